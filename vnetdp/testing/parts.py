"""The parts of a Vnet: its endpoint, and the worker or vhost-user back end that is to own the rings."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..backends.base import Backend
from ..backends.process import WorkerProcess
from ..backends.worker import Worker
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


@dataclass(frozen=True)
class Offload:
    """The backends of a device, and the worker or connection that they belong to; all empty for owner `userspace`."""

    backends: Sequence[Backend] = ()
    worker: Worker | WorkerProcess | BackEndProcess | None = None
    front_end: VhostUserFrontEnd | None = None


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
    return Offload(worker.backends, worker)


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
