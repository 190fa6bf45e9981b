"""Hypothesis strategies for descriptor chains: valid ones, and one for each rule that a chain can break."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from hypothesis import strategies as st

from vnetdp_kernels import rows as r
from vnetdp_kernels import spec

from ..errors import STATUS_TEXT, ConfigError
from .hand_ring import Chain, Descriptor, HandRing

_NEXT, _WRITE, _INDIRECT = HandRing.NEXT, HandRing.WRITE, HandRing.INDIRECT
_HALF: Final = spec.PAGE_SIZE // 2  # of a buffer: the first is for frames, the second for an indirect table


@st.composite
def chains(draw: st.DrawFn, ring: HandRing, *, writable: bool, indirect: bool = False) -> Chain:
    """Return a strategy for a valid `Chain` of up to 8 descriptors of *ring*, in buffers of the same numbers.

    - `writable`: True for a receiveq, whose buffers the device writes; False for a transmitq.
    - `indirect`: True if VIRTIO_RING_F_INDIRECT_DESC was negotiated: some chains then lie in a table, or end in one.
    """
    ids = draw(st.lists(st.integers(0, ring.num - 1), min_size=1, max_size=min(8, ring.num), unique=True))
    direct = draw(st.integers(0, len(ids))) if indirect else len(ids)
    last = len(ids) - 1
    descriptors = []
    table = None
    for k, i in enumerate(ids):
        skip = draw(st.integers(0, 100))
        gpa, length = ring.buffer(i) + skip, draw(st.integers(1, _HALF - skip))
        flags = (_WRITE if writable else 0) | (_NEXT if k < last else 0)
        if k == direct:
            table = ring.buffer(i) + _HALF
            descriptors.append(Descriptor(i, table, spec.VIRTQ_DESC_SIZE * (len(ids) - k), _INDIRECT))
        if table is None:
            descriptors.append(Descriptor(i, gpa, length, flags, ids[k + 1] if k < last else 0))
        else:
            descriptors.append(Descriptor(k - direct, gpa, length, flags, k - direct + 1, table))
    return Chain(ids[0], tuple(descriptors))


@st.composite
def malformed_chains(draw: st.DrawFn, ring: HandRing, *, writable: bool, indirect: bool = False) -> Chain:
    """Return a strategy for a `Chain` that breaks a rule, and with it its queue; `Chain.breaks` has the reason.

    Parameters are those of `chains`. The chain uses the first three descriptors and buffers of *ring*; ConfigError if it
    has fewer.
    """
    if ring.num < 3:
        raise ConfigError(f"a ring of {ring.num} descriptors: malformed chains need three")
    good = Descriptor(0, ring.buffer(0), 64, (_WRITE if writable else 0) | _NEXT, 1)
    code, make = draw(st.sampled_from((*_DIRECT, *(_TABLES if indirect else _NO_TABLES))))
    head = draw(st.integers(ring.num, 0xFFFF)) if code == r.E_HEAD else 0
    return Chain(head, make(draw, ring, good), STATUS_TEXT[code])


_Make = Callable[[st.DrawFn, HandRing, Descriptor], tuple[Descriptor, ...]]


def _last(good: Descriptor, gpa: int | None = None, length: int = 64) -> Descriptor:
    """Return descriptor 1, a chain's last, in the direction of *good*, its first."""
    return Descriptor(1, good.gpa + 128 if gpa is None else gpa, length, good.flags & _WRITE)


def _outside(draw: st.DrawFn, ring: HandRing) -> int:
    """Return an address from which 64 bytes are not guest memory."""
    end = ring.memory.end
    return draw(st.sampled_from((end, end - 1, end - 63, 1 << 63, (1 << 63) - 1, (1 << 64) - 64, (1 << 64) - 1)))


def _cycle(draw: st.DrawFn, ring: HandRing, good: Descriptor) -> tuple[Descriptor, ...]:
    """Return one to three descriptors, each followed by the next, and the last by the first."""
    n = draw(st.integers(1, 3))
    return tuple(replace(good, at=i, gpa=ring.buffer(i), following=(i + 1) % n) for i in range(n))


def _table(good: Descriptor, *entries: Descriptor, length: int | None = None, flags: int = 0) -> tuple[Descriptor, ...]:
    """Return descriptor 0, which refers to an indirect table, and that table's *entries*."""
    at = good.gpa + _HALF
    size = spec.VIRTQ_DESC_SIZE * len(entries) if length is None else length
    return Descriptor(0, at, size, _INDIRECT | flags, 1), *(replace(entry, table=at) for entry in entries)


def _beyond(draw: st.DrawFn, ring: HandRing, good: Descriptor) -> Descriptor:
    return replace(good, following=draw(st.integers(ring.num, 0xFFFF)))


_BAD_LENGTHS: Final = st.sampled_from((0, 1, 8, 15, 17, 0xFFFFFFF0, 0xFFFFFFFF))
_DIRECT: Final[tuple[tuple[int, _Make], ...]] = (
    (r.E_HEAD, lambda draw, ring, good: ()),
    (r.E_ADDRESS, lambda draw, ring, good: (good, _last(good, _outside(draw, ring)))),
    (r.E_NEXT, lambda draw, ring, good: (_beyond(draw, ring, good),)),
    (r.E_LOOP, _cycle),
    (r.E_ZERO_LEN, lambda draw, ring, good: (good, _last(good, length=0))),
    (r.E_ORDER, lambda draw, ring, good: (replace(good, flags=_WRITE | _NEXT), replace(_last(good), flags=0))),
    (r.E_DIRECTION, lambda draw, ring, good: (replace(good, flags=good.flags & _WRITE ^ _WRITE),)),
)
_NO_TABLES: Final[tuple[tuple[int, _Make], ...]] = (
    (r.E_INDIRECT_FEATURE, lambda draw, ring, good: _table(good, replace(_last(good), at=0))),
)
_TABLES: Final[tuple[tuple[int, _Make], ...]] = (
    (r.E_INDIRECT_LEN, lambda draw, ring, good: _table(good, length=draw(_BAD_LENGTHS))),
    (r.E_INDIRECT_NEXT, lambda draw, ring, good: _table(good, replace(_last(good), at=0), flags=_NEXT)),
    (r.E_INDIRECT_NESTED, lambda draw, ring, good: _table(good, Descriptor(0, good.gpa, 16, _INDIRECT))),
    (r.E_ADDRESS, lambda draw, ring, good: (Descriptor(0, _outside(draw, ring), 64, _INDIRECT),)),
    (r.E_NEXT, lambda draw, ring, good: _table(good, _beyond(draw, ring, good), _last(good))),
    (r.E_LOOP, lambda draw, ring, good: _table(good, replace(good, following=0), _last(good))),
)
