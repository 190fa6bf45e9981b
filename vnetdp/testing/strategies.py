"""Hypothesis strategies for frames, descriptor chains, feature sets, faults and schedules. They need the extra `testing`."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache
from typing import Final

from vnetdp_kernels import rows as r
from vnetdp_kernels import spec

from ..backends.faulty import Fault
from ..backends.names import FAULT_POINTS, UNBIND
from ..errors import ConfigError
from ..virtio import features as f
from ..virtio.queue import queues_of
from .schedule import STEPS, Schedule, Setup, Step

try:
    from hypothesis import strategies as st
except ImportError as e:
    raise ConfigError("vnetdp.testing.strategies needs hypothesis: pip install 'vnetdp[testing]'") from e

from .chains import chains as chains
from .chains import malformed_chains as malformed_chains

_ETHER_TYPES: Final = (0x0800, 0x86DD, 0x0806, 0x8100, 0x88B5)
_ADDRESSES: Final = st.sampled_from(
    [bytes.fromhex(text) for text in ("020000000001", "020000000002", "525400123456", "01005e000001", "ffffffffffff")]
)
_FILL: Final = bytes(range(256)) * 258


# --- frames ---


def _filled(seed: int, length: int) -> bytes:
    return _FILL[seed : seed + length]


def frames(min_len: int = spec.ETH_HLEN, max_len: int = 1514) -> st.SearchStrategy[bytes]:
    """Return a strategy for Ethernet frames of *min_len* to *max_len* bytes, without FCS, each end of that range often.

    Addresses are unicast, multicast or broadcast; the payload is made of a seed, and no packet of its EtherType.
    """
    lengths = st.integers(min_len, max_len) | st.sampled_from((min_len, max_len))

    def frame(target: bytes, source: bytes, kind: int, seed: int, length: int) -> bytes:
        head = target + source + kind.to_bytes(2, "big")
        return (head + _filled(seed, max(0, length - len(head))))[:length]

    return st.builds(frame, _ADDRESSES, _ADDRESSES, st.sampled_from(_ETHER_TYPES), st.integers(0, 255), lengths)


def hostile_frames(longest: int = r.FRAME_SLOT - spec.NET_HDR_LEN) -> st.SearchStrategy[bytes]:
    """Return a strategy for frames that no card sends: empty, shorter than a header, or of 1515 to *longest* bytes."""
    long = st.integers(1515, longest) | st.sampled_from((1515, longest))
    return st.binary(max_size=spec.ETH_HLEN - 1) | st.builds(_filled, st.integers(0, 255), long)


def headers(length: int = spec.NET_HDR_LEN) -> st.SearchStrategy[bytes]:
    """Return a strategy for virtio_net_hdr of *length* bytes, 10 or 12, that make sense for each frame of 14 bytes or more.

    Half of them are zeros. The others have a checksum to fill in, and may have a segment to cut (Virtio 1.2, 5.1.6).
    """

    def header(gso: int, ecn: int, size: int) -> bytes:
        packed = struct.pack("<BBHHHH", 1, gso | ecn if gso else 0, gso and spec.ETH_HLEN, gso and size, 6, 4)
        return packed.ljust(length, b"\0")

    offloads = st.builds(header, st.sampled_from((0, 1, 3, 4, 5)), st.sampled_from((0, 0x80)), st.integers(1, 0xFFFF))
    return st.just(bytes(length)) | offloads


def hostile_headers(length: int = spec.NET_HDR_LEN) -> st.SearchStrategy[bytes]:
    """Return a strategy for virtio_net_hdr of any *length* bytes: most of them make no sense."""
    return st.binary(min_size=length, max_size=length)


# --- features ---


def feature_sets(offered: int = f.RING_FEATURES | f.VIRTIO_NET_F_MRG_RXBUF | f.OFFLOADS) -> st.SearchStrategy[int]:
    """Return a strategy for feature bits, subsets of *offered* in which each feature has the features that it needs.

    `NetDevice.device_features` are the features of a device; `vnetdp.features.closure` has the dependencies.
    """
    bits = [1 << bit for bit in range(offered.bit_length()) if offered >> bit & 1]
    if not bits:
        return st.just(0)
    return st.sets(st.sampled_from(bits)).map(lambda chosen: f.closure(sum(chosen)))


# --- faults ---


def faults(
    points: Sequence[str] = FAULT_POINTS, phases: st.SearchStrategy[str] | None = None, pairs: int = 3
) -> st.SearchStrategy[Fault]:
    """Return a strategy for a `Fault`: a verb of *points* that fails once or always, at one pair or ring or at all of them.

    - `phases`: a strategy for `Fault.phase`; None: any phase.
    - `pairs`: queue pairs of the device.
    """

    def at(verb: str) -> st.SearchStrategy[Fault]:
        has_ring = "vring" in verb or verb in ("set_backend", UNBIND)
        return st.builds(
            Fault,
            verb=st.just(verb),
            pair=st.none() | st.integers(0, pairs - 1),
            index=st.none() | st.integers(0, 1) if has_ring else st.none(),
            times=st.sampled_from((1, -1)),
            phase=st.just("") if phases is None else phases,
        )

    return st.sampled_from(points).flatmap(at)


def _fault_text(fault: Fault) -> str:
    """Return *fault* as `Fault.parse` takes it, which knows a ring only together with its pair."""
    where = "" if fault.pair is None else f":{fault.pair}" + (f",{fault.index}" if fault.index is not None else "")
    return f"{fault.verb}{where}:{'once' if fault.times > 0 else 'always'}"


# --- schedules ---


def setups(pairs: int = 2, wire: str = "vnetdp:MailboxEndpoint") -> st.SearchStrategy[Setup]:
    """Return a strategy for the `Setup` of a schedule, with at most *pairs* queue pairs, on the wire *wire*."""
    return st.builds(
        Setup,
        pairs=st.integers(1, pairs),
        num=st.sampled_from((4, 16, 64)),
        first_idx=st.sampled_from((0, 3, 0xFFF0, 0xFFFF)),
        features=st.none() | feature_sets(f.RING_FEATURES | f.VIRTIO_NET_F_MRG_RXBUF),
        wire=st.just(wire),
    )


def schedules(
    setup: st.SearchStrategy[Setup] | Setup | None = None, max_steps: int = 40
) -> st.SearchStrategy[Schedule]:
    """Return a strategy for a `Schedule` of up to *max_steps* steps of any kind, and `settle` as its last.

    `setup`: a strategy for its setup, or the setup itself; None: any of `setups()`. `replay(schedule).check()` runs one,
    and raises the failure with the text that replays it.
    """
    chosen = st.just(setup) if isinstance(setup, Setup) else setups() if setup is None else setup
    return _schedules(chosen, max_steps)


@st.composite
def _schedules(draw: st.DrawFn, setups: st.SearchStrategy[Setup], max_steps: int) -> Schedule:
    setup = draw(setups)
    least = draw(st.sampled_from((0, max_steps // 2)))  # or lists have five or so on average, whatever their limit
    steps = draw(st.lists(_steps(setup.pairs), min_size=least, max_size=max_steps))
    return Schedule(setup, (*steps, Step("settle")))


@cache  # made anew for each example, it took longer than the steps
def _steps(n_pairs: int) -> st.SearchStrategy[Step]:
    """Return a strategy for a step of a device with *n_pairs* queue pairs, `send` and runs more often than the others."""
    ends, pairs = st.sampled_from(("guest", "wire")), st.integers(0, n_pairs - 1)
    budgets = st.sampled_from((64, 1, 2, 3)) | st.integers(1, 64)
    any_headers, any_frames = hostile_headers() | headers(), hostile_frames(2000) | frames()
    drawn: dict[str, tuple[st.SearchStrategy[str] | st.SearchStrategy[int], ...]] = {
        "send": (ends, pairs, st.integers(1, 64), st.sampled_from((60, 61, 1514)) | st.integers(60, 1514)),
        "frame": (ends, pairs, st.builds(lambda header, frame: (header + frame).hex(), any_headers, any_frames)),
        "guest": (budgets,),
        "device": (budgets,),
        "vhost": (budgets,),
        "use": (st.sampled_from(("vhost", "userspace")),),
        "queue": (st.integers(0, queues_of(n_pairs) - 1),),
        "link": (st.sampled_from(("up", "down")),),
        "log": (st.sampled_from(("on", "read", "off")),),
        "fault": (faults(pairs=n_pairs).map(_fault_text),),
    }
    steps = {name: st.builds(Step, st.just(name), st.tuples(*drawn.get(name, ()))) for name in STEPS}
    often = [name for name in steps for _ in range({"send": 6, "guest": 3, "device": 2, "vhost": 3}.get(name, 1))]
    return st.sampled_from(often).flatmap(steps.__getitem__)
