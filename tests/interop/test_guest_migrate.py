"""QEMU migrates a running guest, live, from one `vnetdp serve` to another, and to DPDK's net_vhost and back.

Lost pings say nothing about the dirty log: what a back end wrote and did not log is missing from the guest's memory
afterwards, but mostly where the guest has read it already. So the guest sends requests all the time and reads no answer
before the migration is over (`probe hold`); then every byte is compared. That this finds a lost log is tested, too.

By default a slice; VNETDP_CAMPAIGN=1 runs each 20 times, and DPDK's net_vhost beside ours.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from vnetdp.bench.dpdk import Dpdk, cpu_list, why_no_dpdk

from .guests import images
from .guests.machine import FIGURES, Host, QemuGuest, Serve, up, why_no_guest
from .guests.proxy import ForgetfulProxy

pytestmark = [pytest.mark.interop, pytest.mark.timeout(3600)]

CAMPAIGN = os.environ.get("VNETDP_CAMPAIGN") == "1"
PEER = "10.0.0.99"
HELD = 60000  # at most; the migration takes a few seconds
UNLIMITED = 1 << 40
# What only one of `serve reflect` and net_vhost offers, as QEMU's virtio-net spells it.
ONE_SIDED = ("csum", "guest_csum", "gso", "host_tso4", "host_tso6", "host_ecn", "host_ufo", "guest_tso4", "guest_tso6",
             "guest_ecn", "guest_ufo", "guest_announce", "queue_reset")  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def qemu() -> None:
    if (missing := why_no_guest("ss")) is not None:
        pytest.skip(missing)
    try:
        images.qemu()
        images.pc()
    except images.MissingError as e:
        pytest.skip(str(e))


@contextmanager
def reflecting(kind: str, folder: Path) -> Iterator[Path]:
    """A back end that answers pings: ours, or DPDK's."""
    folder.mkdir()
    sock = folder / "socket"
    if kind == "vnetdp":
        with Serve(folder, "reflect", sock):
            yield sock
        return
    if (missing := why_no_dpdk()) is not None:
        pytest.skip(missing)
    with Dpdk([f"net_vhost0,iface={sock}"], folder, [cpu_list()], args=["--forward-mode=icmpecho"]) as testpmd:
        testpmd.wait()
        testpmd.ask("start")
        yield sock


class Move:
    """A guest on one back end, and a QEMU on another for it to go to."""

    def __init__(
        self, folder: Path, source: Path, target: Path, stack: ExitStack, *, queue_pairs: int = 1, device: str = ""
    ) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._stack = stack
        self._options: dict[str, Any] = {"queue_pairs": queue_pairs, "cpus": queue_pairs, "device": device}
        self.source = stack.enter_context(QemuGuest(folder, source, name="source", **self._options))
        self.target = self._expecting(target, "target")
        self.source.boot()
        up(self.source)
        self._wait_for_target()

    def _expecting(self, sock: Path, name: str) -> QemuGuest:
        self._uri = self._folder / f"{name}.migration"
        return self._stack.enter_context(QemuGuest(self._folder, sock, name=name, incoming=self._uri, **self._options))

    def on_to(self, sock: Path) -> None:
        """Have the guest, which has moved, move once more."""
        self.source, self.target = self.target, self._expecting(sock, "further")
        self._wait_for_target()

    def _wait_for_target(self) -> None:
        assert self.target.qmp("query-status")["status"] == "inmigrate"  # once it answers, it listens

    def migrate(self, bytes_per_second: int = UNLIMITED, downtime_ms: int = 300, passes: int = 0) -> dict[str, Any]:
        """Migrate, and return what QEMU says of it. From then on the guest is in `target`.

        passes: how often QEMU asks for the dirty log before it may stop the guest, if that is busy all the time.
        """
        qmp = self.source.qmp
        qmp(
            "migrate-set-parameters",
            **{"max-bandwidth": bytes_per_second, "downtime-limit": 1 if passes else downtime_ms},
        )
        qmp("migrate", uri=f"unix:{self._uri}")
        until = time.monotonic() + 120
        while (said := qmp("query-migrate"))["status"] not in ("completed", "failed", "cancelled"):
            assert time.monotonic() < until, said
            if passes and said.get("ram", {}).get("dirty-sync-count", 0) > passes:
                qmp("migrate-set-parameters", **{"downtime-limit": downtime_ms})
                passes = 0
            time.sleep(0.02)
        assert said["status"] == "completed", said
        while self.target.qmp("query-status")["status"] != "running":
            assert time.monotonic() < until
            time.sleep(0.01)
        self.source.close()
        self.target.run(":", check=False)  # the serial line may lose a part of what it gets first
        return said

    def output(self, file: str, mark: str, timeout: float = 60) -> str:
        """Return what a command that runs on in the guest has written into *file*, once *mark* is in it."""
        until = time.monotonic() + timeout
        while mark not in (said := self.target.run(f"cat {file}", check=False)):
            assert time.monotonic() < until, f"no {mark} in: {said}\n{self.target.last_words()}"
            time.sleep(0.2)
        return said


def hold(move: Move) -> tuple[dict[str, int], dict[str, Any]]:
    """Migrate while answers lie unread; return what the guest finds then, and what QEMU says of the migration."""
    move.source.run(f"for i in 1 2 3 4 5; do ping -c 1 -W 1 -q {PEER} && break; done")
    move.source.run(f"rm -f /release; probe hold {PEER} {HELD} 1400 600 /release > /held & sleep 0.2")
    # So slow, and in so many passes, that many a page is written after it was sent, wherever in memory it lies.
    said = move.migrate(20_000_000, 25, passes=10)
    move.target.run("touch /release")
    found = move.output("/held", "duplicate=")
    return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", found)}, said


def assert_whole(found: dict[str, int]) -> None:
    assert found["wrong"] == found["duplicate"] == 0, found
    assert found["received"] >= 0.99 * found["sent"] > 1000, found


def beat(folder: Path, source: Path, target: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Migrate under ping; return what the guest counted, and what QEMU says of the migration."""
    with ExitStack() as stack:
        move = Move(folder, source, target, stack)
        move.source.run(f"probe beat {PEER} 2 6 > /beat & sleep 2")
        said = move.migrate()
        found = move.output("/beat", "heard_until_s=")
        return {key: float(value) for key, value in re.findall(r"(\w+)=([-\d.]+)", found)}, said


@pytest.mark.parametrize("run", range(20 if CAMPAIGN else 2))
def test_every_byte_arrives(tmp_path: Path, run: int) -> None:
    with ExitStack() as stack:
        source, target = (stack.enter_context(reflecting("vnetdp", tmp_path / side)) for side in ("a", "b"))
        found, said = hold(Move(tmp_path / str(run), source, target, stack))
    FIGURES.info("vnetdp, held answers: %s, downtime %d ms", found, said["downtime"])
    assert_whole(found)


def test_from_serve_to_dpdks_back_end_and_back(tmp_path: Path) -> None:
    """Both know nothing of each other's device: what the guest has is what both offer, so QEMU lets it go."""
    with ExitStack() as stack:
        ours, theirs = (stack.enter_context(reflecting(kind, tmp_path / kind)) for kind in ("vnetdp", "net_vhost"))
        move = Move(tmp_path / "move", ours, theirs, stack, device=",".join(f"{name}=off" for name in ONE_SIDED))
        for way in ("to net_vhost", "back to serve"):
            found, said = hold(move)
            FIGURES.info("%s, held answers: %s, downtime %d ms", way, found, said["downtime"])
            assert_whole(found)
            if way == "to net_vhost":
                move.on_to(ours)
        move.target.run(f"ping -c 3 -i 0.2 -q {PEER}")


def test_a_lost_dirty_log_is_found(tmp_path: Path) -> None:
    """The test above tests something: without the log it fails."""
    with ExitStack() as stack:
        source, target = (stack.enter_context(reflecting("vnetdp", tmp_path / side)) for side in ("a", "b"))
        proxy = stack.enter_context(ForgetfulProxy(tmp_path / "proxy", source))
        found, _ = hold(Move(tmp_path / "move", tmp_path / "proxy", target, stack))
        assert proxy.logs_lost > 0
    # Answers are stale, or lost with the used ring's index.
    assert found["sent"] > 1000, found
    with pytest.raises(AssertionError):
        assert_whole(found)


@pytest.mark.parametrize("kind", ["vnetdp", *(["net_vhost"] if CAMPAIGN else [])])
def test_under_ping(tmp_path: Path, kind: str) -> None:
    rows = []
    for run in range(20 if CAMPAIGN else 1):
        folder = tmp_path / str(run)
        folder.mkdir()
        with reflecting(kind, folder / "a") as source, reflecting(kind, folder / "b") as target:
            found, said = beat(folder / "move", source, target)
        rows.append((said["downtime"], said["total-time"], found["lost"], found["longest_gap_ms"]))
        assert found["lost"] <= 50, found
        assert found["heard_until_s"] > 5.5, found
    for name, values in zip(
        ("downtime_ms", "total_ms", "lost", "longest_gap_ms"), zip(*rows, strict=True), strict=True
    ):
        least, middle, most = min(values), statistics.median(values), max(values)
        FIGURES.info("%s, under ping: %s %g / %g / %g (min / median / max)", kind, name, least, middle, most)


@pytest.mark.parametrize("queue_pairs", [1, 2] if CAMPAIGN else [2])
def test_a_download_goes_on(tmp_path: Path, queue_pairs: int) -> None:
    """Two TAPs in one bridge: TCP finds its way to the new one."""
    with Host(tmp_path) as host, ExitStack() as stack:
        host.ip("link add bridge0 type bridge")
        host.address("bridge0")
        sockets: list[Path] = []
        for side in ("a", "b"):
            serve = Serve(tmp_path, host.tap(f"tap-{side}"), tmp_path / side, "--queue-pairs", str(queue_pairs))
            sockets.append(stack.enter_context(serve).sock)
            host.ip(f"link set dev tap-{side} master bridge0")
        move = Move(tmp_path, sockets[0], sockets[1], stack, queue_pairs=queue_pairs)
        with host.file(300 if CAMPAIGN else 60) as (url, digest):
            move.source.run(f"wget -q -O - {url} | sha256sum > /sum & sleep 0.5")
            assert move.source.run("cat /sum") == "", "the download was over before the migration"
            said = move.migrate()
            assert move.output("/sum", "-").split()[0] == digest
        FIGURES.info("vnetdp, under a download: downtime %d ms", said["downtime"])
        assert int(re.findall(r"TX:.*\n\s*(\d+)", host.ip("-s link show dev tap-b"))[0]) > 10_000_000
