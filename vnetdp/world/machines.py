"""The parts of a saved world that move frames: datapaths, devices and drivers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from vnetdp_kernels import rows as r

from ..backends.userspace import UserspaceBackend
from ..datapath.datapath import Datapath
from ..device.device import NetDevice
from ..device.owners import Owner
from ..errors import ConfigError
from ..guest.driver import Driver
from ..shared.memory import GuestMemory
from ..system.owned import Owned, OwnedLock
from ..virtio import features as f
from ..virtio.queue import Virtqueue, pair_of, queues_of
from ..virtio.state import Control, DeviceState
from . import limits
from .part import Part
from .plain import flag, number, of_error, to_error
from .sparse import pack, pages_of_block, unpack

_FEATURES: Final = (1 << 64) - 1
_ENTRIES: Final = {"mac_table": bytes, "rss_table": int}


class DatapathPart(Part):
    """A datapath of a device, which the caller runs: the rows of its rings. backends: its `UserspaceBackend`s."""

    def __init__(self, name: str, datapath: Datapath, device: NetDevice, backends: list[UserspaceBackend]) -> None:
        super().__init__(name)
        self._datapath, self._device, self._backends = datapath, device, backends

    def owned(self) -> Sequence[Owned | OwnedLock]:
        return [self._datapath, self._datapath.block, self._datapath.bell, *self._backends]

    @property
    def _memory(self) -> GuestMemory:
        return self._device.memory

    def check_at_rest(self) -> None:
        if self._datapath._in_kernel:
            raise ConfigError(f"{self.name}: a step is under way: save or load the world between two steps")
        if self._datapath._abandoned:
            raise ConfigError(f"{self.name}: it hangs for good: make a new world")

    def shape(self) -> dict[str, Any]:
        return {"pairs": self._datapath.pairs, "backends": [backend.pair for backend in self._backends]}

    def save(self) -> Any:
        datapath = self._datapath
        return {
            "rows": datapath.vqs.tobytes(),
            "memory": datapath.memory is self._memory,
            "translated": [memory is self._memory for memory in datapath.translated],
            "features": [backend.features for backend in self._backends],
        }

    def load(self, state: Any) -> None:
        datapath, device = self._datapath, self._device
        datapath.vqs[:] = np.frombuffer(state["rows"], np.int64).reshape(datapath.vqs.shape)
        datapath.memory = self._memory if flag(state["memory"], "memory") else None
        known = [self._memory if flag(value, "translated") else None for value in state["translated"]]
        for n, memory in zip(range(len(datapath.translated)), known, strict=True):
            datapath.translated[n] = memory
        datapath.log = None
        datapath.logging.clear()
        for backend, features in zip(self._backends, state["features"], strict=True):
            backend.features = number(features, "features", 0, _FEATURES)
        self._bind()
        for fds, kick, call in zip(datapath.notify, device.kicks, device.calls, strict=False):
            fds[:] = (kick.made, call.made) if datapath.stepped else (kick.fd, call.notify)

    def _bind(self) -> None:
        """Have the device's endpoint know which of its queues the datapath polls."""
        datapath, endpoint = self._datapath, self._device.endpoint
        for pair in [pair for pair, owner in endpoint.polled_by.items() if owner is datapath]:
            del endpoint.polled_by[pair]
        datapath.let_go()
        for n in np.flatnonzero(datapath.vqs[:, r.VQ_BOUND]).tolist():
            if pair_of(n) >= self._device.queue_pairs:
                raise ConfigError(f"ring {n} is bound, and the device has {queues_of(self._device.queue_pairs)}")
            endpoint.polled_by[pair_of(n)] = datapath
            datapath.endpoint = endpoint

    def check(self) -> None:
        datapath, polled_by = self._datapath, self._device.endpoint.polled_by
        in_use = [memory is not None for memory in datapath.translated]
        limits.check_rings(datapath.vqs, self._memory, in_use)
        bound = np.flatnonzero(datapath.vqs[:, r.VQ_BOUND]).tolist()
        if bound and datapath.memory is None:
            raise ConfigError(f"ring {bound[0]} is bound without guest memory")
        if any(polled_by.get(pair_of(n)) is not datapath for n in bound):
            raise ConfigError("a queue of the endpoint has two owners")


def _typed(saved: Any, like: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a dataclass from outside; ConfigError unless each has the type that it has in *like*."""
    for name, value in like.items():
        if type(saved[name]) is not type(value):
            raise ConfigError(f"{name} {saved[name]!r} is no {type(value).__name__}")
    for name, kind in _ENTRIES.items():
        if any(type(entry) is not kind for entry in saved.get(name, ())):
            raise ConfigError(f"{name} has entries that are no {kind.__name__}")
    return {name: saved[name] for name in like}


class DevicePart(Part):
    """A device: its registers, status and owner. parts: the names of the parts that it works with."""

    def __init__(self, name: str, device: NetDevice, parts: dict[str, Any]) -> None:
        super().__init__(name)
        self._device, self._parts = device, parts

    def owned(self) -> Sequence[Owned | OwnedLock]:
        device = self._device
        own = (device, device._lock, device._status, device._status.lock, device._owners, device.userspace)
        return [*own, device.config_call, device.notifiers, *device.kicks, *device.calls]

    def check_at_rest(self) -> None:
        device = self._device
        if device.log is not None:
            raise ConfigError(f"{self.name}: it has a dirty log, which can't be saved: set_log(None) first")
        if device.vhost_prepared or device.fenced:
            raise ConfigError(
                f"{self.name}: its vhost is {'fenced' if device.fenced else 'prepared'}, which can't be saved: bind it "
                "(bind_prepared), or abandon it (abandon_vhost), first"
            )

    def shape(self) -> dict[str, Any]:
        device = self._device
        return self._parts | {
            "queue_pairs": device.queue_pairs,
            "max_num": device.max_num,
            "fallback": device.fallback,
            "offered": device.device_features,
            "mac": device._registers._initial.mac,
            "mtu": device._registers._initial.mtu,
        }

    def save(self) -> Any:
        device, owners, status = self._device, self._device._owners, self._device._status
        state = device.save_state()
        notifiers = device.notifiers
        return {
            "status": state.status,
            "features": state.features,
            "control": vars(state.control).copy(),
            "queues": [vars(queue).copy() for queue in state.queues],
            "broken": [list(each) for each in sorted(status.broken.items())],
            "halted": status.halted,
            "running": device.running,
            "use_vhost": device.use_vhost,
            "last_error": of_error(device.last_error),
            "owner": device.owner.value,
            "owner_error": of_error(owners.last_error),
            "handovers": owners.handovers,
            "fallbacks": owners.fallbacks,
            "notifiers": {"grabs": notifiers.grabs, "host": notifiers.host, "guest": notifiers.guest},
        }

    def load(self, state: Any) -> None:
        device, owners, status, registers = (
            *(self._device, self._device._owners, self._device._status),
            self._device._registers,
        )
        wanted = DeviceState(
            number(state["status"], "status", 0, 0xFF),
            number(state["features"], "features", 0, _FEATURES),
            Control(**_typed(state["control"], vars(device.control))),
            [Virtqueue(**_typed(queue, vars(Virtqueue()))) for queue in state["queues"]],
        )
        features, control, queues = registers.after(registers.all_of(wanted))
        registers.take_control(control)
        registers.features = features
        registers.load_queues(queues, ())
        status.status, status.halted = wanted.status, flag(state["halted"], "halted")
        last = len(queues) - 1
        status.broken = {
            number(n, "a broken queue", 0, last): number(code, "its status", r.E_FULL, -1)
            for n, code in state["broken"]
        }
        device._running, device.use_vhost = flag(state["running"], "running"), flag(state["use_vhost"], "use_vhost")
        device.last_error, owners.last_error = to_error(state["last_error"]), to_error(state["owner_error"])
        owners.owner = Owner(state["owner"])
        if device.vhost is None and (device.use_vhost or device.owner is Owner.VHOST):
            raise ConfigError("vhost has its rings, and it was made without vhost")
        owners.handovers, owners.fallbacks = (
            number(state["handovers"], "handovers"),
            number(state["fallbacks"], "fallbacks"),
        )
        for name in ("grabs", "host", "guest"):
            setattr(device.notifiers, name, number(state["notifiers"][name], name, -1, 1 << 16))
        self._tell_waiters()

    def adopt(self) -> None:
        super().adopt()
        self._tell_waiters()

    def _tell_waiters(self) -> None:
        """Have every listener of the device's eventfds look again."""
        for event in (*self._device.kicks, *self._device.calls):
            event.signal()
        self._device._status.notify_config()


class DriverPart(Part):
    """A driver: its rows and the state of its descriptors. parts: the names of the parts that it works with."""

    def __init__(self, name: str, driver: Driver, parts: dict[str, Any]) -> None:
        super().__init__(name)
        self._driver, self._parts = driver, parts

    def owned(self) -> Sequence[Owned | OwnedLock]:
        return [self._driver, self._driver._block, self._driver.bell]

    def check_at_rest(self) -> None:
        driver = self._driver
        if driver._thread is not None:
            raise ConfigError(f"{self.name}: it runs in a thread: stop it, and step it from now on")
        if driver._block.shared:
            raise ConfigError(f"{self.name}: another process may have its block: make the driver without block=")

    def shape(self) -> dict[str, Any]:
        driver = self._driver
        return self._parts | {
            "queue_pairs": driver.queue_pairs,
            "num": driver.num,
            "start_at": driver.start_at,
            "frame_len": driver._frame_len,
            "buffer_len": driver._buffer_len,
        }

    def save(self) -> Any:
        driver = self._driver
        return {
            "features": driver.features,
            "wanted": driver._wanted,
            "block": pack(*pages_of_block(driver._block)),
        }

    def load(self, state: Any) -> None:
        driver = self._driver
        driver.features = number(state["features"], "features", 0, _FEATURES)
        driver._wanted = None if state["wanted"] is None else number(state["wanted"], "wanted", 0, _FEATURES)
        unpack(state["block"], *pages_of_block(driver._block))
        driver.endpoint.set_offloads(f.host_offload_mask(driver.features))

    def check(self) -> None:
        limits.check_counters(self._driver.dvqs)
        self._driver.check_adopted(self._driver.memory.end)
