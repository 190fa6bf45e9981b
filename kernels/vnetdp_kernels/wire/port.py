"""Where frames meet the outside, in compiled code: `emit` takes a frame out of the rings, `produce` brings one in.

Both sides of a ring use them: the device's datapath and the guest's driver join the same endpoints. An endpoint is a
row of named slots (`rows.EP_*`), a descriptor, and frame slots; a frame in a slot is virtio_net_hdr (12 bytes), then
Ethernet without its FCS.
"""

from __future__ import annotations

from .. import rows as r
from .. import spec
from ..platform.atomic import Bytes, Words, address, copy, store_u16_unaligned, store_u64_unaligned
from ..platform.io import EAGAIN, clock_ns, read, writev
from ..platform.jit import inlined
from ..rows import Frame, Sink, Source, Wire
from .frame import linearize
from .ledger import enter, stamp
from .sock import receive, transmit

_MAX_IOVECS = 64  # a frame in more pieces is made whole first: writev takes 1,024 at most
CLOCK_AT = 2 * (_MAX_IOVECS + 2)  # where the clock's scratch begins behind the iovecs
SCRATCH_WORDS = CLOCK_AT + 8


@inlined
def source_of(wire: Wire, pair: int) -> Source:
    """Return the rows of one queue pair from which frames come."""
    return Source(wire.eps[pair], wire.fds[pair], wire.pending[pair], wire.in_frames[pair], wire.in_lengths[pair])


@inlined
def sink_of(wire: Wire, pair: int) -> Sink:
    """Return the rows of one queue pair to which frames go."""
    return Sink(
        wire.eps[pair], wire.fds[pair], wire.out_frames[pair], wire.out_lengths[pair], wire.ledger, wire.windows
    )


@inlined
def emit(frame: Frame, hdr: Bytes, sink: Sink, words: Words) -> int:
    """Hand one frame, and its virtio_net_hdr, to the endpoint. Returns 0 when it is done with, or E_BLOCKED.

    words: of `Scratch`. A frame that can't go out is dropped and counted.
    """
    ep = sink.ep
    if frame.length < spec.ETH_HLEN:
        ep[r.EP_DROP_SHORT] += 1
        return 0
    if frame.length > spec.MAX_FRAME_LEN:
        ep[r.EP_DROP_LONG] += 1
        return 0
    kind = ep[r.EP_KIND]
    if kind == r.KIND_TAP:
        written = _write_to_tap(frame, hdr, sink, words)
        if written == -EAGAIN:
            return r.E_BLOCKED
        if written < 0:
            # A TAP that is down (EIO) or dislikes a header (EINVAL) costs this frame, nothing else.
            ep[r.EP_LAST_ERRNO] = -written
            ep[r.EP_DROP_ERROR] += 1
            return 0
    elif kind == r.KIND_PYTHON:
        slot = ep[r.EP_OUT_COUNT]
        if slot >= sink.out_lengths.size:
            return r.E_BLOCKED
        slot_len = sink.out_frames.size // sink.out_lengths.size
        if frame.length + spec.NET_HDR_LEN > slot_len:
            ep[r.EP_DROP_LONG] += 1
            return 0
        at = slot * slot_len
        store_u16_unaligned(hdr, spec.NET_HDR_NUM_BUFFERS, 0)
        copy(sink.out_frames, at, hdr, 0, spec.NET_HDR_LEN)
        linearize(frame, sink.out_frames, at + spec.NET_HDR_LEN)
        sink.out_lengths[slot] = frame.length + spec.NET_HDR_LEN
        ep[r.EP_OUT_COUNT] = slot + 1
    elif ep[r.EP_CHECK]:
        if frame.n_rows - frame.row == 1:
            enter(frame.mem, frame.iov[frame.row, r.IOV_OFFSET], frame.length, sink.ledger, sink.windows)
        elif frame.length <= sink.out_frames.size:
            linearize(frame, sink.out_frames, 0)
            enter(sink.out_frames, 0, frame.length, sink.ledger, sink.windows)
        else:
            ep[r.EP_DROP_LONG] += 1
            return 0
    elif kind >= r.KIND_STREAM:
        taken = transmit(frame, sink, words)
        if taken <= 0:
            return taken
    ep[r.EP_TO_WIRE] += 1
    ep[r.EP_BYTES_TO_WIRE] += frame.length
    return 0


@inlined
def _write_to_tap(frame: Frame, hdr: Bytes, sink: Sink, words: Words) -> int:
    """Write a frame to the TAP with one writev; return the bytes, or -errno. One in many pieces is made whole first."""
    store_u16_unaligned(hdr, spec.NET_HDR_NUM_BUFFERS, 0)
    words[0] = address(hdr, 0)
    words[1] = spec.NET_HDR_LEN
    count = frame.n_rows - frame.row
    if count <= _MAX_IOVECS:
        for k in range(count):
            words[2 + 2 * k] = address(frame.mem, frame.iov[frame.row + k, r.IOV_OFFSET])
            words[3 + 2 * k] = frame.iov[frame.row + k, r.IOV_LEN]
    else:
        linearize(frame, sink.out_frames, 0)
        words[2] = address(sink.out_frames, 0)
        words[3] = frame.length
        count = 1
    return writev(sink.fd, words, count + 1)


@inlined
def produce(source: Source, dst: Bytes, at: int, room: int, now: int) -> int:
    """Bring one frame in from the endpoint, header first, to *dst* at *at*; return its bytes, 0 if there is none.

    room: bytes there. now: CLOCK_MONOTONIC in ns, looked at only by a generator with a rate.
    """
    ep = source.ep
    kind = ep[r.EP_KIND]
    length = 0
    if kind == r.KIND_TAP:
        length = read(source.fd, dst, at, room)
        if length < 0:
            if length != -EAGAIN:
                ep[r.EP_LAST_ERRNO] = -length
                ep[r.EP_DROP_ERROR] += 1
            return 0
        if length < spec.NET_HDR_LEN + spec.ETH_HLEN:
            ep[r.EP_DROP_SHORT] += 1
            return 0
        if length >= room:
            # The TAP cuts off bytes that do not fit: a frame that fills all the room may be a part of one.
            ep[r.EP_DROP_LONG] += 1
            return 0
    elif kind == r.KIND_GENERATE:
        length = _generate(ep, dst, at, room, now)
        if length == 0:
            return 0
    elif kind == r.KIND_PYTHON:
        while length == 0:
            if ep[r.EP_COUNT] == 0:
                return 0
            slot = ep[r.EP_FIRST]
            length = source.in_lengths[slot]
            ep[r.EP_FIRST] = slot + 1
            ep[r.EP_COUNT] -= 1
            if length > room:
                ep[r.EP_DROP_LONG] += 1
                length = 0
            elif length < spec.NET_HDR_LEN + spec.ETH_HLEN:
                ep[r.EP_DROP_SHORT] += 1
                length = 0
        copy(dst, at, source.in_frames, slot * (source.in_frames.size // source.in_lengths.size), length)
    elif kind >= r.KIND_STREAM:
        length = receive(source, dst, at, room)
        if length == 0:
            return 0
    else:
        return 0
    ep[r.EP_FROM_WIRE] += 1
    ep[r.EP_BYTES_FROM_WIRE] += length - spec.NET_HDR_LEN
    return int(length)


@inlined
def _generate(ep: Words, dst: Bytes, at: int, room: int, now: int) -> int:
    """Write the generator's next frame to *dst* at *at*; return its bytes, 0 if none is due or it has no room."""
    if ep[r.EP_LIMIT] >= 0 and ep[r.EP_SEQ] >= ep[r.EP_LIMIT]:
        return 0
    if ep[r.EP_INTERVAL_NS]:
        if now < ep[r.EP_NEXT_NS]:
            return 0
        # A generator that was held back does not catch up: it goes on from now.
        ep[r.EP_NEXT_NS] = max(ep[r.EP_NEXT_NS] + ep[r.EP_INTERVAL_NS], now - 1_000_000)
    length = spec.NET_HDR_LEN + ep[r.EP_SIZE]
    if length > room:
        ep[r.EP_DROP_LONG] += 1
        return 0
    store_u64_unaligned(dst, at, 0)
    store_u64_unaligned(dst, at + 4, 0)
    stamp(dst, at + spec.NET_HDR_LEN, ep[r.EP_SIZE], ep[r.EP_FLOW], ep[r.EP_SEQ])
    ep[r.EP_SEQ] += 1
    return int(length)


@inlined
def due_in_ns(ep: Words, scratch: Words) -> int:
    """Return the ns until a generator's next frame is due, 0 if it is; -1 if no clock will make one."""
    if ep[r.EP_KIND] != r.KIND_GENERATE:
        return -1
    if ep[r.EP_LIMIT] >= 0 and ep[r.EP_SEQ] >= ep[r.EP_LIMIT]:
        return -1
    if not ep[r.EP_INTERVAL_NS]:
        return 0
    return max(0, ep[r.EP_NEXT_NS] - clock_ns(scratch[CLOCK_AT:]))


@inlined
def now_ns(ep: Words, scratch: Words) -> int:
    """Return CLOCK_MONOTONIC in ns for an endpoint that needs it, else 0."""
    if ep[r.EP_KIND] == r.KIND_GENERATE and ep[r.EP_INTERVAL_NS]:
        return int(clock_ns(scratch[CLOCK_AT:]))
    return 0
