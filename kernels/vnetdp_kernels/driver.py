"""virtio-net, the driver's side: an endpoint to the transmitq, the receiveq to an endpoint.

A queue has one buffer a descriptor, buffer i for descriptor i, each long enough for virtio_net_hdr and what is sent or
received in one piece. Frames go from the endpoint straight into guest memory, and out of it, without a stop between.
"""

from __future__ import annotations

from . import split as ring
from .atomic import (
    Bytes,
    Words,
    load_u16_unaligned,
    load_u64_unaligned,
    store_u16_unaligned,
    store_u64_unaligned,
)
from .jit import inlined, kernel
from .layout import (
    DVQ_BUF_GPA,
    DVQ_BUF_LEN,
    DVQ_BUF_OFFSET,
    DVQ_BYTES,
    DVQ_DROPPED,
    DVQ_FREE_HEAD,
    DVQ_HDR_LEN,
    DVQ_MRG_RXBUF,
    DVQ_NUM_FREE,
    DVQ_PACKETS,
    DVQ_STATUS,
    E_NUM_BUFFERS,
    EP_DROP_LONG,
    EP_KIND,
    EP_OUT_COUNT,
    IOV_LEN,
    IOV_OFFSET,
    KIND_ECHO,
    KIND_MACSWAP,
    KIND_PYTHON,
    KIND_REFLECT,
    NET_HDR_LEN,
    NET_HDR_NUM_BUFFERS,
)
from .port import emit, linearize, now_ns, produce, split_header, swap_macs
from .reflect import answer


@kernel
def reclaim(mem: Bytes, dvq: Words, state: Words) -> int:
    """Give the descriptors of all used transmit chains back to the free list; return the chains, or E_*."""
    n = ring.used_ready(mem, dvq)
    for k in range(n):
        head, _ = ring.take_used(mem, dvq, state)
        if head < 0:
            dvq[DVQ_STATUS] = head
            return k
        ring.release(dvq, state, head)
    if n < 0:
        dvq[DVQ_STATUS] = n
    return n


@inlined
def _put_frame(mem: Bytes, dvq: Words, state: Words, length: int) -> None:
    """Make the transmit buffer that is next available: *length* bytes, virtio_net_hdr of 12 bytes first."""
    buffer = dvq[DVQ_FREE_HEAD] * dvq[DVQ_BUF_LEN]
    shift = NET_HDR_LEN - dvq[DVQ_HDR_LEN]
    if shift:
        # A legacy header has no num_buffers: its ten bytes move up by two.
        at = dvq[DVQ_BUF_OFFSET] + buffer
        low = load_u64_unaligned(mem, at)
        high = load_u16_unaligned(mem, at + 8)
        store_u64_unaligned(mem, at + shift, low)
        store_u16_unaligned(mem, at + shift + 8, high)
    ring.put_single(mem, dvq, state, dvq[DVQ_BUF_GPA] + buffer + shift, length - shift, 0, 0)
    dvq[DVQ_PACKETS] += 1
    dvq[DVQ_BYTES] += length - NET_HDR_LEN


@kernel
def send(
    mem: Bytes,
    dvq: Words,
    state: Words,
    ep: Words,
    fd: int,
    in_frames: Bytes,
    in_lengths: Words,
    scratch: Words,
    budget: int,
) -> int:
    """Bring up to *budget* frames from the endpoint into transmit buffers and publish them; return how many."""
    if dvq[DVQ_NUM_FREE] < budget:
        reclaim(mem, dvq, state)
    now = now_ns(ep, scratch)
    sent = 0
    while sent < budget and dvq[DVQ_NUM_FREE] > 0:
        at = dvq[DVQ_BUF_OFFSET] + dvq[DVQ_FREE_HEAD] * dvq[DVQ_BUF_LEN]
        length = produce(ep, fd, in_frames, in_lengths, mem, at, dvq[DVQ_BUF_LEN], now)
        if length == 0:
            break
        _put_frame(mem, dvq, state, length)
        sent += 1
    if sent:
        ring.publish_available(mem, dvq)
    return sent


@kernel
def post_receive(mem: Bytes, dvq: Words, state: Words) -> None:
    """Put every free receive buffer on the ring; `publish_available` is the caller's."""
    while dvq[DVQ_NUM_FREE] > 0:
        buffer = dvq[DVQ_FREE_HEAD] * dvq[DVQ_BUF_LEN]
        ring.put_single(mem, dvq, state, dvq[DVQ_BUF_GPA] + buffer, dvq[DVQ_BUF_LEN], 1, 0)


@inlined
def _answer(mem: Bytes, tx: Words, tx_state: Words, iov: Words, row: int, n: int, frame_len: int, kind: int) -> bool:
    """Send a received frame back as *kind* wants it; False if it is too long. A frame without an answer is done with."""
    if NET_HDR_LEN + frame_len > tx[DVQ_BUF_LEN]:
        return False
    at = tx[DVQ_BUF_OFFSET] + tx[DVQ_FREE_HEAD] * tx[DVQ_BUF_LEN]
    store_u64_unaligned(mem, at, 0)
    store_u64_unaligned(mem, at + 4, 0)
    linearize(mem, iov, row, n, mem, at + NET_HDR_LEN)
    if kind == KIND_MACSWAP:
        swap_macs(mem, at + NET_HDR_LEN)
    elif kind == KIND_REFLECT:
        frame_len = answer(mem, at + NET_HDR_LEN, frame_len)
    if frame_len:
        _put_frame(mem, tx, tx_state, NET_HDR_LEN + frame_len)
    return True


@kernel
def receive(
    mem: Bytes,
    dvq: Words,
    state: Words,
    tx: Words,
    tx_state: Words,
    iov: Words,
    ep: Words,
    fd: int,
    hdr: Bytes,
    out_frames: Bytes,
    out_lengths: Words,
    ledger: Words,
    windows: Bytes,
    scratch: Words,
    budget: int,
) -> int:
    """Hand up to *budget* received frames to the endpoint, and post their buffers again; return how many.

    An endpoint that answers (echo, macswap, reflect) sends through the transmitq *tx*. A device that breaks the rules
    leaves its E_* in DVQ_STATUS, and nothing more is received.
    """
    answers = KIND_ECHO <= ep[EP_KIND] <= KIND_REFLECT
    frames = 0
    size = 0
    taken = 0
    while frames < budget and dvq[DVQ_STATUS] == 0:
        if ep[EP_KIND] == KIND_PYTHON and ep[EP_OUT_COUNT] >= out_lengths.size:
            break
        if answers and tx[DVQ_NUM_FREE] == 0 and reclaim(mem, tx, tx_state) <= 0:
            break
        ready = ring.used_ready(mem, dvq)
        if ready <= 0:
            dvq[DVQ_STATUS] = ready
            break
        head, length = ring.take_used(mem, dvq, state)
        if head < 0:
            dvq[DVQ_STATUS] = head
            break
        at = dvq[DVQ_BUF_OFFSET] + head * dvq[DVQ_BUF_LEN]
        iov[0, IOV_OFFSET] = at
        iov[0, IOV_LEN] = length
        ring.release(dvq, state, head)
        taken += 1
        n = 1
        if dvq[DVQ_MRG_RXBUF]:
            n = load_u16_unaligned(mem, at + NET_HDR_NUM_BUFFERS) if length >= NET_HDR_LEN else 0
            # All buffers of a frame become used together (5.1.6.4.1).
            if n < 1 or n > iov.shape[0] or (n > ready and n - 1 > ring.refresh_used(mem, dvq)):
                dvq[DVQ_STATUS] = E_NUM_BUFFERS
                break
            for k in range(1, n):
                head, length = ring.take_used(mem, dvq, state)
                if head < 0:
                    dvq[DVQ_STATUS] = head
                    break
                iov[k, IOV_OFFSET] = dvq[DVQ_BUF_OFFSET] + head * dvq[DVQ_BUF_LEN]
                iov[k, IOV_LEN] = length
                ring.release(dvq, state, head)
                taken += 1
            if dvq[DVQ_STATUS]:
                break
        row, frame_len = split_header(mem, iov, n, dvq[DVQ_HDR_LEN], hdr)
        if frame_len == 0:
            dvq[DVQ_DROPPED] += 1
        elif answers:
            if not _answer(mem, tx, tx_state, iov, row, n, frame_len, ep[EP_KIND]):
                ep[EP_DROP_LONG] += 1
        elif emit(mem, iov, row, n, frame_len, hdr, ep, fd, out_frames, out_lengths, ledger, windows, scratch):
            # A TAP that takes no more: the buffer goes back to the device all the same.
            dvq[DVQ_DROPPED] += 1
        frames += 1
        size += frame_len
        post_receive(mem, dvq, state)
    if taken:
        ring.publish_available(mem, dvq)
        if answers:
            ring.publish_available(mem, tx)
    dvq[DVQ_PACKETS] += frames
    dvq[DVQ_BYTES] += size
    return frames
