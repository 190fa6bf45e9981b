"""World: devices without threads, their guests, wires and clocks, as one thing that is saved and loaded."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from ..backends.base import Backend
from ..backends.faulty import Faults, FaultyBackend, FaultyNotifiers
from ..backends.userspace import UserspaceBackend
from ..datapath.datapath import Datapath
from ..device.device import NetDevice
from ..endpoints.base import Endpoint
from ..endpoints.fault import FaultEndpoint
from ..errors import ConfigError, reason
from ..guest.driver import Driver
from .ends import ClockPart, EndpointPart, FaultsPart, MemoryPart
from .machines import DatapathPart, DevicePart, DriverPart
from .part import Part
from .plain import checksum, no_difference

_FORMAT: Final = "vnetdp.World"
_VERSION: Final = 1


class World:
    """The stepped devices of *drivers*, with all that they work with: a world that `save` keeps and `load` brings back.

    The world includes guest memory, endpoints with the endpoints behind them, clocks, vhost's datapaths, and faults
    (`Faults`). After `load` the same steps give the same bytes as after `save`.

    ConfigError if a driver is not that of a `NetDevice` without a thread, or vhost runs elsewhere than in a
    `UserspaceBackend`. It owns nothing, and needs no `close`.
    """

    def __init__(self, *drivers: Driver) -> None:
        if not drivers:
            raise ConfigError("a world without a driver has nothing to save: give World the drivers of its devices")
        found = _Found()
        for driver in drivers:
            found.add_driver(driver)
        self._parts = found.parts()
        self._maker = os.getpid()

    def save(self) -> dict[str, Any]:
        """Return the state of all of it as plain data, which can be pickled and compared. Call it between two steps.

        ConfigError if a part is outside of the simulation, such as a TAP or a thread. Durations (`handovers_ns`) and
        notifications that are pending are left out.
        """
        self._check_at_rest()
        parts = [[part.name, part.shape(), part.save()] for part in self._parts]
        return {"format": _FORMAT, "version": _VERSION, "parts": parts, "checksum": checksum(parts)}

    def load(self, data: Any) -> None:
        """Go back, or on, to the state that `save` returned, of this world or of another one made by the same calls.

        ConfigError, and no change, if *data* is none, is damaged, or is that of a world with other parts. Eventfds that
        somebody has are signalled, as the other state may have news. The clock's announcements are forgotten.
        """
        states = self._states(data)
        self._check_at_rest()
        before = [part.save() for part in self._parts]
        at = ""
        try:
            for part, state in zip(self._parts, states, strict=True):
                at = part.name
                part.load(state)
            for part in self._parts:
                at = part.name
                part.check()
        except BaseException as e:
            for part, state in zip(self._parts, before, strict=True):
                part.load(state)
            if not isinstance(e, Exception):
                raise
            raise ConfigError(f"{at}: not a state that World.save returned, nothing was loaded: {reason(e)}") from e

    def adopt(self) -> None:
        """Have a forked child go on with its copy of the world, apart from the parent, which goes on with its own.

        ConfigError if a part can't be copied, such as guest memory that was not made with `private=True`. In the process
        that made the world it does nothing.
        """
        if os.getpid() == self._maker:
            return
        for part in self._parts:
            part.check_private()
            part.check_at_rest()
        for part in self._parts:
            part.adopt()
        self._maker = os.getpid()

    def _check_at_rest(self) -> None:
        if os.getpid() != self._maker:
            raise ConfigError(
                f"World: process {self._maker} made it: call adopt first in its forked child {os.getpid()}"
            )
        for part in self._parts:
            part.check_at_rest()

    def _states(self, data: Any) -> list[Any]:
        """Return the state of each part of *data*; ConfigError unless it is whole, and has the parts of this world."""
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise ConfigError(f"a {type(data).__name__} is no saved world: load what World.save returned")
        if data.get("version") != _VERSION:
            raise ConfigError(
                f"the saved world has version {data.get('version')!r}, and this vnetdp reads {_VERSION}: save it anew"
            )
        parts = data.get("parts")
        try:
            whole = checksum(parts) == data.get("checksum")
            saved = [(str(name), dict(shape), state) for name, shape, state in parts]  # type: ignore[union-attr]
        except (TypeError, ValueError, RecursionError) as e:
            raise ConfigError(f"the saved world is damaged: save it anew ({reason(e)})") from e
        if not whole:
            raise ConfigError("the saved world is damaged: its checksum is another one; save it anew")
        names, here = [name for name, _, _ in saved], [part.name for part in self._parts]
        if names != here:
            raise ConfigError(
                f"the saved world has {_counted(names)} and this one {_counted(here)}: make both by the same calls"
            )
        for part, (_, shape, _) in zip(self._parts, saved, strict=True):
            no_difference(part.name, shape, part.shape())
        return [state for _, _, state in saved]


def _counted(names: list[str]) -> str:
    """Return how many parts of each kind there are, such as `'memory: 2, device: 2'`."""
    kinds = Counter(name.partition(" ")[0] for name in names)
    return repr(", ".join(f"{kind}: {n}" for kind, n in kinds.items())[:200])


class _Found:
    """The parts of a world, as they are found from its drivers."""

    def __init__(self) -> None:
        self._objects: dict[int, tuple[str, Part]] = {}
        self._count: dict[str, int] = {}
        self._by_kind: dict[str, list[Part]] = {}
        self._endpoints: list[Endpoint] = []

    def parts(self) -> list[Part]:
        """Return all parts, in the order in which they are loaded."""
        order = ("memory", "endpoint", "clock", "faults", "datapath", "device", "driver")
        return [part for kind in order for part in self._by_kind.get(kind, [])]

    def _add(self, kind: str, thing: object, make: Callable[[str], Part]) -> str:
        """Return the name of an object, whose part is made when it is found first."""
        if id(thing) not in self._objects:
            number = self._count.get(kind, 0)
            self._count[kind] = number + 1
            part = make(f"{kind} {number}")
            self._by_kind.setdefault(kind, []).append(part)
            self._objects[id(thing)] = (part.name, part)
        return self._objects[id(thing)][0]

    def add_driver(self, driver: Driver) -> None:
        device = driver.device
        if not isinstance(device, NetDevice):
            raise ConfigError(
                f"a driver of a {type(device).__name__} can't be saved: give World drivers of a NetDevice"
            )
        if id(driver) in self._objects:
            raise ConfigError("a driver is in the world twice: give World each driver once")
        parts = {
            "device": self._add_device(device),
            "memory": self._add("memory", driver.memory, lambda name: MemoryPart(name, driver.memory)),
            "endpoint": self._add_endpoint(driver.endpoint),
        }
        self._add("driver", driver, lambda name: DriverPart(name, driver, parts))

    def _add_device(self, device: NetDevice) -> str:
        if id(device) in self._objects:
            return self._objects[id(device)][0]
        parts: dict[str, Any] = {
            "memory": self._add("memory", device.memory, lambda name: MemoryPart(name, device.memory)),
            "endpoint": self._add_endpoint(device.endpoint),
            "faults": [],
        }
        backends: dict[int, list[UserspaceBackend]] = {}
        for backend in device.vhost or ():
            inner = self._unwrapped(backend, parts["faults"])
            backends.setdefault(id(inner.datapath), []).append(inner)
        if isinstance(device.notifiers, FaultyNotifiers):
            self._add_faults(device.notifiers._faults, parts["faults"])
        datapaths: list[tuple[Datapath, list[UserspaceBackend]]] = [
            (device.userspace.stepped, [b for b in device.userspace.backends if isinstance(b, UserspaceBackend)])
        ]
        datapaths += [(several[0].datapath, several) for several in backends.values()]
        parts["datapaths"] = [
            self._add("datapath", dp, partial(DatapathPart, datapath=dp, device=device, backends=several))
            for dp, several in datapaths
        ]
        if (clock := device.clock) is not None:
            parts["clock"] = self._add("clock", clock, lambda name: ClockPart(name, clock, self._endpoints))
        return self._add("device", device, lambda name: DevicePart(name, device, parts))

    def _unwrapped(self, backend: Backend, faults: list[str]) -> UserspaceBackend:
        """Return the backend within wrappers, whose faults are entered in *faults*."""
        while isinstance(backend, FaultyBackend):
            self._add_faults(backend._faults, faults)
            backend = backend.inner
        if not isinstance(backend, UserspaceBackend) or not isinstance(backend.worker, Datapath):
            raise ConfigError(
                f"a {type(backend).__name__} runs outside of the caller's thread, and can't be saved: give the device a "
                "UserspaceBackend of a Datapath that you run (vhost=)"
            )
        return backend

    def _add_faults(self, faults: Faults, names: list[str]) -> None:
        names.append(self._add("faults", faults, lambda name: FaultsPart(name, faults)))

    def _add_endpoint(self, endpoint: Endpoint, in_wire: bool = False) -> str:
        if id(endpoint) not in self._objects:
            self._endpoints.append(endpoint)
        name = self._add("endpoint", endpoint, lambda name: EndpointPart(name, endpoint, in_wire))
        if isinstance(endpoint, FaultEndpoint):
            self._add_endpoint(endpoint.inner, in_wire=True)
        return name
