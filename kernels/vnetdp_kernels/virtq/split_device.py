"""The split virtqueue (Virtio 1.2, 2.7), the device's side; the driver's is in `split_driver`.

`available`, `head_at`, `gather`, then `put_used`, `publish_used`, `needs_call`; before sleeping, `enable_kicks`. Indices
run free over u16. The state of either side is a row of named slots (`rows.VQ_*`, `rows.DVQ_*`); a value in shared
memory is read once, checked, and used.

Barriers, by name: A = driver publishes available entries, device acquires them. B = device publishes used entries,
driver acquires them. C = device enables kicks, then looks at avail.idx; driver publishes, then looks at avail_event.
D = driver enables calls, then looks at used.idx; device publishes, then looks at used_event.
"""

from __future__ import annotations

from .. import rows as r
from .. import spec
from ..platform.atomic import (
    Bytes,
    Words,
    fence,
    load_u16,
    load_u16_acquire,
    load_u32,
    load_u64_unaligned,
    store_u16,
    store_u16_release,
    store_u32,
)
from ..platform.jit import inlined
from .memory import mark_behind_fence, mark_dirty, mark_noted, prefetch_write, translate


@inlined
def available(mem: Bytes, vq: Words) -> int:
    """Return how many chains the driver has made available and we have not taken, or E_AVAIL_IDX.

    Reads the driver's avail.idx only when the known chains are used up.
    """
    known = (vq[r.VQ_AVAIL_IDX] - vq[r.VQ_LAST_AVAIL_IDX]) & 0xFFFF
    if known:
        return int(known)
    # Barrier A: pairs with the release in publish_available; entries and descriptors are read after it.
    idx = load_u16_acquire(mem, vq[r.VQ_AVAIL] + spec.VIRTQ_RING_IDX)
    n = (idx - vq[r.VQ_LAST_AVAIL_IDX]) & 0xFFFF
    if n > vq[r.VQ_NUM]:
        return r.E_AVAIL_IDX
    vq[r.VQ_AVAIL_IDX] = idx
    return int(n)


@inlined
def known_available(vq: Words) -> int:
    """Return how many available chains we know of and have not taken, without a look at the ring."""
    return (vq[r.VQ_AVAIL_IDX] - vq[r.VQ_LAST_AVAIL_IDX]) & 0xFFFF


@inlined
def refresh(mem: Bytes, vq: Words) -> int:
    """`available`, with a fresh look at avail.idx in any case. An index that went back is E_AVAIL_IDX too."""
    idx = vq[r.VQ_AVAIL_IDX]
    known = (idx - vq[r.VQ_LAST_AVAIL_IDX]) & 0xFFFF
    vq[r.VQ_AVAIL_IDX] = vq[r.VQ_LAST_AVAIL_IDX]
    n = int(available(mem, vq))
    if n < known:
        vq[r.VQ_AVAIL_IDX] = idx
        return r.E_AVAIL_IDX
    return n


@inlined
def head_at(mem: Bytes, vq: Words, ahead: int) -> int:
    """Return the head of the chain *ahead* of the next one to take, or E_HEAD. Only below `available`."""
    slot = (vq[r.VQ_LAST_AVAIL_IDX] + ahead) & (vq[r.VQ_NUM] - 1)
    head = load_u16(mem, vq[r.VQ_AVAIL] + spec.VIRTQ_RING_ENTRIES + 2 * slot)
    return int(head) if head < vq[r.VQ_NUM] else r.E_HEAD


@inlined
def gather(mem: Bytes, regions: Words, vq: Words, head: int, iov: Words) -> tuple[int, int, int, int]:
    """Walk one chain into *iov*; return (readable, writable) rows and bytes, or (E_*, 0, 0, 0).

    iov int64[cap, 3] (window offset, length, guest address); readable rows come first. Handles direct chains,
    indirect tables at any address, and direct descriptors followed by an indirect one (2.7.5.3).
    The bytes are counted here and not by the caller: a loop over the rows would be made into vectors, whose constants
    spill to the stack in every caller, and no store of 64 bytes is forwarded to its load there.
    """
    table = vq[r.VQ_DESC]
    table_len = vq[r.VQ_NUM]
    left = table_len
    indirect = False
    i = head
    n_out = 0
    n_in = 0
    total = 0
    len_in = 0
    while True:
        at = table + spec.VIRTQ_DESC_SIZE * i
        gpa = load_u64_unaligned(mem, at)
        word = load_u64_unaligned(mem, at + 8)
        length = word & 0xFFFFFFFF
        flags = (word >> 32) & 0xFFFF
        if flags & spec.VIRTQ_DESC_F_INDIRECT:
            if indirect:
                return r.E_INDIRECT_NESTED, 0, 0, 0
            if not vq[r.VQ_INDIRECT]:
                return r.E_INDIRECT_FEATURE, 0, 0, 0
            if flags & spec.VIRTQ_DESC_F_NEXT:
                return r.E_INDIRECT_NEXT, 0, 0, 0
            if length == 0 or length & (spec.VIRTQ_DESC_SIZE - 1) or length > spec.VIRTQ_DESC_SIZE * iov.shape[0]:
                return r.E_INDIRECT_LEN, 0, 0, 0
            table = translate(regions, gpa, length)
            if table < 0:
                return r.E_ADDRESS, 0, 0, 0
            table_len = length // spec.VIRTQ_DESC_SIZE
            left = table_len
            indirect = True
            i = 0
            continue
        if length == 0:
            return r.E_ZERO_LEN, 0, 0, 0
        offset = translate(regions, gpa, length)
        if offset < 0:
            return r.E_ADDRESS, 0, 0, 0
        total += length
        if total > spec.MAX_CHAIN_BYTES:
            return r.E_TOTAL_LEN, 0, 0, 0
        n = n_out + n_in
        if n >= iov.shape[0]:
            return r.E_LOOP, 0, 0, 0
        if flags & spec.VIRTQ_DESC_F_WRITE:
            n_in += 1
            len_in += length
        elif n_in:
            return r.E_ORDER, 0, 0, 0
        else:
            n_out += 1
        iov[n, r.IOV_OFFSET] = offset
        iov[n, r.IOV_LEN] = length
        iov[n, r.IOV_GPA] = gpa
        if not flags & spec.VIRTQ_DESC_F_NEXT:
            return n_out, n_in, total - len_in, len_in
        left -= 1
        if left <= 0:
            return r.E_LOOP, 0, 0, 0
        i = (word >> 48) & 0xFFFF
        if i >= table_len:
            return r.E_NEXT, 0, 0, 0


@inlined
def prefetch_frame(mem: Bytes, regions: Words, vq: Words, ahead: int, length: int) -> None:
    """Have the cache fetch the buffer of a frame of *length* bytes in the chain *ahead* of the next, if it is there.

    The descriptor is read here for an address inside guest memory and nothing else, and read and checked again when the
    chain is taken.
    """
    if ahead >= known_available(vq):
        return
    head = head_at(mem, vq, ahead)
    if head < 0:
        return
    at = vq[r.VQ_DESC] + spec.VIRTQ_DESC_SIZE * head
    length = min(length, load_u64_unaligned(mem, at + 8) & 0xFFFFFFFF)
    offset = translate(regions, load_u64_unaligned(mem, at), length)
    if offset >= 0:
        prefetch_write(mem, offset, length)


@inlined
def put_used(mem: Bytes, vq: Words, ahead: int, head: int, length: int) -> None:
    """Write the used element *ahead* of the next one; the driver sees it after `publish_used`.

    A line that already holds the value is not written again: rings used in order then stay shared in both caches.
    """
    slot = (vq[r.VQ_LAST_USED_IDX] + ahead) & (vq[r.VQ_NUM] - 1)
    at = vq[r.VQ_USED] + spec.VIRTQ_RING_ENTRIES + spec.VIRTQ_USED_ELEM_SIZE * slot
    if load_u32(mem, at) != head:
        store_u32(mem, at, head)
    if load_u32(mem, at + 4) != length:
        store_u32(mem, at + 4, length)


@inlined
def publish_used(mem: Bytes, vq: Words, log: Bytes, n: int) -> None:
    """Make *n* used elements visible to the driver, and take as many available ones off the ring."""
    first = vq[r.VQ_LAST_USED_IDX]
    idx = (first + n) & 0xFFFF
    vq[r.VQ_LAST_USED_IDX] = idx
    vq[r.VQ_LAST_AVAIL_IDX] = (vq[r.VQ_LAST_AVAIL_IDX] + n) & 0xFFFF
    if log.size > 0:
        mark_noted(vq, log)  # first: should this process end here, the next owner writes the unpublished buffers again
    # Barrier B: pairs with the acquire in used_ready.
    store_u16_release(mem, vq[r.VQ_USED] + spec.VIRTQ_RING_IDX, idx)
    if vq[r.VQ_INFLIGHT]:
        store_u16(mem, vq[r.VQ_INFLIGHT] + spec.INFLIGHT_USED_IDX, idx)
    if log.size > 0 and vq[r.VQ_LOG_USED] >= 0:
        num = vq[r.VQ_NUM]
        slot = first & (num - 1)
        before_wrap = min(n, num - slot)
        base = vq[r.VQ_LOG_USED]
        elements = base + spec.VIRTQ_RING_ENTRIES
        # Pairs with the fence in take_dirty, and the exchange before that.
        fence()
        mark_behind_fence(log, base, spec.VIRTQ_RING_ENTRIES)
        mark_behind_fence(log, elements + spec.VIRTQ_USED_ELEM_SIZE * slot, spec.VIRTQ_USED_ELEM_SIZE * before_wrap)
        mark_behind_fence(log, elements, spec.VIRTQ_USED_ELEM_SIZE * (n - before_wrap))


@inlined
def needs_call(mem: Bytes, vq: Words) -> bool:
    """Decide whether the driver wants a notification of the buffers used since the last decision (2.7.7)."""
    # Barrier D: pairs with the fence in enable_calls; used.idx is stored before used_event or flags is loaded.
    fence()
    if not vq[r.VQ_EVENT_IDX]:
        return not load_u16(mem, vq[r.VQ_AVAIL]) & spec.VIRTQ_AVAIL_F_NO_INTERRUPT
    new = vq[r.VQ_LAST_USED_IDX]
    old = vq[r.VQ_SIGNALLED_USED]
    valid = vq[r.VQ_SIGNALLED_USED_VALID]
    vq[r.VQ_SIGNALLED_USED] = new
    vq[r.VQ_SIGNALLED_USED_VALID] = 1
    if not valid:
        return True
    event = load_u16(mem, vq[r.VQ_AVAIL] + spec.VIRTQ_RING_ENTRIES + 2 * vq[r.VQ_NUM])
    return ((new - event - 1) & 0xFFFF) < ((new - old) & 0xFFFF)


@inlined
def enable_kicks(mem: Bytes, vq: Words, log: Bytes) -> bool:
    """Ask the driver to kick; return True if chains came in since avail.idx was last read: look again, do not sleep."""
    vq[r.VQ_KICKS_ON] = 1
    at = vq[r.VQ_USED]
    if vq[r.VQ_EVENT_IDX]:
        at += spec.VIRTQ_RING_ENTRIES + spec.VIRTQ_USED_ELEM_SIZE * vq[r.VQ_NUM]
        store_u16(mem, at, vq[r.VQ_AVAIL_IDX])
    else:
        store_u16(mem, at, 0)
    if log.size > 0 and vq[r.VQ_LOG_USED] >= 0:
        mark_dirty(log, vq[r.VQ_LOG_USED] + at - vq[r.VQ_USED], 2)
    # Barrier C: pairs with the fence in needs_kick.
    fence()
    return load_u16(mem, vq[r.VQ_AVAIL] + spec.VIRTQ_RING_IDX) != vq[r.VQ_AVAIL_IDX]


@inlined
def disable_kicks(mem: Bytes, vq: Words, log: Bytes) -> None:
    """Tell the driver that kicks are not needed. With EVENT_IDX an avail_event left behind says so."""
    if vq[r.VQ_KICKS_ON] and not vq[r.VQ_EVENT_IDX]:
        store_u16(mem, vq[r.VQ_USED], spec.VIRTQ_USED_F_NO_NOTIFY)
        if log.size > 0 and vq[r.VQ_LOG_USED] >= 0:
            mark_dirty(log, vq[r.VQ_LOG_USED], 2)
    vq[r.VQ_KICKS_ON] = 0
