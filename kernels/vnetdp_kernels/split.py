"""The split virtqueue (Virtio 1.2, 2.7), both sides.

Device side: `available`, `head_at`, `gather`, then `put_used`, `publish_used`, `needs_call`; before sleeping,
`enable_kicks`. Driver side: `put_single` or `put_chain`, `publish_available`, `needs_kick`; then `take_used`; before
sleeping, `enable_calls`. Indices run free over u16. The state of either side is a row of named slots
(`layout.VQ_*`, `layout.DVQ_*`); what lies in shared memory is read once, checked, and used.

Barriers, by name: A = driver publishes available entries, device acquires them. B = device publishes used entries,
driver acquires them. C = device enables kicks, then looks at avail.idx; driver publishes, then looks at avail_event.
D = driver enables calls, then looks at used.idx; device publishes, then looks at used_event.
"""

from __future__ import annotations

from .atomic import (
    Bytes,
    Words,
    fence,
    load_u16,
    load_u16_acquire,
    load_u32,
    load_u64_unaligned,
    prefetch_to_write,
    store_u16,
    store_u16_release,
    store_u32,
    store_u64_unaligned,
)
from .guest import mark_behind_fence, mark_dirty, mark_noted, translate
from .jit import inlined, kernel
from .layout import (
    CACHE_LINE,
    DS_LEN_IN,
    DS_N_DESC,
    DS_NEXT,
    DS_TOKEN,
    DVQ_AVAIL,
    DVQ_AVAIL_IDX,
    DVQ_BATCH_ID,
    DVQ_BATCH_LEN,
    DVQ_CALLS_ON,
    DVQ_DESC,
    DVQ_EVENT_IDX,
    DVQ_FREE_HEAD,
    DVQ_FREE_TAIL,
    DVQ_IN_FLIGHT,
    DVQ_IN_ORDER,
    DVQ_KICKED_IDX,
    DVQ_LAST_USED_IDX,
    DVQ_NUM,
    DVQ_NUM_FREE,
    DVQ_ORDER_HEAD,
    DVQ_PUBLISHED_IDX,
    DVQ_STATUS,
    DVQ_USED,
    DVQ_USED_IDX,
    E_ADDRESS,
    E_AVAIL_IDX,
    E_FULL,
    E_HEAD,
    E_INDIRECT_FEATURE,
    E_INDIRECT_LEN,
    E_INDIRECT_NESTED,
    E_INDIRECT_NEXT,
    E_LOOP,
    E_NEXT,
    E_ORDER,
    E_TOTAL_LEN,
    E_USED_ID,
    E_USED_IDX,
    E_USED_LEN,
    E_ZERO_LEN,
    INFLIGHT_USED_IDX,
    IOV_GPA,
    IOV_LEN,
    IOV_OFFSET,
    MAX_CHAIN_BYTES,
    VIRTQ_AVAIL_F_NO_INTERRUPT,
    VIRTQ_DESC_F_INDIRECT,
    VIRTQ_DESC_F_NEXT,
    VIRTQ_DESC_F_WRITE,
    VIRTQ_DESC_SIZE,
    VIRTQ_RING_ENTRIES,
    VIRTQ_RING_IDX,
    VIRTQ_USED_ELEM_SIZE,
    VIRTQ_USED_F_NO_NOTIFY,
    VQ_AVAIL,
    VQ_AVAIL_IDX,
    VQ_DESC,
    VQ_EVENT_IDX,
    VQ_INDIRECT,
    VQ_INFLIGHT,
    VQ_KICKS_ON,
    VQ_LAST_AVAIL_IDX,
    VQ_LAST_USED_IDX,
    VQ_LOG_USED,
    VQ_NUM,
    VQ_SIGNALLED_USED,
    VQ_SIGNALLED_USED_VALID,
    VQ_USED,
)

# --- device side ---


@inlined
def available(mem: Bytes, vq: Words) -> int:
    """Return how many chains the driver has made available and we have not taken, or E_AVAIL_IDX.

    Reads the driver's avail.idx only when what was known is used up.
    """
    known = (vq[VQ_AVAIL_IDX] - vq[VQ_LAST_AVAIL_IDX]) & 0xFFFF
    if known:
        return int(known)
    # Barrier A: pairs with the release in publish_available; entries and descriptors are read after it.
    idx = load_u16_acquire(mem, vq[VQ_AVAIL] + VIRTQ_RING_IDX)
    n = (idx - vq[VQ_LAST_AVAIL_IDX]) & 0xFFFF
    if n > vq[VQ_NUM]:
        return E_AVAIL_IDX
    vq[VQ_AVAIL_IDX] = idx
    return int(n)


@inlined
def known_available(vq: Words) -> int:
    """Return how many available chains we know of and have not taken, without a look at the ring."""
    return (vq[VQ_AVAIL_IDX] - vq[VQ_LAST_AVAIL_IDX]) & 0xFFFF


@inlined
def refresh(mem: Bytes, vq: Words) -> int:
    """`available`, with a fresh look at avail.idx whatever is known. An index that went back is E_AVAIL_IDX too."""
    idx = vq[VQ_AVAIL_IDX]
    known = (idx - vq[VQ_LAST_AVAIL_IDX]) & 0xFFFF
    vq[VQ_AVAIL_IDX] = vq[VQ_LAST_AVAIL_IDX]
    n = int(available(mem, vq))
    if n < known:
        vq[VQ_AVAIL_IDX] = idx
        return E_AVAIL_IDX
    return n


@inlined
def head_at(mem: Bytes, vq: Words, ahead: int) -> int:
    """Return the head of the chain *ahead* of the next one to take, or E_HEAD. Only below `available`."""
    slot = (vq[VQ_LAST_AVAIL_IDX] + ahead) & (vq[VQ_NUM] - 1)
    head = load_u16(mem, vq[VQ_AVAIL] + VIRTQ_RING_ENTRIES + 2 * slot)
    return int(head) if head < vq[VQ_NUM] else E_HEAD


@inlined
def gather(mem: Bytes, regions: Words, vq: Words, head: int, iov: Words) -> tuple[int, int, int, int]:
    """Walk one chain into *iov*; return (readable, writable) rows and bytes, or (E_*, 0, 0, 0).

    iov int64[cap, 3] (window offset, length, guest address); readable rows come first. Handles direct chains,
    indirect tables at any address, and direct descriptors followed by an indirect one (2.7.5.3).
    The bytes are counted here and not by who wants them: a loop over the rows would be made into vectors, whose constants
    spill to the stack in every caller, and no store of 64 bytes is forwarded to its load there.
    """
    table = vq[VQ_DESC]
    table_len = vq[VQ_NUM]
    left = table_len
    indirect = False
    i = head
    n_out = 0
    n_in = 0
    total = 0
    len_in = 0
    while True:
        at = table + VIRTQ_DESC_SIZE * i
        gpa = load_u64_unaligned(mem, at)
        word = load_u64_unaligned(mem, at + 8)
        length = word & 0xFFFFFFFF
        flags = (word >> 32) & 0xFFFF
        if flags & VIRTQ_DESC_F_INDIRECT:
            if indirect:
                return E_INDIRECT_NESTED, 0, 0, 0
            if not vq[VQ_INDIRECT]:
                return E_INDIRECT_FEATURE, 0, 0, 0
            if flags & VIRTQ_DESC_F_NEXT:
                return E_INDIRECT_NEXT, 0, 0, 0
            if length == 0 or length & (VIRTQ_DESC_SIZE - 1) or length > VIRTQ_DESC_SIZE * iov.shape[0]:
                return E_INDIRECT_LEN, 0, 0, 0
            table = translate(regions, gpa, length)
            if table < 0:
                return E_ADDRESS, 0, 0, 0
            table_len = length // VIRTQ_DESC_SIZE
            left = table_len
            indirect = True
            i = 0
            continue
        if length == 0:
            return E_ZERO_LEN, 0, 0, 0
        offset = translate(regions, gpa, length)
        if offset < 0:
            return E_ADDRESS, 0, 0, 0
        total += length
        if total > MAX_CHAIN_BYTES:
            return E_TOTAL_LEN, 0, 0, 0
        n = n_out + n_in
        if n >= iov.shape[0]:
            return E_LOOP, 0, 0, 0
        if flags & VIRTQ_DESC_F_WRITE:
            n_in += 1
            len_in += length
        elif n_in:
            return E_ORDER, 0, 0, 0
        else:
            n_out += 1
        iov[n, IOV_OFFSET] = offset
        iov[n, IOV_LEN] = length
        iov[n, IOV_GPA] = gpa
        if not flags & VIRTQ_DESC_F_NEXT:
            return n_out, n_in, total - len_in, len_in
        left -= 1
        if left <= 0:
            return E_LOOP, 0, 0, 0
        i = (word >> 48) & 0xFFFF
        if i >= table_len:
            return E_NEXT, 0, 0, 0


@inlined
def expect_write(mem: Bytes, regions: Words, vq: Words, ahead: int, length: int) -> None:
    """Have the cache fetch the first *length* bytes of the chain *ahead* of the next one, if it is there: to be written.

    A hint, a frame ahead: stores wait for their lines one after another. What the driver wrote is read here for an
    address inside guest memory and nothing else, and read and checked again by whoever takes the chain.
    """
    if ahead >= known_available(vq):
        return
    head = head_at(mem, vq, ahead)
    if head < 0:
        return
    at = vq[VQ_DESC] + VIRTQ_DESC_SIZE * head
    length = min(length, load_u64_unaligned(mem, at + 8) & 0xFFFFFFFF)
    offset = translate(regions, load_u64_unaligned(mem, at), length)
    if offset >= 0:
        end = offset + length
        while offset < end:
            prefetch_to_write(mem, offset)
            offset += CACHE_LINE


@inlined
def put_used(mem: Bytes, vq: Words, ahead: int, head: int, length: int) -> None:
    """Write the used element *ahead* of the next one; the driver sees it after `publish_used`.

    A line that already holds the value is not written again: rings used in order then stay shared in both caches.
    """
    slot = (vq[VQ_LAST_USED_IDX] + ahead) & (vq[VQ_NUM] - 1)
    at = vq[VQ_USED] + VIRTQ_RING_ENTRIES + VIRTQ_USED_ELEM_SIZE * slot
    if load_u32(mem, at) != head:
        store_u32(mem, at, head)
    if load_u32(mem, at + 4) != length:
        store_u32(mem, at + 4, length)


@inlined
def publish_used(mem: Bytes, vq: Words, log: Bytes, n: int) -> None:
    """Make *n* used elements visible to the driver, and take as many available ones off the ring."""
    first = vq[VQ_LAST_USED_IDX]
    idx = (first + n) & 0xFFFF
    vq[VQ_LAST_USED_IDX] = idx
    vq[VQ_LAST_AVAIL_IDX] = (vq[VQ_LAST_AVAIL_IDX] + n) & 0xFFFF
    if log.size > 0:
        mark_noted(vq, log)  # first: should this process end here, the next owner writes what was not published again
    # Barrier B: pairs with the acquire in take_used.
    store_u16_release(mem, vq[VQ_USED] + VIRTQ_RING_IDX, idx)
    if vq[VQ_INFLIGHT]:
        store_u16(mem, vq[VQ_INFLIGHT] + INFLIGHT_USED_IDX, idx)
    if log.size > 0 and vq[VQ_LOG_USED] >= 0:
        num = vq[VQ_NUM]
        slot = first & (num - 1)
        before_wrap = min(n, num - slot)
        base = vq[VQ_LOG_USED]
        elements = base + VIRTQ_RING_ENTRIES
        # Pairs with the exchange in take_dirty.
        fence()
        mark_behind_fence(log, base, VIRTQ_RING_ENTRIES)
        mark_behind_fence(log, elements + VIRTQ_USED_ELEM_SIZE * slot, VIRTQ_USED_ELEM_SIZE * before_wrap)
        mark_behind_fence(log, elements, VIRTQ_USED_ELEM_SIZE * (n - before_wrap))


@inlined
def needs_call(mem: Bytes, vq: Words) -> bool:
    """Decide whether the driver wants to hear of what was published since the last decision (2.7.7)."""
    # Barrier D: pairs with the fence in enable_calls; used.idx is stored before used_event or flags is loaded.
    fence()
    if not vq[VQ_EVENT_IDX]:
        return not load_u16(mem, vq[VQ_AVAIL]) & VIRTQ_AVAIL_F_NO_INTERRUPT
    new = vq[VQ_LAST_USED_IDX]
    old = vq[VQ_SIGNALLED_USED]
    valid = vq[VQ_SIGNALLED_USED_VALID]
    vq[VQ_SIGNALLED_USED] = new
    vq[VQ_SIGNALLED_USED_VALID] = 1
    if not valid:
        return True
    event = load_u16(mem, vq[VQ_AVAIL] + VIRTQ_RING_ENTRIES + 2 * vq[VQ_NUM])
    return ((new - event - 1) & 0xFFFF) < ((new - old) & 0xFFFF)


@inlined
def enable_kicks(mem: Bytes, vq: Words, log: Bytes) -> bool:
    """Ask the driver to kick; return True if chains came in since avail.idx was last read: look again, do not sleep."""
    vq[VQ_KICKS_ON] = 1
    at = vq[VQ_USED]
    if vq[VQ_EVENT_IDX]:
        at += VIRTQ_RING_ENTRIES + VIRTQ_USED_ELEM_SIZE * vq[VQ_NUM]
        store_u16(mem, at, vq[VQ_AVAIL_IDX])
    else:
        store_u16(mem, at, 0)
    if log.size > 0 and vq[VQ_LOG_USED] >= 0:
        mark_dirty(log, vq[VQ_LOG_USED] + at - vq[VQ_USED], 2)
    # Barrier C: pairs with the fence in needs_kick.
    fence()
    return load_u16(mem, vq[VQ_AVAIL] + VIRTQ_RING_IDX) != vq[VQ_AVAIL_IDX]


@inlined
def disable_kicks(mem: Bytes, vq: Words, log: Bytes) -> None:
    """Tell the driver that kicks are not needed. With EVENT_IDX an avail_event left behind says so."""
    if vq[VQ_KICKS_ON] and not vq[VQ_EVENT_IDX]:
        store_u16(mem, vq[VQ_USED], VIRTQ_USED_F_NO_NOTIFY)
        if log.size > 0 and vq[VQ_LOG_USED] >= 0:
            mark_dirty(log, vq[VQ_LOG_USED], 2)
    vq[VQ_KICKS_ON] = 0


# --- driver side ---


@kernel
def reset_driver(dvq: Words, state: Words) -> None:
    """Put all descriptors on the free list, in ring order; indices go to zero (the ring's memory is the caller's)."""
    num = dvq[DVQ_NUM]
    for i in range(num):
        state[i, DS_NEXT] = i + 1
        state[i, DS_N_DESC] = 0
    dvq[DVQ_FREE_HEAD] = 0
    dvq[DVQ_FREE_TAIL] = num - 1
    dvq[DVQ_NUM_FREE] = num
    dvq[DVQ_AVAIL_IDX] = 0
    dvq[DVQ_PUBLISHED_IDX] = 0
    dvq[DVQ_KICKED_IDX] = 0
    dvq[DVQ_LAST_USED_IDX] = 0
    dvq[DVQ_USED_IDX] = 0
    dvq[DVQ_ORDER_HEAD] = 0
    dvq[DVQ_BATCH_ID] = -1
    dvq[DVQ_IN_FLIGHT] = 0
    dvq[DVQ_STATUS] = 0


@inlined
def _write_desc(mem: Bytes, at: int, gpa: int, word: int) -> None:
    # As in put_used: an unchanged descriptor is left alone, and its line stays shared.
    if load_u64_unaligned(mem, at) != gpa:
        store_u64_unaligned(mem, at, gpa)
    if load_u64_unaligned(mem, at + 8) != word:
        store_u64_unaligned(mem, at + 8, word)


@inlined
def _put_avail(mem: Bytes, dvq: Words, state: Words, head: int, n_desc: int, len_in: int, token: int) -> None:
    state[head, DS_N_DESC] = n_desc
    state[head, DS_LEN_IN] = len_in
    state[head, DS_TOKEN] = token
    slot = dvq[DVQ_AVAIL_IDX] & (dvq[DVQ_NUM] - 1)
    at = dvq[DVQ_AVAIL] + VIRTQ_RING_ENTRIES + 2 * slot
    if load_u16(mem, at) != head:
        store_u16(mem, at, head)
    dvq[DVQ_AVAIL_IDX] = (dvq[DVQ_AVAIL_IDX] + 1) & 0xFFFF
    dvq[DVQ_IN_FLIGHT] += 1


@inlined
def put_single(mem: Bytes, dvq: Words, state: Words, gpa: int, length: int, writable: int, token: int) -> int:
    """Make one buffer available in one descriptor; return its head, or E_FULL."""
    if dvq[DVQ_NUM_FREE] == 0:
        return E_FULL
    head = int(dvq[DVQ_FREE_HEAD])
    dvq[DVQ_FREE_HEAD] = state[head, DS_NEXT]
    dvq[DVQ_NUM_FREE] -= 1
    flags = VIRTQ_DESC_F_WRITE if writable else 0
    _write_desc(mem, dvq[DVQ_DESC] + VIRTQ_DESC_SIZE * head, gpa, length | flags << 32)
    _put_avail(mem, dvq, state, head, 1, length if writable else 0, token)
    return head


@kernel
def put_chain(
    mem: Bytes,
    dvq: Words,
    state: Words,
    iov: Words,
    n_out: int,
    n_in: int,
    n_direct: int,
    table: Words,
    token: int,
) -> int:
    """Make a chain of n_out readable, then n_in writable buffers available; return its head, or E_FULL.

    iov int64[n, 3] as in `gather`. The first *n_direct* buffers go into the ring's own descriptors; the rest, if
    any, into an indirect table at *table* (int64[2]: window offset, guest address), 16 bytes each, any alignment.
    """
    n = n_out + n_in
    n_desc = n_direct + (1 if n_direct < n else 0)
    if n_desc > dvq[DVQ_NUM_FREE]:
        return E_FULL
    head = int(dvq[DVQ_FREE_HEAD])
    at = head
    len_in = 0
    for k in range(n):
        flags = VIRTQ_DESC_F_WRITE if k >= n_out else 0
        if k >= n_out:
            len_in += iov[k, IOV_LEN]
        if k < n_direct:
            following = state[at, DS_NEXT]
            word = iov[k, IOV_LEN] | flags << 32
            if k + 1 < n_desc:
                word |= VIRTQ_DESC_F_NEXT << 32 | following << 48
            _write_desc(mem, dvq[DVQ_DESC] + VIRTQ_DESC_SIZE * at, iov[k, IOV_GPA], word)
            at = following
        else:
            entry = k - n_direct
            word = iov[k, IOV_LEN] | flags << 32
            if k + 1 < n:
                word |= VIRTQ_DESC_F_NEXT << 32 | (entry + 1) << 48
            store_u64_unaligned(mem, table[0] + VIRTQ_DESC_SIZE * entry, iov[k, IOV_GPA])
            store_u64_unaligned(mem, table[0] + VIRTQ_DESC_SIZE * entry + 8, word)
    if n_direct < n:
        length = VIRTQ_DESC_SIZE * (n - n_direct)
        _write_desc(mem, dvq[DVQ_DESC] + VIRTQ_DESC_SIZE * at, table[1], length | VIRTQ_DESC_F_INDIRECT << 32)
        at = state[at, DS_NEXT]
    dvq[DVQ_FREE_HEAD] = at
    dvq[DVQ_NUM_FREE] -= n_desc
    _put_avail(mem, dvq, state, head, n_desc, len_in, token)
    return head


@inlined
def publish_available(mem: Bytes, dvq: Words) -> None:
    """Make all chains put so far visible to the device."""
    dvq[DVQ_PUBLISHED_IDX] = dvq[DVQ_AVAIL_IDX]
    # Barrier A: pairs with the acquire in available.
    store_u16_release(mem, dvq[DVQ_AVAIL] + VIRTQ_RING_IDX, dvq[DVQ_AVAIL_IDX])


@inlined
def needs_kick(mem: Bytes, dvq: Words) -> bool:
    """Decide whether the device wants to hear of what was published since the last decision (2.7.10)."""
    new = dvq[DVQ_PUBLISHED_IDX]
    old = dvq[DVQ_KICKED_IDX]
    if new == old:
        return False
    dvq[DVQ_KICKED_IDX] = new
    # Barrier C: pairs with the fence in enable_kicks.
    fence()
    if not dvq[DVQ_EVENT_IDX]:
        return not load_u16(mem, dvq[DVQ_USED]) & VIRTQ_USED_F_NO_NOTIFY
    event = load_u16(mem, dvq[DVQ_USED] + VIRTQ_RING_ENTRIES + VIRTQ_USED_ELEM_SIZE * dvq[DVQ_NUM])
    return ((new - event - 1) & 0xFFFF) < ((new - old) & 0xFFFF)


@inlined
def used_ready(mem: Bytes, dvq: Words) -> int:
    """Return how many used chains wait to be taken, or E_USED_IDX."""
    known = (dvq[DVQ_USED_IDX] - dvq[DVQ_LAST_USED_IDX]) & 0xFFFF
    if known:
        return int(known)
    # Barrier B: pairs with the release in publish_used.
    idx = load_u16_acquire(mem, dvq[DVQ_USED] + VIRTQ_RING_IDX)
    n = (idx - dvq[DVQ_LAST_USED_IDX]) & 0xFFFF
    if n > dvq[DVQ_IN_FLIGHT]:
        return E_USED_IDX
    dvq[DVQ_USED_IDX] = idx
    return int(n)


@inlined
def refresh_used(mem: Bytes, dvq: Words) -> int:
    """`used_ready`, with a fresh look at used.idx whatever is known."""
    dvq[DVQ_USED_IDX] = dvq[DVQ_LAST_USED_IDX]
    return int(used_ready(mem, dvq))


@inlined
def take_used(mem: Bytes, dvq: Words, state: Words) -> tuple[int, int]:
    """Take the next used chain off the ring: (head, bytes written), or (E_*, 0). Only if `used_ready` said so.

    Its descriptors are still the caller's to read in *state*; `release` puts them on the free list. With IN_ORDER one
    element may stand for all chains up to its id (2.7.9): those before it count as written in full.
    """
    num = dvq[DVQ_NUM]
    if dvq[DVQ_BATCH_ID] >= 0:
        head = dvq[DVQ_BATCH_ID]
        length = dvq[DVQ_BATCH_LEN]
    else:
        slot = dvq[DVQ_LAST_USED_IDX] & (num - 1)
        at = dvq[DVQ_USED] + VIRTQ_RING_ENTRIES + VIRTQ_USED_ELEM_SIZE * slot
        head = load_u32(mem, at)
        length = load_u32(mem, at + 4)
    if head >= num or state[head, DS_N_DESC] == 0:
        return E_USED_ID, 0
    if dvq[DVQ_IN_ORDER]:
        oldest = dvq[DVQ_ORDER_HEAD]
        if head != oldest:
            if ((dvq[DVQ_USED_IDX] - dvq[DVQ_LAST_USED_IDX]) & 0xFFFF) < 2:
                return E_USED_ID, 0
            dvq[DVQ_BATCH_ID] = head
            dvq[DVQ_BATCH_LEN] = length
            head = oldest
            length = state[head, DS_LEN_IN]
        else:
            dvq[DVQ_BATCH_ID] = -1
        dvq[DVQ_ORDER_HEAD] = (head + state[head, DS_N_DESC]) & (num - 1)
    if length > state[head, DS_LEN_IN]:
        return E_USED_LEN, 0
    dvq[DVQ_LAST_USED_IDX] = (dvq[DVQ_LAST_USED_IDX] + 1) & 0xFFFF
    dvq[DVQ_IN_FLIGHT] -= 1
    return int(head), int(length)


@inlined
def release(dvq: Words, state: Words, head: int) -> None:
    """Give the descriptors of a chain that was taken back to the free list, at its end (rings stay in order)."""
    n_desc = state[head, DS_N_DESC]
    state[head, DS_N_DESC] = 0
    if dvq[DVQ_NUM_FREE] == 0:
        dvq[DVQ_FREE_HEAD] = head
    else:
        state[dvq[DVQ_FREE_TAIL], DS_NEXT] = head
    tail = head
    for _ in range(n_desc - 1):
        tail = state[tail, DS_NEXT]
    dvq[DVQ_FREE_TAIL] = tail
    dvq[DVQ_NUM_FREE] += n_desc


@inlined
def enable_calls(mem: Bytes, dvq: Words) -> bool:
    """Ask the device to call; return True if chains were used meanwhile, so look again and do not sleep."""
    dvq[DVQ_CALLS_ON] = 1
    if dvq[DVQ_EVENT_IDX]:
        store_u16(mem, dvq[DVQ_AVAIL] + VIRTQ_RING_ENTRIES + 2 * dvq[DVQ_NUM], dvq[DVQ_LAST_USED_IDX])
    else:
        store_u16(mem, dvq[DVQ_AVAIL], 0)
    # Barrier D: pairs with the fence in needs_call.
    fence()
    return load_u16(mem, dvq[DVQ_USED] + VIRTQ_RING_IDX) != dvq[DVQ_LAST_USED_IDX]


@inlined
def disable_calls(mem: Bytes, dvq: Words) -> None:
    """Tell the device that calls are not needed. With EVENT_IDX a used_event left behind says so."""
    if dvq[DVQ_CALLS_ON] and not dvq[DVQ_EVENT_IDX]:
        store_u16(mem, dvq[DVQ_AVAIL], VIRTQ_AVAIL_F_NO_INTERRUPT)
    dvq[DVQ_CALLS_ON] = 0
