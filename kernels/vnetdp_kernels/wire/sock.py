"""Sockets as the wire, in compiled code: stream and datagram sockets that carry frames as QEMU and passt have them.

On a stream each frame follows its length, four bytes, big endian; a datagram is a frame. Neither has a virtio_net_hdr.
No call waits, whatever the flags of the descriptor, which may be another program's, too.

EP_LOST is not 0 while there is no connection: a frame for the wire is dropped and counted, and the descriptor is left
alone. Kernels set it, with the reason. The endpoint's thread then puts the next connection behind the same descriptor, and
clears it: so neither sees the other's half-done work.

The bytes of a stream lie in frame slots: in in_frames EP_COUNT bytes from EP_FIRST on, received and not yet delivered; in
out_frames EP_OUT_COUNT bytes from EP_OUT_FIRST on: EP_OUT_FRAMES frames, of the first of which EP_OUT_PART bytes were sent.
"""

from __future__ import annotations

from .. import rows as r
from .. import spec
from ..platform.atomic import (
    Bytes,
    Words,
    address,
    copy,
    load_i64_acquire,
    load_u32_unaligned,
    store_i64_release,
    store_u32_unaligned,
    store_u64_unaligned,
)
from ..platform.io import EAGAIN, EINTR, recv, recv_datagram, send, sendmsg, shutdown
from ..platform.jit import inlined, kernel
from ..rows import Frame, Sink, Source
from .frame import linearize

LENGTH_LEN = 4  # bytes before each frame of a stream
LONGEST = r.FRAME_SLOT - spec.NET_HDR_LEN  # bytes of a frame: none that is announced as longer is waited for

_MSGHDR_WORDS = 8  # a struct msghdr, and up to a multiple of 16 bytes
_MAX_IOVECS = 62  # that the words of a `Scratch` have room for, behind it
_EPIPE = 32
_NO_PEER = (32, 104, 107, 111)  # EPIPE, ECONNRESET, ENOTCONN, ECONNREFUSED
_NO_ROOM = (11, 12, 105)  # EAGAIN, ENOMEM, ENOBUFS: of a stream, whose frames can't be dropped in the middle


@inlined
def _swapped(n: int) -> int:
    """Return a 32-bit number with its bytes in the other order."""
    return (n & 0xFF) << 24 | (n & 0xFF00) << 8 | (n >> 8) & 0xFF00 | n >> 24


@kernel
def lose(ep: Words, reason: int) -> None:
    """Let the connection alone from now on: forget half a frame received, and drop and count the frames not wholly sent."""
    ep[r.EP_FIRST] = ep[r.EP_COUNT] = 0
    _drop(ep)
    ep[r.EP_GONE] = 1  # it is polled no more: it would never let the loop sleep
    ep[r.EP_BLOCKED] = 1  # but looked at again and again
    if reason < 0:
        ep[r.EP_LAST_ERRNO] = -reason
    store_i64_release(ep, r.EP_LOST, reason)


@inlined
def _drop(ep: Words) -> None:
    """Drop the frames that wait to be sent."""
    ep[r.EP_DROP_ERROR] += ep[r.EP_OUT_FRAMES]
    ep[r.EP_OUT_FIRST] = ep[r.EP_OUT_COUNT] = ep[r.EP_OUT_PART] = ep[r.EP_OUT_FRAMES] = 0


@kernel
def _cut(ep: Words, fd: int, reason: int) -> None:
    """End a stream. The endpoint's thread, which polls it, wakes."""
    lose(ep, reason)
    shutdown(fd)


# --- to the wire ---


@kernel
def transmit(frame: Frame, sink: Sink, words: Words) -> int:
    """Send a frame, or put it behind others for `flush`: 1 if so, 0 if it was dropped and counted, or E_BLOCKED.

    words: of `Scratch`.
    """
    ep = sink.ep
    if load_i64_acquire(ep, r.EP_LOST):
        ep[r.EP_DROP_ERROR] += 1
        return 0
    if ep[r.EP_KIND] == r.KIND_STREAM:
        return _append(frame, sink)
    sent = _send_datagram(frame, sink, words)
    if sent == -EAGAIN or sent == -EINTR:
        return r.E_BLOCKED
    if sent < 0:
        ep[r.EP_LAST_ERRNO] = -sent
        ep[r.EP_DROP_ERROR] += 1
        if -sent in _NO_PEER:
            lose(ep, sent)
        return 0
    return 1


@inlined
def _send_datagram(frame: Frame, sink: Sink, words: Words) -> int:
    """Send a frame with one sendmsg; return the bytes, or -errno. A frame in many pieces is made whole first."""
    count = frame.n_rows - frame.row
    at = _MSGHDR_WORDS
    if count <= _MAX_IOVECS:
        for k in range(count):
            words[at + 2 * k] = address(frame.mem, frame.iov[frame.row + k, r.IOV_OFFSET])
            words[at + 2 * k + 1] = frame.iov[frame.row + k, r.IOV_LEN]
    else:
        linearize(frame, sink.out_frames, 0)
        words[at] = address(sink.out_frames, 0)
        words[at + 1] = frame.length
        count = 1
    for k in range(at):
        words[k] = 0
    words[2] = address(words, at)  # msg_iov
    words[3] = count  # msg_iovlen
    return sendmsg(sink.fd, words)


@kernel
def _append(frame: Frame, sink: Sink) -> int:
    """Put a frame behind those of a stream that wait for `flush`; returns as `transmit`."""
    ep, slots = sink.ep, sink.out_frames
    need = LENGTH_LEN + frame.length
    if ep[r.EP_OUT_FIRST] + ep[r.EP_OUT_COUNT] + need > slots.size:
        flush(sink)
        if ep[r.EP_LOST]:
            ep[r.EP_DROP_ERROR] += 1
            return 0
        first, count = ep[r.EP_OUT_FIRST], ep[r.EP_OUT_COUNT]
        if count <= first:
            copy(slots, 0, slots, first, count)
            ep[r.EP_OUT_FIRST] = first = 0
        if first + count + need > slots.size:
            return r.E_BLOCKED
    at = ep[r.EP_OUT_FIRST] + ep[r.EP_OUT_COUNT]
    store_u32_unaligned(slots, at, _swapped(frame.length))
    linearize(frame, slots, at + LENGTH_LEN)
    ep[r.EP_OUT_COUNT] += need
    ep[r.EP_OUT_FRAMES] += 1
    return 1


@kernel
def flush(sink: Sink) -> int:
    """Send the frames of a stream that wait for it, as far as the peer takes them; return the bytes that still wait."""
    ep, slots = sink.ep, sink.out_frames
    if load_i64_acquire(ep, r.EP_LOST):
        return 0
    while ep[r.EP_OUT_COUNT] > 0:
        part = ep[r.EP_OUT_PART]
        n = send(sink.fd, slots, ep[r.EP_OUT_FIRST] + part, ep[r.EP_OUT_COUNT] - part)
        if n > 0:
            _take_off(ep, slots, part + n)
        elif n == -_EPIPE:
            # The peer is gone. It may have left frames to receive: the connection is lost behind the last of them.
            ep[r.EP_LAST_ERRNO] = _EPIPE
            _drop(ep)
        elif -n in _NO_ROOM:
            ep[r.EP_BLOCKED] = 1
            return int(ep[r.EP_OUT_COUNT])
        elif n != -EINTR:
            _cut(ep, sink.fd, n)
            return 0
    ep[r.EP_BLOCKED] = 0
    return 0


@inlined
def _take_off(ep: Words, slots: Bytes, sent: int) -> None:
    """Take the first *sent* bytes off those to be sent: whole frames, and a part of the next one."""
    if sent == ep[r.EP_OUT_COUNT]:
        ep[r.EP_OUT_FIRST] = ep[r.EP_OUT_COUNT] = ep[r.EP_OUT_PART] = ep[r.EP_OUT_FRAMES] = 0
        return
    while sent >= LENGTH_LEN:
        whole = LENGTH_LEN + _swapped(load_u32_unaligned(slots, ep[r.EP_OUT_FIRST]))
        if sent < whole:
            break
        ep[r.EP_OUT_FIRST] += whole
        ep[r.EP_OUT_COUNT] -= whole
        ep[r.EP_OUT_FRAMES] -= 1
        sent -= whole
    ep[r.EP_OUT_PART] = sent


# --- from the wire ---


@kernel
def receive(source: Source, dst: Bytes, at: int, room: int) -> int:
    """Bring the next frame, behind a virtio_net_hdr of zeros, to *dst* at *at*; return its bytes, 0 if there is none.

    room: bytes there. Once it returns 0, no whole frame is left in in_frames: poll() tells of the next one.
    """
    ep = source.ep
    if load_i64_acquire(ep, r.EP_LOST):
        return 0
    frame_at, frame_room = at + spec.NET_HDR_LEN, room - spec.NET_HDR_LEN
    if ep[r.EP_KIND] == r.KIND_STREAM:
        length = _next_of_stream(source, dst, frame_at, frame_room)
    else:
        length = _next_datagram(source, dst, frame_at, frame_room)
    if length == 0:
        return 0
    store_u64_unaligned(dst, at, 0)
    store_u32_unaligned(dst, at + 8, 0)
    return spec.NET_HDR_LEN + length


@inlined
def _next_datagram(source: Source, dst: Bytes, at: int, room: int) -> int:
    ep = source.ep
    length = recv_datagram(source.fd, dst, at, room)
    if length < 0:
        if length != -EAGAIN and length != -EINTR:
            lose(ep, length)
        return 0
    if length < spec.ETH_HLEN:
        ep[r.EP_DROP_SHORT] += 1
        return 0
    if length > room:
        ep[r.EP_DROP_LONG] += 1
        return 0
    return length


@inlined
def _next_of_stream(source: Source, dst: Bytes, at: int, room: int) -> int:
    """Return the bytes of the next frame, which the peer is asked for once at most, however slowly it sends."""
    ep, slots = source.ep, source.in_frames
    asked = False
    while True:
        first, count = ep[r.EP_FIRST], ep[r.EP_COUNT]
        if count >= LENGTH_LEN:
            length = _swapped(load_u32_unaligned(slots, first))
            if length == 0 or length > LONGEST:
                _cut(ep, source.fd, r.LOST_LENGTH + length)
                return 0
            if count >= LENGTH_LEN + length:
                ep[r.EP_FIRST] = first + LENGTH_LEN + length
                ep[r.EP_COUNT] = count - LENGTH_LEN - length
                if length < spec.ETH_HLEN:
                    ep[r.EP_DROP_SHORT] += 1
                elif length > room:
                    ep[r.EP_DROP_LONG] += 1
                else:
                    copy(dst, at, slots, first + LENGTH_LEN, length)
                    return length
                continue
        if asked:
            return 0
        asked = True
        if count == 0 or first + r.FRAME_SLOT > slots.size:
            copy(slots, 0, slots, first, count)
            ep[r.EP_FIRST] = first = 0
        n = recv(source.fd, slots, first + count, slots.size - first - count)
        if n <= 0:
            if n != -EAGAIN and n != -EINTR:
                _cut(ep, source.fd, n if n < 0 else r.LOST_END)
            return 0
        ep[r.EP_COUNT] = count + n
