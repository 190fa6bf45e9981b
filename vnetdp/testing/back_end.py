"""BackEndProcess: a vhost-user back end in a process of its own, with an endpoint that it makes there."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pickle
import select
import signal
import socket
import sys
import threading
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..backends.worker import Worker
from ..datapath.loop_thread import check_exception, hang_s
from ..endpoints.base import Endpoint
from ..endpoints.loopback import GenerateEndpoint
from ..errors import ConfigError, VnetdpError, WorkError, place, reason
from ..system import child, limits
from ..system.owned import Owned
from ..vhost_user.back_end.server import Server
from ..warmup import warm_up
from .hang import hangs_now

_MAX_MESSAGE = 1 << 16
_PATIENCE_S = 600.0  # until the first answer: the process may be compiling
_ERRORS = "errors"
_HANGS = "hangs"

_importing = False  # True in a process that makes its endpoint: its modules may start no other


@dataclass(frozen=True)
class _Order:
    """The process's work. made_by: module, name and file of the endpoint's class; None for the block of a generator."""

    path: str
    pairs: int
    mtu: int | None
    made_by: tuple[str, str, str] | None
    import_path: tuple[str, ...]


class BackEndProcess(Owned):
    """A vhost-user back end (`Server`) at the socket *path*, in a process of its own, which a test may end.

    - `endpoint`: the class of the endpoint, which the process imports and calls with the number of queue pairs if there
      are several; or a `GenerateEndpoint` whose numbers and counts both processes share.
    - `pairs`: queue pairs.
    - `mtu`: the MTU to offer; None offers none.

    ConfigError if the process can't import the class; WorkError, with the reason, if it can't serve.
    """

    def __init__(
        self, endpoint: type[Endpoint] | GenerateEndpoint, path: str, pairs: int = 1, mtu: int | None = None
    ) -> None:
        made_by = None if isinstance(endpoint, GenerateEndpoint) else _home_of(endpoint)
        if _importing:
            raise ConfigError(
                "a back end's process imports the module of the endpoint's class, which starts a back end: put all that "
                "it runs below `if __name__ == '__main__':`"
            )
        self.path = path
        """The path of the socket."""
        self._order = _Order(path, pairs, mtu, made_by, tuple(sys.path))
        self._shared = endpoint if isinstance(endpoint, GenerateEndpoint) else None
        self._lock = threading.Lock()
        self._start()
        self.close_on_fork()

    def _start(self) -> None:
        self._closing = threading.Event()
        self._sock, theirs = limits.socket_pair(socket.SOCK_SEQPACKET)
        passed = () if self._shared is None else (self._shared.block.fd,)
        with ExitStack() as made:
            made.callback(self._sock.close)
            with theirs:
                fds = (theirs.fileno(), *passed)
                process = child.start(f"from {__name__} import main; main({fds})", theirs, passed)
            self._child = child.Child(process, self._sock)
            made.callback(self._child.kill, "could not serve")
            self._ask(self._order)
            made.pop_all()

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._child.pid

    @property
    def alive(self) -> bool:
        """True until the process has ended."""
        return self._child.alive

    def _ask(self, request: object) -> Any:
        """Return the process's answer; WorkError if it is an error, or if there is no process any more."""
        with self._lock:
            try:
                self._sock.send(pickle.dumps(request))
                for waited_s in self._child.waiting():
                    if waited_s > _PATIENCE_S:
                        self._child.kill(f"did not answer within {_PATIENCE_S:.0f} s")
                data = self._sock.recv(_MAX_MESSAGE)
            except OSError:
                data = b""
        if not data:
            raise WorkError(f"the back end's process {self.pid} {self._child.ended()}")
        ok, answer = pickle.loads(data)
        if not ok:
            raise WorkError(answer)
        return answer

    @property
    def errors(self) -> tuple[int, str]:
        """The number of errors of the process's endpoint, and the last one in words; (0, "") once the process died."""
        if not self.alive or self._child.stopped:
            return 0, ""
        with suppress(WorkError):
            count, text = self._ask(_ERRORS)
            return count, text
        return 0, ""

    def hangs(self) -> list[str]:
        """Return a line if the process's endpoint does not return from the call that it is in; else none. @private"""
        if self.alive and not self._child.stopped:
            with suppress(WorkError):
                text = self._ask(_HANGS)
                return [f"in the back end's process: {text}: let it return"] if text else []
        return []

    def kill(self) -> None:
        """End the process at once, by SIGKILL. Nothing happens if it has ended."""
        self._child.process.kill()

    def fail(self, exc: BaseException) -> None:
        """Have the loop of its worker raise a VnetdpError with the class and text of *exc*: it ends, and another is made.

        The device loses the back end, and gets it again with the next connection. Nothing happens if the process has
        ended. TypeError if *exc* is not an exception.
        """
        check_exception(exc)
        with suppress(WorkError):
            self._ask(VnetdpError(reason(exc)[:1000]))

    def hang(self, seconds: float) -> None:
        """Stop the process (SIGSTOP) for *seconds*, math.inf for ever, or until `close`. ConfigError if it is negative."""
        wait_s = hang_s(seconds)
        closing, process = self._closing, self._child.process

        def go_on() -> None:
            closing.wait(wait_s)
            process.send_signal(signal.SIGCONT)

        process.send_signal(signal.SIGSTOP)
        limits.start(threading.Thread(target=go_on, name="back-end-hang", daemon=True))

    def restart(self) -> None:
        """Start the next process at the same socket; the one before is ended, if it still runs."""
        self.close()
        self._start()

    def close(self) -> None:
        """End the process."""
        if not self.inherited:
            self._closing.set()
            self._child.end()

    def leave_to_parent(self) -> None:
        """Leave the socket to the parent. @private"""
        self._sock.close()


def _home_of(kind: type[Endpoint]) -> tuple[str, str, str]:
    """Return module, name and file of a class, for another process to import; ConfigError if none can."""
    name = getattr(kind, "__qualname__", "")
    module = sys.modules.get(getattr(kind, "__module__", ""))
    file = getattr(module, "__file__", None)
    if not isinstance(kind, type) or "." in name or file is None:
        raise ConfigError(
            f"{name or kind!r}: a back end's process has to import the endpoint's class: define it in a module, outside of "
            "functions and classes, and give the class itself"
        )
    return kind.__module__, name, str(Path(file).resolve())


# --- the process ---


def _class_of(home: tuple[str, str, str]) -> type[Endpoint]:
    module, name, file = home
    with suppress(ImportError):
        found = importlib.import_module(module)
        if getattr(found, "__file__", None) and Path(str(found.__file__)).resolve() == Path(file):
            return _named(found, name)
    spec = importlib.util.spec_from_file_location(f"_of_{Path(file).stem}", file)  # __main__, or no folder of sys.path
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file}: not a module that can be imported")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return _named(loaded, name)


def _named(module: ModuleType, name: str) -> type[Endpoint]:
    found: type[Endpoint] = getattr(module, name)
    return found


class _SharedGenerator(GenerateEndpoint):
    """The generator of the parent: the same rows."""

    def _claim(self, queue: int, n: int) -> bool:
        """True: the device hands each ring over, and the claim of a process that dies may outlive its connection."""
        return True


def _endpoint_of(order: _Order, block_fd: int) -> Endpoint:
    if order.made_by is None:
        return _SharedGenerator(order.pairs, block_fd=block_fd)
    kind = _class_of(order.made_by)
    return kind(order.pairs) if order.pairs > 1 else kind()


class _Served:
    """The endpoint and its server, and the requests of the parent, which `Server.run` looks at."""

    def __init__(self, sock: socket.socket, server: Server) -> None:
        self._sock = sock
        self._server = server

    def asked(self) -> bool:
        """Answer a request, if there is one; return False, as serving ends with the process."""
        if not select.select([self._sock], [], [], 0)[0]:
            return False
        data = self._sock.recv(_MAX_MESSAGE)
        if not data:
            os._exit(0)  # the parent is gone, or wants no more
        request = pickle.loads(data)
        if isinstance(request, VnetdpError):
            worker = self._server.worker
            if isinstance(worker, Worker):
                worker.fail(request)
            self._answer(True, None)
        elif request == _HANGS:
            self._answer(True, hangs_now(self._server.endpoint))
        else:
            endpoint = self._server.endpoint
            error = endpoint.last_error
            self._answer(True, (endpoint.errors, "" if error is None else reason(error) + place(error)))
        return False

    def _answer(self, ok: bool, answer: object) -> None:
        self._sock.send(pickle.dumps((ok, answer)))


def main(fds: tuple[int, ...]) -> None:
    """Serve in this process, as the parent at the other end of the first descriptor orders, until it closes that."""
    global _importing
    with socket.socket(fileno=fds[0]) as sock:
        order: _Order = pickle.loads(sock.recv(_MAX_MESSAGE))
        try:
            sys.path[:] = order.import_path
            _importing = True
            endpoint = _endpoint_of(order, fds[-1])
            _importing = False
            warm_up()
            server = Server(endpoint, order.path, queue_pairs=order.pairs, mtu=order.mtu)
        except BaseException as e:  # noqa: BLE001 - whatever it is, the parent has to know
            sock.send(pickle.dumps((False, f"the back end's endpoint can't be served: {reason(e)}{place(e)}")))
            raise SystemExit(1) from None
        sock.send(pickle.dumps((True, None)))
        server.run(_Served(sock, server).asked, sock.fileno())
