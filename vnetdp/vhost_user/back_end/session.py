"""Session: a vhost-user back end's state of one front end, and a handler for each of its requests."""

from __future__ import annotations

import logging
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ...endpoints.announce import rarp
from ...endpoints.base import Endpoint
from ...errors import BackendError, ConfigError, EndpointError, RemoteProtocolError, RequestRefused
from ...shared.memory import DirtyLog
from ...shared.notify import EventFd
from ...virtio import features as f
from ..connection import BackEndConnection, Message
from ..inflight import InflightArea
from ..message import (
    MAX_CONFIG,
    NO_FD,
    U64,
    VERSION,
    BackendRequest,
    Config,
    DeviceStateTransfer,
    Empty,
    Header,
    Inflight,
    Log,
    MemoryTable,
    Payload,
    ProtocolFeature,
    Request,
    SingleRegion,
    VringAddr,
    VringState,
)
from ..transport import Transport, close_fds
from . import device_state
from .descriptors import PeerEvent, check_event, check_socket, check_state_channel
from .vrings import InbandEvent, Mapped, Served, Vrings

_log = logging.getLogger("vnetdp.session")

_F = ProtocolFeature
_EVERY = _F(sum(_F))
# Offered unless others are asked for. A guest whose back end has DEVICE_STATE is migrated by QEMU to none without it, such
# as DPDK's; INBAND_NOTIFICATIONS is taken by Linux wherever it is offered, and slow.
USUAL_PROTOCOL_FEATURES = _EVERY & ~(_F.DEVICE_STATE | _F.INBAND_NOTIFICATIONS)
MAX_MEM_SLOTS = 509  # as many as the kernel's vhost has, and memory hot-plug asks for


@contextmanager
def _closed_unless_taken(event: EventFd | None) -> Iterator[None]:
    """Close a descriptor, which no one else knows of, if the verb in the block fails."""
    try:
        yield
    except BaseException:
        if event is not None:
            event.close()
        raise


class Session:
    """One front end's session. `handle_one` takes a message from the transport and answers it."""

    def __init__(
        self,
        transport: Transport,
        worker: Served,
        endpoint: Endpoint,
        offer: int | None,
        mtu: int | None,
        mac: bytes,
        protocol_offer: ProtocolFeature = USUAL_PROTOCOL_FEATURES,
    ) -> None:
        self._transport = transport
        self._worker = worker
        self._endpoint = endpoint
        self._mtu = mtu
        self._mtu_before: int | None = None  # the endpoint's, before this front end set another
        self._mac = mac
        self._protocol_offer = protocol_offer & _EVERY
        self._connection = BackEndConnection()
        self._connection.offered_features = self._can_offer() if offer is None else self._can_offer() & offer
        self._connection.offered_features |= f.VHOST_USER_F_PROTOCOL_FEATURES
        self._vrings = Vrings(self._connection, worker, endpoint)
        self._front_end: socket.socket | None = None
        self._unsent = b""  # of a message to it
        self._status = 0  # the driver's, as the front end tells it
        self._device_state_ok = True
        self._pending_state = -1  # a descriptor to load a state from
        self._vrings.forget_enabled()

    def _can_offer(self) -> int:
        bits = f.RING_FEATURES | f.VIRTIO_NET_F_MRG_RXBUF | f.VIRTIO_NET_F_MAC | f.VIRTIO_NET_F_STATUS
        bits |= f.VHOST_F_LOG_ALL
        if self._mtu is not None:
            bits |= f.VIRTIO_NET_F_MTU
        if self._endpoint.vnet_hdr:
            bits |= f.OFFLOADS
        if len(self._worker.backends) > 1:
            bits |= f.VIRTIO_NET_F_MQ  # QEMU and DPDK serve the control queue themselves
        return bits

    # --- one message ---

    def handle_one(self) -> bool:
        """Take one message and answer it; False if the front end has left."""
        got = self._transport.receive()
        if got is None:
            return False
        header, data, fds = got
        unclaimed = list(fds)
        try:
            message = self._connection.receive(header, data, fds)
            try:
                answer, answer_fds = self._apply(message, unclaimed)
            except (RequestRefused, ConfigError, BackendError, EndpointError) as e:
                if not message.need_reply:
                    raise RemoteProtocolError(f"{message.request.name}: {e}") from e
                _log.warning("refused: %s: %s", message.request.name, e)
                self._transport.send(self._connection.acknowledge(message.request, False))
                return True
        finally:
            close_fds(unclaimed)
        if answer is not None:
            self._transport.send(self._connection.reply(message.request, answer), answer_fds)
        elif message.need_reply:
            self._transport.send(self._connection.acknowledge(message.request, True))
        return True

    def _apply(self, message: Message, fds: list[int]) -> tuple[Payload | None, list[int]]:
        """Handle a message; a handler takes the descriptors that it keeps out of *fds*."""
        handler: Callable[..., Payload | None] = getattr(self, f"_on_{message.request.name.lower()}")
        if message.request is Request.GET_INFLIGHT_FD:
            area = self._on_get_inflight_fd(message.payload)
            return area.describe(), [area.fd]
        return handler(message.payload, fds), []

    # --- features ---

    def _on_get_features(self, _payload: Empty, _fds: list[int]) -> Payload:
        return U64(self._connection.offered_features)

    def _on_set_features(self, payload: U64, _fds: list[int]) -> None:
        wanted = payload.value
        if wanted & ~self._connection.offered_features:
            unknown = ", ".join(f.names(wanted & ~self._connection.offered_features))
            raise RequestRefused(f"features that were not offered: {unknown}")
        features = wanted & ~f.VHOST_USER_F_PROTOCOL_FEATURES
        toggled = (wanted ^ self._connection.features) & ~f.VHOST_USER_F_PROTOCOL_FEATURES
        changed = toggled & ~f.VHOST_F_LOG_ALL
        rings = range(len(self._vrings.rings)) if changed else ()
        with self._vrings.before_start(*rings):
            # Logging begins and ends under a driver; any other request, even of the same features, is for a new driver.
            if toggled != f.VHOST_F_LOG_ALL and not any(ring.enabled for ring in self._vrings.rings):
                for index in range(len(self._vrings.rings)):
                    self._vrings.abandon(index)
            if changed and any(ring.bound for ring in self._vrings.rings):
                raise RequestRefused(f"features that can't change while a ring runs: {', '.join(f.names(changed))}")
            for backend in self._worker.backends:
                backend.set_features(features)
            self._vrings.has_features = True
        self._connection.features = wanted
        self._tell_mtu()
        self._endpoint.set_offloads(f.guest_offload_mask(features))
        if not wanted & f.VHOST_USER_F_PROTOCOL_FEATURES:
            for index in range(len(self._vrings.rings)):
                self._vrings.enable(index, True)

    def _on_get_protocol_features(self, _payload: Empty, _fds: list[int]) -> Payload:
        return U64(int(self._protocol_offer))

    def _on_set_protocol_features(self, payload: U64, _fds: list[int]) -> None:
        if payload.value & ~self._protocol_offer:
            raise RequestRefused(f"protocol features that were not offered: {payload.value:#x}")
        wanted = ProtocolFeature(payload.value)
        if wanted & _F.INBAND_NOTIFICATIONS and not (wanted & _F.BACKEND_REQ and wanted & _F.REPLY_ACK):
            raise RequestRefused("INBAND_NOTIFICATIONS needs BACKEND_REQ and REPLY_ACK")
        self._connection.protocol_features = wanted

    def _on_set_owner(self, _payload: Empty, _fds: list[int]) -> None:
        pass

    def _on_reset_owner(self, _payload: Empty, _fds: list[int]) -> None:
        for index in range(len(self._vrings.rings)):
            self._vrings.enable(index, False)

    def _on_get_queue_num(self, _payload: Empty, _fds: list[int]) -> Payload:
        return U64(len(self._worker.backends))

    # --- memory ---

    def _on_set_mem_table(self, payload: MemoryTable, fds: list[int]) -> None:
        if len(payload.regions) != len(fds):
            raise RemoteProtocolError(f"SET_MEM_TABLE: {len(payload.regions)} regions, {len(fds)} descriptors")
        before = self._vrings.regions
        self._vrings.change_memory([Mapped(region, fd) for region, fd in zip(payload.regions, fds, strict=True)])
        fds.clear()
        close_fds(old.fd for old in before)

    def _on_get_max_mem_slots(self, _payload: Empty, _fds: list[int]) -> Payload:
        return U64(MAX_MEM_SLOTS)

    def _on_add_mem_reg(self, payload: SingleRegion, fds: list[int]) -> None:
        if len(self._vrings.regions) >= MAX_MEM_SLOTS:
            raise RequestRefused(f"more than {MAX_MEM_SLOTS} memory regions")
        self._vrings.change_memory([*self._vrings.regions, Mapped(payload.region, fds[0])])
        fds.clear()

    def _on_rem_mem_reg(self, payload: SingleRegion, _fds: list[int]) -> None:
        wanted = (payload.region.gpa, payload.region.size, payload.region.uva)
        gone = [m for m in self._vrings.regions if (m.region.gpa, m.region.size, m.region.uva) == wanted]
        if not gone:
            raise RequestRefused(f"no memory region {payload.region.gpa:#x}+{payload.region.size:#x}")
        self._vrings.change_memory([m for m in self._vrings.regions if m is not gone[0]])
        os.close(gone[0].fd)

    # --- the dirty log ---

    def _on_set_log_base(self, payload: Log, fds: list[int]) -> Payload:
        log = DirtyLog.attach(fds[0], payload.size, payload.offset)
        fds.clear()
        self._vrings.set_log(log)
        return payload  # QEMU takes an answer of any length, rust-vmm of this one alone

    def _on_set_log_fd(self, _payload: Empty, _fds: list[int]) -> None:
        pass  # the log is polled by the front end anyway; the descriptor is closed

    # --- rings ---

    def _on_set_vring_num(self, payload: VringState, _fds: list[int]) -> None:
        ring = self._vrings.get(payload.index)
        self._vrings.abandon(payload.index)
        backend, vring = self._vrings.backend(payload.index)
        with self._vrings.before_start(payload.index):
            backend.set_vring_num(vring, payload.num)
            ring.num = payload.num

    def _on_set_vring_base(self, payload: VringState, _fds: list[int]) -> None:
        ring = self._vrings.get(payload.index)
        backend, vring = self._vrings.backend(payload.index)
        with self._vrings.before_start(payload.index):
            backend.set_vring_base(vring, payload.num)
            ring.base, ring.has_base = payload.num, True

    def _on_set_vring_addr(self, payload: VringAddr, _fds: list[int]) -> None:
        self._vrings.move(payload.index, payload)

    def _on_get_vring_base(self, payload: VringState, _fds: list[int]) -> Payload:
        return VringState(payload.index, self._vrings.release(payload.index))

    def _take_event(self, request: Request, payload: U64, fds: list[int]) -> tuple[int, EventFd | None]:
        """Return the ring's index and its descriptor, ours from now on; None if the message says there is none."""
        index = payload.value & 0xFF
        self._vrings.get(index)
        if payload.value & ~(0xFF | NO_FD):
            raise RemoteProtocolError(f"unknown bits {payload.value:#x} in a vring descriptor message")
        if payload.value & NO_FD:
            return index, None
        if not fds:
            raise RemoteProtocolError("a vring descriptor message without its descriptor")
        check_event(fds[0], None if request is Request.SET_VRING_KICK else self._transport.sock)
        return index, PeerEvent(fds.pop(0))

    def _on_set_vring_kick(self, payload: U64, fds: list[int]) -> None:
        index, event = self._take_event(Request.SET_VRING_KICK, payload, fds)
        ring = self._vrings.rings[index]
        backend, vring = self._vrings.backend(index)
        with _closed_unless_taken(event):
            backend.set_vring_kick(vring, event)
        if ring.kick is not None:
            ring.kick.close()
        ring.kick = event
        ring.has_kick = True
        self._vrings.start_if_ready(index)

    def _on_set_vring_call(self, payload: U64, fds: list[int]) -> None:
        index, event = self._take_event(Request.SET_VRING_CALL, payload, fds)
        ring = self._vrings.rings[index]
        event = event or self._inband_event(BackendRequest.VRING_CALL)
        backend, vring = self._vrings.backend(index)
        with self._vrings.standing_still():
            with _closed_unless_taken(event):
                backend.set_vring_call(vring, event)
            if ring.call is not None:
                ring.call.close()
            ring.call = event
            self._vrings.call(ring)  # the driver may not have been called for buffers used before

    def _on_set_vring_err(self, payload: U64, fds: list[int]) -> None:
        index, event = self._take_event(Request.SET_VRING_ERR, payload, fds)
        ring = self._vrings.rings[index]
        event = event or self._inband_event(BackendRequest.VRING_ERR)
        with self._vrings.standing_still():
            if ring.err is not None:
                ring.err.close()
            ring.err = event

    def _inband_event(self, request: BackendRequest) -> EventFd | None:
        return InbandEvent(request) if self._connection.has(_F.INBAND_NOTIFICATIONS) else None

    def _on_set_vring_enable(self, payload: VringState, _fds: list[int]) -> None:
        self._vrings.get(payload.index)
        if payload.num not in (0, 1):
            raise RequestRefused(f"SET_VRING_ENABLE {payload.num} is neither 0 nor 1")
        self._vrings.enable(payload.index, bool(payload.num))

    def _on_vring_kick(self, payload: VringState, _fds: list[int]) -> None:
        ring = self._vrings.get(payload.index)
        ring.has_kick = True
        self._vrings.start_if_ready(payload.index)
        if ring.bound:
            with self._vrings.standing_still():
                pass  # a thread that was paused looks at all rings when it goes on

    # --- the device ---

    def _on_send_rarp(self, payload: U64, _fds: list[int]) -> None:
        mac = payload.value.to_bytes(8, "little")[:6]
        with self._vrings.standing_still():  # the worker's thread has the endpoint otherwise
            self._endpoint.send_to_wire(rarp(mac))

    def _on_net_set_mtu(self, payload: U64, _fds: list[int]) -> None:
        if wrong := f.mtu_error(payload.value):
            raise RequestRefused(wrong)
        before = self._endpoint.mtu
        self._endpoint.set_mtu(payload.value)
        self._mtu = payload.value
        self._mtu_before = before if self._mtu_before is None else self._mtu_before
        self._tell_mtu()

    def _tell_mtu(self) -> None:
        """Have the worker hold frames to the MTU, where it was negotiated."""
        if self._mtu is not None and self._connection.features & f.VIRTIO_NET_F_MTU:
            with self._vrings.standing_still():
                for backend in self._worker.backends:
                    backend.set_mtu(self._mtu)

    def _on_set_backend_req_fd(self, _payload: Empty, fds: list[int]) -> None:
        check_socket(fds[0], self._transport.sock)
        if self._front_end is not None:
            self._front_end.close()
        self._front_end = socket.socket(fileno=fds.pop(0))

    def _config_space(self) -> bytes:
        space = self._mac + struct.pack("<HHH", 1, len(self._worker.backends), self._mtu or 0)
        return space.ljust(MAX_CONFIG, b"\0")

    def _on_get_config(self, payload: Config, _fds: list[int]) -> Payload:
        if payload.offset + payload.size > MAX_CONFIG or len(payload.data) != payload.size:
            return Config(payload.offset, 0, payload.flags, b"")
        data = self._config_space()[payload.offset : payload.offset + payload.size]
        return Config(payload.offset, payload.size, payload.flags, data)

    def _on_set_config(self, payload: Config, _fds: list[int]) -> None:
        migration = payload.flags in (1, 2)
        if not migration or payload.offset != 0 or payload.size < 6 or len(payload.data) != payload.size:
            raise RequestRefused("SET_CONFIG: no field of a network device's configuration can be written")
        self._mac = payload.data[:6]

    def _on_reset_device(self, _payload: Empty, _fds: list[int]) -> None:
        self._status = 0
        self._vrings.reset()
        self._vrings.rewind()
        self._vrings.forget_enabled()

    def _on_set_status(self, payload: U64, _fds: list[int]) -> None:
        if payload.value > 0xFF:
            raise RequestRefused(f"status {payload.value:#x} is not a u8")
        self._status = payload.value
        if payload.value == 0:
            self._vrings.reset()

    def _on_get_status(self, _payload: Empty, _fds: list[int]) -> Payload:
        return U64(self._status)

    # --- inflight ---

    def _on_get_inflight_fd(self, payload: Payload) -> InflightArea:
        assert isinstance(payload, Inflight)
        area = InflightArea.create(payload.num_queues, payload.queue_size, len(self._vrings.rings))
        self._vrings.take_inflight(area)
        return area

    def _on_set_inflight_fd(self, payload: Inflight, fds: list[int]) -> None:
        area = InflightArea.attach(payload, fds[0], len(self._vrings.rings))
        fds.clear()
        self._vrings.take_inflight(area)

    # --- state of the device, for migration by the front end ---

    def _on_set_device_state_fd(self, payload: DeviceStateTransfer, fds: list[int]) -> Payload:
        if payload.direction not in (0, 1) or payload.phase != 0 or any(ring.bound for ring in self._vrings.rings):
            return U64(1 | NO_FD)
        check_state_channel(fds[0])
        self._close_pending_state()
        if payload.direction == 0:
            self._device_state_ok = device_state.save(fds[0], self._mac, self._mtu)
        else:
            self._pending_state = fds.pop(0)
            self._device_state_ok = False
        return U64(NO_FD)

    def _on_check_device_state(self, _payload: Empty, _fds: list[int]) -> Payload:
        if self._pending_state >= 0:
            fd, self._pending_state = self._pending_state, -1
            self._device_state_ok = self._load_state(fd)
        return U64(0 if self._device_state_ok else 1)

    def _load_state(self, fd: int) -> bool:
        try:
            mac, mtu = device_state.load(fd)
            if mtu is not None:
                self._on_net_set_mtu(U64(mtu), [])
        except (RequestRefused, EndpointError) as e:
            _log.warning("the device state can't be loaded: %s", e)
            return False
        self._mac, self._mtu = mac, mtu
        return True

    # --- events of the worker ---

    def ring_broke(self) -> None:
        """A ring broke (called in the worker's thread): say so on its error descriptor."""
        self._vrings.tell_broken()

    def descriptors(self) -> dict[int, int]:
        """Return the descriptors that `look_at` waits for, each with its events (select.POLL*)."""
        kicks = dict.fromkeys(self._vrings.kicks(), select.POLLIN)
        if self._front_end is None:
            return kicks
        if self._unsent:
            return kicks | {self._front_end.fileno(): select.POLLOUT}
        return kicks | {event.fd: select.POLLIN for _, event in self._inband_events()}

    def look_at(self, ready: set[int]) -> None:
        """Handle *ready*, of `descriptors`: start kicked rings, and send calls and errors of the worker in-band."""
        for fd, index in self._vrings.kicks().items():
            if fd in ready:
                self._vrings.start_kicked(index)
        self._tell_front_end(ready)

    def _inband_events(self) -> Iterator[tuple[int, InbandEvent]]:
        for index, ring in enumerate(self._vrings.rings):
            for event in (ring.call, ring.err):
                if isinstance(event, InbandEvent):
                    yield index, event

    def _tell_front_end(self, ready: set[int]) -> None:
        """Send calls and errors that the worker signalled on *ready* in-band: as many as the socket takes now."""
        self._send_unsent()
        for index, event in self._inband_events():
            if event.fd in ready and not self._unsent:
                event.clear()
                payload = VringState(index, 0).encode()
                self._unsent = Header(event.request, VERSION, len(payload)).encode() + payload
                self._send_unsent()

    def _send_unsent(self) -> None:
        if self._front_end is not None and self._unsent:
            try:
                sent = self._front_end.send(self._unsent, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError:  # after any error the socket takes no other message either
                sent = len(self._unsent)
            self._unsent = self._unsent[sent:]

    def close(self) -> None:
        """Stop all rings, and give up every mapping and descriptor of this front end."""
        self._vrings.close()
        if self._mtu_before is not None:
            with suppress(EndpointError):
                self._endpoint.set_mtu(self._mtu_before)
        if self._front_end is not None:
            self._front_end.close()
        self._close_pending_state()

    def _close_pending_state(self) -> None:
        fd, self._pending_state = self._pending_state, -1
        if fd >= 0:
            os.close(fd)
