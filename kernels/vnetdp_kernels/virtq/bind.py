"""Checks of the indices of all rings of a device, and their binding, at once, while the rings have no owner."""

from __future__ import annotations

from .. import rows as r
from .. import spec
from ..platform.atomic import Bytes, Words, load_u16_acquire, store_u16
from ..platform.jit import kernel
from .memory import mark_dirty, translate


@kernel
def bind(mem: Bytes, vqs: Words, eps: Words, log: Bytes, bases: Words) -> None:
    """Let translated rings be served from now on. bases int64[k, 2]: row n of vqs, which belongs to endpoint row n // 2,
    and the ring's next avail index, a u16.

    The owner before may have left a decision about a call open: it is made anew (VQ_CALL_DUE).
    """
    for k in range(bases.shape[0]):
        n = bases[k, 0]
        vq = vqs[n]
        if not vq[r.VQ_EVENT_IDX]:
            store_u16(mem, vq[r.VQ_USED], 0)
        if log.size > 0 and vq[r.VQ_LOG_USED] >= 0:
            # All of the used ring: the owner before may have been killed between a write and its dirty mark.
            mark_dirty(log, vq[r.VQ_LOG_USED], spec.VIRTQ_RING_ENTRIES + spec.VIRTQ_USED_ELEM_SIZE * vq[r.VQ_NUM] + 2)
        vq[r.VQ_LAST_USED_IDX] = load_u16_acquire(mem, vq[r.VQ_USED] + spec.VIRTQ_RING_IDX)
        vq[r.VQ_LAST_AVAIL_IDX] = bases[k, 1]
        vq[r.VQ_AVAIL_IDX] = bases[k, 1]
        vq[r.VQ_SIGNALLED_USED_VALID] = 0
        vq[r.VQ_CALL_DUE] = 1
        vq[r.VQ_KICKS_ON] = 1
        vq[r.VQ_STATUS] = 0
        eps[n // 2, r.EP_GONE] = 0
        vq[r.VQ_BOUND] = 1


RING_OUTSIDE = 3  # a part of a ring is not wholly inside guest memory
RING_APART = 2  # last_avail_idx and used.idx are further apart than the ring is long
RING_MOVED = 1  # avail.idx is further ahead than that: the driver's own doing


@kernel
def check_rings(mem: Bytes, regions: Words, rings: Words) -> tuple[int, int]:
    """Hold the index of each ring against guest memory, as virtio_load does; return (0 or RING_*, ring).

    rings int64[k, 6]: enabled, size, addresses of desc, avail and used, next avail index, each such as a device can have.
    The first ring that is outside or apart counts; only without one a ring that was moved.
    """
    found, which = 0, 0
    for n in range(rings.shape[0]):
        num, last = rings[n, 1], rings[n, 5]
        if not rings[n, 0]:
            continue
        desc = translate(regions, rings[n, 2], spec.VIRTQ_DESC_SIZE * num)
        avail = translate(regions, rings[n, 3], spec.VIRTQ_RING_ENTRIES + 2 * num + 2)
        used = translate(regions, rings[n, 4], spec.VIRTQ_RING_ENTRIES + spec.VIRTQ_USED_ELEM_SIZE * num + 2)
        if desc < 0 or avail < 0 or used < 0:
            return RING_OUTSIDE, n
        if (last - load_u16_acquire(mem, used + spec.VIRTQ_RING_IDX)) & 0xFFFF > num:
            return RING_APART, n
        if (load_u16_acquire(mem, avail + spec.VIRTQ_RING_IDX) - last) & 0xFFFF > num and not found:
            found, which = RING_MOVED, n
    return found, which
