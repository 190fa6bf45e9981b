"""Endpoints that answer each frame: echo sends it back, macswap with its addresses exchanged, reflect replies as a host."""

from __future__ import annotations

from .. import rows as r
from ..platform.atomic import Bytes, Words
from ..platform.jit import inlined, kernel
from .frame import swap_macs
from .reflect import reply


@inlined
def answers(ep: Words) -> bool:
    """Return whether an endpoint answers frames: echo, macswap or reflect."""
    return r.KIND_ECHO <= ep[r.EP_KIND] <= r.KIND_REFLECT


@kernel
def answer(kind: int, frame: Bytes, at: int, length: int) -> int:
    """Make the Ethernet frame of *length* bytes at *at* the answer to it, in place; return its bytes, 0 if it has none."""
    if kind == r.KIND_REFLECT:
        return int(reply(frame, at, length))
    if kind == r.KIND_MACSWAP:
        swap_macs(frame, at, frame, at)
    return length
