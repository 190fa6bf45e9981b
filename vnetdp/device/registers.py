"""Registers: a device's values that its driver and its host set, with their checks (Virtio 1.2, 4.1.4.3 and 5.1).

They know neither locks nor owners: `NetDevice` holds its lock around every call, and has the owner of the rings follow.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ..endpoints.base import Endpoint
from ..errors import ConfigError, EndpointError
from ..virtio import features as f
from ..virtio.queue import Virtqueue, check_num, queues_of
from ..virtio.state import (
    MAX_QUEUE_PAIRS,
    VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_NET_S_LINK_UP,
    Control,
    DeviceState,
    StateDelta,
)

_log = logging.getLogger("vnetdp.device")

_AGREED = VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK


class Registers:
    """offered, features: the bits that the device offers, and the bits that the driver chose. control: the fields that
    control commands set; the endpoint is told of its own. queues: as the driver set them up.
    """

    def __init__(
        self, endpoint: Endpoint, queue_pairs: int, mac: bytes, mtu: int | None, offered: int | None, max_num: int
    ) -> None:
        if not 1 <= queue_pairs <= MAX_QUEUE_PAIRS:
            raise ConfigError(f"{queue_pairs} queue pairs: a device has 1 to {MAX_QUEUE_PAIRS}")
        if endpoint.queues < queue_pairs:
            raise ConfigError(f"{endpoint.name} has {endpoint.queues} queues, the device needs {queue_pairs}")
        if len(mac) != 6:
            raise ConfigError(f"the MAC address has {len(mac)} bytes, not 6")
        if mtu is not None and (wrong := f.mtu_error(mtu)):
            raise ConfigError(wrong)
        check_num(max_num)
        if mtu is not None:
            endpoint.set_mtu(mtu)
        self.endpoint = endpoint
        self.queue_pairs = queue_pairs
        self.max_num = max_num
        self.control = self._initial = Control(mac=mac, mtu=mtu or 0, curr_queue_pairs=queue_pairs)
        self.queues = [self._unset() for _ in range(queues_of(queue_pairs))]
        self.features = 0
        self.offered = self._can_offer() if offered is None else f.closure(offered & self._can_offer())

    def _can_offer(self) -> int:
        bits = f.RING_FEATURES | f.VIRTIO_NET_F_MRG_RXBUF | f.VIRTIO_NET_F_MAC | f.VIRTIO_NET_F_STATUS
        if self.control.mtu:
            bits |= f.VIRTIO_NET_F_MTU
        if self.endpoint.vnet_hdr:
            bits |= f.OFFLOADS
        return bits

    def _unset(self) -> Virtqueue:
        return Virtqueue(num=min(256, self.max_num))

    def queue(self, index: int) -> Virtqueue:
        if not 0 <= index < len(self.queues):
            raise ConfigError(f"queue {index}: the device has queues 0 to {len(self.queues) - 1}")
        return self.queues[index]

    def complete_queue(self, index: int) -> Virtqueue:
        """Return a queue that has its addresses; ConfigError if it has none."""
        queue = self.queue(index)
        if not queue.has_addresses:
            raise ConfigError(f"queue {index} has no addresses: set_queue comes first")
        return queue

    def set_queue(self, index: int, wanted: Virtqueue) -> None:
        if self.queue(index).enabled:
            raise ConfigError(f"queue {index} is enabled: reset it before it is set up again")
        wanted.validate()
        if wanted.num > self.max_num:
            raise ConfigError(f"queue {index}: size {wanted.num} is larger than {self.max_num}")
        self.queues[index] = wanted

    def reset_queue(self, index: int) -> None:
        self.queues[index] = self._unset()

    def reset_queues(self) -> None:
        self.queues[:] = [self._unset() for _ in self.queues]

    def reset(self) -> EndpointError | None:
        """Forget all that the driver set but the queues; return the error of an endpoint that refuses the reset."""
        self.features = 0
        before = self.control
        self.control = replace(self._initial, mtu=before.mtu, net_status=before.net_status & VIRTIO_NET_S_LINK_UP)
        return self._told(lambda: self._tell_endpoint(before, self.control))

    def read_config(self, offset: int, length: int) -> bytes:
        control = self.control
        space = control.mac + struct.pack("<HHH", control.net_status, self.queue_pairs, control.mtu)
        if offset < 0 or length < 0 or offset + length > len(space):
            raise ConfigError(f"configuration space has {len(space)} bytes; {length} at offset {offset} are asked for")
        return space[offset : offset + length]

    def accept(self, features: int, status: int) -> None:
        """Set the features that the driver chose; ConfigError if *status* has them agreed on."""
        if status & _AGREED:
            raise ConfigError("features can't change after FEATURES_OK: reset the device first")
        self.features = features

    def agree(self, status: int, before: int) -> tuple[int, EndpointError | None]:
        """Return *status*, written over *before*, without bits that are not agreed on; and the endpoint's error.

        With FEATURES_OK the endpoint learns which offloads the driver's features let it send.
        """
        # A legacy driver goes to DRIVER_OK without FEATURES_OK; nothing runs with features that were not agreed on.
        if not status & _AGREED or before & _AGREED:
            return status, None
        if not self._can_be(self.features):
            return status & ~_AGREED, None
        error = self._told(self._take_offloads)
        return (status & ~_AGREED if error else status), error

    def _can_be(self, features: int) -> bool:
        return not (features & ~self.offered or f.missing_dependency(features))

    def _told(self, tell: Callable[[], None]) -> EndpointError | None:
        """Tell the endpoint something; return its error, logged and counted there: no register write fails for that."""
        try:
            tell()
        except EndpointError as e:
            self.endpoint.errors += 1
            _log.warning("%s", e)
            return e
        return None

    def _take_offloads(self) -> None:
        offloads = f.guest_offload_mask(self.features)
        self.endpoint.set_offloads(offloads)
        self.control = replace(self.control, guest_offloads=offloads)

    @property
    def negotiated_mtu(self) -> int | None:
        """The MTU, if the driver accepted VIRTIO_NET_F_MTU."""
        return self.control.mtu if self.features & f.VIRTIO_NET_F_MTU else None

    def set_control(self, changes: dict[str, Any]) -> Control:
        """Change fields of `control`, and return it. ConfigError or EndpointError, and no change, if that cannot be."""
        control = replace(self.control, **changes)
        control.validate(self.queue_pairs)
        self._check_offloads(control, self.features)
        self.take_control(control)
        return control

    def _check_offloads(self, control: Control, features: int) -> None:
        extra = control.guest_offloads & ~f.guest_offload_mask(features)
        if extra:
            raise ConfigError(f"receive offloads {extra:#x} were not negotiated: leave them out")

    def take_control(self, control: Control) -> None:
        """Tell the endpoint its part of *control*, then hold *control*. If the endpoint refuses, both are as before."""
        before = self.control
        try:
            self._tell_endpoint(before, control)
        except Exception:
            with suppress(EndpointError):
                self._tell_endpoint(control, before)
            raise
        self.control = control

    def _tell_endpoint(self, before: Control, control: Control) -> None:
        """Tell the endpoint its part of *control*, where it differs from *before*."""
        if control.mtu != before.mtu and control.mtu:
            self.endpoint.set_mtu(control.mtu)
        if control.curr_queue_pairs != before.curr_queue_pairs:
            for pair in range(self.queue_pairs):
                self.endpoint.set_queue_active(pair, pair < control.curr_queue_pairs)
        if control.guest_offloads != before.guest_offloads:
            self.endpoint.set_offloads(control.guest_offloads)

    def all_of(self, state: DeviceState) -> StateDelta:
        """Return all of another device's *state* as a difference; ConfigError if it has another number of queues."""
        if len(state.queues) != len(self.queues):
            raise ConfigError(f"a state of {len(state.queues)} queues; the device has {len(self.queues)}")
        return StateDelta.of(state)

    def after(self, delta: StateDelta) -> tuple[int, Control, list[Virtqueue]]:
        """Return features, control and queues as *delta* has them, and change nothing. ConfigError if they can't be.

        Values that *delta* leaves alone were checked when they came, and not here. The indices in `delta.bases` are
        checked only: they belong into queues that are not replaced.
        """
        features, control = self.features, self.control
        if "features" in delta.registers:
            features = delta.registers["features"]
            if not self._can_be(features):
                refused = ", ".join(f.names(features & ~self.offered)) or "a feature without one that it needs"
                raise ConfigError(f"the driver uses features that this device can't offer: {refused}")
        if delta.control:
            control = control.changed(delta.control)
            control.validate(self.queue_pairs)
        if "features" in delta.registers or "guest_offloads" in delta.control:
            self._check_offloads(control, features)
        queues = self.queues.copy()
        for index, queue in delta.queues.items():
            self.queue(index)
            queue.validate()
            if queue.enabled and queue.num > self.max_num:
                raise ConfigError(f"queue {index}: size {queue.num} is larger than {self.max_num}")
            queues[index] = queue
        for index, _ in delta.bases:
            if not (0 <= index < len(queues) and queues[index].enabled):
                raise ConfigError(f"queue {index} has an index and is not enabled")
        return features, control, queues

    def load_queues(self, queues: list[Virtqueue], bases: Iterable[tuple[int, int]]) -> None:
        """Take over queues, and the next avail index of some, that `after` has checked."""
        self.queues[:] = queues
        for index, base in bases:
            queues[index].last_avail_idx = base
