"""What a guest remembers lies in its memory, and comes from outside: what no driver leaves is refused before it runs."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.migration.rig import SMALL
from tests.support.by_hand import frame
from vnetdp.device.device import NetDevice
from vnetdp.endpoints.loopback import EchoEndpoint
from vnetdp.errors import ConfigError
from vnetdp.guest.driver import Driver, memory_for
from vnetdp.migration.machine import Machine
from vnetdp.virtio import features as f
from vnetdp_kernels import rows as r
from vnetdp_kernels import spec

NUM = 16
MODERN = f.VIRTIO_F_VERSION_1
FEATURES = [
    None,
    0,
    MODERN,
    MODERN | f.VIRTIO_F_IN_ORDER,
    MODERN | f.VIRTIO_NET_F_MRG_RXBUF | f.VIRTIO_RING_F_EVENT_IDX,
    f.VIRTIO_NET_F_MRG_RXBUF | f.VIRTIO_F_IN_ORDER,
]

STEPS = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 64), st.integers(1, 64)), max_size=12)


@given(st.sampled_from(FEATURES), st.sampled_from((1, 4, NUM)), st.sampled_from((0, 5, 0xFFF8)), STEPS)
def test_what_a_driver_leaves_is_taken(wanted: int | None, num: int, first_idx: int, steps: list[Any]) -> None:
    """Frames sent, then moved so far by the device, and so far by the driver: it may stop anywhere."""
    with (
        memory_for(num=num) as memory,
        EchoEndpoint() as echo,
        NetDevice(memory, echo, threaded=False) as device,
        Driver(device, memory, num=num, wanted=wanted, first_idx=first_idx) as driver,
    ):
        for queue in device.queues:
            queue.last_avail_idx = first_idx
        parts = [[queue.desc, queue.avail, queue.used] for queue in device.queues]
        for frames, device_budget, driver_budget in steps:
            for n in range(frames):
                driver.send(frame(n))
            device.step(device_budget)
            assert driver.check_adopted(memory.end) == parts
            driver.step(driver_budget)
            assert driver.check_adopted(memory.end) == parts


# --- what no driver leaves ---


@pytest.fixture(params=[MODERN, MODERN | f.VIRTIO_F_IN_ORDER], ids=["any order", "in order"])
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    """One that has receive buffers, and a few frames to the device, in flight: the descriptors from 8 on are free."""
    with (
        memory_for(num=NUM) as memory,
        EchoEndpoint() as echo,
        NetDevice(memory, echo, threaded=False) as device,
        Driver(device, memory, num=NUM, wanted=request.param) as driver,
    ):
        for n in range(5):
            driver.send(frame(n))
        driver.step(3)
        device.step()
        driver.step(2)
        driver.check_adopted(memory.end)
        yield driver


def assert_refused(driver: Driver) -> None:
    with pytest.raises(ConfigError):
        driver.check_adopted(driver.memory.end)


FIXED = (
    *(r.DVQ_NUM, r.DVQ_DESC, r.DVQ_AVAIL, r.DVQ_USED, r.DVQ_EVENT_IDX, r.DVQ_IN_ORDER, r.DVQ_MRG_RXBUF),
    *(r.DVQ_HDR_LEN, r.DVQ_BUF_OFFSET, r.DVQ_BUF_GPA, r.DVQ_BUF_LEN),
)
INDICES = (r.DVQ_AVAIL_IDX, r.DVQ_PUBLISHED_IDX, r.DVQ_LAST_USED_IDX, r.DVQ_NUM_FREE, r.DVQ_IN_FLIGHT)
WILD = (-1, NUM, 1 << 16, 1 << 45, (1 << 63) - 1, -(1 << 63))


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("slot", FIXED)
def test_a_row_of_other_rings_buffers_or_features(driver: Driver, index: int, slot: int) -> None:
    was = int(driver.dvqs[index, slot])
    for wrong in (*WILD, was + 1, was + spec.PAGE_SIZE, was ^ 1):
        if wrong != was:
            driver.dvqs[index, slot] = wrong
            assert_refused(driver)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("slot", INDICES)
def test_indices_and_counts_that_do_not_agree(driver: Driver, index: int, slot: int) -> None:
    was = int(driver.dvqs[index, slot])
    for wrong in (*WILD, was + 1, was - 1):
        if wrong != was:
            driver.dvqs[index, slot] = wrong
            assert_refused(driver)


@pytest.mark.parametrize("slot", [r.DVQ_KICKED_IDX, r.DVQ_USED_IDX, r.DVQ_FREE_HEAD, r.DVQ_FREE_TAIL])
def test_indices_out_of_range(driver: Driver, slot: int) -> None:
    for wrong in (-1, 1 << 16, 1 << 45, -(1 << 63)):
        driver.dvqs[1, slot] = wrong
        assert_refused(driver)


@pytest.mark.parametrize(
    ("slot", "wrong"),
    [
        (r.DVQ_STATUS, 1),
        (r.DVQ_STATUS, -(1 << 40)),
        (r.DVQ_BATCH_ID, -2),
        (r.DVQ_BATCH_ID, NUM),
        (r.DVQ_BATCH_ID, 8),  # free
    ],
)
def test_a_row_that_says_what_cannot_be(driver: Driver, slot: int, wrong: int) -> None:
    driver.dvqs[1, slot] = wrong
    assert_refused(driver)


@pytest.mark.parametrize(
    ("slot", "wrong"),
    [
        (r.DS_NEXT, 8),  # itself
        (r.DS_NEXT, NUM),
        (r.DS_NEXT, -1),
        (r.DS_N_DESC, 1),
        (r.DS_N_DESC, 2),
        (r.DS_N_DESC, 1 << 40),
    ],
)
def test_a_free_list_that_leads_elsewhere(driver: Driver, slot: int, wrong: int) -> None:
    assert driver.states[1, 8, r.DS_N_DESC] == 0
    driver.states[1, 8, slot] = wrong
    assert_refused(driver)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("wrong", [-1, 1, 1 << 40])
def test_a_chain_longer_than_its_buffer(driver: Driver, index: int, wrong: int) -> None:
    assert driver.states[index, :, r.DS_N_DESC].any()
    driver.states[index, :, r.DS_LEN_IN] = wrong
    assert_refused(driver)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("n", [0, NUM - 1])
def test_a_descriptor_of_another_buffer(driver: Driver, index: int, n: int) -> None:
    """In flight or not: its device would write there, or read."""
    row = driver.dvqs[index]
    at = int(row[r.DVQ_DESC]) + spec.VIRTQ_DESC_SIZE * n
    gpa = int(row[r.DVQ_BUF_GPA] + n * row[r.DVQ_BUF_LEN])
    flags = spec.VIRTQ_DESC_F_WRITE if index == 0 else 0
    length = int(row[r.DVQ_BUF_LEN])
    for wrong in (
        (driver.memory.end - 4096, length, flags, 0),
        (gpa + 64, length, flags, 0),
        (gpa, length + 1, flags, 0),
        (gpa, 0, flags, 0),
        (gpa, length, flags ^ spec.VIRTQ_DESC_F_WRITE, 0),
        (gpa, length, flags | spec.VIRTQ_DESC_F_NEXT, 1),
        (gpa, length, flags | spec.VIRTQ_DESC_F_INDIRECT, 0),
    ):
        driver.memory.mem[at : at + 16] = list(struct.pack("<QIHH", *wrong))
        assert_refused(driver)


@pytest.mark.parametrize("slot", [r.DVQ_ORDER_HEAD, r.DVQ_BATCH_LEN])
def test_what_is_known_of_the_order(driver: Driver, slot: int) -> None:
    row, state = driver.dvqs[0], driver.states[0]
    head = int(state[:, r.DS_N_DESC].argmax())
    if not row[r.DVQ_IN_ORDER]:
        row[r.DVQ_BATCH_ID] = head
        assert_refused(driver)
        return
    if slot == r.DVQ_BATCH_LEN:
        row[r.DVQ_BATCH_ID] = head
        driver.check_adopted(driver.memory.end)
    for wrong in (-1, 1 << 32, 1 << 45, -(1 << 63)):
        row[slot] = wrong
        assert_refused(driver)


@pytest.mark.parametrize("first", [-spec.PAGE_SIZE, 1 << 30, 1 << 62])
def test_a_queue_outside_guest_memory(driver: Driver, first: int) -> None:
    driver.dvqs[1, r.DVQ_DESC] = first
    with pytest.raises(ConfigError, match=r"queue 1: the driver's ring at -?0x[0-9a-f]+ lies outside guest memory"):
        driver.check_adopted(driver.memory.end)


def test_queues_one_over_the_other(driver: Driver) -> None:
    driver.dvqs[0], driver.states[0] = driver.dvqs[1], driver.states[1]
    driver.states[1, :, r.DS_LEN_IN] = 0
    assert_refused(driver)


def test_queues_over_what_is_no_queues(driver: Driver) -> None:
    ends = [sum(driver.place_of(index)) for index in range(2)]
    driver.check_adopted(spec.align_up(max(ends), spec.PAGE_SIZE))
    with pytest.raises(ConfigError, match="queues overlap, or reach outside guest addresses"):
        driver.check_adopted(max(ends) - spec.PAGE_SIZE)


# --- the guest's end of the traffic, and the device's rings ---


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda machine: machine.guest.rows[:, r.EP_KIND].fill(r.KIND_TAP), "the traffic"),
        (lambda machine: machine.guest.rows[:, r.EP_SIZE].fill(1 << 40), "the traffic"),
        (lambda machine: machine.guest.rows[:, r.EP_SIZE].fill(0), "the traffic"),
        (lambda machine: machine.guest.rows[:, r.EP_FIRST].fill(1), "the traffic"),
        (lambda machine: machine.guest.rows[:, r.EP_SEQ].fill(-2), "the traffic"),
        (lambda machine: machine.guest.ledger[:, r.LEDGER_NEXT].fill(-1), "ledger"),
        (
            lambda machine: setattr(machine.device.queues[1], "used", machine.memory.end - 4096),
            "device and driver have different rings",
        ),
        (
            lambda machine: setattr(machine.device.queues[0], "num", 2 * SMALL.num),
            "device and driver have different rings",
        ),
        (lambda machine: machine.driver.dvqs[3].fill(0), "queue 3"),
    ],
)
def test_a_guest_that_is_not_this_machines(
    machines: tuple[Machine, Machine], change: Callable[[Machine], None], says: str
) -> None:
    machine = machines[0]
    machine.stop()
    machine.check_guest()
    change(machine)
    with pytest.raises(ConfigError, match=says):
        machine.check_guest()
