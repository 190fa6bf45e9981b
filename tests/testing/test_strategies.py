"""The strategies: valid data is valid, malformed chains break their queue for the reason that they name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import assume, find, given, settings
from hypothesis import strategies as st

from tests.support.by_hand import CAMPAIGN, scaled
from vnetdp import ConfigError, Fault, GuestMemory, MailboxEndpoint, NetDevice, features
from vnetdp.errors import STATUS_TEXT
from vnetdp.testing import READY, Chain, HandRing, bring_up, strategies
from vnetdp_kernels import rows as r
from vnetdp_kernels import spec

RINGS = features.VIRTIO_F_VERSION_1 | features.VIRTIO_NET_F_MRG_RXBUF
FRAME = bytes(14)
USED = spec.NET_HDR_LEN + len(FRAME)
FEW = settings(max_examples=2000 if CAMPAIGN else scaled(60, 20))


@contextmanager
def brought_up(indirect: bool) -> Iterator[tuple[NetDevice, MailboxEndpoint, list[HandRing]]]:
    wanted = RINGS | (features.VIRTIO_RING_F_INDIRECT_DESC if indirect else 0)
    with (
        GuestMemory.create([(0, 1 << 18)]) as memory,
        MailboxEndpoint() as wire,
        NetDevice(memory, wire, threaded=False) as device,
    ):
        rings = bring_up(device, wanted, num=8)
        device.set_status(READY)
        yield device, wire, rings


@FEW
@given(st.data(), st.booleans(), st.booleans())
def test_a_device_uses_each_valid_chain(data: st.DataObject, writable: bool, indirect: bool) -> None:
    with brought_up(indirect) as (device, wire, rings):
        ring = rings[0 if writable else 1]
        for _ in range(3):
            chain = data.draw(strategies.chains(ring, writable=writable, indirect=indirect))
            pieces = [desc.length for desc in chain.descriptors if not desc.flags & HandRing.INDIRECT]
            if writable:
                assume(sum(pieces) >= USED)
                wire.put(FRAME)
            ring.lay(chain)
            device.step()
            assert device.ring_errors() == []
            assert ring.taken() == [(chain.head, USED if writable else 0)]
        assert chain.breaks == ""


@FEW
@given(st.data(), st.booleans(), st.booleans())
def test_a_queue_breaks_at_a_malformed_chain_for_the_reason_that_it_names(
    data: st.DataObject, writable: bool, indirect: bool
) -> None:
    with brought_up(indirect) as (device, wire, rings):
        index = 0 if writable else 1
        chain = data.draw(strategies.malformed_chains(rings[index], writable=writable, indirect=indirect))
        rings[index].lay(chain)
        wire.put(FRAME)
        device.step()
        assert [str(error) for error in device.ring_errors()] == [f"queue {index}: {chain.breaks}"]
        assert rings[index].taken() == []


def breaks_for(reason: str) -> Callable[[Chain], bool]:
    return lambda chain: chain.breaks == reason


@pytest.mark.parametrize("indirect", [False, True])
def test_malformed_chains_have_every_reason(indirect: bool) -> None:
    tables = {r.E_INDIRECT_LEN, r.E_INDIRECT_NEXT, r.E_INDIRECT_NESTED}
    wanted = {r.E_HEAD, r.E_ADDRESS, r.E_NEXT, r.E_LOOP, r.E_ZERO_LEN, r.E_ORDER, r.E_DIRECTION}
    wanted |= tables if indirect else {r.E_INDIRECT_FEATURE}
    with brought_up(indirect) as (_, _, rings):
        chains = strategies.malformed_chains(rings[1], writable=False, indirect=indirect)
        for code in wanted:
            find(chains, breaks_for(STATUS_TEXT[code]))


def test_malformed_chains_need_three_descriptors() -> None:
    too_few = pytest.raises(ConfigError, match="a ring of 2 descriptors: malformed chains need three")
    with GuestMemory.create([(0, 1 << 18)]) as memory, too_few:
        strategies.malformed_chains(HandRing(memory, 0, 2), writable=False)


@given(
    strategies.frames(14, 200), strategies.hostile_frames(3000), strategies.headers(10), strategies.hostile_headers()
)
def test_frames_and_headers_have_the_lengths_asked_for(frame: bytes, odd: bytes, header: bytes, wild: bytes) -> None:
    assert 14 <= len(frame) <= 200
    assert len(odd) < 14 or 1514 < len(odd) <= 3000
    assert (len(header), len(wild)) == (10, 12)


@given(strategies.feature_sets())
def test_feature_sets_have_all_that_their_features_need(bits: int) -> None:
    assert features.missing_dependency(bits) is None


def test_feature_sets_reach_what_is_offered_and_no_more() -> None:
    offered = features.VIRTIO_F_VERSION_1 | features.VIRTIO_NET_F_CSUM | features.VIRTIO_NET_F_HOST_TSO4
    assert find(strategies.feature_sets(offered), lambda bits: bits == offered) == offered
    assert find(strategies.feature_sets(0), lambda _: True) == 0


@given(strategies.faults(points=("set_backend", "set_mtu"), phases=st.just("final"), pairs=1))
def test_faults_are_at_the_points_and_in_the_phases_asked_for(fault: Fault) -> None:
    assert (fault.verb in ("set_backend", "set_mtu"), fault.phase, fault.pair in (None, 0)) == (True, "final", True)


def test_without_hypothesis_the_extra_that_brings_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    monkeypatch.delitem(sys.modules, "vnetdp.testing.strategies")
    with pytest.raises(ConfigError, match=r"needs hypothesis: pip install 'vnetdp\[testing\]'$"):
        importlib.import_module("vnetdp.testing.strategies")
