"""virtio-net, the driver's side: an endpoint to the transmitq, the receiveq to an endpoint.

A queue has one buffer a descriptor, buffer i for descriptor i, each long enough for virtio_net_hdr and bytes sent or
received in one piece. Frames go from the endpoint straight into guest memory, and out of it, without a stop between.
"""

from __future__ import annotations

from .. import rows as r
from .. import spec
from ..platform.atomic import (
    Bytes,
    Words,
    load_u16_unaligned,
    load_u64_unaligned,
    store_u16_unaligned,
    store_u64_unaligned,
)
from ..platform.jit import inlined, kernel
from ..rows import Frame, Scratch, Sink, Source
from ..virtq import split_driver as ring
from ..virtq.memory import prefetch_write
from ..wire.answer import answer, answers
from ..wire.frame import linearize, split_header, tidy
from ..wire.port import emit, now_ns, produce, takes


@kernel
def reclaim(mem: Bytes, dvq: Words, state: Words) -> int:
    """Give the descriptors of all used transmit chains back to the free list; return the chains, or E_*."""
    n = ring.used_ready(mem, dvq)
    for k in range(n):
        head, _ = ring.take_used(mem, dvq, state)
        if head < 0:
            dvq[r.DVQ_STATUS] = head
            return k
        ring.release(dvq, state, head)
    if n < 0:
        dvq[r.DVQ_STATUS] = n
    return n


@inlined
def _put_frame(mem: Bytes, dvq: Words, state: Words, length: int) -> None:
    """Make the transmit buffer that is next available: *length* bytes, virtio_net_hdr of 12 bytes first."""
    buffer = dvq[r.DVQ_FREE_HEAD] * dvq[r.DVQ_BUF_LEN]
    shift = spec.NET_HDR_LEN - dvq[r.DVQ_HDR_LEN]
    if shift:
        # A legacy header has no num_buffers: its ten bytes move up by two.
        at = dvq[r.DVQ_BUF_OFFSET] + buffer
        low = load_u64_unaligned(mem, at)
        high = load_u16_unaligned(mem, at + 8)
        store_u64_unaligned(mem, at + shift, low)
        store_u16_unaligned(mem, at + shift + 8, high)
    ring.put_single(mem, dvq, state, dvq[r.DVQ_BUF_GPA] + buffer + shift, length - shift, 0, 0)
    dvq[r.DVQ_PACKETS] += 1
    dvq[r.DVQ_BYTES] += length - spec.NET_HDR_LEN


@kernel
def send(mem: Bytes, dvq: Words, state: Words, source: Source, words: Words, budget: int) -> int:
    """Bring up to *budget* frames from the endpoint into transmit buffers and publish them; return how many.

    words: of `Scratch`.
    """
    if dvq[r.DVQ_NUM_FREE] < budget:
        reclaim(mem, dvq, state)
    now = now_ns(source.ep, words)
    sent = 0
    while sent < budget and dvq[r.DVQ_NUM_FREE] > 0:
        at = dvq[r.DVQ_BUF_OFFSET] + dvq[r.DVQ_FREE_HEAD] * dvq[r.DVQ_BUF_LEN]
        length = produce(source, mem, at, dvq[r.DVQ_BUF_LEN], now)
        if length == 0:
            break
        _put_frame(mem, dvq, state, length)
        if dvq[r.DVQ_NUM_FREE] > 1:
            following = state[dvq[r.DVQ_FREE_HEAD], r.DS_NEXT]
            prefetch_write(mem, dvq[r.DVQ_BUF_OFFSET] + following * dvq[r.DVQ_BUF_LEN], length)
        sent += 1
    if sent:
        ring.publish_available(mem, dvq)
    return sent


@kernel
def post_receive(mem: Bytes, dvq: Words, state: Words) -> None:
    """Put every free receive buffer on the ring; `publish_available` is the caller's."""
    while dvq[r.DVQ_NUM_FREE] > 0:
        buffer = dvq[r.DVQ_FREE_HEAD] * dvq[r.DVQ_BUF_LEN]
        ring.put_single(mem, dvq, state, dvq[r.DVQ_BUF_GPA] + buffer, dvq[r.DVQ_BUF_LEN], 1, 0)


@inlined
def _answer(mem: Bytes, tx: Words, tx_state: Words, ep: Words, frame: Frame) -> None:
    """Send a received frame back as the endpoint wants it, if it fits; one without an answer is done with."""
    frame_len = frame.length
    if spec.NET_HDR_LEN + frame_len > tx[r.DVQ_BUF_LEN]:
        ep[r.EP_DROP_LONG] += 1
        return
    ep[r.EP_TO_WIRE] += 1
    ep[r.EP_BYTES_TO_WIRE] += frame_len
    at = tx[r.DVQ_BUF_OFFSET] + tx[r.DVQ_FREE_HEAD] * tx[r.DVQ_BUF_LEN]
    store_u64_unaligned(mem, at, 0)
    store_u64_unaligned(mem, at + 4, 0)
    linearize(frame, mem, at + spec.NET_HDR_LEN)
    frame_len = answer(ep[r.EP_KIND], mem, at + spec.NET_HDR_LEN, frame_len)
    if frame_len:
        _put_frame(mem, tx, tx_state, spec.NET_HDR_LEN + frame_len)
        ep[r.EP_FROM_WIRE] += 1
        ep[r.EP_BYTES_FROM_WIRE] += frame_len


@inlined
def _take_buffers(mem: Bytes, dvq: Words, state: Words, iov: Words, ready: int) -> tuple[int, int]:
    """Take the buffers of one frame off the ring into *iov*: (buffers, bytes), or (E_*, 0). *ready*: of `used_ready`.

    With VIRTIO_NET_F_MRG_RXBUF a frame has num_buffers of them, which become used together (5.1.6.4.1).
    """
    n = 1
    total = 0
    k = 0
    while k < n:
        head, length = ring.take_used(mem, dvq, state)
        if head < 0:
            return head, 0
        at = dvq[r.DVQ_BUF_OFFSET] + head * dvq[r.DVQ_BUF_LEN]
        iov[k, r.IOV_OFFSET] = at
        iov[k, r.IOV_LEN] = length
        total += length
        ring.release(dvq, state, head)
        if k == 0 and dvq[r.DVQ_MRG_RXBUF]:
            n = load_u16_unaligned(mem, at + spec.NET_HDR_NUM_BUFFERS) if length >= spec.NET_HDR_LEN else 0
            if n < 1 or n > iov.shape[0] or (n > ready and n - 1 > ring.refresh_used(mem, dvq)):
                return r.E_NUM_BUFFERS, 0
        k += 1
    return n, total


@kernel
def receive(
    mem: Bytes, dvq: Words, state: Words, tx: Words, tx_state: Words, sink: Sink, scratch: Scratch, budget: int
) -> int:
    """Hand up to *budget* received frames to the endpoint, and post their buffers again; return how many.

    An endpoint that answers (echo, macswap, reflect) sends through the transmitq *tx*. A device that breaks the rules
    leaves its E_* in DVQ_STATUS, and nothing more is received.
    """
    ep = sink.ep
    hdr = scratch.hdr
    sends_back = answers(ep)
    frames = 0
    size = 0
    while frames < budget and dvq[r.DVQ_STATUS] == 0:
        if ep[r.EP_KIND] >= r.KIND_FAULT and not takes(ep, sink.out_lengths.size):
            break
        if sends_back and tx[r.DVQ_NUM_FREE] == 0 and reclaim(mem, tx, tx_state) <= 0:
            break
        ready = ring.used_ready(mem, dvq)
        if ready <= 0:
            dvq[r.DVQ_STATUS] = ready
            break
        n, total = _take_buffers(mem, dvq, state, scratch.iov, ready)
        if n < 0:
            dvq[r.DVQ_STATUS] = n
            break
        row, length = split_header(Frame(mem, scratch.iov, 0, n, total), dvq[r.DVQ_HDR_LEN], hdr)
        frame = Frame(mem, scratch.iov, row, n, length)
        tidy(hdr, frame.length, spec.VIRTIO_NET_HDR_F_NEEDS_CSUM | spec.VIRTIO_NET_HDR_F_DATA_VALID)
        if frame.length == 0:
            dvq[r.DVQ_DROPPED] += 1
        elif sends_back:
            _answer(mem, tx, tx_state, ep, frame)
        elif emit(frame, hdr, sink, scratch.words):
            # A TAP that takes no more: the buffer goes back to the device all the same.
            dvq[r.DVQ_DROPPED] += 1
        frames += 1
        size += frame.length
        post_receive(mem, dvq, state)
    if frames:
        ring.publish_available(mem, dvq)
        if sends_back:
            ring.publish_available(mem, tx)
    dvq[r.DVQ_PACKETS] += frames
    dvq[r.DVQ_BYTES] += size
    return frames


@kernel
def is_sound(mem: Bytes, dvq: Words, state: Words, writable: bool, seen: Words) -> bool:
    """Return whether a row that came from outside, and the state of its descriptors, can be a driver's at rest.

    The row's size, offsets, addresses and features are right already; *writable*: a receiveq. If this holds, too, no index
    leads out of its table and no list into a ring, and a descriptor is empty or is that of its own buffer: neither the
    driver nor its device touches anything else. seen int64[num or more]: scratch.
    """
    num = dvq[r.DVQ_NUM]
    for slot in (r.DVQ_AVAIL_IDX, r.DVQ_PUBLISHED_IDX, r.DVQ_KICKED_IDX, r.DVQ_LAST_USED_IDX, r.DVQ_USED_IDX):
        if not 0 <= dvq[slot] <= 0xFFFF:
            return False
    in_flight = (dvq[r.DVQ_AVAIL_IDX] - dvq[r.DVQ_LAST_USED_IDX]) & 0xFFFF
    if in_flight > num or dvq[r.DVQ_IN_FLIGHT] != in_flight or dvq[r.DVQ_NUM_FREE] != num - in_flight:
        return False
    if (
        dvq[r.DVQ_PUBLISHED_IDX] != dvq[r.DVQ_AVAIL_IDX]
        or (dvq[r.DVQ_USED_IDX] - dvq[r.DVQ_LAST_USED_IDX]) & 0xFFFF > in_flight
    ):
        return False
    if not r.E_FULL <= dvq[r.DVQ_STATUS] <= 0:
        return False
    heads = 0
    shift = spec.NET_HDR_LEN - dvq[r.DVQ_HDR_LEN]
    for i in range(num):
        seen[i] = 0
        if not 0 <= state[i, r.DS_N_DESC] <= 1:
            return False
        heads += state[i, r.DS_N_DESC]
        gpa = load_u64_unaligned(mem, dvq[r.DVQ_DESC] + spec.VIRTQ_DESC_SIZE * i)
        word = load_u64_unaligned(mem, dvq[r.DVQ_DESC] + spec.VIRTQ_DESC_SIZE * i + 8)
        if state[i, r.DS_N_DESC] and state[i, r.DS_LEN_IN] != (dvq[r.DVQ_BUF_LEN] if writable else 0):
            return False
        if gpa == 0 and word == 0 and state[i, r.DS_N_DESC] == 0:
            continue
        buffer = dvq[r.DVQ_BUF_GPA] + i * dvq[r.DVQ_BUF_LEN]
        if writable and (gpa != buffer or word != dvq[r.DVQ_BUF_LEN] | spec.VIRTQ_DESC_F_WRITE << 32):
            return False
        if not writable and (gpa != buffer + shift or not 0 < word <= dvq[r.DVQ_BUF_LEN] - shift):
            return False
    if heads != in_flight:
        return False
    order_head = dvq[r.DVQ_ORDER_HEAD]
    if dvq[r.DVQ_IN_ORDER]:
        if not 0 <= order_head < num:
            return False
        for k in range(in_flight):
            if state[(order_head + k) & (num - 1), r.DS_N_DESC] == 0:
                return False
    i = dvq[r.DVQ_FREE_HEAD]
    for k in range(num - in_flight):
        if not 0 <= i < num or seen[i] or state[i, r.DS_N_DESC]:
            return False
        if dvq[r.DVQ_IN_ORDER] and i != (order_head + in_flight + k) & (num - 1):
            return False
        if k == num - in_flight - 1 and i != dvq[r.DVQ_FREE_TAIL]:
            return False
        seen[i] = 1
        i = state[i, r.DS_NEXT]
    batch = dvq[r.DVQ_BATCH_ID]
    if batch == -1:
        return True
    if not dvq[r.DVQ_IN_ORDER] or not 0 <= batch < num or state[batch, r.DS_N_DESC] == 0:
        return False
    return bool(0 <= dvq[r.DVQ_BATCH_LEN] <= 0xFFFFFFFF)
