"""WorkerProcess: a vhost worker in a process of its own, over the same shared memory.

Verbs go over a socket, one pickled request and one answer each, with every descriptor they speak of beside it; so the
child maps the same guest memory, log and endpoint, and kernels there work on the same words. The parent keeps the
books: who polls an endpoint, and what a dead child leaves behind.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import pickle
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

from vnetdp_kernels import rows as r

from ..datapath.datapath import Datapath
from ..datapath.loop_thread import Listeners, LoopThread, check_exception, hang_s
from ..endpoints.base import Endpoint
from ..errors import BackendError, EndpointError, MachineError, VnetdpError, reason
from ..shared.memory import GuestMemory, Words
from ..system import child, limits
from ..system.owned import Owned
from ..virtio.queue import VRINGS, receiveq
from . import messages
from .base import Backend
from .messages import RemoteEndpoint
from .userspace import COUNTERS, UserspaceBackend
from .verbs import GetVringBase, SetBackend, SetLog, SetMemory, SetVringCall, SetVringKick, Verb, refusal

_log = logging.getLogger("vnetdp.worker")

_TO_START = 12  # times the patience that a child has to answer first: it may be compiling
_BROKEN = "broken"
# Requests that are no verbs. Between the first two the child's thread stays out of the kernels; a ping is only answered.
_HOLD, _RELEASE, _PING = "hold", "release", "ping"
_SAME_MEMORY = "same memory"  # set_memory with the table that the child has
_MAX_REASON = 1000  # characters of an exception that the child is told


class WorkerProcess(Owned):
    """A vhost worker in a process of its own, for *pairs* queue pairs of one device. Give it to `NetDevice`.

    - `poll_us`: microseconds for which it busy-polls before it sleeps; 0 sleeps at once, -1 never sleeps.
    - `timeout_s`: seconds after which a process that does not answer is killed; 12 times as long before its first
      answer, since it may be compiling. None waits without end.
    - `ending`: asked while an answer is waited for; once it returns True, the process has 2 s to answer.

    An endpoint in Python stays with its process: a ring can't be bound to it here (EOPNOTSUPP). If the process dies,
    the device takes its rings back by itself, and every verb fails with ESRCH. A process that is killed amid a batch
    may have moved up to 64 frames a queue without saying so: the next owner sends those again, and those received are
    lost. MachineError if the machine has no more processes, memory or descriptors.
    """

    backends: list[ProcessBackend]
    """A `Backend` for each queue pair."""

    def __init__(
        self,
        pairs: int,
        poll_us: int = 0,
        timeout_s: float | None = 10.0,
        ending: Callable[[], bool] = lambda: False,
    ) -> None:
        self.listeners = Listeners()
        self.timeout_s = timeout_s
        self._ending = ending
        self._answered = False  # before that it may be compiling
        self.memory: GuestMemory | None = None  # the table that the child has
        self._lock = threading.Lock()
        self._closing = threading.Event()
        with ExitStack() as made, ExitStack() as childs:
            self.datapath = Datapath(pairs)
            made.callback(self.datapath.close)
            pairs_of_sockets = []
            for _ in range(2):
                ours, theirs = limits.socket_pair(socket.SOCK_SEQPACKET)
                pairs_of_sockets.append((made.enter_context(ours), childs.enter_context(theirs)))
            (self._sock, verbs), (self._events, events) = pairs_of_sockets
            passed = (verbs.fileno(), events.fileno(), self.datapath.block.fd)
            code = f"from {__name__} import main; main({passed}, {pairs}, {poll_us})"
            process = child.start(code, verbs, passed[1:])
            made.callback(process.wait)
            made.callback(process.kill)
            self._child = child.Child(process, self._sock)
            self.backends = [ProcessBackend(self, pair) for pair in range(pairs)]
            self._watch = threading.Thread(target=self._listen, name="vhost-process-events", daemon=True)
            limits.start(self._watch)
            made.pop_all()
        self.close_on_fork()

    @property
    def pid(self) -> int:
        """The id of the worker process."""
        return self._child.pid

    @property
    def alive(self) -> bool:
        """True until the process has ended. @private"""
        return self._child.alive

    def call(self, pair: int, request: Verb | VnetdpError | Endpoint | str) -> int:
        """Have the child run a verb, or take the descriptors of an endpoint anew; BackendError as it raised it.

        ESRCH if there is no child any more.
        @private
        """
        self.check_maker()
        data, fds = messages.pack((pair, request))
        name = "fail" if isinstance(request, VnetdpError) else request if isinstance(request, str) else request.name
        if len(fds) > messages.MAX_FDS or len(data) > messages.MAX_LEN:
            limit = f"at most {messages.MAX_LEN} and {messages.MAX_FDS} fit"
            why = f"a message of {len(data)} bytes and {len(fds)} descriptors; {limit}"
            raise BackendError(name, errno.E2BIG, None, why)
        with self._lock:
            try:
                self._send(name, data, fds)
                self._await_answer()
                ok, answer = messages.receive(self._sock)
                self._answered = True
            except BackendError:
                raise  # nothing was sent
            except BaseException as e:
                if self._sock.fileno() < 0 or isinstance(e, EOFError | ConnectionError):
                    raise BackendError(name, errno.ESRCH, None, self._how_it_ended()) from e
                # ^C, or a signal's handler that raised: an answer is on its way, which no other verb may take for its own.
                self._sock.close()
                self._child.kill(f"was broken off in {name}")
                raise
        if not ok:
            raise BackendError(*answer)
        return int(answer)

    def _send(self, name: str, data: bytes, fds: list[int]) -> None:
        try:
            socket.send_fds(self._sock, [data], fds)
        except OSError as e:
            if isinstance(e, ConnectionError) or e.errno in (None, errno.EBADF):
                raise
            raise BackendError(name, e.errno, None, limits.fault(e)) from e

    def _how_it_ended(self) -> str:
        """Return how a lost child ended, and the next step."""
        return f"the worker process {self.pid} {self._child.ended()} (restart the program to use vhost again)"

    def _await_answer(self) -> None:
        """Wait until the child has answered; a child that does not answer in time is killed."""
        patience_s = math.inf if self.timeout_s is None else self.timeout_s
        until_s, hurried, starting = patience_s, False, not self._answered
        for waited_s in self._child.waiting(min(child.LOOK_S, patience_s)):
            if waited_s >= until_s and starting and not hurried and not self._child.stopped:
                until_s, starting = _TO_START * patience_s, False
                _log.warning("the worker process %d has not answered yet: waiting, as it may be compiling", self.pid)
            if not hurried and self._ending():
                until_s, hurried = min(until_s, waited_s + child.TO_END_S), True
            if waited_s >= until_s:
                self._child.kill(f"did not answer within {waited_s:.1f} s")

    def check(self) -> None:
        """Ask the child whether it is there; return once it has answered, or every device has its rings back. @private"""
        try:
            self.call(0, _PING)
        except BackendError:
            self._watch.join()

    def _listen(self) -> None:
        """Pass on the child's own messages, until it is gone."""
        while True:
            try:
                self._events.settimeout(None if self.timeout_s is None else self.timeout_s / 4)
                if not self._events.recv(64):
                    break
                self.listeners.tell_broken()
            except TimeoutError:
                if any(backend.bound for backend in self.backends):
                    with suppress(BackendError):  # the end of the child is heard next
                        self.call(0, _PING)
            except OSError:
                break
        self.listeners.tell_gone()

    def kill(self) -> None:
        """End the process at once, by SIGKILL. For tests. Nothing happens if it has ended."""
        self.check_maker()
        self._child.process.kill()

    def fail(self, exc: BaseException) -> None:
        """Have the loop of the process raise a VnetdpError with the class and text of *exc*, which ends it. For tests.

        Nothing happens if it has ended. TypeError if *exc* is not an exception.
        """
        check_exception(exc)
        with suppress(BackendError):  # it has ended, or ends before it answers
            self.call(0, VnetdpError(reason(exc)[:_MAX_REASON]))

    def hang(self, seconds: float) -> None:
        """Stop the process (SIGSTOP) for *seconds*, math.inf for ever, or until `close`. For tests.

        Nothing happens if it has ended. ConfigError if *seconds* is negative.
        """
        self.check_maker()
        wait_s = hang_s(seconds)

        def go_on() -> None:
            self._closing.wait(wait_s)
            self._child.process.send_signal(signal.SIGCONT)

        self._child.process.send_signal(signal.SIGSTOP)
        limits.start(threading.Thread(target=go_on, name="vhost-process-hang", daemon=True))

    def close(self) -> None:
        """End the process, and give up its memory and descriptors. A device whose rings it has goes on in userspace."""
        if self.inherited:
            self.datapath.close()
            return
        self._closing.set()
        if not self._child.end():
            _log.error("the worker process %d %s", self.pid, self._child.ended())
        for backend in self.backends:
            backend.forget()
        self._watch.join()
        self._events.close()
        self.datapath.close()

    def leave_to_parent(self) -> None:
        """Leave both sockets to the parent: the worker process has to see when the parent closes them. @private"""
        self._sock.close()
        self._events.close()


class ProcessBackend(Backend, Owned):
    """One vhost device of a worker process (see `Backend`)."""

    def __init__(self, worker: WorkerProcess, pair: int) -> None:
        self._worker = worker
        self._pair = pair
        self._rows = worker.datapath.vqs[receiveq(pair) :][:VRINGS]
        self._bound: dict[int, Endpoint] = {}

    def apply(self, verb: Verb) -> int:
        match verb:
            case SetMemory(memory):
                verb.check()
                verb.check_shared()
                # A table that the child has already stays mapped there: mapping it anew would fault in every page again.
                answer = self._worker.call(self._pair, _SAME_MEMORY if memory is self._worker.memory else verb)
                self._worker.memory = memory
            case SetBackend(index, None):
                try:
                    answer = self._worker.call(self._pair, verb)
                finally:
                    self._let_go(index)
            case SetBackend(index, Endpoint() as endpoint):
                answer = self._bind(verb, endpoint)
                self._bound[index] = endpoint
            case GetVringBase(index):
                answer = self._worker.call(self._pair, verb)
                self._let_go(index)
            case _:
                answer = self._worker.call(self._pair, verb)
        return answer

    def _bind(self, verb: SetBackend, endpoint: Endpoint) -> int:
        if endpoint.kind >= r.KIND_PYTHON:
            raise refusal(
                verb, errno.EOPNOTSUPP, f"{endpoint.name} runs in Python, in the process of the device: take a Worker"
            )
        try:
            endpoint.share()
            endpoint.start_polling(self._pair, self)
        except MachineError as e:
            raise refusal(verb, e.errno or errno.EMFILE, str(e)) from e
        except EndpointError as e:
            raise refusal(verb, errno.EBUSY, str(e)) from e
        try:
            return self._worker.call(self._pair, verb)
        except BaseException:
            if endpoint not in self._bound.values():
                endpoint.stop_polling(self._pair, self)
            raise

    def renew(self, endpoint: Endpoint) -> None:
        """Give the child an endpoint's descriptors anew: there are other files behind them now."""
        with suppress(BackendError):  # a child that is gone needs none
            self._worker.call(self._pair, endpoint)

    def _let_go(self, index: int) -> None:
        endpoint = self._bound.pop(index, None)
        if endpoint is not None and not self._bound:
            endpoint.stop_polling(self._pair, self)

    @property
    def bound(self) -> bool:
        """True if the child may have a ring of this pair."""
        return bool(self._bound)

    def forget(self) -> None:
        """Let go of everything, once the child has ended."""
        for index in range(VRINGS):
            self._let_go(index)

    @property
    def worker(self) -> object:
        return self._worker

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Have the child stand still; a child that is gone stands still for good."""
        with suppress(BackendError):
            self._worker.call(self._pair, _HOLD)
        try:
            yield
        finally:
            with suppress(BackendError):
                self._worker.call(self._pair, _RELEASE)

    def park(self, parked: bool) -> None:
        with suppress(BackendError):
            self._worker.call(self._pair, _HOLD if parked else _RELEASE)

    def listen(self, on_broken: Callable[[], None], on_gone: Callable[[], None]) -> Callable[[], None]:
        return self._worker.listeners.add_device(on_broken, on_gone)

    def status(self, index: int) -> int:
        return int(self._rows[index, r.VQ_STATUS])

    def row(self, index: int) -> Words | None:
        return self._rows[index] if self._worker.alive else None

    def counters(self, index: int) -> dict[str, int]:
        return {name: int(self._rows[index, slot]) for name, slot in COUNTERS.items()}


# --- the child ---


class _Child:
    """The worker process: a datapath, its thread, and the objects that it was sent, each kept once."""

    def __init__(self, block_fd: int, pairs: int, poll_us: int, events: socket.socket) -> None:
        self._datapath = Datapath(pairs, block_fd)
        self._events = events
        self._loop_thread = LoopThread(self._datapath, "vhost-process", poll_us)
        self._loop_thread.listeners.add(self._broken, lambda: os._exit(1))
        self._loop_thread.start()
        self._backends = [UserspaceBackend(self._datapath, pair) for pair in range(pairs)]
        self._kept: dict[tuple[object, ...], Any] = {}
        self._endpoints: dict[int, RemoteEndpoint] = {}
        self._holds: list[ExitStack] = []

    def _broken(self) -> None:
        with suppress(ConnectionError):
            self._events.send(_BROKEN.encode())

    def apply(self, pair: int, request: Verb | VnetdpError | RemoteEndpoint | str) -> int:
        if request == _PING:
            return 0
        if isinstance(request, RemoteEndpoint):
            self._same_endpoint(request)
            return 0
        if request == _HOLD:
            self._holds.append(ExitStack())
            self._holds[-1].enter_context(self._loop_thread.paused())
            return 0
        if request == _RELEASE:
            self._holds.pop().close()
            return 0
        if isinstance(request, VnetdpError):
            self._loop_thread.fail(request)
            return 0
        verb = SetMemory(self._kept[(SetMemory,)]) if isinstance(request, str) else request
        with self._loop_thread.paused():
            if isinstance(verb, SetBackend) and verb.endpoint is not None:
                assert isinstance(verb.endpoint, RemoteEndpoint)
                verb = replace(verb, endpoint=self._same_endpoint(verb.endpoint))
            answer = self._backends[pair].apply(verb)
            match verb:
                case SetMemory(thing) | SetLog(thing):
                    self._keep((type(verb),), thing)
                case SetVringKick(index, thing) | SetVringCall(index, thing):
                    self._keep((type(verb), pair, index), thing)
        return answer

    def _keep(self, key: tuple[object, ...], thing: Any) -> None:
        """Keep an object that kernels use until another takes its place."""
        before = self._kept.get(key)
        self._kept[key] = thing
        if before is not None and before is not thing:
            before.close()

    def _same_endpoint(self, endpoint: RemoteEndpoint) -> Endpoint:
        """Return the view made when this endpoint was first bound, with its present files: all pairs must work on one."""
        inode = os.fstat(endpoint.block.fd).st_ino
        known = self._endpoints.get(inode)
        if known is not None:
            known.renew(endpoint)
            endpoint.close()
            return known
        for other in list(self._endpoints):
            if not self._endpoints[other].polled_by:
                self._endpoints.pop(other).close()
        self._endpoints[inode] = endpoint
        return endpoint


def main(passed: tuple[int, int, int], pairs: int, poll_us: int) -> None:
    """Serve verbs until the parent closes its end, or dies."""
    sock, events = (socket.socket(fileno=fd) for fd in passed[:2])
    try:
        served = _Child(passed[2], pairs, poll_us, events)
    except MachineError as e:
        sys.exit(f"vnetdp: the worker process: {e}")
    while True:
        try:
            pair, request = messages.receive(sock)
            answer: tuple[bool, object] = (True, served.apply(pair, request))
        except (EOFError, ConnectionError):  # the latter if an answer was left unread
            os._exit(0)  # the thread is in a kernel, and everything else is shared memory
        except BackendError as e:
            answer = (False, (e.verb, e.errno, e.index, e.detail))
        except OSError as e:  # no descriptor or memory is left for what came
            why = f"the worker process: {limits.fault(e)}"
            answer = (False, ("receive", e.errno or errno.ENOMEM, None, why))
        with suppress(ConnectionError):  # the parent is gone, and so are we
            sock.send(pickle.dumps(answer))
