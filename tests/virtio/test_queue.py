"""A device's record of a queue is checked when it comes from outside; queues are numbered pair by pair."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vnetdp.errors import ConfigError
from vnetdp.virtio.queue import (
    RECEIVEQ,
    TRANSMITQ,
    Virtqueue,
    check_num,
    is_receiveq,
    pair_of,
    partner_of,
    queue_of,
    queues_of,
    receiveq,
    ring_len,
    transmitq,
    vring_of,
)

SIZES = [1 << n for n in range(16)]


@pytest.mark.parametrize("num", SIZES)
def test_ring_lengths_are_the_specifications(num: int) -> None:
    check_num(num)
    # Virtio 1.2, 2.7: 16 * size, 6 + 2 * size, 6 + 8 * size.
    assert ring_len(num) == (16 * num, 6 + 2 * num, 6 + 8 * num)


@given(st.integers(-(1 << 40), 1 << 40).filter(lambda n: n not in SIZES))
def test_other_sizes_are_refused(num: int) -> None:
    with pytest.raises(ConfigError, match="power of two"):
        check_num(num)


@given(
    st.builds(
        Virtqueue,
        st.sampled_from(SIZES),
        st.integers(0, (1 << 48) - 1).map(lambda n: 16 * n),
        st.integers(0, 1 << 48).map(lambda n: 2 * n),
        st.integers(0, 1 << 48).map(lambda n: 4 * n),
        st.booleans(),
        st.integers(0, 0xFFFF),
    )
)
def test_a_queue_that_a_driver_can_have_set_up_is_valid(queue: Virtqueue) -> None:
    queue.validate()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num": 0}, "power of two"),
        ({"num": 3}, "power of two"),
        ({"last_avail_idx": -1}, "not between 0 and 65535"),
        ({"last_avail_idx": 0x10000}, "not between 0 and 65535"),
        ({"desc": 0x1008}, "desc address"),
        ({"avail": 0x2001}, "avail address"),
        ({"used": 0x3002}, "used address"),
        ({"desc": 1 << 63}, "desc address 0x8000000000000000 is not below 0x10000000000000"),
        ({"avail": 1 << 52}, "avail address 0x10000000000000 is not below 0x10000000000000"),
        ({"used": (1 << 64) - 4}, "used address 0xfffffffffffffffc is not below 0x10000000000000"),
        ({"desc": -1}, "without addresses"),
        ({"avail": -1}, "without addresses"),
        ({"used": -1}, "without addresses"),
    ],
)
def test_one_wrong_field_is_refused(change: dict[str, Any], says: str) -> None:
    good = Virtqueue(16, 0x1000, 0x2000, 0x3000, True, 5)
    good.validate()
    with pytest.raises(ConfigError, match=says):
        replace(good, **change).validate()


def test_a_new_queue_is_not_set_up() -> None:
    queue = Virtqueue()
    queue.validate()
    assert not queue.has_addresses
    assert not queue.enabled


def test_queues_are_numbered_pair_by_pair_and_the_receiveq_comes_first() -> None:
    numbers = [number for pair in range(3) for number in (receiveq(pair), transmitq(pair))]
    assert numbers == list(range(queues_of(3)))
    for queue in numbers:
        assert queue_of(pair_of(queue), vring_of(queue)) == queue
        assert vring_of(queue) == (RECEIVEQ if is_receiveq(queue) else TRANSMITQ)
        assert pair_of(partner_of(queue)) == pair_of(queue)
        assert is_receiveq(partner_of(queue)) is not is_receiveq(queue)
