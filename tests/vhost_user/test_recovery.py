"""Either side dies under load, and comes back: what was on its way arrives once, or as often as the protocol allows."""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.by_hand import PATIENCE, no_descriptor_leaks, wait_for
from tests.support.vhost_user import PAIRS, ByHand, Guest, InThread, costs_nothing, ping, serve, u64
from vnetdp.endpoints.loopback import GenerateEndpoint
from vnetdp.programs import drive as drive_module
from vnetdp.programs.drive import drive
from vnetdp.vhost_user.message import Request
from vnetdp.virtio import features as f
from vnetdp_kernels import rows as r
from vnetdp_kernels.loops.wait import BATCH

CAMPAIGN = os.environ.get("VNETDP_CAMPAIGN") == "1"
DEATHS_OF_A_BACK_END = 50 if CAMPAIGN else 2
DEATHS_OF_A_FRONT_END = 20 if CAMPAIGN else 2
STEPS = range(8) if CAMPAIGN else (0, 3, 5, 7)  # of a handshake

R = Request
_NO_AREA = ("--protocol-features=-inflight_shmfd",)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `drive` in this process wait for frames on their way as long as it takes."""
    for name in ("_LOSS_S", "_SETTLE_S"):
        monkeypatch.setattr(drive_module, name, PATIENCE)


class Supervised:
    """`vnetdp serve echo`, started again whenever it dies."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.path = str(folder / "socket")
        self._log = folder / "log"
        self._options = options
        self._log.write_text("")
        self._process = serve(self.path, self._log, *options)

    def dies(self, *options: str) -> None:
        """Kill it on the spot, and start another, with other *options* if any are given."""
        self._process.kill()
        assert self._process.wait(PATIENCE) == -signal.SIGKILL
        self._process = serve(self.path, self._log, *(options or self._options))

    def ends(self) -> None:
        """End it as its user would: no trace is left but the log."""
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(PATIENCE) == 0, self._log.read_text()
        assert not Path(self.path).exists()
        assert "Traceback" not in self._log.read_text()

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


@contextmanager
def supervised(folder: Path, *options: str) -> Iterator[Supervised]:
    back_end = Supervised(folder, *options)
    try:
        yield back_end
    finally:
        back_end.close()


class Load:
    """`drive` in a thread of this process: as many numbered frames as the rings take."""

    def __init__(self, path: str, features: int | None = None, num: int = 256) -> None:
        self._endpoint = GenerateEndpoint(PAIRS)
        self._stop = threading.Event()
        self._report: dict[str, Any] = {}
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(path, features, num), daemon=True)
        self._thread.start()

    def _run(self, path: str, features: int | None, num: int) -> None:
        try:
            self._report = drive(
                self._endpoint, path, self._stop.is_set, lambda _: None, queue_pairs=PAIRS, features=features, num=num
            )
        except BaseException as e:
            self._failed = e
            raise

    def wait_for_more(self, frames: int) -> None:
        """Wait until each pair has got so many frames back."""
        before = self._endpoint.ledger[:, r.LEDGER_DELIVERED].copy()

        def more() -> bool:
            assert self._failed is None
            return bool((self._endpoint.ledger[:, r.LEDGER_DELIVERED] >= before + frames).all())

        wait_for(more, f"{frames} frames on each pair")

    def finish(self) -> dict[str, Any]:
        """End it, once what was sent came back; return its report."""
        self._stop.set()
        self._thread.join(PATIENCE)
        assert self._failed is None
        self._endpoint.close()
        return self._report


def under_load(folder: Path, options: tuple[str, ...], features: int | None, deaths: int) -> dict[str, Any]:
    """Let a back end die that often under load, and return the report of the front end."""
    moments = random.Random(1)
    with no_descriptor_leaks(), supervised(folder, *options) as back_end:
        load = Load(back_end.path, features)
        load.wait_for_more(1)
        for _ in range(deaths):
            load.wait_for_more(moments.randint(1, 20_000))
            back_end.dies()
        load.wait_for_more(1000)
        report = load.finish()
        back_end.ends()
    assert report["connections"] == deaths + 1
    return report


@pytest.mark.timeout(3600 if CAMPAIGN else 300)
@pytest.mark.parametrize(
    "without", [0, f.VIRTIO_F_IN_ORDER, f.VIRTIO_RING_F_EVENT_IDX], ids=["", "-in_order", "-event_idx"]
)
def test_no_chain_is_lost_or_repeated_when_a_back_end_dies_that_kept_an_inflight_area(
    tmp_path: Path, without: int
) -> None:
    report = under_load(tmp_path, (), ~without, DEATHS_OF_A_BACK_END)
    ledger = report["ledger"]
    assert ledger["delivered"] == ledger["sent"] > 0
    assert {name: n for name, n in ledger.items() if n} == {"sent": ledger["sent"], "delivered": ledger["delivered"]}
    assert report["bad_packets"] == 0


@pytest.mark.timeout(3600 if CAMPAIGN else 300)
@pytest.mark.parametrize("without", [0, f.VIRTIO_F_IN_ORDER], ids=["", "-in_order"])
def test_without_an_inflight_area_what_was_in_hand_may_be_repeated_and_nothing_else(
    tmp_path: Path, without: int
) -> None:
    """The next back end goes on from used.idx: a batch that was echoed, and not yet used, is echoed again."""
    report = under_load(tmp_path, _NO_AREA, ~without, DEATHS_OF_A_BACK_END)
    ledger = report["ledger"]
    assert (ledger["lost"], ledger["corrupted"], ledger["reordered"]) == (0, 0, 0)
    assert ledger["duplicated"] <= BATCH * PAIRS * DEATHS_OF_A_BACK_END
    assert ledger["delivered"] == ledger["sent"] > 0


def test_a_back_end_that_lost_its_inflight_feature_is_worked_with_all_the_same(tmp_path: Path) -> None:
    """The one that comes after has another build: no area any more, then one again."""
    with supervised(tmp_path) as back_end:
        load = Load(back_end.path)
        for options in (_NO_AREA, ("--protocol-features=",), _NO_AREA):
            load.wait_for_more(1000)
            back_end.dies(*options)
        load.wait_for_more(1000)
        ledger = load.finish()["ledger"]
    assert (ledger["lost"], ledger["corrupted"], ledger["reordered"]) == (0, 0, 0)


@pytest.mark.timeout(3600 if CAMPAIGN else 300)
def test_a_front_end_that_dies_and_comes_back_is_served_again(tmp_path: Path) -> None:
    with no_descriptor_leaks():
        back_end = InThread(tmp_path)
        with costs_nothing(back_end, None):
            for _ in range(DEATHS_OF_A_FRONT_END):
                echoed = back_end.echoed()
                command = ["drive", "generate", "--socket", back_end.path, "--queue-pairs", str(PAIRS)]
                process = subprocess.Popen(
                    [sys.executable, "-m", "vnetdp", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
                try:
                    wait_for(partial(_has_echoed, back_end, echoed + 10_000), "frames are echoed")
                finally:
                    process.kill()
                    process.wait()
        back_end.close()


def _has_echoed(back_end: InThread, frames: int) -> bool:
    return back_end.echoed() > frames


# --- the end ---


@contextmanager
def up(folder: Path, *options: str) -> Iterator[Supervised]:
    with supervised(folder, *options) as back_end:
        log = folder / "log"
        wait_for(lambda: "serving" in log.read_text(), "the back end serves")
        yield back_end


def test_it_ends_when_idle(tmp_path: Path) -> None:
    for _ in range(3 if CAMPAIGN else 1):
        with up(tmp_path) as back_end:
            back_end.ends()


def test_it_ends_as_soon_as_it_says_that_it_serves(tmp_path: Path) -> None:
    with supervised(tmp_path) as back_end:
        wait_for(lambda: b"serving" in (tmp_path / "log").read_bytes(), "the back end serves")
        back_end.ends()


def test_it_ends_under_load_and_its_successor_goes_on(tmp_path: Path) -> None:
    load: Load | None = None
    for _ in range(3 if CAMPAIGN else 1):
        with up(tmp_path) as back_end:
            load = load or Load(back_end.path)
            load.wait_for_more(5000)
            back_end.ends()
    with up(tmp_path) as back_end:
        assert load is not None
        load.wait_for_more(1000)
        report = load.finish()
        assert report["ledger"]["lost"] == report["bad_packets"] == 0
        back_end.ends()


@pytest.mark.parametrize("messages", STEPS)
def test_it_ends_in_the_middle_of_a_handshake(tmp_path: Path, messages: int) -> None:
    with up(tmp_path) as back_end, ByHand.dial(back_end.path) as end, Guest(end) as guest:
        steps: list[Callable[[], object]] = [
            lambda: end.send(R.SET_OWNER),
            lambda: end.ask(R.GET_FEATURES),
            lambda: end.shake_hands(),
            lambda: guest.share(),
            lambda: guest.describe(0),
            lambda: guest.start(0, 1),
            lambda: guest.echo(),
        ]
        for step in steps[:messages]:
            step()
        back_end.ends()
        assert end.left()


def test_it_ends_in_the_middle_of_a_message(tmp_path: Path) -> None:
    with up(tmp_path) as back_end, ByHand.dial(back_end.path) as end:
        end.ask(R.GET_FEATURES)
        end.send(R.SET_FEATURES, b"", size=8)
        back_end.ends()


def test_it_ends_with_more_front_ends_waiting(tmp_path: Path) -> None:
    with up(tmp_path) as back_end:
        ends = [ByHand.dial(back_end.path) for _ in range(4)]
        ends[0].ask(R.GET_FEATURES)
        back_end.ends()
        for end in ends:
            assert end.left()
            end.close()


def test_it_ends_while_a_call_waits_for_ever(tmp_path: Path) -> None:
    """The front end holds a full eventfd, and it is a blocking one."""
    with up(tmp_path) as back_end, ByHand.dial(back_end.path) as end, Guest(end) as guest:
        end.shake_hands()
        guest.share()
        full = os.eventfd(0)
        os.eventfd_write(full, (1 << 64) - 2)
        for index in range(2):
            guest.describe(index)
            assert end.tell(R.SET_VRING_CALL, u64(index), [full])
        os.set_blocking(full, True)
        for index in range(2):
            end.send(R.SET_VRING_KICK, u64(index), [guest.kicks[index].fd])
            end.send(R.SET_VRING_ENABLE, index.to_bytes(4, "little") + b"\1\0\0\0")
        end.ask(R.GET_QUEUE_NUM)
        back_end.ends()
        os.close(full)


def test_it_ends_while_it_looks_for_a_front_end(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with supervised(tmp_path, "--connect") as back_end, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        assert select.select([listener], [], [], PATIENCE)[0]
        path.unlink()
        back_end.ends()


def test_a_socket_file_that_was_left_is_taken_over_and_a_living_one_is_not(tmp_path: Path) -> None:
    with up(tmp_path) as back_end:
        back_end.dies()
        wait_for(lambda: (tmp_path / "log").read_text().count("serving") == 2, "another serves")
        second = serve(back_end.path, tmp_path / "second")
        assert second.wait(PATIENCE) == 2
        assert "another program listens" in (tmp_path / "second").read_text()
        assert Path(back_end.path).exists()
        back_end.ends()


def test_a_front_end_in_this_process_is_served_after_all_that(tmp_path: Path) -> None:
    with no_descriptor_leaks():
        back_end = InThread(tmp_path)
        ping(back_end)
        back_end.close()
