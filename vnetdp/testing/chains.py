"""Hypothesis strategies for descriptor chains: valid ones, and one for each rule that a chain can break."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from hypothesis import strategies as st

from vnetdp_kernels import rows as r
from vnetdp_kernels import spec

from ..errors import STATUS_TEXT, ConfigError
from .hand_ring import Chain, Descriptor, HandRing

_NEXT, _WRITE, _INDIRECT = HandRing.NEXT, HandRing.WRITE, HandRing.INDIRECT
_HALF: Final = spec.PAGE_SIZE // 2  # of a buffer: the first is for frames, the second for an indirect table


def chains(ring: HandRing, *, writable: bool, indirect: bool = False) -> st.SearchStrategy[Chain]:
    """Return a strategy for a valid `Chain` of up to 8 descriptors of *ring*, in buffers of the same numbers.

    - `writable`: True for a receiveq, whose buffers the device writes; False for a transmitq.
    - `indirect`: True if VIRTIO_RING_F_INDIRECT_DESC was negotiated: some chains then lie in a table, or end in one.
    """
    return _chains(ring, writable, indirect)


@st.composite
def _chains(draw: st.DrawFn, ring: HandRing, writable: bool, indirect: bool) -> Chain:
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


def malformed_chains(ring: HandRing, *, writable: bool, indirect: bool = False) -> st.SearchStrategy[Chain]:
    """Return a strategy for a `Chain` that breaks a rule, and with it its queue; `Chain.breaks` has the reason.

    Parameters are those of `chains`. The chain uses the first three descriptors and buffers of *ring*; ConfigError if it
    has fewer.
    """
    if ring.num < 3:
        raise ConfigError(f"a ring of {ring.num} descriptors: malformed chains need three")
    good = Descriptor(0, ring.buffer(0), 64, (_WRITE if writable else 0) | _NEXT, 1)
    heads = st.integers(ring.num, 0xFFFF).map(lambda head: Chain(head, (), STATUS_TEXT[r.E_HEAD]))
    kinds = [*_direct(ring, good), *(_indirect(ring, good) if indirect else _not_negotiated(good))]
    return st.one_of(heads, *(st.builds(Chain, st.just(0), kind, st.just(STATUS_TEXT[code])) for code, kind in kinds))


_Kind = tuple[int, st.SearchStrategy[tuple[Descriptor, ...]]]  # the status that it earns, and its descriptors


def _direct(ring: HandRing, good: Descriptor) -> Iterator[_Kind]:
    """Yield malformed chains of direct descriptors; *good* is a good first one, in the queue's direction."""
    last = _last(good)
    yield r.E_ADDRESS, _outside(ring).map(lambda gpa: (good, replace(last, gpa=gpa)))
    yield r.E_NEXT, st.integers(ring.num, 0xFFFF).map(lambda i: (replace(good, following=i),))
    yield r.E_LOOP, st.integers(1, 3).map(lambda n: _cycle(ring, good, n))
    yield r.E_ZERO_LEN, st.just((good, replace(last, length=0)))
    yield r.E_ORDER, st.just((replace(good, flags=_WRITE | _NEXT), replace(last, flags=0)))
    yield r.E_DIRECTION, st.just((replace(good, flags=last.flags ^ _WRITE),))


def _not_negotiated(good: Descriptor) -> Iterator[_Kind]:
    """Yield a chain that is good, but for VIRTIO_RING_F_INDIRECT_DESC, which was not negotiated."""
    yield r.E_INDIRECT_FEATURE, st.just(_table(good, replace(_last(good), at=0)))


def _indirect(ring: HandRing, good: Descriptor) -> Iterator[_Kind]:
    """Yield malformed indirect tables, and descriptors that refer to one."""
    last = _last(good)
    sizes = st.sampled_from((0, 1, 8, 15, 17, 0xFFFFFFF0, 0xFFFFFFFF))
    yield r.E_INDIRECT_LEN, sizes.map(lambda size: (replace(_table(good)[0], length=size),))
    yield r.E_INDIRECT_NEXT, st.just((replace(_table(good, last)[0], flags=_INDIRECT | _NEXT),))
    yield r.E_INDIRECT_NESTED, st.just(_table(good, Descriptor(0, good.gpa, 16, _INDIRECT)))
    yield r.E_ADDRESS, _outside(ring).map(lambda gpa: (Descriptor(0, gpa, 64, _INDIRECT),))
    yield r.E_NEXT, st.integers(2, 0xFFFF).map(lambda i: _table(good, replace(good, following=i), last))
    yield r.E_LOOP, st.integers(0, 1).map(lambda i: _table(good, replace(good, following=i), replace(good, at=1)))


def _last(good: Descriptor) -> Descriptor:
    """Return descriptor 1, a chain's last, in the direction of *good*, its first."""
    return Descriptor(1, good.gpa + 128, 64, good.flags & _WRITE)


def _outside(ring: HandRing) -> st.SearchStrategy[int]:
    """Return a strategy for addresses from which 64 bytes are not guest memory."""
    end = ring.memory.end
    return st.sampled_from((end, end - 1, end - 63, 1 << 63, (1 << 63) - 1, (1 << 64) - 64, (1 << 64) - 1))


def _cycle(ring: HandRing, good: Descriptor, n: int) -> tuple[Descriptor, ...]:
    """Return *n* descriptors, each followed by the next, and the last by the first."""
    return tuple(replace(good, at=i, gpa=ring.buffer(i), following=(i + 1) % n) for i in range(n))


def _table(good: Descriptor, *entries: Descriptor) -> tuple[Descriptor, ...]:
    """Return descriptor 0, which refers to an indirect table, and that table's *entries*."""
    at = good.gpa + _HALF
    size = spec.VIRTQ_DESC_SIZE * len(entries)
    return Descriptor(0, at, size, _INDIRECT, 1), *(replace(entry, table=at) for entry in entries)
