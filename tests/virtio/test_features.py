"""Feature bits: their names, what depends on what, and what a header looks like for it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vnetdp.errors import ConfigError
from vnetdp.virtio import features as f
from vnetdp_kernels import spec

ANY = st.sets(st.integers(0, 63)).map(lambda bits: sum(1 << bit for bit in bits))


@given(ANY)
def test_the_closure_is_the_largest_set_whose_needs_are_met(features: int) -> None:
    closed = f.closure(features)
    assert closed & ~features == 0
    assert f.missing_dependency(closed) is None
    assert f.closure(closed) == closed
    # Nothing that was left out could have stayed, alone.
    for bit in range(64):
        if (features & ~closed) >> bit & 1:
            assert f.missing_dependency(closed | 1 << bit) is not None


@pytest.mark.parametrize(
    ("feature", "needs"),
    [
        (f.VIRTIO_NET_F_GUEST_TSO4, f.VIRTIO_NET_F_GUEST_CSUM),
        (f.VIRTIO_NET_F_GUEST_ECN, f.VIRTIO_NET_F_GUEST_TSO6 | f.VIRTIO_NET_F_GUEST_CSUM),
        (f.VIRTIO_NET_F_HOST_TSO6, f.VIRTIO_NET_F_CSUM),
        (f.VIRTIO_NET_F_HOST_ECN, f.VIRTIO_NET_F_HOST_TSO4 | f.VIRTIO_NET_F_CSUM),
        (f.VIRTIO_NET_F_MQ, f.VIRTIO_NET_F_CTRL_VQ),
        (f.VIRTIO_NET_F_GUEST_ANNOUNCE, f.VIRTIO_NET_F_CTRL_VQ),
    ],
)
def test_needs_are_the_specifications(feature: int, needs: int) -> None:
    missing = f.missing_dependency(feature)
    assert missing is not None
    assert missing[0] == feature
    assert missing[1] & needs
    assert f.missing_dependency(feature | needs) is None
    assert f.closure(feature) == 0


def test_bits_are_where_the_specification_has_them() -> None:
    # Virtio 1.2, 5.1.3 and 6.
    for bit, value in (
        (0, f.VIRTIO_NET_F_CSUM),
        (1, f.VIRTIO_NET_F_GUEST_CSUM),
        (3, f.VIRTIO_NET_F_MTU),
        (5, f.VIRTIO_NET_F_MAC),
        (15, f.VIRTIO_NET_F_MRG_RXBUF),
        (16, f.VIRTIO_NET_F_STATUS),
        (17, f.VIRTIO_NET_F_CTRL_VQ),
        (22, f.VIRTIO_NET_F_MQ),
        (26, f.VHOST_F_LOG_ALL),
        (28, f.VIRTIO_RING_F_INDIRECT_DESC),
        (29, f.VIRTIO_RING_F_EVENT_IDX),
        (32, f.VIRTIO_F_VERSION_1),
        (34, f.VIRTIO_F_RING_PACKED),
        (35, f.VIRTIO_F_IN_ORDER),
        (40, f.VIRTIO_F_RING_RESET),
    ):
        assert value == 1 << bit


def test_names_say_every_bit() -> None:
    assert f.names(0) == []
    assert f.names(f.VIRTIO_NET_F_CSUM | f.VIRTIO_F_VERSION_1 | 1 << 63) == ["csum", "version_1", "bit 63"]
    assert len(set(f.NAMES.values())) == len(f.NAMES)


@given(ANY)
def test_names_are_read_back(features: int) -> None:
    features &= sum(f.NAMES.values())
    everything = (1 << 64) - 1
    assert f.parse(",".join(f.names(features))) == (features or everything)
    assert f.parse(",".join("-" + name for name in f.names(features))) == everything & ~features


def test_lists_of_features_say_what_is_left_or_what_is_left_out() -> None:
    assert f.parse("") == (1 << 64) - 1
    assert f.parse(" CSUM , guest_csum,,") == f.VIRTIO_NET_F_CSUM | f.VIRTIO_NET_F_GUEST_CSUM
    with pytest.raises(ConfigError, match="unknown feature 'tso'"):
        f.parse("csum,tso")
    for mixed in ("csum,-guest_csum", "+csum,guest_csum"):
        with pytest.raises(ConfigError, match="either names alone, or names with a sign"):
            f.parse(mixed)


def test_lists_of_features_change_the_usual_ones() -> None:
    usual = f.VIRTIO_NET_F_CSUM | f.VIRTIO_NET_F_MTU
    assert f.parse("", usual=usual) == usual
    assert f.parse("+mac", usual=usual) == usual | f.VIRTIO_NET_F_MAC
    assert f.parse("-csum,+mac", usual=usual) == f.VIRTIO_NET_F_MTU | f.VIRTIO_NET_F_MAC
    assert f.parse("mac", usual=usual) == f.VIRTIO_NET_F_MAC
    with pytest.raises(ConfigError, match="is both left out and added: take one sign"):
        f.parse("-mac,+mac", usual=usual)


@given(ANY)
def test_what_is_needed_is_added(features: int) -> None:
    added = f.with_needs(features)
    assert added & features == features
    assert f.closure(added) == added
    assert added == features or f.missing_dependency(features) is not None


@pytest.mark.parametrize("features", [0, f.VIRTIO_F_VERSION_1, f.VIRTIO_NET_F_MRG_RXBUF, f.VIRTIO_RING_F_EVENT_IDX])
def test_header_lengths(features: int) -> None:
    modern = features & (f.VIRTIO_F_VERSION_1 | f.VIRTIO_NET_F_MRG_RXBUF)
    assert f.header_len(features) == (12 if modern else 10)


@given(ANY)
def test_offload_masks_follow_their_own_side_only(features: int) -> None:
    guest, host = f.guest_offload_mask(features), f.host_offload_mask(features)
    assert bool(guest & spec.OFFLOAD_TSO4) == bool(features & f.VIRTIO_NET_F_GUEST_TSO4)
    assert bool(guest & spec.OFFLOAD_CSUM) == bool(features & f.VIRTIO_NET_F_GUEST_CSUM)
    assert bool(host & spec.OFFLOAD_TSO6) == bool(features & f.VIRTIO_NET_F_HOST_TSO6)
    assert bool(host & spec.OFFLOAD_CSUM) == bool(features & f.VIRTIO_NET_F_CSUM)
    assert f.guest_offload_mask(features & ~(f.GUEST_OFFLOADS | f.VIRTIO_NET_F_GUEST_UFO)) == 0
    assert f.host_offload_mask(features & ~(f.HOST_OFFLOADS | f.VIRTIO_NET_F_HOST_UFO)) == 0
