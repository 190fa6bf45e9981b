"""The split virtqueue (Virtio 1.2, 2.7), the driver's side; the device's, and the names of the barriers, are in `split`.

`put_single` or `put_chain`, `publish_available`, `needs_kick`; then `take_used`, `release`; before sleeping, `enable_calls`.
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
    store_u64_unaligned,
)
from ..platform.jit import inlined, kernel


@kernel
def reset_driver(dvq: Words, state: Words) -> None:
    """Put all descriptors on the free list, in ring order; indices go to zero (the ring's memory is the caller's)."""
    num = dvq[r.DVQ_NUM]
    for i in range(num):
        state[i, r.DS_NEXT] = i + 1
        state[i, r.DS_N_DESC] = 0
    dvq[r.DVQ_FREE_HEAD] = 0
    dvq[r.DVQ_FREE_TAIL] = num - 1
    dvq[r.DVQ_NUM_FREE] = num
    dvq[r.DVQ_AVAIL_IDX] = 0
    dvq[r.DVQ_PUBLISHED_IDX] = 0
    dvq[r.DVQ_KICKED_IDX] = 0
    dvq[r.DVQ_LAST_USED_IDX] = 0
    dvq[r.DVQ_USED_IDX] = 0
    dvq[r.DVQ_ORDER_HEAD] = 0
    dvq[r.DVQ_BATCH_ID] = -1
    dvq[r.DVQ_IN_FLIGHT] = 0
    dvq[r.DVQ_STATUS] = 0


@inlined
def _write_desc(mem: Bytes, at: int, gpa: int, word: int) -> None:
    # As in put_used: an unchanged descriptor is left alone, and its line stays shared.
    if load_u64_unaligned(mem, at) != gpa:
        store_u64_unaligned(mem, at, gpa)
    if load_u64_unaligned(mem, at + 8) != word:
        store_u64_unaligned(mem, at + 8, word)


@inlined
def _put_avail(mem: Bytes, dvq: Words, state: Words, head: int, n_desc: int, len_in: int, token: int) -> None:
    state[head, r.DS_N_DESC] = n_desc
    state[head, r.DS_LEN_IN] = len_in
    state[head, r.DS_TOKEN] = token
    slot = dvq[r.DVQ_AVAIL_IDX] & (dvq[r.DVQ_NUM] - 1)
    at = dvq[r.DVQ_AVAIL] + spec.VIRTQ_RING_ENTRIES + 2 * slot
    if load_u16(mem, at) != head:
        store_u16(mem, at, head)
    dvq[r.DVQ_AVAIL_IDX] = (dvq[r.DVQ_AVAIL_IDX] + 1) & 0xFFFF
    dvq[r.DVQ_IN_FLIGHT] += 1


@inlined
def put_single(mem: Bytes, dvq: Words, state: Words, gpa: int, length: int, writable: int, token: int) -> int:
    """Make one buffer available in one descriptor; return its head, or E_FULL."""
    if dvq[r.DVQ_NUM_FREE] == 0:
        return r.E_FULL
    head = int(dvq[r.DVQ_FREE_HEAD])
    dvq[r.DVQ_FREE_HEAD] = state[head, r.DS_NEXT]
    dvq[r.DVQ_NUM_FREE] -= 1
    flags = spec.VIRTQ_DESC_F_WRITE if writable else 0
    _write_desc(mem, dvq[r.DVQ_DESC] + spec.VIRTQ_DESC_SIZE * head, gpa, length | flags << 32)
    _put_avail(mem, dvq, state, head, 1, length if writable else 0, token)
    return head


@kernel
def put_chain(
    mem: Bytes,
    dvq: Words,
    state: Words,
    iov: Words,
    n_out: int,
    n_direct: int,
    table: Words,
    token: int,
) -> int:
    """Make a chain available, *n_out* readable buffers before the writable ones; return its head, or E_FULL.

    iov int64[n, 3] as in `gather`: all buffers. The first *n_direct* go into the ring's own descriptors; the rest, if
    any, into an indirect table at *table* (int64[2]: window offset, guest address), 16 bytes each, any alignment.
    """
    n = iov.shape[0]
    n_desc = n_direct + (1 if n_direct < n else 0)
    if n_desc > dvq[r.DVQ_NUM_FREE]:
        return r.E_FULL
    head = int(dvq[r.DVQ_FREE_HEAD])
    at = head
    len_in = 0
    for k in range(n):
        flags = spec.VIRTQ_DESC_F_WRITE if k >= n_out else 0
        if k >= n_out:
            len_in += iov[k, r.IOV_LEN]
        if k < n_direct:
            following = state[at, r.DS_NEXT]
            word = iov[k, r.IOV_LEN] | flags << 32
            if k + 1 < n_desc:
                word |= spec.VIRTQ_DESC_F_NEXT << 32 | following << 48
            _write_desc(mem, dvq[r.DVQ_DESC] + spec.VIRTQ_DESC_SIZE * at, iov[k, r.IOV_GPA], word)
            at = following
        else:
            entry = k - n_direct
            word = iov[k, r.IOV_LEN] | flags << 32
            if k + 1 < n:
                word |= spec.VIRTQ_DESC_F_NEXT << 32 | (entry + 1) << 48
            store_u64_unaligned(mem, table[0] + spec.VIRTQ_DESC_SIZE * entry, iov[k, r.IOV_GPA])
            store_u64_unaligned(mem, table[0] + spec.VIRTQ_DESC_SIZE * entry + 8, word)
    if n_direct < n:
        length = spec.VIRTQ_DESC_SIZE * (n - n_direct)
        _write_desc(
            mem, dvq[r.DVQ_DESC] + spec.VIRTQ_DESC_SIZE * at, table[1], length | spec.VIRTQ_DESC_F_INDIRECT << 32
        )
        at = state[at, r.DS_NEXT]
    dvq[r.DVQ_FREE_HEAD] = at
    dvq[r.DVQ_NUM_FREE] -= n_desc
    _put_avail(mem, dvq, state, head, n_desc, len_in, token)
    return head


@inlined
def publish_available(mem: Bytes, dvq: Words) -> None:
    """Make all chains put so far visible to the device."""
    dvq[r.DVQ_PUBLISHED_IDX] = dvq[r.DVQ_AVAIL_IDX]
    # Barrier A: pairs with the acquire in available.
    store_u16_release(mem, dvq[r.DVQ_AVAIL] + spec.VIRTQ_RING_IDX, dvq[r.DVQ_AVAIL_IDX])


@inlined
def needs_kick(mem: Bytes, dvq: Words) -> bool:
    """Decide whether the device wants a notification of the buffers made available since the last decision (2.7.10)."""
    new = dvq[r.DVQ_PUBLISHED_IDX]
    old = dvq[r.DVQ_KICKED_IDX]
    if new == old:
        return False
    dvq[r.DVQ_KICKED_IDX] = new
    # Barrier C: pairs with the fence in enable_kicks.
    fence()
    if not dvq[r.DVQ_EVENT_IDX]:
        return not load_u16(mem, dvq[r.DVQ_USED]) & spec.VIRTQ_USED_F_NO_NOTIFY
    event = load_u16(mem, dvq[r.DVQ_USED] + spec.VIRTQ_RING_ENTRIES + spec.VIRTQ_USED_ELEM_SIZE * dvq[r.DVQ_NUM])
    return ((new - event - 1) & 0xFFFF) < ((new - old) & 0xFFFF)


@inlined
def used_ready(mem: Bytes, dvq: Words) -> int:
    """Return how many used chains wait to be taken, or E_USED_IDX."""
    known = (dvq[r.DVQ_USED_IDX] - dvq[r.DVQ_LAST_USED_IDX]) & 0xFFFF
    if known:
        return int(known)
    # Barrier B: pairs with the release in publish_used.
    idx = load_u16_acquire(mem, dvq[r.DVQ_USED] + spec.VIRTQ_RING_IDX)
    n = (idx - dvq[r.DVQ_LAST_USED_IDX]) & 0xFFFF
    if n > dvq[r.DVQ_IN_FLIGHT]:
        return r.E_USED_IDX
    dvq[r.DVQ_USED_IDX] = idx
    return int(n)


@inlined
def refresh_used(mem: Bytes, dvq: Words) -> int:
    """`used_ready`, with a fresh look at used.idx in any case."""
    dvq[r.DVQ_USED_IDX] = dvq[r.DVQ_LAST_USED_IDX]
    return int(used_ready(mem, dvq))


@inlined
def take_used(mem: Bytes, dvq: Words, state: Words) -> tuple[int, int]:
    """Take the next used chain off the ring: (head, bytes written), or (E_*, 0). Only if `used_ready` said so.

    Its descriptors are still the caller's to read in *state*; `release` puts them on the free list. With IN_ORDER one
    element may stand for all chains up to its id (2.7.9): those before it count as written in full.
    """
    num = dvq[r.DVQ_NUM]
    if dvq[r.DVQ_BATCH_ID] >= 0:
        head = dvq[r.DVQ_BATCH_ID]
        length = dvq[r.DVQ_BATCH_LEN]
    else:
        slot = dvq[r.DVQ_LAST_USED_IDX] & (num - 1)
        at = dvq[r.DVQ_USED] + spec.VIRTQ_RING_ENTRIES + spec.VIRTQ_USED_ELEM_SIZE * slot
        head = load_u32(mem, at)
        length = load_u32(mem, at + 4)
    if head >= num or state[head, r.DS_N_DESC] == 0:
        return r.E_USED_ID, 0
    if dvq[r.DVQ_IN_ORDER]:
        oldest = dvq[r.DVQ_ORDER_HEAD]
        if head != oldest:
            if ((dvq[r.DVQ_USED_IDX] - dvq[r.DVQ_LAST_USED_IDX]) & 0xFFFF) < 2:
                return r.E_USED_ID, 0
            dvq[r.DVQ_BATCH_ID] = head
            dvq[r.DVQ_BATCH_LEN] = length
            head = oldest
            length = state[head, r.DS_LEN_IN]
        else:
            dvq[r.DVQ_BATCH_ID] = -1
        dvq[r.DVQ_ORDER_HEAD] = (head + state[head, r.DS_N_DESC]) & (num - 1)
    if length > state[head, r.DS_LEN_IN]:
        return r.E_USED_LEN, 0
    dvq[r.DVQ_LAST_USED_IDX] = (dvq[r.DVQ_LAST_USED_IDX] + 1) & 0xFFFF
    dvq[r.DVQ_IN_FLIGHT] -= 1
    return int(head), int(length)


@inlined
def release(dvq: Words, state: Words, head: int) -> None:
    """Give the descriptors of a chain that was taken back to the free list, at its end (rings stay in order)."""
    n_desc = state[head, r.DS_N_DESC]
    state[head, r.DS_N_DESC] = 0
    if dvq[r.DVQ_NUM_FREE] == 0:
        dvq[r.DVQ_FREE_HEAD] = head
    else:
        state[dvq[r.DVQ_FREE_TAIL], r.DS_NEXT] = head
    tail = head
    for _ in range(n_desc - 1):
        tail = state[tail, r.DS_NEXT]
    dvq[r.DVQ_FREE_TAIL] = tail
    dvq[r.DVQ_NUM_FREE] += n_desc


@inlined
def enable_calls(mem: Bytes, dvq: Words) -> bool:
    """Ask the device to call; return True if chains were used meanwhile, so look again and do not sleep."""
    dvq[r.DVQ_CALLS_ON] = 1
    if dvq[r.DVQ_EVENT_IDX]:
        store_u16(mem, dvq[r.DVQ_AVAIL] + spec.VIRTQ_RING_ENTRIES + 2 * dvq[r.DVQ_NUM], dvq[r.DVQ_LAST_USED_IDX])
    else:
        store_u16(mem, dvq[r.DVQ_AVAIL], 0)
    # Barrier D: pairs with the fence in needs_call.
    fence()
    return load_u16(mem, dvq[r.DVQ_USED] + spec.VIRTQ_RING_IDX) != dvq[r.DVQ_LAST_USED_IDX]


@inlined
def disable_calls(mem: Bytes, dvq: Words) -> None:
    """Tell the device that calls are not needed. With EVENT_IDX a used_event left behind says so."""
    if dvq[r.DVQ_CALLS_ON] and not dvq[r.DVQ_EVENT_IDX]:
        store_u16(mem, dvq[r.DVQ_AVAIL], spec.VIRTQ_AVAIL_F_NO_INTERRUPT)
    dvq[r.DVQ_CALLS_ON] = 0
