"""The guest's side: frames by hand and in a thread, what it negotiates, and what it does about a device that cheats."""

from __future__ import annotations

import select
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.by_hand import NEEDS_RESET, Traffic, frame, no_descriptor_leaks, scaled, wait_equal, wait_for
from vnetdp.backends.worker import Worker
from vnetdp.device.device import NetDevice
from vnetdp.device.owners import Owner
from vnetdp.endpoints.loopback import EchoEndpoint, GenerateEndpoint, NullEndpoint
from vnetdp.endpoints.mailbox import MailboxEndpoint
from vnetdp.errors import ConfigError, GuestError
from vnetdp.guest.driver import BUFFER_LEN, Driver, memory_for
from vnetdp.shared.memory import GuestMemory
from vnetdp.shared.notify import EventFd
from vnetdp.testing import READY
from vnetdp.testing.strategies import frames
from vnetdp.virtio import features as f
from vnetdp_kernels import rows as r
from vnetdp_kernels import spec

ALL = (1 << 64) - 1


class OffloadMailbox(MailboxEndpoint):
    """A mailbox that takes and gives offloads, and remembers which the other side takes."""

    vnet_hdr = True
    offloads = -1

    def set_offloads(self, mask: int) -> None:
        self.offloads = mask


@contextmanager
def echoing(wanted: int | None = None, pairs: int = 1, num: int = 64) -> Iterator[tuple[NetDevice, Driver]]:
    """A stepped device that echoes, and its driver."""
    with (
        no_descriptor_leaks(),
        memory_for(pairs, num) as memory,
        EchoEndpoint(pairs) as echo,
        NetDevice(memory, echo, queue_pairs=pairs, threaded=False) as device,
        Driver(device, memory, queue_pairs=pairs, num=num, wanted=wanted) as driver,
    ):
        yield device, driver


def step(device: NetDevice, driver: Driver) -> None:
    """Run both until neither has anything left to do."""
    while driver.step() + device.step():
        pass


# --- frames by hand ---


@pytest.mark.parametrize("wanted", [None, 0, f.VIRTIO_F_VERSION_1, f.VIRTIO_NET_F_MRG_RXBUF, f.VIRTIO_F_IN_ORDER])
def test_what_is_sent_comes_back(wanted: int | None) -> None:
    with echoing(wanted) as (device, driver):
        assert device.step() == 0
        assert driver.receive() == []
        sent = [frame(n, 14 + 37 * n % 1500) for n in range(100)]
        received = []
        for n, data in enumerate(sent):
            assert driver.send(data)
            if n % 7 == 0:
                step(device, driver)
                received += driver.receive()
        step(device, driver)
        assert received + driver.receive() == sent
        counters = driver.counters()
        assert [queue["packets"] for queue in counters] == [100, 100]
        assert [queue["bytes"] for queue in counters] == [sum(map(len, sent))] * 2
        assert [queue["dropped"] for queue in counters] == [0, 0]


@given(st.lists(frames(max_len=BUFFER_LEN - spec.NET_HDR_LEN), max_size=100))
def test_any_frames_come_back(sent: list[bytes]) -> None:
    with echoing(num=16) as (device, driver):
        for data in sent:
            assert driver.send(data)
        step(device, driver)
        assert driver.receive() == sent


def test_what_is_no_frame_is_dropped_and_counted() -> None:
    with echoing() as (device, driver):
        for data in (b"", bytes(13), bytes(14), bytes(BUFFER_LEN - 12), bytes(BUFFER_LEN - 11), bytes(70_000)):
            assert driver.send(data)
        step(device, driver)
        assert [len(data) for data in driver.receive()] == [14, BUFFER_LEN - 12]
        counters = driver.endpoint.counters()
        assert (counters["dropped_short"], counters["dropped_long"]) == (2, 2)


def test_what_cannot_be_sent_at_all_is_said_at_once() -> None:
    with echoing(pairs=2) as (_, driver):
        for queue in (-1, 2, 7):
            with pytest.raises(ConfigError, match=f"queue pair {queue}: the last one is 1"):
                driver.send(frame(1), queue)
        for nothing in ("text", None, 7):
            with pytest.raises(TypeError, match="a frame is bytes, not"):
                driver.send(nothing)  # type: ignore[arg-type]


def test_each_pair_has_its_queue() -> None:
    with echoing(pairs=3) as (device, driver):
        for n in range(3):
            assert driver.send(frame(n), queue=n)
        step(device, driver)
        assert sorted(driver.receive()) == sorted(frame(n) for n in range(3))
        assert [queue["packets"] for queue in driver.counters()] == [1] * 6


def test_a_full_mailbox_says_so() -> None:
    with echoing() as (device, driver):
        assert driver.mailbox is not None
        driver.mailbox.limit = 5
        assert [driver.send(frame(n)) for n in range(7)] == [True] * 5 + [False] * 2
        step(device, driver)
        assert driver.receive() == [frame(n) for n in range(5)]


def test_it_can_be_waited_for() -> None:
    with echoing() as (device, driver):
        assert select.select([driver], [], [], 0) == ([], [], [])
        driver.send(frame(0))
        step(device, driver)
        assert select.select([driver], [], [], 0) == ([driver], [], [])
        driver.receive()
        assert select.select([driver], [], [], 0) == ([], [], [])


def test_a_budget_is_kept() -> None:
    with echoing() as (device, driver):
        for n in range(10):
            driver.send(frame(n))
        assert driver.step(4) == 4
        assert device.step(3) == 3
        assert device.step(3) == 1
        step(device, driver)
        assert driver.receive() == [frame(n) for n in range(10)]


# --- in a thread ---


@pytest.mark.parametrize("poll_us", [0, -1])
def test_it_starts_and_stops_and_starts_again(poll_us: int) -> None:
    with (
        no_descriptor_leaks(),
        memory_for() as memory,
        MailboxEndpoint() as endpoint,
        NetDevice(memory, endpoint, poll_us=poll_us) as device,
        Driver(device, memory) as driver,
    ):
        driver.stop()
        for n in range(5):
            driver.start(poll_us=(0, 50, -1)[n % 3])
            driver.start()
            with pytest.raises(ConfigError, match="call stop before step"):
                driver.step()
            driver.send(frame(n))
            wait_equal(lambda: endpoint.take(), [frame(n)])
            endpoint.put(frame(n))
            wait_equal(lambda: driver.receive(), [frame(n)])
            driver.stop()
            driver.stop()
        driver.send(frame(9))
        assert driver.step() == 1
        driver.check()


def test_a_reset_under_traffic_starts_anew() -> None:
    with no_descriptor_leaks():
        traffic = Traffic(2, rate=scaled(20_000, 300))
        worker = Worker(2)
        with (
            memory_for(2, 64) as memory,
            NetDevice(memory, traffic.device, queue_pairs=2, vhost=worker) as device,
            Driver(device, memory, traffic.guest, queue_pairs=2, num=64) as driver,
        ):
            driver.start(poll_us=10)
            for n in range(scaled(20, 4)):
                device.set_use_vhost(n % 3 > 0)
                traffic.wait_for_more(5)
                driver.reset()
                assert device.status == READY
                assert device.owner is (Owner.VHOST if n % 3 else Owner.USERSPACE)
            traffic.wait_for_more(5)
            driver.stop()
            driver.reset()
            assert driver.step(0) == 0
        worker.close()
        for end in (traffic.device, traffic.guest):
            # Frames in flight are gone, and that is all.
            assert not end.ledger[:, [r.LEDGER_DUPLICATED, r.LEDGER_REORDERED, r.LEDGER_CORRUPTED]].any()
        traffic.close()


@pytest.mark.parametrize("first_idx", [5, 0xFFFA])
def test_a_reset_begins_at_0_wherever_indices_began_first(first_idx: int) -> None:
    with (
        memory_for(num=16) as memory,
        EchoEndpoint() as echo,
        NetDevice(memory, echo, threaded=False) as device,
        Driver(device, memory, num=16, first_idx=first_idx) as driver,
    ):
        assert set(driver.dvqs[:, r.DVQ_LAST_USED_IDX]) == {first_idx}
        driver.reset()
        assert set(driver.dvqs[:, r.DVQ_LAST_USED_IDX]) == {0}
        for n in range(40):
            assert driver.send(frame(n))
            step(device, driver)
            assert driver.receive() == [frame(n)]


def test_needs_reset_is_mended_by_a_reset() -> None:
    with echoing() as (device, driver):
        row = driver.dvqs[1]
        at = int(row[r.DVQ_AVAIL])
        driver.memory.mem[at + 2 : at + 4] = 0x7F
        device.step()
        assert device.status & NEEDS_RESET
        driver.send(frame(0))
        assert driver.step() == 1
        assert device.step() == 0
        driver.reset()
        assert device.status == READY
        driver.send(frame(1))
        step(device, driver)
        assert driver.receive() == [frame(1)]


# --- negotiation ---


@given(st.sets(st.integers(0, 63)).map(lambda bits: sum(1 << bit for bit in bits)))
def test_it_takes_what_is_offered_and_wanted_and_makes_sense(wanted: int) -> None:
    with (
        GuestMemory.create([(0, 1 << 23)]) as memory,
        OffloadMailbox() as left,
        OffloadMailbox() as right,
        NetDevice(memory, left, threaded=False, mtu=1500) as device,
        Driver(device, memory, right, num=4, wanted=wanted) as driver,
    ):
        assert driver.features == f.closure(wanted & device.device_features) == device.driver_features
        assert device.status == READY
        assert left.offloads == f.guest_offload_mask(driver.features)
        assert right.offloads == f.host_offload_mask(driver.features)
        left.put(frame(0, 100))
        right.put(frame(1, 100))
        step(device, driver)
        assert left.take() == [frame(1, 100)]
        assert right.take() == [frame(0, 100)]


def test_an_endpoint_without_headers_gets_no_offloads() -> None:
    with (
        memory_for(num=4) as memory,
        OffloadMailbox() as left,
        MailboxEndpoint() as right,
        NetDevice(memory, left, threaded=False) as device,
        Driver(device, memory, right, num=4) as driver,
    ):
        assert device.device_features & f.OFFLOADS
        assert not driver.features & f.OFFLOADS


class Liar(NetDevice):
    """Offers what it will not take."""

    @property
    def device_features(self) -> int:
        return super().device_features | 1 << 60


def test_a_refusal_is_a_clear_error_and_leaks_nothing() -> None:
    with (
        no_descriptor_leaks(),
        memory_for() as memory,
        NullEndpoint() as end,
        Liar(memory, end, threaded=False) as device,
        pytest.raises(ConfigError, match=r"refuses the features .*bit 60"),
    ):
        Driver(device, memory)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num": 100}, "power of two"),
        ({"num": 2048}, "larger than 1024"),
        ({"queue_pairs": 0}, "queue pair"),
        ({"queue_pairs": 2, "num": 16}, "queue"),
        ({"start_at": 1 << 40}, "not inside guest memory"),
        ({"num": 1024, "buffer_len": 1 << 20}, "not inside guest memory"),
    ],
)
def test_what_no_driver_can_be(options: dict[str, Any], says: str) -> None:
    with (
        no_descriptor_leaks(),
        memory_for(2, 1024, 4096) as memory,
        NullEndpoint() as left,
        NullEndpoint(2) as right,
        NetDevice(memory, left, threaded=False) as device,
        pytest.raises(ConfigError, match=says),
    ):
        Driver(device, memory, right, **options)


def test_the_mailboxs_methods_need_the_mailbox() -> None:
    with (
        memory_for() as memory,
        NullEndpoint() as left,
        NullEndpoint() as right,
        NetDevice(memory, left, threaded=False) as device,
        Driver(device, memory, right) as driver,
    ):
        for call in (driver.receive, driver.fileno, lambda: driver.send(b"")):
            with pytest.raises(ConfigError, match="without one"):
                call()
    with (
        NullEndpoint() as narrow,
        memory_for() as memory,
        NetDevice(memory, narrow, threaded=False) as device,
        pytest.raises(ConfigError, match="has 1 queues"),
    ):
        Driver(device, memory, narrow, queue_pairs=2)


@pytest.mark.parametrize(("pairs", "num"), [(1, 1), (1, 1024), (3, 2), (8, 256)])
def test_memory_fits_whatever_is_negotiated(pairs: int, num: int) -> None:
    for wanted in (ALL, 0, ALL & ~f.VIRTIO_NET_F_MRG_RXBUF):
        with (
            memory_for(pairs, num) as memory,
            OffloadMailbox(pairs) as left,
            OffloadMailbox(pairs) as right,
            NetDevice(memory, left, queue_pairs=pairs, threaded=False) as device,
            Driver(device, memory, right, queue_pairs=pairs, num=num, wanted=wanted) as driver,
        ):
            parts = sorted(
                (int(row[slot]), int(length))
                for row in driver.dvqs
                for slot, length in (
                    (r.DVQ_DESC, 16 * num),
                    (r.DVQ_AVAIL, 6 + 2 * num),
                    (r.DVQ_USED, 6 + 8 * num),
                    (r.DVQ_BUF_OFFSET, num * row[r.DVQ_BUF_LEN]),
                )
            )
            for (at, length), (behind, _) in pairwise(parts):
                assert at + length <= behind, "parts overlap"
            assert parts[-1][0] + parts[-1][1] <= memory.mem.size
            left.put(frame(0, 64 if num == 1 else 1514), queue=pairs - 1)
            step(device, driver)
            assert len(right.take()) == 1


# --- a device that cheats ---


def use(driver: Driver, queue: int, head: int, length: int, ahead: int = 1) -> None:
    """Write one used element behind the device's back, and move used.idx by *ahead*."""
    row, mem = driver.dvqs[queue], driver.memory.mem
    at = int(row[r.DVQ_USED])
    idx = int.from_bytes(mem[at + 2 : at + 4].tobytes(), "little")
    element = at + 4 + 8 * (idx % int(row[r.DVQ_NUM]))
    mem[element : element + 8] = list(struct.pack("<II", head, length))
    mem[at + 2 : at + 4] = list(struct.pack("<H", (idx + ahead) & 0xFFFF))


@pytest.mark.parametrize(
    ("wanted", "queue", "head", "length", "ahead", "status"),
    [
        (None, 0, 0, 72, 65, r.E_USED_IDX),
        (None, 0, 0, 72, -1, r.E_USED_IDX),
        (None, 1, 0, 0, 2, r.E_USED_IDX),
        (None, 0, 64, 72, 1, r.E_USED_ID),
        (None, 0, 0xFFFFFFFF, 72, 1, r.E_USED_ID),
        (None, 1, 5, 0, 1, r.E_USED_ID),
        (None, 0, 0, BUFFER_LEN + 1, 1, r.E_USED_LEN),
        (None, 0, 0, 0xFFFFFFFF, 1, r.E_USED_LEN),
        (None, 1, 0, 1, 1, r.E_USED_LEN),
        (f.VIRTIO_F_VERSION_1 | f.VIRTIO_NET_F_MRG_RXBUF, 0, 0, 11, 1, r.E_NUM_BUFFERS),
        (f.VIRTIO_F_VERSION_1 | f.VIRTIO_F_IN_ORDER, 0, 1, 72, 1, r.E_USED_ID),
    ],
)
def test_a_device_that_cheats_is_found_out(
    wanted: int | None, queue: int, head: int, length: int, ahead: int, status: int
) -> None:
    with echoing(wanted) as (device, driver):
        driver.send(frame(0))
        driver.step()
        use(driver, queue, head, length, ahead)
        for n in range(100):  # a driver looks for used transmit buffers only when it needs them
            driver.send(frame(n))
        for _ in range(2):
            with pytest.raises(GuestError) as caught:
                while driver.step():
                    pass
                driver.check()
            assert (caught.value.queue, caught.value.status) == (queue, status)
        driver.reset()
        driver.check()
        driver.receive()
        assert device.status == READY
        step(device, driver)
        driver.receive()
        driver.send(frame(77))
        step(device, driver)
        assert driver.receive() == [frame(77)]


@pytest.mark.parametrize("num_buffers", [0, 2, 64, 65, 0xFFFF])
def test_a_frame_of_buffers_that_are_not_there(num_buffers: int) -> None:
    with echoing(f.VIRTIO_F_VERSION_1 | f.VIRTIO_NET_F_MRG_RXBUF) as (_, driver):
        at = int(driver.dvqs[0, r.DVQ_BUF_OFFSET])
        driver.memory.mem[at + 10 : at + 12] = list(struct.pack("<H", num_buffers))
        use(driver, 0, 0, 72)
        with pytest.raises(GuestError, match="num_buffers"):
            driver.step()


def test_other_pairs_go_on_when_one_is_cheated() -> None:
    with echoing(pairs=2) as (device, driver):
        use(driver, 0, 999, 72)
        with pytest.raises(GuestError, match="queue 0"):
            driver.step()
        driver.send(frame(1), queue=1)
        for _ in range(3):
            with pytest.raises(GuestError, match="queue 0"):
                driver.step()
            device.step()
        assert driver.receive() == [frame(1)]


def test_a_thread_that_is_cheated_says_so_when_asked() -> None:
    with (
        no_descriptor_leaks(),
        memory_for() as memory,
        NullEndpoint() as end,
        NetDevice(memory, end) as device,
        Driver(device, memory) as driver,
    ):
        driver.start()
        use(driver, 0, 999, 72)
        device.calls[0].signal()

        def found_out() -> bool:
            return bool(driver.dvqs[0, r.DVQ_STATUS])

        wait_for(found_out, "the driver finds out")
        with pytest.raises(GuestError, match="not in flight"):
            driver.check()
        driver.reset()
        driver.check()


def test_a_driver_uses_no_descriptor_of_a_device_that_was_closed() -> None:
    """Another file may have the number by then: here, an eventfd that nobody may write to."""
    with (
        memory_for() as memory,
        GenerateEndpoint(count=0) as source,
        NullEndpoint() as wire,
        NetDevice(memory, wire) as device,
        Driver(device, memory, source, wanted=ALL & ~f.VIRTIO_RING_F_EVENT_IDX) as driver,
    ):
        driver.start()
        numbers = {event.fd for event in (*device.kicks, *device.calls)}
        device.close()
        others = [EventFd() for _ in range(64)]
        assert numbers <= {other.fd for other in others}, "each number is used again"
        memory.write(device.queues[1].used, bytes(2))  # flags: the device wants to be kicked
        source.rows[0, r.EP_LIMIT] = 1
        assert driver.step() == 1
        assert [other.clear() for other in others] == [0] * len(others)
        for other in others:
            other.close()
