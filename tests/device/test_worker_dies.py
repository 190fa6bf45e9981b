"""A vhost worker may die or hang at any moment: wired as the README shows, userspace goes on with the rings.

Nothing here tells the device of it: it hears by itself.
"""

from __future__ import annotations

import math
import os
import re
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import pytest

from tests.support.by_hand import PATIENCE, frame, no_descriptor_leaks, wait_equal, wait_for
from vnetdp import Driver, NetDevice
from vnetdp.backends.faulty import Fault, Faults
from vnetdp.backends.process import WorkerProcess
from vnetdp.backends.worker import Worker
from vnetdp.device.owners import Owner
from vnetdp.endpoints.base import Endpoint
from vnetdp.endpoints.loopback import GenerateEndpoint, Ledger, MacswapEndpoint, drained
from vnetdp.errors import BackendError, ConfigError
from vnetdp.guest.driver import memory_for
from vnetdp.shared.memory import DirtyLog
from vnetdp.testing import Vnet
from vnetdp_kernels import rows as r

SHORT_S = 0.5  # until a worker that hangs is given up, in place of 10 s
CAMPAIGN = os.environ.get("VNETDP_CAMPAIGN") == "1"
IN_HAND = 2 * 64  # frames that a killed process may have moved both ways, and not published


class Bed:
    """A device, its worker and its driver, as the README wires them, and numbered frames both ways."""

    def __init__(self, worker: Worker | WorkerProcess) -> None:
        self.worker = worker
        with ExitStack() as stack:
            stack.callback(worker.close)
            self.memory = stack.enter_context(memory_for())
            self.wire = stack.enter_context(GenerateEndpoint())
            self.source = stack.enter_context(GenerateEndpoint())
            self.device = stack.enter_context(NetDevice(self.memory, self.wire, vhost=worker))
            self.close = stack.pop_all().close

    def boot(self) -> None:
        self.guest = Driver(self.device, self.memory, self.source)
        self.guest.start()

    def moves(self) -> None:
        """Wait until frames have moved both ways."""
        before = [queue["packets"] for queue in self.device.counters()]

        def moved() -> bool:
            return all(now["packets"] > then for now, then in zip(self.device.counters(), before, strict=True))

        wait_for(moved, f"frames move both ways; owner {self.device.owner}, {self.device.last_error}")

    def serve(self) -> None:
        """Bring the driver up, and wait until vhost has moved frames."""
        self.boot()
        assert self.device.owner is Owner.VHOST
        self.moves()

    def settle(self) -> Ledger:
        ledger = drained(self.wire, self.source)
        self.guest.check()
        self.guest.close()
        return ledger


# --- how a worker ends ---


def _fails(bed: Bed) -> None:
    """An exception ends the thread, or the process by its thread."""
    bed.worker.fail(RuntimeError("a defect"))


def _killed(bed: Bed) -> None:
    bed.worker.kill()


def _hangs(bed: Bed) -> None:
    """The thread is in Python, and does not come back."""
    assert isinstance(bed.worker, Worker)
    bed.worker.loop_thread._timeout_s = SHORT_S
    bed.worker.hang(math.inf)


def _stopped(bed: Bed) -> None:
    """The process stands still: it is not dead, and answers nothing."""
    assert isinstance(bed.worker, WorkerProcess)
    bed.worker.timeout_s = SHORT_S
    bed.worker.hang(math.inf)


def _closed(bed: Bed) -> None:
    bed.worker.close()


def _looked_after() -> Worker:
    """Return a worker whose watchdog looks often, and has patience: it is to lose that when the thread hangs, not before."""
    worker = Worker(1, timeout_s=SHORT_S)
    worker.loop_thread._timeout_s = PATIENCE
    return worker


ENDS: dict[str, tuple[Callable[[], Worker | WorkerProcess], Callable[[Bed], None]]] = {
    "thread fails": (lambda: Worker(1), _fails),
    "thread is killed": (lambda: Worker(1), _killed),
    "thread hangs": (_looked_after, _hangs),
    "thread is closed": (lambda: Worker(1), _closed),
    "process fails": (lambda: WorkerProcess(1), _fails),
    "process is killed": (lambda: WorkerProcess(1), _killed),
    "process hangs": (lambda: WorkerProcess(1), _stopped),
}

# --- what the device is doing meanwhile ---


def _traffic(bed: Bed, end: Callable[[Bed], None]) -> None:
    bed.serve()
    end(bed)


def _idle(bed: Bed, end: Callable[[Bed], None]) -> None:
    bed.wire.stop()
    bed.source.stop()
    bed.boot()
    assert bed.device.owner is Owner.VHOST
    end(bed)
    wait_equal(lambda: bed.device.owner, Owner.USERSPACE)
    for endpoint in (bed.wire, bed.source):
        endpoint.rows[:, r.EP_LIMIT] = -1
    with bed.guest.paused(), bed.device.paused():
        pass  # both look anew at what may be sent


def _before_the_driver(bed: Bed, end: Callable[[Bed], None]) -> None:
    end(bed)
    bed.boot()


def _link_down(bed: Bed, end: Callable[[Bed], None]) -> None:
    bed.serve()
    bed.device.set_link(False)
    end(bed)
    bed.device.set_link(True)


def _machine_stopped(bed: Bed, end: Callable[[Bed], None]) -> None:
    bed.serve()
    bed.device.set_running(False)
    end(bed)
    bed.device.set_running(True)


def _prepared(bed: Bed, end: Callable[[Bed], None]) -> None:
    """Configured, with its rings held back, as at the destination of a migration."""
    bed.serve()
    bed.device.set_running(False)
    assert bed.device.prepare_vhost()
    end(bed)
    bed.device.bind_prepared()
    bed.device.set_running(True)


def _userspace_serves(bed: Bed, end: Callable[[Bed], None]) -> None:
    bed.serve()
    bed.device.set_use_vhost(False)
    end(bed)
    bed.moves()
    assert bed.device.owner is Owner.USERSPACE
    bed.device.set_use_vhost(True)


def _logging(bed: Bed, end: Callable[[Bed], None]) -> None:
    log = DirtyLog(bed.memory.end)
    bed.device.set_log(log)
    bed.serve()
    end(bed)
    wait_equal(lambda: bed.device.owner, Owner.USERSPACE)
    bed.device.set_log(None)
    log.close()


def _handed_over(bed: Bed, end: Callable[[Bed], None]) -> None:
    """The owner changes again and again, in another thread."""
    bed.serve()
    done = threading.Event()

    def change() -> None:
        while not done.is_set():
            bed.device.set_use_vhost(False)
            bed.device.set_use_vhost(True)

    thread = threading.Thread(target=change)
    thread.start()
    handovers = bed.device.handovers
    wait_for(lambda: bed.device.handovers > handovers + 4, "the owner changes")
    end(bed)
    wait_for(lambda: bed.device.fallbacks > 0, "vhost can't be started any more")
    done.set()
    thread.join()


STATES: dict[str, Callable[[Bed, Callable[[Bed], None]], None]] = {
    "under traffic": _traffic,
    "idle": _idle,
    "before the driver": _before_the_driver,
    "link down": _link_down,
    "machine stopped": _machine_stopped,
    "prepared": _prepared,
    "userspace serves": _userspace_serves,
    "logging": _logging,
    "handed over": _handed_over,
}


# Each process that hangs takes seconds, and one that fails ends as one that is killed: the others of their states are
# for the campaign.
_SHORT = {
    "process hangs": ("under traffic", "before the driver", "prepared"),
    "process fails": ("under traffic", "prepared"),
}
CASES = [(how, state) for how in ENDS for state in STATES if CAMPAIGN or state in _SHORT.get(how, STATES)]


@pytest.mark.parametrize(("how", "state"), CASES)
def test_userspace_goes_on_where_a_worker_ended(how: str, state: str) -> None:
    make, end = ENDS[how]
    with no_descriptor_leaks(), ExitStack() as stack:
        bed = Bed(make())
        stack.callback(bed.close)
        STATES[state](bed, end)
        wait_equal(lambda: bed.device.owner, Owner.USERSPACE)
        bed.moves()
        assert isinstance(bed.device.last_error, BackendError)
        assert "ESRCH" in str(bed.device.last_error)
        bed.device.set_status(bed.device.status)  # which is when vhost is tried again
        assert bed.device.owner is Owner.USERSPACE
        bed.moves()
        ledger = bed.settle()
        died = isinstance(bed.worker, WorkerProcess)
        assert abs(ledger.lost) + ledger.duplicated <= (IN_HAND if died else 0), ledger
        assert ledger.reordered == ledger.corrupted == 0, ledger


@pytest.mark.parametrize(
    ("end", "says"),
    [
        (_killed, "was killed by SIGKILL"),
        (_fails, "ended with exit status 1"),
        (_stopped, r"did not answer within [0-9.]+ s, and was killed"),
    ],
)
def test_the_end_of_a_worker_process_is_said_in_one_line_and_once(
    end: Callable[[Bed], None], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    bed = Bed(WorkerProcess(1))
    with ExitStack() as stack:
        stack.callback(bed.close)
        bed.serve()
        end(bed)
        wait_equal(lambda: bed.device.owner, Owner.USERSPACE)
        for _ in range(10):
            bed.device.set_use_vhost(False)
            bed.device.set_use_vhost(True)
        bed.moves()
        assert bed.device.fallbacks == 11
        bed.guest.close()
    (said,) = [record.getMessage() for record in caplog.records]
    assert isinstance(bed.worker, WorkerProcess)
    assert re.fullmatch(
        rf"vhost is gone: the worker process {bed.worker.pid} {says} \(restart the program to use vhost again\): "
        r"falling back on userspace virtio \(rings 0 and 1\)",
        said,
    )


def test_the_exit_status_of_a_worker_process_is_said() -> None:
    worker = WorkerProcess(1)
    worker._events.shutdown(socket.SHUT_RDWR)
    worker._sock.shutdown(socket.SHUT_RDWR)
    with pytest.raises(BackendError, match=f"the worker process {worker.pid} ended with exit status 0"):
        worker.backends[0].set_features(0)
    worker.close()
    with pytest.raises(BackendError, match="ended with exit status 0"):
        worker.backends[0].set_features(0)


def test_why_vhost_cannot_start_is_said_again_once_it_could(caplog: pytest.LogCaptureFixture) -> None:
    worker, faults = Worker(1), Faults()
    with (
        memory_for() as memory,
        MacswapEndpoint() as wire,
        NetDevice(memory, wire, vhost=faults.wrap(worker)) as device,
        Driver(device, memory),
    ):

        def fail(times: int) -> None:
            faults.append(Fault("set_vring_base", times=times))
            for _ in range(times):
                device.set_use_vhost(False)
                device.set_use_vhost(True)
                assert device.owner is Owner.USERSPACE

        fail(3)
        assert len(caplog.records) == 1
        device.set_status(device.status)
        assert device.owner is Owner.VHOST
        fail(3)
        assert len(caplog.records) == 2
    worker.close()


def test_a_device_whose_memory_was_closed_first_closes_after_its_worker_died() -> None:
    with no_descriptor_leaks(), ExitStack() as stack:
        bed = Bed(WorkerProcess(1))
        stack.callback(bed.close)
        bed.serve()
        bed.memory.close()
        _killed(bed)
        wait_equal(lambda: bed.device.owner, Owner.NOBODY)
        bed.device.close()
        bed.guest.close()


def test_a_device_hears_through_backends_that_are_wrapped() -> None:
    with ExitStack() as stack:
        worker = Worker(2)
        stack.callback(worker.close)
        memory = stack.enter_context(memory_for(2))
        wire = stack.enter_context(MacswapEndpoint(2))
        device = stack.enter_context(NetDevice(memory, wire, queue_pairs=2, vhost=Faults().wrap(worker)))
        stack.enter_context(Driver(device, memory, queue_pairs=2))
        assert device.owner is Owner.VHOST
        worker.fail(RuntimeError("a defect"))
        wait_equal(lambda: device.owner, Owner.USERSPACE)
        assert "a defect" in str(device.last_error)
        assert device.fallbacks == 1


class Slow(Endpoint):
    """An endpoint in Python that sends every frame back, and whose code may take for ever."""

    name = "slow"

    def __init__(self, hangs_in: str) -> None:
        super().__init__()
        self.hangs_in = hangs_in
        self.go_on = threading.Event()
        self.go_on.set()
        self.inside = threading.Event()
        self._frames: list[bytes] = []

    def _hang(self, where: str) -> None:
        if where == self.hangs_in and not self.go_on.is_set():
            self.inside.set()
            self.go_on.wait()

    def transmit_frames(self, queue: int, frames: Sequence[bytes]) -> None:
        self._hang("transmit")
        self._frames += frames

    def receive_frames(self, queue: int, limit: int) -> Sequence[bytes]:
        frames, self._frames = self._frames, []
        self._hang("receive")
        return frames


@pytest.mark.parametrize("where", ["transmit", "receive"])
def test_an_endpoint_that_hangs_costs_the_worker_and_no_frame(where: str) -> None:
    """Whoever has the rings waits for the endpoint; once it comes back, nothing is lost or doubled."""
    worker = _looked_after()
    with (
        memory_for() as memory,
        Slow(where) as wire,
        NetDevice(memory, wire, vhost=worker) as device,
        Driver(device, memory) as guest,
    ):
        guest.start()
        got: list[bytes] = []

        def echoed(n: int) -> bool:
            got.extend(guest.receive())
            return len(got) >= n

        guest.send(frame(0))
        wait_for(lambda: echoed(1), "the first frame comes back")
        assert device.owner is Owner.VHOST
        worker.loop_thread._timeout_s = SHORT_S
        wire.go_on.clear()
        guest.send(frame(1))
        assert wire.inside.wait(60)
        wait_equal(lambda: device.owner, Owner.USERSPACE)
        guest.send(frame(2))
        wire.go_on.set()
        wait_for(lambda: echoed(3), "the others come back")
        assert got == [frame(0), frame(1), frame(2)]
        worker.close()


def test_a_worker_has_one_device_at_a_time() -> None:
    """A second one would lead the rings of the first into its own guest's memory."""
    worker = Worker(2)
    with ExitStack() as stack:
        stack.callback(worker.close)
        memories = [stack.enter_context(memory_for()) for _ in range(2)]
        wire = stack.enter_context(GenerateEndpoint())
        source = stack.enter_context(GenerateEndpoint())
        with NetDevice(memories[0], wire, vhost=worker.backends[:1]) as first, Driver(first, memories[0], source):
            with pytest.raises(ConfigError, match="a worker for each device"):
                NetDevice(memories[1], wire, vhost=worker.backends[1:])
            assert worker.datapath.memory is memories[0]
        with NetDevice(memories[1], wire, vhost=worker.backends[1:]) as second:
            assert not second.last_error


class Meddler(Endpoint):
    """An endpoint whose own code takes down its device's link, once *may* has returned."""

    device: NetDevice

    def may(self) -> None: ...

    def transmit_frames(self, queue: int, frames: Sequence[bytes]) -> None:
        self.may()
        self.device.set_link(False)


@pytest.mark.parametrize("use_vhost", [True, False])
def test_an_endpoint_cannot_change_its_device_from_within_and_the_device_lives(use_vhost: bool) -> None:
    worker = Worker(1)
    with (
        memory_for() as memory,
        Meddler() as wire,
        NetDevice(memory, wire, vhost=worker) as device,
        Driver(device, memory) as guest,
    ):
        wire.device = device
        device.set_use_vhost(use_vhost)
        guest.start()
        guest.send(frame(0))
        wait_equal(lambda: wire.errors, 1)
        device.set_link(True)
        assert device.owner is (Owner.VHOST if use_vhost else Owner.USERSPACE)
        worker.close()


@pytest.mark.parametrize("use_vhost", [True, False])
def test_an_endpoint_that_changes_its_device_while_another_thread_does_waits_for_no_one(use_vhost: bool) -> None:
    """The other thread waits for the endpoint's."""
    worker = Worker(1)
    within = threading.Event()
    with (
        memory_for() as memory,
        Meddler() as wire,
        NetDevice(memory, wire, vhost=worker) as device,
        Driver(device, memory) as guest,
    ):
        running = worker if use_vhost else device.userspace.worker
        assert running is not None
        ctl = running.datapath.ctl

        def waits() -> None:
            within.set()
            wait_for(lambda: ctl[r.CTL_DOORBELL] == 1, "the other thread waits for this one")

        wire.device, wire.may = device, waits  # type: ignore[method-assign]
        device.set_use_vhost(use_vhost)
        guest.start()
        guest.send(frame(0))
        assert within.wait(PATIENCE)
        device.set_link(False)  # which takes the rings from the endpoint's thread
        device.set_link(True)
        wait_equal(lambda: wire.errors, 1)
        assert device.owner is (Owner.VHOST if use_vhost else Owner.USERSPACE)
        worker.close()


@pytest.mark.vnet(owner=["thread", "process"])
def test_a_worker_that_hangs_for_a_while_goes_on_with_its_rings(vnet: Vnet) -> None:
    vnet.wait_for(100)
    vnet.worker.hang(0.05)
    vnet.wait_for(100)
    assert vnet.device.owner is Owner.VHOST
    assert not vnet.device.last_error
