"""What vhost's verbs do to the rows of queues, many at once: a migration binds all rings while nobody serves them."""

from __future__ import annotations

from .atomic import Bytes, Words, load_u16_acquire, store_u16
from .guest import mark_dirty
from .jit import kernel
from .layout import (
    EP_GONE,
    VIRTQ_RING_IDX,
    VQ_AVAIL_IDX,
    VQ_BOUND,
    VQ_CALL_DUE,
    VQ_EVENT_IDX,
    VQ_KICKS_ON,
    VQ_LAST_AVAIL_IDX,
    VQ_LAST_USED_IDX,
    VQ_LOG_USED,
    VQ_SIGNALLED_USED_VALID,
    VQ_STATUS,
    VQ_USED,
)


@kernel
def bind(mem: Bytes, vqs: Words, eps: Words, log: Bytes, bases: Words) -> None:
    """Let translated rings be served from now on. bases int64[k, 2]: row n of vqs, which belongs to endpoint row n // 2,
    and the ring's next avail index, a u16.

    Whoever had a ring before may have left a decision about a call open: it is made anew (VQ_CALL_DUE).
    """
    for k in range(bases.shape[0]):
        n = bases[k, 0]
        vq = vqs[n]
        if not vq[VQ_EVENT_IDX]:
            store_u16(mem, vq[VQ_USED], 0)
            if vq[VQ_LOG_USED] >= 0:
                mark_dirty(log, vq[VQ_LOG_USED], 2)
        vq[VQ_LAST_USED_IDX] = load_u16_acquire(mem, vq[VQ_USED] + VIRTQ_RING_IDX)
        vq[VQ_LAST_AVAIL_IDX] = bases[k, 1]
        vq[VQ_AVAIL_IDX] = bases[k, 1]
        vq[VQ_SIGNALLED_USED_VALID] = 0
        vq[VQ_CALL_DUE] = 1
        vq[VQ_KICKS_ON] = 1
        vq[VQ_STATUS] = 0
        eps[n // 2, EP_GONE] = 0
        vq[VQ_BOUND] = 1
