"""Each kind of endpoint, one frame at a time: called by `port` for the rings, and by `faulty` for faulty wires."""

from __future__ import annotations

from .. import rows as r
from .. import spec
from ..platform.atomic import Bytes, Words, copy, store_u64_unaligned
from ..platform.io import EAGAIN, read
from ..platform.jit import inlined
from .ledger import stamp


@inlined
def sent_to_tap(ep: Words, written: int) -> int:
    """Return 1 if a TAP took the frame, 0 if it refused it, which is counted, or E_BLOCKED. *written*: of `writev`."""
    if written == -EAGAIN:
        return r.E_BLOCKED
    if written < 0:
        # A TAP that is down (EIO) or dislikes a header (EINVAL) costs this frame, nothing else.
        ep[r.EP_LAST_ERRNO] = -written
        ep[r.EP_DROP_ERROR] += 1
        return 0
    return 1


@inlined
def from_tap(ep: Words, fd: int, dst: Bytes, at: int, room: int) -> int:
    """Read a TAP's next frame to *dst* at *at*; return its bytes, 0 if there is none or it was dropped."""
    length = read(fd, dst, at, room)
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
    return int(length)


@inlined
def slot_for(ep: Words, frames: Bytes, lengths: Words, length: int) -> int:
    """Return where a frame of *length* bytes for an endpoint in Python goes in *frames*. The caller counts it then.

    E_BLOCKED if no slot is free; E_TOO_BIG if the frame fits in none, which is counted.
    """
    slot = ep[r.EP_OUT_COUNT]
    if slot >= lengths.size:
        return r.E_BLOCKED
    slot_len = frames.size // lengths.size
    if length > slot_len:
        ep[r.EP_DROP_LONG] += 1
        return r.E_TOO_BIG
    lengths[slot] = length
    return int(slot * slot_len)


@inlined
def from_slots(ep: Words, frames: Bytes, lengths: Words, dst: Bytes, at: int, room: int) -> int:
    """Copy the next frame of an endpoint in Python to *dst* at *at*; return its bytes, 0 if there is none."""
    length = 0
    slot = 0
    while length == 0:
        if ep[r.EP_COUNT] == 0:
            return 0
        slot = ep[r.EP_FIRST]
        length = lengths[slot]
        ep[r.EP_FIRST] = slot + 1
        ep[r.EP_COUNT] -= 1
        if length > room:
            ep[r.EP_DROP_LONG] += 1
            length = 0
        elif length < spec.NET_HDR_LEN + spec.ETH_HLEN:
            ep[r.EP_DROP_SHORT] += 1
            length = 0
    copy(dst, at, frames, slot * (frames.size // lengths.size), length)
    return int(length)


@inlined
def generate(ep: Words, dst: Bytes, at: int, room: int, now: int) -> int:
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
def ended(ep: Words) -> bool:
    """Return whether a generator makes no frame any more."""
    return bool(ep[r.EP_LIMIT] >= 0 and ep[r.EP_SEQ] >= ep[r.EP_LIMIT])
