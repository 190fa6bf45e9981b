"""The parts of a Vnet: its endpoint, and the worker or vhost-user back end that is to own the rings."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from inspect import signature
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from ..backends.base import Backend
from ..backends.process import WorkerProcess
from ..backends.worker import Worker
from ..device.owners import Owner
from ..endpoints.base import Endpoint
from ..endpoints.loopback import GenerateEndpoint
from ..errors import ConfigError
from ..vhost_user.front_end.front_end import VhostUserFrontEnd
from .back_end import BackEndProcess


def as_endpoint(made: Any, by: Any) -> Endpoint:
    """Return *made*, an endpoint that *by* is or made; ConfigError if it is none, or can't be used."""
    if not isinstance(made, Endpoint):
        raise ConfigError(f"{by!r} returned {made!r}: an endpoint is an object of a subclass of vnetdp.Endpoint")
    if "rows" not in vars(made):
        raise ConfigError(f"{type(made).__name__}.__init__ does not call super().__init__(): an endpoint has to")
    if made.closed:
        raise ConfigError(f"{made.name} is closed: give each test an endpoint of its own")
    if made.polled_by:
        raise ConfigError(f"{made.name} serves another device: give each Vnet an endpoint of its own")
    return made


def check_numbers(whole: Mapping[str, object], real: Mapping[str, object]) -> None:
    """Raise ConfigError unless the arguments, by name, are whole and real numbers."""
    for arguments, kind, named in ((whole, Integral, "a whole number"), (real, Real, "a number")):
        for name, value in arguments.items():
            if not isinstance(value, kind):
                raise ConfigError(f"{name}={value!r} is not {named}")


def make_endpoint(made: ExitStack, by: Any, pairs: int, size: int, rate: float) -> Endpoint:
    """Return the endpoint that *by* is, or makes, which *made* closes then; a generator, with *size* and *rate*, for None.

    ConfigError if there is none, or it can't be used.
    """
    if by is None:
        return made.enter_context(GenerateEndpoint(pairs, size, rate))
    if isinstance(by, Endpoint):
        return as_endpoint(by, by)
    arguments = (pairs,) if isinstance(by, type) and pairs > 1 else ()
    with suppress(ValueError):  # a callable without a signature
        try:
            signature(by).bind(*arguments)
        except TypeError as e:
            called = f"{getattr(by, '__name__', by)}({', '.join(map(str, arguments))})"
            why = ", with the number of queue pairs" if arguments else ""
            raise ConfigError(
                f"endpoint: {called} is called{why}: {e}; give a function without arguments that makes it, such as a lambda"
            ) from None
    return made.enter_context(as_endpoint(by(*arguments), by))


@dataclass(frozen=True)
class Offload:
    """The backends of a device, and the worker or connection that they belong to; all empty for *kind* `userspace`."""

    kind: str = "userspace"
    backends: Sequence[Backend] = ()
    worker: Worker | WorkerProcess | BackEndProcess | None = None
    front_end: VhostUserFrontEnd | None = None

    def died(self, gone: bool) -> bool:
        """Return whether a process that had the rings died, rather than gave them back. gone: it did not answer."""
        if self.front_end is not None:
            return self.front_end.gone or not self.front_end.connected
        return gone and isinstance(self.worker, WorkerProcess)

    def named(self, owner: Owner) -> str:
        """Return the name of *owner*, with the kind and the process of vhost."""
        if owner is not Owner.VHOST:
            return str(owner.value)
        pid = f" {self.worker.pid}" if isinstance(self.worker, WorkerProcess | BackEndProcess) else ""
        return f"vhost ({self.kind}{pid})"


def make_offload(made: ExitStack, owner: str, pairs: int) -> Offload:
    """Return a worker in a thread or a process, closed by *made*; nothing for another owner."""
    worker: Worker | WorkerProcess
    if owner == "thread":
        worker = Worker(pairs)
    elif owner == "process":
        worker = WorkerProcess(pairs)
    else:
        return Offload()
    made.callback(worker.close)
    return Offload(owner, worker.backends, worker)


def start_back_end(made: ExitStack, served: object, pairs: int, mtu: int | None) -> tuple[BackEndProcess, str]:
    """Start a back end with an endpoint of its own, like *served*; return it and its socket's path.

    ConfigError unless *served* is a class or a `GenerateEndpoint`.
    """
    if not isinstance(served, GenerateEndpoint | type):
        raise ConfigError("owner 'vhost-user': its process makes an endpoint of its own: give the endpoint's class")
    folder = tempfile.mkdtemp(prefix="vnetdp-")
    made.callback(shutil.rmtree, folder, ignore_errors=True)
    path = str(Path(folder) / "s")
    worker = BackEndProcess(served, path, pairs, mtu)
    made.callback(worker.close)
    return worker, path


def connect(made: ExitStack, path: str, pairs: int, num: int, patience_s: float) -> VhostUserFrontEnd:
    """Return a connection to the back end at *path*, closed by *made*; ConfigError if there is none in time."""
    front_end = VhostUserFrontEnd(path, pairs, queue_size=num, watched=True)
    made.callback(front_end.close)
    if not front_end.connect(patience_s):
        raise ConfigError(f"{path}: the back end can't be connected to: {front_end.trouble}")
    return front_end
