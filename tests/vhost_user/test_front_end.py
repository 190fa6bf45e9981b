"""Our front end against back ends that are full, silent, hang, lie, die, and come back."""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.programs.test_drive_serve import served
from tests.support.by_hand import CAMPAIGN, NEEDS_RESET, PATIENCE, frame, no_descriptor_leaks, wait_equal, wait_for
from tests.support.vhost_user import PAIRS, VERSION_1, serve
from tests.vhost_user.card import NUM, Card, attached, hang, in_thread
from tests.vhost_user.test_recovery import supervised
from vnetdp.device.device import NetDevice
from vnetdp.device.owners import Owner
from vnetdp.endpoints.loopback import EchoEndpoint, GenerateEndpoint, NullEndpoint
from vnetdp.errors import ConfigError, RequestRefused, UnbindError
from vnetdp.guest.driver import Driver
from vnetdp.programs import drive as drive_module
from vnetdp.programs.drive import drive
from vnetdp.shared.memory import GuestMemory
from vnetdp.testing import READY, HandRing, bring_up
from vnetdp.vhost_user.back_end.session import Session
from vnetdp.vhost_user.back_end.vrings import Vrings
from vnetdp.vhost_user.front_end.front_end import VhostUserFrontEnd
from vnetdp.vhost_user.front_end.watch import Watch
from vnetdp.vhost_user.inflight import InflightArea
from vnetdp.vhost_user.message import MemoryTable, VringAddr, VringState
from vnetdp_kernels import rows as r
from vnetdp_kernels import spec

DEATHS = 10 if CAMPAIGN else 2


@pytest.fixture
def path(tmp_path: Path) -> Iterator[str]:
    with no_descriptor_leaks():
        yield str(tmp_path / "s")


@pytest.fixture(params=["has a full backlog", "takes the connection and says nothing"])
def silent(request: pytest.FixtureRequest, path: str) -> Iterator[str]:
    """A path where somebody listens, and nobody answers."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(0 if request.param == "has a full backlog" else 64)
        waiting = []
        while request.param == "has a full backlog":
            waiting.append(socket.socket(socket.AF_UNIX))
            waiting[-1].setblocking(False)
            try:
                waiting[-1].connect(path)
            except BlockingIOError:
                break
        yield path
        for sock in waiting:
            sock.close()


# --- time ---


def test_connecting_takes_no_longer_than_was_said(silent: str) -> None:
    front_end = VhostUserFrontEnd(silent, timeout_s=2 * PATIENCE)
    began = time.monotonic()
    assert not front_end.connect(0.1)
    assert time.monotonic() - began < PATIENCE  # and not the time that an answer may take
    front_end.close()


def test_waiting_for_a_back_end_ends_when_the_time_is_up_or_the_user_says_so(silent: str) -> None:
    with NullEndpoint() as guest, pytest.raises(ConfigError, match=r"within 0\.2 s"):
        drive(guest, silent, lambda: False, lambda _: None, wait_s=0.2)
    asked = iter([False] * 5)  # it asks again and again, and is told at last
    with NullEndpoint() as guest, pytest.raises(ConfigError, match="ended before"):
        drive(guest, silent, lambda: next(asked, True), lambda _: None, wait_s=math.inf)


def test_driving_ends_though_frames_never_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drive_module, "_SETTLE_S", 0.2)
    with GenerateEndpoint(rate=1000.0) as endpoint, served(endpoint, tmp_path / "s"), NullEndpoint() as guest:
        report = drive(
            guest, str(tmp_path / "s"), lambda: guest.counters()["to_wire"] > 100, lambda _: None, wait_s=PATIENCE
        )
    assert report["rx_packets"] > 100


def test_driving_begins_though_the_first_back_end_dies_over_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take = Session._on_set_mem_table
    deaths = iter([OSError("it dies here")])

    def die_once(self: Session, payload: MemoryTable, fds: list[int]) -> None:
        for death in deaths:
            raise death
        take(self, payload, fds)

    monkeypatch.setattr(Session, "_on_set_mem_table", die_once)
    with EchoEndpoint() as endpoint, served(endpoint, tmp_path / "s"), GenerateEndpoint(count=100) as guest:
        report = drive(guest, str(tmp_path / "s"), lambda: False, lambda _: None)
    assert (report["rx_packets"], report["connections"]) == (100, 2)


def test_a_back_end_that_falls_silent_over_the_rings_is_one_line_with_its_socket_and_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    take = Session._on_set_mem_table

    def wait(self: Session, payload: MemoryTable, fds: list[int]) -> None:
        assert go_on.wait(PATIENCE)
        take(self, payload, fds)

    monkeypatch.setattr(Session, "_on_set_mem_table", wait)
    monkeypatch.setattr(drive_module, "VhostUserFrontEnd", partial(VhostUserFrontEnd, timeout_s=0.2))
    why = r"SET_MEM_TABLE: ETIMEDOUT: no answer from the back end for [0-9.]+ s"
    says = rf"^{tmp_path / 's'}: the back end did not take the rings: {why}: end it, and start another$"
    with EchoEndpoint() as endpoint, served(endpoint, tmp_path / "s"), GenerateEndpoint(count=100) as guest:
        try:
            with pytest.raises(ConfigError, match=says):
                drive(guest, str(tmp_path / "s"), lambda: False, lambda _: None, wait_s=0.5)
        finally:
            go_on.set()


def test_a_back_end_whose_answer_is_none_is_one_line_with_its_socket_and_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "_on_get_queue_num", lambda *_: VringAddr(0, 0, 0, 0, 0, 0))
    says = rf"^{tmp_path / 's'}: the back end can't be used: GET_QUEUE_NUM: EPROTO: .*: end it, and start another$"
    with (
        EchoEndpoint() as endpoint,
        served(endpoint, tmp_path / "s"),
        NullEndpoint() as guest,
        pytest.raises(ConfigError, match=says),
    ):
        drive(guest, str(tmp_path / "s"), lambda: False, lambda _: None)


# --- what can't be ---


@pytest.mark.parametrize("queue_pairs", [0, 129])
def test_more_queue_pairs_than_a_message_can_name(path: str, queue_pairs: int) -> None:
    with pytest.raises(ConfigError, match="1 to 128"):
        VhostUserFrontEnd(path, queue_pairs)


# --- who has the rings ---


@pytest.mark.parametrize("way", ["restart_vhost", "set_use_vhost"])
def test_userspace_goes_on_where_a_back_end_was_killed_and_the_next_one_takes_the_rings_back(
    tmp_path: Path, way: str
) -> None:
    with supervised(tmp_path) as back_end, attached(back_end.path, PAIRS) as front_end:
        card = Card(front_end, PAIRS)
        for _ in range(DEATHS):
            card.wait_for_more()
            back_end.dies()
            if way == "restart_vhost":
                card.device.restart_vhost()
            else:
                card.device.set_use_vhost(False)
            card.is_of(Owner.USERSPACE)
            card.wait_for_more()
            wait_for(lambda: front_end.connect(1.0), "its successor is there")
            card.device.restart_vhost() if way == "restart_vhost" else card.device.set_use_vhost(True)
            card.is_of(Owner.VHOST)
        card.wait_for_more()
        card.finish()


def test_a_device_falls_back_by_itself_where_its_back_end_was_killed(tmp_path: Path) -> None:
    with supervised(tmp_path) as back_end, attached(back_end.path, PAIRS) as front_end:
        card = Card(front_end, PAIRS)
        card.wait_for_more()
        back_end.dies()
        wait_for(lambda: card.device.owner is Owner.USERSPACE, "userspace has the rings")
        card.wait_for_more()
        assert card.device.fallbacks == 1
        card.finish()


def test_what_a_back_end_was_cut_off_in_is_finished_before_userspace_goes_on(tmp_path: Path) -> None:
    """It copied a frame, used the receive buffer, and died before it used the frame: that is in the area's journal."""
    with in_thread(tmp_path) as back_end, attached(back_end.path) as front_end:
        card = Card(front_end)
        card.wait_for_more()
        card.all_back()
        card.device.fallback = False  # until what it leaves is written
        back_end.close()
        receiveq, transmitq = (card.device.queues[n].used + spec.VIRTQ_RING_IDX for n in (0, 1))
        idx = card.memory.read(transmitq, 2)
        one_less = ((int.from_bytes(idx, "little") - 1) & 0xFFFF).to_bytes(2, "little")
        card.memory.write(transmitq, one_less)
        assert front_end._inflight is not None
        said, fd = front_end._inflight
        at = InflightArea.attach(said, fd, 2).journal_at(1)
        os.pwrite(fd, card.memory.read(receiveq, 2) + idx + b"\1\0", said.offset + at)
        card.device.fallback = True
        card.device.restart_vhost()
        assert card.memory.read(transmitq, 2) == idx
        card.is_of(Owner.USERSPACE)
        card.finish()


@pytest.mark.parametrize("lie", [0x1_0000, 9999, -1, "of another ring"])
def test_a_base_that_cannot_be_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: int | str) -> None:
    release = Vrings.release

    def lies(self: Vrings, index: int) -> int:
        base = release(self, index)
        return base if isinstance(lie, str) else lie & 0xFFFFFFFF if lie != -1 else (base - 1) & 0xFFFF

    monkeypatch.setattr(Vrings, "release", lies)
    if isinstance(lie, str):
        monkeypatch.setattr(
            Session, "_on_get_vring_base", lambda self, payload, _: VringState(payload.index ^ 1, lies(self._vrings, 0))
        )
    with in_thread(tmp_path) as back_end, attached(back_end.path) as front_end:
        card = Card(front_end)
        card.wait_for_more()
        card.device.set_use_vhost(False)
        card.is_of(Owner.USERSPACE)
        card.wait_for_more()
        card.finish()


def test_a_ring_that_was_refused_after_its_kick_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First while the device starts, when it moved a frame already, and then while one queue is enabled anew."""
    enable = Session._on_set_vring_enable
    refused: set[int] = {1}

    def refuse(self: Session, payload: VringState, fds: list[int]) -> None:
        enable(self, payload, fds)
        if payload.index in refused:
            wait_equal(lambda: rings[1].used_idx, rings[1].avail_idx)
            raise RequestRefused("no")

    monkeypatch.setattr(Session, "_on_set_vring_enable", refuse)
    with in_thread(tmp_path) as back_end, ExitStack() as stack:
        front_end = stack.enter_context(attached(back_end.path))
        memory = stack.enter_context(GuestMemory.create([(0x10000, 1 << 20)]))
        wire = stack.enter_context(EchoEndpoint())
        device = stack.enter_context(NetDevice(memory, wire, offered=front_end.features, vhost=front_end.backends))
        rings = bring_up(device, VERSION_1)

        def echo(n: int) -> None:
            rings[0].post(n)
            rings[1].send(n, frame(n))
            device.kicks[1].signal()

        def served_by(owner: Owner, frames: int) -> None:
            assert device.owner is owner, device.last_error
            bound = back_end.server.worker.datapath.vqs[:, r.VQ_BOUND]
            assert bool(bound.any()) == (owner is Owner.VHOST)
            wait_equal(lambda: [ring.used_idx for ring in rings], [frames, frames])
            last = rings[0].buffer(frames - 1) + spec.NET_HDR_LEN
            assert memory.read(last, 60) == frame(frames - 1)  # and not one that came before

        echo(0)
        device.set_status(READY)
        echo(1)
        served_by(Owner.USERSPACE, 2)
        refused.clear()
        device.restart_vhost()
        echo(2)
        served_by(Owner.VHOST, 3)
        device.reset_queue(1)
        refused.add(1)
        rings[1] = HandRing(memory, rings[1].end)
        device.set_queue(1, rings[1].num, rings[1].desc, rings[1].avail, rings[1].used)
        device.enable_queue(1)
        assert device.owner is Owner.USERSPACE
        assert not back_end.server.worker.datapath.vqs[:, r.VQ_BOUND].any()


def test_a_watched_device_falls_back_and_returns_by_itself(tmp_path: Path) -> None:
    with supervised(tmp_path) as back_end, attached(back_end.path, PAIRS) as front_end:
        card = Card(front_end, PAIRS)
        with Watch(front_end, card.device):
            for deaths in range(1, DEATHS + 1):
                card.wait_for_more()
                handovers = card.device.handovers
                back_end.dies()
                wait_for(lambda: card.device.handovers > handovers, "userspace has the rings")  # noqa: B023
                card.wait_for_more()
                wait_for(lambda: card.device.owner is Owner.VHOST, "the back end has the rings again")
                assert front_end.connections == deaths + 1
            card.wait_for_more()
            card.all_back()
        card.close()


def test_a_watched_device_falls_back_when_a_back_end_that_hung_lets_go(tmp_path: Path) -> None:
    process = serve(str(tmp_path / "s"), tmp_path / "log")
    try:
        with attached(str(tmp_path / "s")) as front_end:
            card = Card(front_end)
            with Watch(front_end, card.device):
                card.wait_for_more()
                hang(process, front_end)
                card.device.set_use_vhost(False)
                card.is_of(Owner.NOBODY)
                process.kill()
                wait_for(lambda: card.device.owner is Owner.USERSPACE, "userspace has the rings")
                card.wait_for_more()
                card.all_back()
            card.close()
    finally:
        process.kill()
        process.wait()


def test_a_watched_device_survives_a_back_end_that_comes_back_as_another(tmp_path: Path) -> None:
    """Its successor has fewer queue pairs, and then none of the features: userspace goes on."""
    with supervised(tmp_path) as back_end, attached(back_end.path, PAIRS) as front_end:
        card = Card(front_end, PAIRS)
        with Watch(front_end, card.device):
            card.wait_for_more()
            back_end.dies("--queue-pairs", "1")
            wait_for(lambda: card.device.owner is Owner.USERSPACE, "userspace has the rings")
            card.wait_for_more()
            back_end.dies("--features=-version_1")
            wait_for(lambda: front_end.connections == 2, "it was tried")
            card.wait_for_more()
            wait_for(lambda: card.device.owner is Owner.USERSPACE, "userspace has the rings still, or again")
            card.all_back()
        card.close()


@pytest.mark.parametrize("end", ["goes on", "is killed"])
def test_nobody_gets_the_rings_of_a_back_end_that_hangs(tmp_path: Path, end: str) -> None:
    process = serve(str(tmp_path / "s"), tmp_path / "log")
    try:
        with attached(str(tmp_path / "s")) as front_end:
            card = Card(front_end)
            card.wait_for_more()
            hang(process, front_end)
            card.device.set_use_vhost(False)
            card.is_of(Owner.NOBODY)
            assert isinstance(card.device.last_error, UnbindError)
            assert not card.device.status & NEEDS_RESET
            card.device.set_use_vhost(False)  # and it does not help to ask again
            card.is_of(Owner.NOBODY)
            assert not front_end.connect(0.1)  # nor may another back end have them
            process.send_signal(signal.SIGCONT if end == "goes on" else signal.SIGKILL)
            wait_for(lambda: front_end.gone, "it has let go")
            card.device.set_use_vhost(False)
            card.is_of(Owner.USERSPACE)
            card.wait_for_more()
            card.finish()
    finally:
        process.kill()
        process.wait()


def test_a_device_is_reset_while_its_back_end_hangs_and_runs_again_when_that_is_gone(tmp_path: Path) -> None:
    process = serve(str(tmp_path / "s"), tmp_path / "log")
    try:
        with attached(str(tmp_path / "s")) as front_end:
            card = Card(front_end)
            card.wait_for_more()
            hang(process, front_end)
            card.driver.close()
            card.device.set_status(0)
            card.is_of(Owner.NOBODY)
            driver = Driver(card.device, card.memory, num=NUM)
            card.is_of(Owner.NOBODY)
            process.kill()
            process.wait()
            card.device.restart_vhost()
            card.is_of(Owner.USERSPACE)
            driver.start()
            assert driver.send(frame(1))
            wait_for(lambda: driver.receive() == [frame(1)], "a frame comes back")
            driver.close()
            card.close()
    finally:
        process.kill()
        process.wait()


def test_a_device_goes_on_without_a_front_end_that_is_closed_before_it(tmp_path: Path) -> None:
    with in_thread(tmp_path) as back_end:
        for _ in range(10):  # a thread that looks may be as fast, or not
            with attached(back_end.path) as front_end:
                card = Card(front_end)
                card.is_of(Owner.VHOST)
                card.wait_for_more()
                front_end.close()
                card.is_of(Owner.USERSPACE)
                card.wait_for_more()
                card.finish()
