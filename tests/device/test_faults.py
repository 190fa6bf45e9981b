"""Any verb of vhost fails, at any queue, once or always: the rings have a live owner, and no packet is lost."""

from __future__ import annotations

import errno
import itertools
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.support.by_hand import NEEDS_RESET, Traffic, no_descriptor_leaks, scaled, wait_for
from vnetdp.backends.faulty import Fault, Faults
from vnetdp.backends.names import VERBS
from vnetdp.backends.process import WorkerProcess
from vnetdp.backends.worker import Worker
from vnetdp.device.device import NetDevice
from vnetdp.device.owners import Owner
from vnetdp.endpoints.loopback import NullEndpoint
from vnetdp.errors import BackendError, ConfigError
from vnetdp.guest.driver import Driver, memory_for
from vnetdp.programs.link import Link
from vnetdp.shared.memory import DirtyLog
from vnetdp.testing import READY, Vnet

PAIRS = 2
RATE = scaled(20_000, 300)
PER_DEVICE = ("set_mtu", "set_features", "set_memory", "set_log")
AT_START = tuple(verb for verb in VERBS if verb != "get_vring_base")
TIMES = {"once": 1, "always": -1}

# Verbs of a whole device strike at a pair; those of a ring at a pair and a ring.
POINTS = [
    (verb, pair, vring)
    for verb, pair in itertools.product(VERBS, range(PAIRS))
    for vring in ([None] if verb in PER_DEVICE else [0, 1])
]
START_POINTS = [point for point in POINTS if point[0] in AT_START]


class Faulty(Vnet):
    """A device under traffic whose vhost fails as `faults` says."""

    def strike(self, verb: str, pair: int, vring: int | None, times: str) -> Fault:
        fault = Fault(verb, pair, vring, TIMES[times])
        self.faults.append(fault)
        return fault

    def owned_by(self, owner: Owner) -> bool:
        return self.device.owner is owner

    def serves(self, owner: Owner) -> None:
        """*owner* has all rings, violates no invariant, and moves packets on each pair, each way."""
        assert self.device.owner is owner, self.device.last_error
        assert self.device.status == READY
        self.wait_for(3)
        self.check()


@contextmanager
def faulty(vhost_first: bool, owner: str = "thread") -> Iterator[Faulty]:
    """Run traffic; at the end it settles, every frame is accounted for, and every descriptor is closed."""
    with no_descriptor_leaks(), Faulty(owner=owner, pairs=PAIRS, num=64, rate=RATE) as setup:
        setup.device.set_use_vhost(vhost_first)
        setup.serves(Owner.VHOST if vhost_first else Owner.USERSPACE)
        yield setup


def test_a_device_that_may_not_fall_back_says_that_nobody_has_the_rings(caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker(1)
    vhost = Faults([Fault("set_backend")]).wrap(worker)
    with (
        memory_for() as memory,
        NullEndpoint() as wire,
        NetDevice(memory, wire, vhost=vhost, fallback=False) as device,
        Driver(device, memory),
    ):
        assert device.owner is Owner.NOBODY
    worker.close()
    assert "the rings have no owner until vhost starts" in caplog.text
    assert "falling back" not in caplog.text


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize(("verb", "pair", "vring"), START_POINTS)
def test_a_verb_that_fails_at_the_start_means_userspace(verb: str, pair: int, vring: int | None, times: str) -> None:
    with faulty(vhost_first=False) as setup:
        device = setup.device
        fault = setup.strike(verb, pair, vring, times)
        device.set_use_vhost(True)
        setup.serves(Owner.USERSPACE)
        assert (device.fallbacks, fault.hits) == (1, 1)
        assert isinstance(device.last_error, BackendError)
        assert (device.last_error.verb, device.last_error.errno) == (verb, errno.EIO)
        # The next status set tries again.
        device.set_status(device.status)
        if times == "once":
            setup.serves(Owner.VHOST)
            assert (device.fallbacks, fault.hits) == (1, 1)
        else:
            setup.serves(Owner.USERSPACE)
            assert (device.fallbacks, fault.hits) == (2, 2)
            # The fault goes away, and so does its effect.
            setup.faults.clear()
            device.set_status(device.status)
            setup.serves(Owner.VHOST)


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize(
    ("verb", "pair", "vring"), [("set_vring_base", 1, 0), ("set_backend", 1, 1), ("set_memory", 1, None)]
)
def test_the_same_with_a_worker_process(verb: str, pair: int, vring: int | None, times: str) -> None:
    with faulty(vhost_first=False, owner="process") as setup:
        setup.strike(verb, pair, vring, times)
        setup.device.set_use_vhost(True)
        setup.serves(Owner.USERSPACE)
        setup.device.set_status(setup.device.status)
        setup.serves(Owner.VHOST if times == "once" else Owner.USERSPACE)
        setup.device.set_use_vhost(False)
        setup.serves(Owner.USERSPACE)


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize(("pair", "vring"), [(p, v) for p in range(PAIRS) for v in range(2)])
def test_the_index_is_right_even_if_vhost_does_not_tell_it(pair: int, vring: int, times: str) -> None:
    with faulty(vhost_first=True) as setup:
        fault = setup.strike("get_vring_base", pair, vring, times)
        for hits in range(1, scaled(20, 4)):
            setup.device.set_use_vhost(False)
            setup.serves(Owner.USERSPACE)
            assert fault.hits == (hits if times == "always" else 1)
            setup.device.set_use_vhost(True)
            setup.serves(Owner.VHOST)


def test_everything_fails_at_once_and_the_indices_are_right() -> None:
    with faulty(vhost_first=True) as setup:
        setup.faults.append(Fault("get_vring_base", times=-1))
        setup.faults.append(Fault("set_backend", 1, 1, times=-1))
        for _ in range(scaled(20, 4)):
            # Three rings are bound and let go again, without a word about their index.
            setup.device.set_link(False)
            setup.device.set_link(True)
            setup.device.set_status(setup.device.status)
            setup.serves(Owner.USERSPACE)
        assert setup.device.fallbacks == setup.faults[1].hits == 2 * scaled(20, 4)


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("pair", range(PAIRS))
@pytest.mark.parametrize("verb", ["set_log", "set_features", "set_vring_addr"])
@pytest.mark.parametrize("on", [True, False])
def test_logging_that_cannot_start_stays_off_and_stops_in_any_case(on: bool, verb: str, pair: int, times: str) -> None:
    with faulty(vhost_first=True) as setup:
        device = setup.device
        log = DirtyLog(device.memory.end)
        if not on:
            device.set_log(log)
        fault = setup.strike(verb, pair, None, times)
        if on:
            with pytest.raises(BackendError, match=verb):
                device.set_log(log)
            assert device.log is None
            setup.serves(Owner.VHOST if times == "once" else Owner.USERSPACE)
            setup.faults.clear()
            device.set_log(log)
        else:
            device.set_log(None)
            assert fault.hits == (1 if times == "once" else 2)
            setup.serves(Owner.VHOST if times == "once" else Owner.USERSPACE)
            setup.faults.clear()
        device.set_status(device.status)
        setup.serves(Owner.VHOST)
        # Whoever owns the rings does, or does not, write the log that was asked for.
        log.take()
        setup.wait_for(200)
        pages = log.take()
        assert bool(pages) == on
        device.set_log(None)
        log.close()


@pytest.mark.parametrize("verb", ["set_vring_num", "set_vring_addr", "set_vring_kick", "set_vring_call", "set_backend"])
def test_many_failures_leak_nothing(verb: str) -> None:
    with faulty(vhost_first=False) as setup:
        with no_descriptor_leaks():
            for n in range(scaled(30, 4)):
                setup.strike(verb, n % PAIRS, n // PAIRS % 2, "once")
                setup.device.set_use_vhost(True)
                assert setup.owned_by(Owner.USERSPACE)
                setup.device.set_status(setup.device.status)
                assert setup.owned_by(Owner.VHOST)
                setup.device.set_use_vhost(False)
        setup.serves(Owner.USERSPACE)


@pytest.mark.parametrize("datapath", ["vhost", "vhost-process"])
def test_a_worker_that_dies_under_traffic_leaves_the_rings_to_userspace(datapath: str) -> None:
    with no_descriptor_leaks():
        traffic = Traffic(PAIRS, rate=scaled(1000, 100))
        with Link(traffic.device, traffic.guest, datapath, queue_pairs=PAIRS, num=64) as link:
            traffic.wait_for_more(20)
            assert link.report()["owner"] == "vhost"
            worker = link.worker
            if isinstance(worker, WorkerProcess):
                with worker.backends[0].hold():  # it has no frame in hand: what became of that one nobody would know
                    worker.kill()
            elif worker is not None:
                worker.fail(RuntimeError("a defect"))
            wait_for(lambda: link.device.owner is Owner.USERSPACE, "userspace has the rings")
            traffic.wait_for_more(20)
            assert link.device.fallbacks == 1
            assert isinstance(link.device.last_error, BackendError)
            assert link.device.last_error.errno == errno.ESRCH
            # It stays gone, whoever asks for it.
            link.device.set_use_vhost(True)
            assert link.device.owner is Owner.USERSPACE
            traffic.wait_for_more(20)
            traffic.settle(link.device, link.driver)
        traffic.check()
        assert traffic.device.polls_started == traffic.device.polls_stopped
        traffic.close()


def test_a_userspace_datapath_that_dies_means_needs_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    traffic = Traffic(PAIRS, rate=scaled(1000, 100))
    with Link(traffic.device, traffic.guest, queue_pairs=PAIRS, num=64) as link:
        traffic.wait_for_more(20)
        datapath = link.device.userspace.backends[0].worker._target  # type: ignore[attr-defined]
        monkeypatch.setattr(datapath, "run", _fails)
        datapath.bell.signal()
        wait_for(lambda: bool(link.device.status & NEEDS_RESET), "the device needs a reset")
        assert link.device.owner is Owner.NOBODY
        assert not traffic.device.polled_by
    traffic.close()


def _fails(*_args: int) -> tuple[int, int]:
    raise RuntimeError("a defect")


# --- how faults are written ---


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("set_mtu", Fault("set_mtu")),
        ("set_backend:1", Fault("set_backend", 1)),
        ("set_backend:1,0", Fault("set_backend", 1, 0)),
        ("set_vring_num:0,1:once", Fault("set_vring_num", 0, 1, 1)),
        ("get_vring_base:always", Fault("get_vring_base", times=-1)),
        ("get_vring_base:12,1:always", Fault("get_vring_base", 12, 1, -1)),
        ("set_vring_base:0,1:#2:EBUSY", Fault("set_vring_base", 0, 1, 1, errno.EBUSY, nth=2)),
        ("set_memory:ENOMEM:always:#3", Fault("set_memory", times=-1, code=errno.ENOMEM, nth=3)),
        ("set_backend:delay=0.5", Fault("set_backend", code=0, delay_s=0.5)),
        ("early.set_backend:1:EIO:delay=2", Fault("set_backend", 1, phase="early", delay_s=2.0)),
    ],
)
def test_faults_are_read(text: str, fault: Fault) -> None:
    assert Fault.parse(text) == fault


@pytest.mark.parametrize("text", ["", "set", "SET_MTU", "set-mtu", ".set_mtu", "a.b.set_mtu", ":EIO"])
def test_a_fault_of_no_verb_is_refused_and_the_verbs_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match="set_mtu, set_features"):
        Fault.parse(text)


@pytest.mark.parametrize(
    ("parts", "wrong"),
    [
        ("", ""),
        ("x", "x"),
        ("1,", "1,"),
        ("twice", "twice"),
        ("1:1", "1"),
        ("#0", "#0"),
        ("#", "#"),
        ("2#", "2#"),
        ("EBUSSY", "EBUSSY"),
        ("ebusy", "ebusy"),
        ("delay=", "delay="),
        ("delay=-1", "delay=-1"),
        ("delay=inf", "delay=inf"),
        ("once:0", "0"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_a_part_that_no_fault_has_is_named_with_the_parts_that_there_are(parts: str, wrong: str) -> None:
    with pytest.raises(
        ConfigError, match=re.escape(f"{wrong!r} is none of the parts of [PHASE.]VERB[:PAIR[,VRING]][:#N]")
    ):
        Fault.parse(f"set_mtu:{parts}")


def test_a_part_that_is_given_twice_and_a_delay_without_end_are_refused() -> None:
    for parts in ("once:always", "#1:#2", "EIO:EBUSY", "delay=1:delay=2"):
        with pytest.raises(ConfigError, match="says again what a part before it says"):
            Fault.parse(f"set_mtu:{parts}")
    with pytest.raises(ConfigError, match=r"fault set_mtu:delay=61: delay_s 61\.0 is not 0 to 60 seconds"):
        Fault.parse("set_mtu:delay=61")


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"verb": "set_bakend"}, "verbs are set_mtu, set_features"),
        ({"verb": "set_backend:0"}, "verbs are set_mtu, set_features"),
        ({"pair": -1}, "pair -1 is not None or a number from 0"),
        ({"index": 2}, "index 2 is not None, 0 (receiveq) or 1 (transmitq)"),
        ({"times": 0}, "times 0 is not a number from 1"),
        ({"times": -2}, "times -2 is not"),
        ({"code": -5}, "code -5 is not an errno, or 0"),
        ({"phase": "a.b"}, "phase 'a.b' is not a word"),
        ({"nth": 0}, "nth 0 is not a number from 1"),
        ({"delay_s": -1.0}, "delay_s -1.0 is not 0 to 60 seconds"),
        ({"delay_s": float("nan")}, "delay_s nan is not 0 to 60 seconds"),
    ],
)
def test_a_fault_of_a_call_that_cannot_be_is_refused(fields: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(wrong)):
        Fault(**({"verb": "set_backend"} | fields))


def test_a_text_in_a_list_of_faults_is_the_fault_that_it_describes() -> None:
    faults = Faults(["set_mtu"])
    faults.append("set_log:1")
    faults.insert(0, "set_memory")
    faults.extend(["set_backend"])
    faults += ["set_features"]
    faults[0] = "set_vring_num"
    faults[1:2] = ["unbind", Fault("set_log")]
    assert [fault.verb for fault in faults] == [
        "set_vring_num", "unbind", "set_log", "set_log", "set_backend", "set_features",
    ]  # fmt: skip
    for wrong in ("set_bakend", None):
        with pytest.raises(ConfigError, match=r"set_bakend|None is not a Fault"):
            faults.append(wrong)  # type: ignore[arg-type]


def test_a_fault_that_has_struck_as_often_as_it_may_is_not_taken_again() -> None:
    fault = Fault("set_mtu")
    assert fault.strikes("set_mtu", 0, None)
    with pytest.raises(ConfigError, match="fault set_mtu has struck as often as it may: append a new one"):
        Faults().append(fault)


def test_a_fault_strikes_where_and_as_often_as_it_says() -> None:
    fault = Fault("set_backend", 1, 0, times=2)
    assert not fault.strikes("set_mtu", 1, None)
    assert not fault.strikes("set_backend", 0, 0)
    assert not fault.strikes("set_backend", 1, 1)
    assert [fault.strikes("set_backend", 1, 0) for _ in range(4)] == [True, True, False, False]
    assert fault.hits == 2


def test_a_fault_strikes_from_the_call_on_that_it_names() -> None:
    second, later = Fault("set_mtu", nth=2), Fault("set_mtu", times=-1, nth=3)
    assert [second.strikes("set_mtu", 0, None) for _ in range(4)] == [False, True, False, False]
    assert [later.strikes("set_mtu", 0, None) for _ in range(4)] == [False, False, True, True]
    assert (second.hits, later.hits) == (1, 2)


def test_a_fault_has_the_errno_that_it_names() -> None:
    with faulty(vhost_first=False) as setup:
        setup.faults.append(Fault.parse("set_vring_addr:1,0:ENOMEM"))
        setup.device.set_use_vhost(True)
        setup.serves(Owner.USERSPACE)
        assert isinstance(setup.device.last_error, BackendError)
        assert (setup.device.last_error.verb, setup.device.last_error.errno) == ("set_vring_addr", errno.ENOMEM)


def test_a_verb_that_is_slow_is_no_failure() -> None:
    with faulty(vhost_first=False) as setup:
        setup.faults.append(Fault.parse("set_vring_base:delay=0.05:always"))
        began = time.monotonic()
        setup.device.set_use_vhost(True)
        assert time.monotonic() - began >= 2 * PAIRS * 0.05
        setup.serves(Owner.VHOST)
        assert setup.faults[0].hits == 2 * PAIRS
        assert setup.device.fallbacks == 0


def test_a_verb_may_be_slow_and_then_fail() -> None:
    with faulty(vhost_first=False) as setup:
        setup.faults.append(Fault.parse("set_memory:1:EIO:delay=0.05"))
        began = time.monotonic()
        setup.device.set_use_vhost(True)
        assert time.monotonic() - began >= 0.05
        setup.serves(Owner.USERSPACE)


def test_no_fault_strikes_that_is_not_armed() -> None:
    with faulty(vhost_first=False) as setup:
        setup.faults.append(Fault("set_memory", times=-1))
        setup.faults.armed = False
        setup.device.set_use_vhost(True)
        setup.serves(Owner.VHOST)
        assert setup.faults[0].hits == 0
        setup.faults.clear()
