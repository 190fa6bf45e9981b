"""Where frames meet the outside, in compiled code: `emit` takes a frame out of the rings, `produce` brings one in.

Both sides of a ring use them: the device's datapath and the guest's driver join the same endpoints. An endpoint is a
row of named slots (`rows.EP_*`), a descriptor, and frame slots; a frame in a slot is virtio_net_hdr (12 bytes), then
Ethernet without its FCS.
"""

from __future__ import annotations

from .. import rows as r
from .. import spec
from ..platform.atomic import Bytes, Words, address, copy, store_u16_unaligned
from ..platform.io import time_ns, writev
from ..platform.jit import inlined, kernel
from ..rows import Frame, Sink, Source, Wire
from . import faulty
from .frame import linearize
from .kinds import ended, from_slots, from_tap, generate, sent_to_tap, slot_for
from .ledger import enter
from .sock import flush, receive, transmit

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
        sent = sent_to_tap(ep, _write_to_tap(frame, hdr, sink, words))
        if sent <= 0:
            return sent
    elif kind >= r.KIND_STREAM:  # one comparison for all of them: the kinds below are the fastest
        if kind == r.KIND_PYTHON:
            at = slot_for(ep, sink.out_frames, sink.out_lengths, spec.NET_HDR_LEN + frame.length)
            if at < 0:
                return r.E_BLOCKED if at == r.E_BLOCKED else 0
            store_u16_unaligned(hdr, spec.NET_HDR_NUM_BUFFERS, 0)
            copy(sink.out_frames, at, hdr, 0, spec.NET_HDR_LEN)
            linearize(frame, sink.out_frames, at + spec.NET_HDR_LEN)
            ep[r.EP_OUT_COUNT] += 1
        elif kind >= r.KIND_FAULT:
            if faulty.hold(frame, hdr, sink) < 0:
                return r.E_BLOCKED
        else:
            taken = transmit(frame, sink, words)
            if taken <= 0:
                return taken
    elif ep[r.EP_CHECK]:
        if frame.n_rows - frame.row == 1:
            enter(frame.mem, frame.iov[frame.row, r.IOV_OFFSET], frame.length, sink.ledger, sink.windows)
        elif frame.length <= sink.out_frames.size:
            linearize(frame, sink.out_frames, 0)
            enter(sink.out_frames, 0, frame.length, sink.ledger, sink.windows)
        else:
            ep[r.EP_DROP_LONG] += 1
            return 0
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

    room: bytes there. now: in ns, looked at only by a generator with a rate.
    """
    ep = source.ep
    kind = ep[r.EP_KIND]
    length = 0
    if kind == r.KIND_TAP:
        length = from_tap(ep, source.fd, dst, at, room)
    elif kind == r.KIND_GENERATE:
        length = generate(ep, dst, at, room, now)
    elif kind >= r.KIND_STREAM:
        if kind == r.KIND_PYTHON:
            length = from_slots(ep, source.in_frames, source.in_lengths, dst, at, room)
        elif kind >= r.KIND_FAULT:
            length = faulty.bring(source, dst, at, room)
        else:
            length = receive(source, dst, at, room)
    if length == 0:
        return 0
    ep[r.EP_FROM_WIRE] += 1
    ep[r.EP_BYTES_FROM_WIRE] += length - spec.NET_HDR_LEN
    return int(length)


@inlined
def due_in_ns(ep: Words, scratch: Words) -> int:
    """Return the ns until the next frame from the wire is due, 0 if it is; -1 if no clock will bring one."""
    kind = ep[r.EP_KIND]
    if kind == r.KIND_FAULT or kind == r.KIND_FAULT_PYTHON:
        return int(faulty.in_due_ns(ep, time_ns(ep[r.EP_TOLD_NS], scratch[CLOCK_AT:])))
    if kind != r.KIND_GENERATE or ended(ep):
        return -1
    if not ep[r.EP_INTERVAL_NS]:
        return 0
    return max(0, ep[r.EP_NEXT_NS] - time_ns(ep[r.EP_TOLD_NS], scratch[CLOCK_AT:]))


@inlined
def out_due_ns(ep: Words, scratch: Words) -> int:
    """Return the ns until a frame that a faulty wire holds back may go to the wire, 0 if it may; -1 if there is none."""
    kind = ep[r.EP_KIND]
    if kind == r.KIND_FAULT or kind == r.KIND_FAULT_PYTHON:
        return int(faulty.out_due_ns(ep, time_ns(ep[r.EP_TOLD_NS], scratch[CLOCK_AT:])))
    return -1


@kernel
def takes(ep: Words, slots: int) -> bool:
    """Return whether an endpoint in Python, with so many slots, or one behind faulty wires takes a frame now."""
    if ep[r.EP_KIND] == r.KIND_PYTHON:
        return bool(ep[r.EP_OUT_COUNT] < slots)
    return bool(faulty.takes(ep, faulty.TO_WIRE))


@kernel
def send_on(sink: Sink, words: Words) -> bool:
    """Send the frames of a stream, or those of faulty wires that are due; return whether Python has frames to take.

    For an endpoint that has frames waiting (EP_OUT_COUNT). words: of `Scratch`.
    """
    ep = sink.ep
    waiting = ep[r.EP_OUT_COUNT]
    if ep[r.EP_KIND] < r.KIND_FAULT:
        flush(sink)
    elif ep[r.EP_KIND] != r.KIND_PYTHON:
        waiting = faulty.send_on(sink, words)
    return bool(waiting and ep[r.EP_KIND] >= r.KIND_PYTHON and not ep[r.EP_BLOCKED])


@inlined
def now_ns(ep: Words, scratch: Words) -> int:
    """Return the time in ns, by the endpoint's clock, for an endpoint that needs it, else 0."""
    if ep[r.EP_KIND] == r.KIND_GENERATE and ep[r.EP_INTERVAL_NS]:
        return int(time_ns(ep[r.EP_TOLD_NS], scratch[CLOCK_AT:]))
    return 0


@kernel
def next_due_ns(ep: Words, scratch: Words) -> int:
    """Return the time in ns, after now, at which time alone lets a frame of the endpoint move; -1 if there is none.

    Frames that are due already wait for something else, such as a step or a receive buffer. scratch: words of `Scratch`.
    """
    out = out_due_ns(ep, scratch)
    left = due_in_ns(ep, scratch)
    if out > 0 and (left <= 0 or out < left):
        left = out
    return time_ns(ep[r.EP_TOLD_NS], scratch[CLOCK_AT:]) + left if left > 0 else -1
