"""Published bugs of other programs that speak vhost-user, by name: each has a test, here or in a file beside this one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.by_hand import PATIENCE, frame, no_descriptor_leaks, wait_for
from tests.support.vhost_user import (
    EVENT_IDX,
    FEATURES,
    GPA,
    LOG_ALL,
    MEMORY_LEN,
    NUM,
    PAIRS,
    UVA,
    VERSION_1,
    BackEnd,
    ByHand,
    Guest,
    InThread,
    costs_nothing,
    region,
    state,
    table,
    u64,
)
from tests.vhost_user import test_hostile_descriptors as descriptors
from tests.vhost_user import test_hostile_memory as memory
from tests.vhost_user import test_hostile_messages as messages
from tests.vhost_user import test_recovery as recovery
from tests.vhost_user import test_transport as transport
from vnetdp.device.device import NetDevice
from vnetdp.device.owners import Owner
from vnetdp.endpoints.loopback import EchoEndpoint
from vnetdp.guest.driver import Driver, memory_for
from vnetdp.shared.memory import GuestMemory
from vnetdp.vhost_user.front_end.front_end import VhostUserFrontEnd
from vnetdp.vhost_user.message import Request

R = Request
PAGE = 4096
HALF = MEMORY_LEN // 2


@contextmanager
def running(back_end: BackEnd, refusals: int) -> Iterator[Guest]:
    """Give a guest whose rings all run; it leaves at the end, and costs nothing but so many lines of the log."""
    with costs_nothing(back_end, refusals), ByHand.dial(back_end.path) as end, Guest(end) as guest:
        end.shake_hands()
        guest.share()
        guest.start(0, 1, 2, 3)
        guest.echo()
        yield guest
        end.leave()


@contextmanager
def echoing(guest: Guest, pair: int) -> Iterator[Callable[[], None]]:
    """Have frames go round on a pair, one after another, in a thread; give a function that waits for a few more."""
    done = 0
    stop = threading.Event()

    def run() -> None:
        nonlocal done
        while not stop.is_set():
            guest.echo(done & 0xFF, pair)
            done += 1

    def more() -> None:
        enough = done + 3
        wait_for(lambda: done >= enough or not thread.is_alive(), "frames go round")
        assert thread.is_alive()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield more
    finally:
        stop.set()
        thread.join(PATIENCE)


def test_a_ring_s_size_again_and_again(back_end: BackEnd) -> None:
    """DPDK allocated with each SET_VRING_NUM, and kept what it had."""
    with costs_nothing(back_end, 1), ByHand.dial(back_end.path) as end, Guest(end) as guest:
        end.shake_hands()
        guest.share()
        for n in range(2000):
            assert end.tell(R.SET_VRING_NUM, state(n % 4, 1 << n % 16))
        guest.start(0, 1, 2, 3)
        guest.echo(1)
        assert not end.tell(R.SET_VRING_NUM, state(0, 2 * NUM))
        guest.echo(2)
        guest.echo(3, pair=1)
        end.leave()


def test_the_base_of_a_ring_that_never_was(back_end: BackEnd) -> None:
    """A front end with several pairs comes back and stops them all, though its guest has used one."""
    with costs_nothing(back_end, 0):
        for _ in range(3):
            with ByHand.dial(back_end.path) as end, Guest(end) as guest:
                end.shake_hands()
                for index in range(2 * PAIRS):
                    assert end.ask(R.GET_VRING_BASE, state(index, 0)) == state(index, 0)
                guest.share()
                guest.start(0, 1)
                guest.echo()
                for index in (2, 3):
                    assert end.ask(R.GET_VRING_BASE, state(index, 0)) == state(index, 0)
                guest.start(2, 3)
                guest.echo(1, pair=1)
                end.leave()


def test_a_memory_table_under_traffic(back_end: BackEnd) -> None:
    """The rings stay where they are, and the table around them changes: memory is plugged in, a migration begins."""
    elsewhere = region(GPA + MEMORY_LEN, MEMORY_LEN, UVA + MEMORY_LEN)
    whole, halves = (
        [region(GPA, MEMORY_LEN, UVA)],
        [region(GPA, HALF, UVA), region(GPA + HALF, HALF, UVA + HALF, HALF)],
    )
    with running(back_end, 0) as guest, echoing(guest, 0) as more, echoing(guest, 1) as more_too:
        for n in range(25):
            for regions in (whole, halves, [elsewhere, *halves], [*whole, elsewhere]):
                assert guest.end.tell(R.SET_MEM_TABLE, table(*regions), [guest.fd] * len(regions))
            assert guest.end.tell(R.REM_MEM_REG, bytes(8) + elsewhere)
            assert guest.end.tell(R.ADD_MEM_REG, bytes(8) + elsewhere, [guest.fd])
            assert guest.end.tell(R.SET_VRING_ADDR, guest.addr(n % 4, n // 4 % 2, guest.rings[n % 4].used))
            more()
            more_too()


def test_a_table_of_other_memory(back_end: BackEnd) -> None:
    """Whoever keeps an address of before finds nonsense there."""
    with running(back_end, 0) as guest:
        for n in range(10):
            other = GuestMemory.create([(GPA, MEMORY_LEN)])
            other.write(GPA, guest.memory.read(GPA, MEMORY_LEN))
            assert guest.end.tell(R.SET_MEM_TABLE, guest.table, [other.regions[0].fd])
            guest.memory.write(GPA, b"\xff" * MEMORY_LEN)
            guest.memory.close()
            guest.memory = other
            for ring in guest.rings:
                ring.memory = other
            guest.echo(n)
            guest.echo(n, pair=1)


def test_ring_addresses_that_move(back_end: BackEnd) -> None:
    with running(back_end, 0) as guest:
        there = guest.rings[-1].end
        for n in range(12):
            index = n % 4
            ring = guest.rings[index]
            before = (ring.desc, ring.avail, ring.used)
            ring.desc, ring.avail, ring.used = (there + (3 * n + k) * PAGE for k in range(3))
            for old, new in zip(before, (ring.desc, ring.avail, ring.used), strict=True):
                guest.memory.write(new, guest.memory.read(old, PAGE))
            assert guest.end.tell(R.SET_VRING_ADDR, guest.addr(index))
            for old in before:
                guest.memory.write(old, b"\xff" * PAGE)
            guest.echo(n)
            guest.echo(n, pair=1)


@pytest.mark.parametrize("flipped", [VERSION_1, EVENT_IDX, 1 << 15, EVENT_IDX | LOG_ALL], ids=hex)
def test_features_that_change_while_rings_run(back_end: BackEnd, flipped: int) -> None:
    """LOG_ALL may: that is how a migration begins, and how it is given up."""
    with running(back_end, 5) as guest:
        for n in range(5):
            assert not guest.end.tell(R.SET_FEATURES, u64(FEATURES ^ flipped))
            guest.echo(n)
            for features in (FEATURES | LOG_ALL, FEATURES):
                assert guest.end.tell(R.SET_FEATURES, u64(features))
                guest.echo(n, pair=1)


@pytest.mark.parametrize("first", ["the back end", "the connection", "its socket"])
def test_a_device_outlives_what_serves_it(tmp_path: Path, first: str) -> None:
    """The other way round: the guest's card is there still when its back end is not, is used, goes on, and is stopped."""
    with no_descriptor_leaks(), ExitStack() as stack:
        back_end = InThread(tmp_path)
        stack.callback(lambda: back_end.close() if back_end.alive() else None)
        front_end = VhostUserFrontEnd(back_end.path, 1, queue_size=NUM)
        stack.callback(front_end.close)
        wait_for(lambda: front_end.connect(1.0), "the back end takes a front end")
        memory = stack.enter_context(memory_for(1, NUM))
        wire = stack.enter_context(EchoEndpoint())
        device = stack.enter_context(
            NetDevice(memory, wire, offered=front_end.features, vhost=front_end.backends, max_num=NUM, threaded=False)
        )
        driver = stack.enter_context(Driver(device, memory, num=NUM))
        assert device.last_error is None, device.last_error
        if first == "the back end":
            back_end.close()
        elif first == "the connection":
            front_end.disconnect()
        else:
            front_end.close()
        sent = [frame(n) for n in range(2 * NUM) if driver.send(frame(n))]
        driver.step()
        device.restart_vhost()
        got: list[bytes] = []

        def all_came() -> bool:
            driver.step()
            device.step()
            got.extend(driver.receive())
            return len(got) >= len(sent)

        wait_for(all_came, "userspace goes on with what was sent")
        assert got == sent
        device.set_status(0)
        assert device.owner is Owner.NOBODY


CHECKED_BY: dict[str, list[Callable[..., None]]] = {
    "CVE-2019-14818, DPDK: descriptors with a message that has none; SET_VRING_NUM again and again": [
        messages.test_another_number_of_descriptors,
        test_a_ring_s_size_again_and_again,
    ],
    "DPDK 585283f9a7, 218daf1664: descriptors of a message that is too long, or too many for the receiver": [
        messages.test_a_giant_size,
        transport.test_more_descriptors_than_are_taken_off_the_socket,
        transport.test_no_descriptors_left_to_take_one,
    ],
    "CVE-2020-10722, DPDK: size and offset of the log wrap": [memory.test_a_log_that_cannot_be],
    "CVE-2020-10723, DPDK: the index of a ring is cut to 16 bits": [messages.test_a_vring_that_is_not_there],
    "CVE-2020-10724, DPDK: messages of crypto devices": [messages.test_requests_that_do_not_exist],
    "CVE-2020-10726, DPDK: GET_INFLIGHT_FD again and again": [
        memory.test_one_inflight_area_after_another,
        messages.test_repeated_while_the_rings_run,
    ],
    "CVE-2021-3839, DPDK: more queues in SET_INFLIGHT_FD than there are": [
        memory.test_an_inflight_area_that_cannot_be,
        memory.test_an_inflight_area_is_not_made_for_absurd_counts,
    ],
    "CVE-2022-0669, DPDK: descriptors with messages of the inflight area": [
        messages.test_another_number_of_descriptors
    ],
    "DPDK 5a4fbe79e6: an index that is read back from the inflight area": [
        memory.test_an_inflight_area_full_of_nonsense
    ],
    "DPDK 0fe99cf73e, c6420a3632: size and offset of a memory region wrap, or are nothing": [
        memory.test_a_memory_table_that_cannot_be_leaves_the_old_one_in_force
    ],
    "rust-vmm/vhost 38c442d: SET_VRING_BASE of a ring that is not there": [messages.test_a_vring_that_is_not_there],
    "rust-vmm/vhost 0152e88: a request that does not exist": [messages.test_requests_that_do_not_exist],
    "DPDK 3c929a0bb3: GET_VRING_BASE of a ring that never was": [test_the_base_of_a_ring_that_never_was],
    "DPDK a368804699, d5022533c2, 72d002b3eb: memory and ring addresses change under a running datapath": [
        test_a_memory_table_under_traffic,
        test_a_table_of_other_memory,
        test_ring_addresses_that_move,
        memory.test_a_table_that_leaves_the_rings_out_is_refused_and_they_run_on,
    ],
    "DPDK 07f8db29b8: features change while rings run": [test_features_that_change_while_rings_run],
    "CVE-2023-3301, QEMU: the back end is freed while the card is attached": [test_a_device_outlives_what_serves_it],
    "DPDK 73ea44370d, 21d9fb6bad: a thread outlives the memory it works in": [
        recovery.test_it_ends_under_load_and_its_successor_goes_on,
        recovery.test_a_front_end_that_dies_and_comes_back_is_served_again,
        memory.test_memory_that_shrinks_under_running_rings,
    ],
    "cloud-hypervisor 563303b50: an impossible avail.idx is passed over in silence": [
        descriptors.test_a_broken_ring_is_told_and_the_others_run_on
    ],
}


@pytest.mark.parametrize("bug", CHECKED_BY)
def test_each_has_a_test(bug: str) -> None:
    for test in CHECKED_BY[bug]:
        assert test.__name__.startswith("test_")
        assert test.__module__.rpartition(".")[2].startswith("test_")
    assert CHECKED_BY[bug]
