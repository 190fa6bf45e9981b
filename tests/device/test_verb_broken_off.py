"""A verb at a worker process may end early, on either side: the worker may be lost by it, and no frame is."""

from __future__ import annotations

import re
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.device.test_worker_dies import IN_HAND, Bed
from tests.support.by_hand import PATIENCE, no_descriptor_leaks, stand_still, wait_equal, wait_for
from vnetdp.backends.process import WorkerProcess
from vnetdp.device.owners import Owner
from vnetdp.errors import BackendError
from vnetdp.virtio.state import VIRTIO_CONFIG_S_NEEDS_RESET


@contextmanager
def _raising(error: BaseException) -> Iterator[None]:
    """Have SIGUSR1 raise *error* in the main thread."""

    def handler(*_: object) -> None:
        raise error

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def _breaks_off(worker: WorkerProcess, change: Callable[[], object], error: BaseException) -> None:
    """Make *change*, and have a signal raise *error* while the worker, which is stopped, is waited for."""
    may_end = threading.Event()

    def send() -> None:
        wait_for(worker._lock.locked, "a verb is on its way")
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        may_end.set()

    sender = threading.Thread(target=send)
    with _raising(error), pytest.raises(type(error)) as caught:
        sender.start()
        change()
        may_end.wait(PATIENCE)
    assert caught.value is error
    sender.join()


@pytest.mark.parametrize("error", [SystemExit(3), TimeoutError("the user's"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("serving", ["vhost", "userspace"])
def test_a_handler_of_a_signal_that_raises_in_a_verb_costs_the_worker_and_no_frame(
    error: BaseException, serving: str
) -> None:
    with no_descriptor_leaks(), ExitStack() as stack:
        bed = Bed(WorkerProcess(1))
        stack.callback(bed.close)
        bed.serve()
        assert isinstance(bed.worker, WorkerProcess)
        bed.device.set_use_vhost(serving == "vhost")
        stand_still(bed.worker.pid)
        _breaks_off(bed.worker, lambda: bed.device.set_use_vhost(serving != "vhost"), error)
        bed.moves()
        for use in (True, False, True):
            bed.device.set_use_vhost(use)
            assert bed.device.owner is Owner.USERSPACE
        bed.moves()
        assert bed.device.status & VIRTIO_CONFIG_S_NEEDS_RESET == 0
        ledger = bed.settle()
        assert abs(ledger.lost) + ledger.duplicated <= IN_HAND, ledger
        assert ledger.reordered == ledger.corrupted == 0, ledger


def test_the_rings_of_a_worker_process_that_is_closed_are_taken_once_it_is_gone() -> None:
    """It is stopped, so it does not end by itself, and could go on with the rings later."""
    with no_descriptor_leaks(), ExitStack() as stack:
        bed = Bed(WorkerProcess(1))
        stack.callback(bed.close)
        bed.serve()
        assert isinstance(bed.worker, WorkerProcess)
        stand_still(bed.worker.pid)
        closing = threading.Thread(target=bed.worker.close)
        closing.start()
        wait_for(lambda: bed.worker._sock.fileno() < 0, "close has begun")  # type: ignore[union-attr]
        bed.device.set_use_vhost(False)
        assert bed.device.owner is Owner.USERSPACE
        assert bed.worker._child.process.poll() is not None
        bed.moves()
        closing.join()
        bed.settle()


@pytest.mark.parametrize("more", range(10))
def test_a_worker_process_out_of_descriptors_refuses_and_may_be_tried_again(
    more: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with no_descriptor_leaks(), ExitStack() as stack:
        bed = Bed(WorkerProcess(1))
        stack.callback(bed.close)
        bed.device.set_use_vhost(False)
        bed.boot()
        assert isinstance(bed.worker, WorkerProcess)
        pid = bed.worker.pid
        bed.worker.check()  # it has opened all that it opens by itself
        highest = max(int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir())
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + 1 + more, limits[1]))
        bed.device.set_use_vhost(True)
        if bed.device.owner is Owner.USERSPACE:
            assert isinstance(bed.device.last_error, BackendError)
            assert re.fullmatch(
                r"receive: EMFILE: the worker process: (.*: )?Too many open files: "
                r"\d+ of \d+ descriptors are in use; raise the limit: ulimit -n 65536",
                str(bed.device.last_error),
            )
        bed.moves()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        bed.device.set_use_vhost(False)
        bed.device.set_use_vhost(True)
        wait_equal(lambda: bed.device.owner, Owner.VHOST)
        bed.moves()
        assert bed.settle().clean
    assert capfd.readouterr().err == ""
