"""Session: what a vhost-user back end remembers of one front end, and a handler for each of its requests."""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

from vnetdp_kernels import layout

from . import features as f
from .backends.base import VRINGS
from .backends.worker import WorkerBackend
from .datapath import Datapath, Paced
from .endpoints.base import Endpoint
from .errors import BackendError, ConfigError, EndpointError, GuestError, RemoteProtocolError, RequestRefused
from .inflight import InflightArea
from .memory import DirtyLog, GuestMemory, Region
from .notify import EventFd
from .vhost_user.connection import BackEndConnection, Message
from .vhost_user.message import (
    MAX_CONFIG,
    NO_FD,
    U64,
    VHOST_VRING_F_LOG,
    BackendRequest,
    Config,
    DeviceState,
    Empty,
    Header,
    Inflight,
    Log,
    MemoryRegion,
    MemoryTable,
    Payload,
    ProtocolFeature,
    Request,
    SingleRegion,
    VringAddr,
    VringState,
)
from .vhost_user.transport import Transport, close_fds

_log = logging.getLogger("vnetdp.session")

_F = ProtocolFeature
MAX_MEM_SLOTS = 509  # as the kernel's vhost has, and what memory hot-plug asks for
_DRIVER_OK = 4
_MAX_STATE = 1 << 16
_STATE_MAGIC = "vnetdp-net"


class Served(Protocol):
    """What a session drives: the backends of a datapath, and the thread that runs it."""

    paced: Paced
    datapath: Datapath
    backends: list[WorkerBackend]
    on_broken: Callable[[], None] | None


@dataclass
class _Ring:
    """A ring as its front end described it; addresses are user addresses until the ring is started."""

    num: int = 0
    base: int = 0
    addr: VringAddr | None = None
    kick: EventFd | None = None
    call: EventFd | None = None
    err: EventFd | None = None
    inband: bool = False  # *call* is our own, and passed on as a message
    has_kick: bool = False  # SET_VRING_KICK came, with a descriptor or without
    enabled: bool | None = None  # None = nobody has said: it waits, while one that is disabled discards
    bound: bool = False
    broken: bool = False  # it was said that the ring broke


@dataclass
class _Mapped:
    """A region of the memory table, and its descriptor, owned."""

    region: MemoryRegion
    fd: int = field(default=-1)


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
        inband: bool = False,
        protocol_offer: int | None = None,
    ) -> None:
        self._transport = transport
        self._worker = worker
        self._endpoint = endpoint
        self._mtu = mtu
        self._mac = mac
        self._inband = inband
        self._protocol_offer = protocol_offer
        self._connection = BackEndConnection()
        self._connection.offered_features = self._can_offer() if offer is None else self._can_offer() & offer
        self._connection.offered_features |= f.VHOST_USER_F_PROTOCOL_FEATURES
        self._rings = [_Ring() for _ in range(VRINGS * len(worker.backends))]
        self._regions: list[_Mapped] = []
        self._memory: GuestMemory | None = None
        self._log_area: DirtyLog | None = None
        self._inflight: InflightArea | None = None
        self._status = 0
        self._front_end: socket.socket | None = None
        self._device_state_ok = True
        self._forget_enabled()

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

    def _protocol_features(self) -> ProtocolFeature:
        bits = _F.LOG_SHMFD | _F.RARP | _F.REPLY_ACK | _F.MTU | _F.BACKEND_REQ | _F.CONFIG | _F.INFLIGHT_SHMFD
        bits |= _F.RESET_DEVICE | _F.CONFIGURE_MEM_SLOTS | _F.STATUS | _F.DEVICE_STATE
        if self._inband:
            bits |= _F.INBAND_NOTIFICATIONS
        bits |= _F.MQ
        return bits if self._protocol_offer is None else bits & self._protocol_offer

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
        """Do what a message asks; a handler takes the descriptors that it keeps out of *fds*."""
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
        with self._standing_still():
            if not any(ring.enabled for ring in self._rings):
                for index in range(len(self._rings)):
                    self._abandon(index)
            changed = (wanted ^ self._connection.features) & ~(f.VHOST_F_LOG_ALL | f.VHOST_USER_F_PROTOCOL_FEATURES)
            if changed and any(ring.bound for ring in self._rings):
                raise RequestRefused(f"features that can't change while a ring runs: {', '.join(f.names(changed))}")
            for backend in self._worker.backends:
                backend.set_features(features)
        self._connection.features = wanted
        self._endpoint.set_offloads(f.guest_offload_mask(features))
        if not wanted & f.VHOST_USER_F_PROTOCOL_FEATURES:
            for index in range(len(self._rings)):
                self._enable(index, True)

    def _on_get_protocol_features(self, _payload: Empty, _fds: list[int]) -> Payload:
        return U64(self._protocol_features())

    def _on_set_protocol_features(self, payload: U64, _fds: list[int]) -> None:
        if payload.value & ~self._protocol_features():
            raise RequestRefused(f"protocol features that were not offered: {payload.value:#x}")
        wanted = ProtocolFeature(payload.value)
        if wanted & _F.INBAND_NOTIFICATIONS and not (wanted & _F.BACKEND_REQ and wanted & _F.REPLY_ACK):
            raise RequestRefused("INBAND_NOTIFICATIONS needs BACKEND_REQ and REPLY_ACK")
        self._connection.protocol_features = wanted

    def _on_set_owner(self, _payload: Empty, _fds: list[int]) -> None:
        pass

    def _on_reset_owner(self, _payload: Empty, _fds: list[int]) -> None:
        for index in range(len(self._rings)):
            self._enable(index, False)

    def _on_get_queue_num(self, _payload: Empty, _fds: list[int]) -> Payload:
        return U64(len(self._worker.backends))

    # --- memory ---

    def _on_set_mem_table(self, payload: MemoryTable, fds: list[int]) -> None:
        if len(payload.regions) != len(fds):
            raise RemoteProtocolError(f"SET_MEM_TABLE: {len(payload.regions)} regions, {len(fds)} descriptors")
        before = self._regions
        self._change_memory([_Mapped(region, fd) for region, fd in zip(payload.regions, fds, strict=True)])
        fds.clear()
        close_fds(old.fd for old in before)

    def _on_get_max_mem_slots(self, _payload: Empty, _fds: list[int]) -> Payload:
        return U64(MAX_MEM_SLOTS)

    def _on_add_mem_reg(self, payload: SingleRegion, fds: list[int]) -> None:
        if len(self._regions) >= MAX_MEM_SLOTS:
            raise RequestRefused(f"more than {MAX_MEM_SLOTS} memory regions")
        self._change_memory([*self._regions, _Mapped(payload.region, fds[0])])
        fds.clear()

    def _on_rem_mem_reg(self, payload: SingleRegion, _fds: list[int]) -> None:
        wanted = (payload.region.gpa, payload.region.size, payload.region.uva)
        gone = [m for m in self._regions if (m.region.gpa, m.region.size, m.region.uva) == wanted]
        if not gone:
            raise RequestRefused(f"no memory region {payload.region.gpa:#x}+{payload.region.size:#x}")
        self._change_memory([m for m in self._regions if m is not gone[0]])
        os.close(gone[0].fd)

    def _change_memory(self, mapped: list[_Mapped], inflight: InflightArea | None = None) -> None:
        """Map a new table, or another inflight area beside it, and move the rings over to it under their owner's feet."""
        uvas = sorted((m.region.uva, m.region.size) for m in mapped)
        for (uva, size), (following, _) in itertools.pairwise(uvas):
            if uva + size > following:
                raise RequestRefused(f"regions overlap at user address {following:#x}")
        if any(uva + size > 1 << 64 for uva, size in uvas):
            raise RequestRefused("a region wraps around the user address space")
        regions = [Region(m.region.gpa, m.region.size, m.fd, m.region.mmap_offset) for m in mapped]
        before_inflight = self._inflight
        inflight = inflight or before_inflight
        beside = inflight.region() if inflight else None
        try:
            memory = GuestMemory(regions, foreign=True, beside=beside) if regions else None
        except OSError as e:
            raise RequestRefused(f"the memory cannot be mapped: {e}") from e
        before, self._memory = self._memory, memory
        kept = self._regions
        with self._standing_still():
            bound = [index for index, ring in enumerate(self._rings) if ring.bound]
            for index in bound:
                self._stop_ring(index)
            self._regions, self._inflight = mapped, inflight
            try:
                if memory is not None:
                    for backend in self._worker.backends:
                        backend.set_memory(memory)
                for index in bound:
                    self._start_ring(index)
            except Exception:
                self._regions, self._memory, self._inflight = kept, before, before_inflight
                try:
                    for index in bound:
                        self._stop_ring(index)
                    if before is not None:
                        for backend in self._worker.backends:
                            backend.set_memory(before)
                    for index in bound:
                        self._start_ring(index)
                finally:
                    if memory is not None:
                        memory.close()
                raise
            if memory is None:
                self._worker.datapath.memory = None
        if before is not None:
            before.close()

    def _gpa(self, uva: int, what: str) -> int:
        """Return the guest address of a user address of the front end."""
        for mapped in self._regions:
            into = uva - mapped.region.uva
            if 0 <= into < mapped.region.size:
                return mapped.region.gpa + into
        raise RequestRefused(f"{what} at user address {uva:#x} is in no memory region")

    # --- the dirty log ---

    def _on_set_log_base(self, payload: Log, fds: list[int]) -> Payload:
        log = DirtyLog.attach(fds[0], payload.size, payload.offset)
        fds.clear()
        before, self._log_area = self._log_area, log
        with self._standing_still():
            for backend in self._worker.backends:
                backend.set_log(log)
        if before is not None:
            before.close()
        return U64(0)

    def _on_set_log_fd(self, _payload: Empty, _fds: list[int]) -> None:
        pass  # the log is polled by the front end anyway; the descriptor is closed

    # --- rings ---

    def _ring(self, index: int) -> _Ring:
        if not 0 <= index < len(self._rings):
            raise RequestRefused(f"vring {index}: there are vrings 0 to {len(self._rings) - 1}")
        return self._rings[index]

    def _backend(self, index: int) -> tuple[WorkerBackend, int]:
        pair, vring = divmod(index, VRINGS)
        return self._worker.backends[pair], vring

    def _on_set_vring_num(self, payload: VringState, _fds: list[int]) -> None:
        ring = self._ring(payload.index)
        self._abandon(payload.index)
        backend, vring = self._backend(payload.index)
        backend.set_vring_num(vring, payload.num)
        ring.num = payload.num

    def _abandon(self, index: int) -> None:
        """Stop and forget a ring that is disabled: Linux, as a front end, sets it up anew without GET_VRING_BASE."""
        ring = self._rings[index]
        if ring.bound and not ring.enabled:
            self._stop_ring(index)
            ring.addr = None
            ring.has_kick = False
            ring.enabled = None

    def _on_set_vring_base(self, payload: VringState, _fds: list[int]) -> None:
        ring = self._ring(payload.index)
        backend, vring = self._backend(payload.index)
        backend.set_vring_base(vring, payload.num)
        ring.base = payload.num

    def _on_set_vring_addr(self, payload: VringAddr, _fds: list[int]) -> None:
        ring = self._ring(payload.index)
        before = ring.addr
        with self._standing_still():
            was_bound = ring.bound
            ring.addr = payload
            try:
                if was_bound:
                    self._stop_ring(payload.index)
                    self._start_ring(payload.index)
                else:
                    self._gpa(payload.desc, "desc")
                    self._gpa(payload.avail, "avail")
                    self._gpa(payload.used, "used")
            except (BackendError, RequestRefused):
                ring.addr = before
                if was_bound and not ring.bound:
                    self._start_ring(payload.index)
                raise
        self._start_if_ready(payload.index)

    def _on_get_vring_base(self, payload: VringState, _fds: list[int]) -> Payload:
        ring = self._ring(payload.index)
        backend, vring = self._backend(payload.index)
        self._stop_ring(payload.index)
        ring.has_kick = False
        base = backend.get_vring_base(vring)
        backend.set_vring_kick(vring, None)
        backend.set_vring_call(vring, None)
        for event in (ring.kick, ring.call):
            if event is not None:
                event.close()
        ring.kick = ring.call = None
        ring.inband = False
        ring.base = base
        return VringState(payload.index, base)

    def _take_event(self, payload: U64, fds: list[int]) -> tuple[int, EventFd | None]:
        """Return the ring's index and its descriptor, ours from now on; None if the message says there is none."""
        index = payload.value & 0xFF
        self._ring(index)
        if payload.value & ~(0xFF | NO_FD):
            raise RemoteProtocolError(f"bits {payload.value:#x} in a vring descriptor message")
        if payload.value & NO_FD:
            return index, None
        if not fds:
            raise RemoteProtocolError("a vring descriptor message without its descriptor")
        mode = os.fstat(fds[0]).st_mode
        # An eventfd is of no file type; UML calls through pipes.
        if stat.S_IFMT(mode) != 0 and not stat.S_ISFIFO(mode) and not stat.S_ISSOCK(mode):
            raise RequestRefused("a vring descriptor that is neither eventfd nor pipe")
        try:
            os.set_blocking(fds[0], False)
        except OSError as e:
            raise RequestRefused(f"a vring descriptor that can't be used: {e}") from e
        return index, EventFd(fds.pop(0))

    def _on_set_vring_kick(self, payload: U64, fds: list[int]) -> None:
        index, event = self._take_event(payload, fds)
        ring = self._rings[index]
        backend, vring = self._backend(index)
        backend.set_vring_kick(vring, event)
        if ring.kick is not None:
            ring.kick.close()
        ring.kick = event
        ring.has_kick = True
        self._start_if_ready(index)

    def _on_set_vring_call(self, payload: U64, fds: list[int]) -> None:
        index, event = self._take_event(payload, fds)
        ring = self._rings[index]
        ring.inband = event is None and self._connection.has(_F.INBAND_NOTIFICATIONS)
        if ring.inband:
            event = EventFd()
        backend, vring = self._backend(index)
        with self._standing_still():
            backend.set_vring_call(vring, event)
            if ring.call is not None:
                ring.call.close()
            ring.call = event
            self._call(ring)  # what was used before may not have been told

    def _call(self, ring: _Ring) -> None:
        """Call the driver, from the thread: on a peer's descriptor a write may fail, or wait."""
        if ring.call is not None:
            self._worker.paced.signal_later(ring.call)

    def _on_set_vring_err(self, payload: U64, fds: list[int]) -> None:
        index, event = self._take_event(payload, fds)
        ring = self._rings[index]
        with self._standing_still():
            if ring.err is not None:
                ring.err.close()
            ring.err = event

    def _on_set_vring_enable(self, payload: VringState, _fds: list[int]) -> None:
        self._ring(payload.index)
        if payload.num not in (0, 1):
            raise RequestRefused(f"SET_VRING_ENABLE {payload.num} is neither 0 nor 1")
        self._enable(payload.index, bool(payload.num))

    def _on_vring_kick(self, payload: VringState, _fds: list[int]) -> None:
        ring = self._ring(payload.index)
        ring.has_kick = True
        self._start_if_ready(payload.index)
        if ring.bound:
            with self._standing_still():
                pass  # whoever is stopped looks at all rings when it goes on

    def _enable(self, index: int, enabled: bool) -> None:
        ring = self._rings[index]
        backend, vring = self._backend(index)
        ring.enabled = enabled
        backend.set_vring_enable(vring, enabled)
        if vring == 0:
            self._endpoint.set_queue_active(index // VRINGS, enabled)
        self._start_if_ready(index)

    def _forget_enabled(self) -> None:
        """Have every ring wait to be enabled. A TAP's queue that nobody serves may get no flows meanwhile."""
        for index, ring in enumerate(self._rings):
            self._enable(index, False)
            ring.enabled = None

    def _start_if_ready(self, index: int) -> None:
        """Start a ring once it is described, its kick is known, and the driver is ready if that is told."""
        ring = self._rings[index]
        told = self._connection.has(_F.STATUS)
        described = ring.num and ring.addr is not None and self._memory is not None
        ready = described and ring.has_kick and ring.enabled is not None
        if ready and not ring.bound and (not told or self._status & _DRIVER_OK):
            with self._standing_still():
                self._start_ring(index)

    def _start_ring(self, index: int) -> None:
        ring = self._rings[index]
        addr = ring.addr
        if addr is None or self._memory is None:
            return
        backend, vring = self._backend(index)
        if ring.call is None and self._connection.has(_F.INBAND_NOTIFICATIONS):
            ring.call, ring.inband = EventFd(), True  # Linux sends no SET_VRING_CALL then
            backend.set_vring_call(vring, ring.call)
        logged = addr.log if addr.flags & VHOST_VRING_F_LOG else None
        desc, avail, used = self._gpa(addr.desc, "desc"), self._gpa(addr.avail, "avail"), self._gpa(addr.used, "used")
        backend.set_vring_addr(vring, desc, avail, used, logged)
        if self._inflight is not None and self._memory.beside_offset >= 0:
            partner = self._rings[index ^ 1].addr
            other_used = self._gpa(partner.used, "used") if partner is not None else None
            ring.base = self._inflight.recover(index, self._memory, ring.num, used, other_used)
            at = self._memory.beside_offset
            # What moves from ring to ring within this guest can be journalled; the other end of a bridge is not ours.
            loops_back = layout.KIND_ECHO <= self._endpoint.kind <= layout.KIND_REFLECT
            journal = self._inflight.journal_at(index) if loops_back else 0
            backend.set_vring_inflight(vring, at + self._inflight.area_at(index), at + journal if journal else 0)
            backend.set_vring_base(vring, ring.base)
        else:
            backend.set_vring_inflight(vring, 0, 0)
        backend.set_backend(vring, self._endpoint)
        ring.bound = True
        ring.broken = False
        self._call(ring)

    def _stop_ring(self, index: int) -> None:
        ring = self._rings[index]
        if ring.bound:
            backend, vring = self._backend(index)
            backend.set_backend(vring, None)
            ring.base = backend.get_vring_base(vring)
            ring.bound = False

    @contextmanager
    def _standing_still(self) -> Iterator[None]:
        with self._worker.paced.paused():
            yield

    # --- the device ---

    def _on_send_rarp(self, payload: U64, _fds: list[int]) -> None:
        mac = payload.value.to_bytes(8, "little")[:6]
        self._endpoint.send_to_wire(rarp(mac))

    def _on_net_set_mtu(self, payload: U64, _fds: list[int]) -> None:
        if not 68 <= payload.value <= 65535:
            raise RequestRefused(f"MTU {payload.value} is not between 68 and 65535")
        self._endpoint.set_mtu(payload.value)
        self._mtu = payload.value

    def _on_set_backend_req_fd(self, _payload: Empty, fds: list[int]) -> None:
        try:
            sock = socket.socket(fileno=fds[0])
        except OSError as e:
            raise RequestRefused(f"not a socket: {e}") from e
        fds.clear()
        if self._front_end is not None:
            self._front_end.close()
        self._front_end = sock

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
        self._reset_rings()
        self._forget_enabled()

    def _reset_rings(self) -> None:
        """Stop all rings, and forget where they are and how far they came."""
        with self._standing_still():
            for index, ring in enumerate(self._rings):
                self._stop_ring(index)
                backend, vring = self._backend(index)
                backend.set_vring_base(vring, 0)
                ring.base, ring.addr, ring.has_kick = 0, None, False
            self._endpoint.rows[:, layout.EP_HELD] = 0

    def _on_set_status(self, payload: U64, _fds: list[int]) -> None:
        if payload.value > 0xFF:
            raise RequestRefused(f"status {payload.value:#x} is not a u8")
        self._status = payload.value
        if payload.value == 0:
            self._reset_rings()
        elif payload.value & _DRIVER_OK:
            for index in range(len(self._rings)):
                self._start_if_ready(index)

    def _on_get_status(self, _payload: Empty, _fds: list[int]) -> Payload:
        return U64(self._status)

    # --- inflight ---

    def _on_get_inflight_fd(self, payload: Payload) -> InflightArea:
        assert isinstance(payload, Inflight)
        area = InflightArea.create(payload.num_queues, payload.queue_size, len(self._rings))
        self._take_inflight(area)
        return area

    def _on_set_inflight_fd(self, payload: Inflight, fds: list[int]) -> None:
        area = InflightArea.attach(payload, fds[0], len(self._rings))
        fds.clear()
        self._take_inflight(area)

    def _take_inflight(self, area: InflightArea) -> None:
        before = self._inflight
        try:
            if self._regions:
                self._change_memory(self._regions, area)
        except Exception:
            area.close()
            raise
        self._inflight = area
        if before is not None:
            before.close()

    # --- state of the device, for migration by the front end ---

    def _on_set_device_state_fd(self, payload: DeviceState, fds: list[int]) -> Payload:
        if payload.direction not in (0, 1) or payload.phase != 0 or any(ring.bound for ring in self._rings):
            return U64(1 | NO_FD)
        if self._pending_state >= 0:
            os.close(self._pending_state)
            self._pending_state = -1
        if payload.direction == 0:
            state = json.dumps({"magic": _STATE_MAGIC, "mac": self._mac.hex(), "mtu": self._mtu}).encode()
            try:
                self._device_state_ok = os.pwritev(fds[0], [state], -1, _no_wait(fds[0])) == len(state)
            except OSError as e:
                _log.warning("the state can't be saved: %s", e)
                self._device_state_ok = False
        else:
            self._pending_state = fds.pop(0)
            self._device_state_ok = False
        return U64(NO_FD)

    _pending_state = -1

    def _on_check_device_state(self, _payload: Empty, _fds: list[int]) -> Payload:
        if self._pending_state >= 0:
            fd, self._pending_state = self._pending_state, -1
            self._device_state_ok = self._load_state(fd)
        return U64(0 if self._device_state_ok else 1)

    def _load_state(self, fd: int) -> bool:
        """Read what another back end saved, up to its end, and close *fd*; False if it makes no sense."""
        data = b""
        try:
            while len(data) <= _MAX_STATE:
                part = bytearray(_MAX_STATE)
                n = os.preadv(fd, [part], -1, _no_wait(fd))
                if n == 0:
                    break
                data += part[:n]
        except BlockingIOError:
            pass  # all that was sent is read
        except OSError as e:
            _log.warning("the state can't be read: %s", e)
            return False
        finally:
            os.close(fd)
        try:
            state = json.loads(data)
            mac, mtu = bytes.fromhex(state["mac"]), state["mtu"]
            if state["magic"] != _STATE_MAGIC or len(mac) != 6 or not isinstance(mtu, int | None):
                raise ValueError("not the state of a network device")
            if mtu is not None:
                self._on_net_set_mtu(U64(mtu), [])
        except (ValueError, KeyError, TypeError, RecursionError, RequestRefused, EndpointError) as e:
            _log.warning("a state that can't be loaded: %s", e)
            return False
        self._mac, self._mtu = mac, mtu
        return True

    # --- what comes from the worker ---

    def descriptors(self) -> list[int]:
        """Return the descriptors of in-band calls: readable when the worker has called."""
        if not self._connection.has(_F.INBAND_NOTIFICATIONS) or self._front_end is None:
            return []
        return [ring.call.fd for ring in self._rings if ring.inband and ring.call is not None]

    def on_readable(self, fd: int) -> None:
        """Pass a call on in-band."""
        for index, ring in enumerate(self._rings):
            if ring.inband and ring.call is not None and ring.call.fd == fd:
                ring.call.clear()
                self._tell_front_end(BackendRequest.VRING_CALL, VringState(index, 0))

    def _tell_front_end(self, request: BackendRequest, payload: Payload) -> None:
        if self._front_end is not None:
            data = payload.encode()
            with suppress(OSError):
                message = Header(request, 1, len(data)).encode() + data
                self._front_end.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def ring_broke(self) -> None:
        """A ring broke (called in the worker's thread): say so on its error descriptor."""
        for index, ring in enumerate(self._rings):
            backend, vring = self._backend(index)
            status = backend.status(vring)
            if ring.bound and status and not ring.broken:
                ring.broken = True
                _log.warning("%s; it stands still until it is started anew", GuestError(index, status))
                if ring.err is not None:
                    with suppress(OSError):  # it is the peer's, and may be anything
                        ring.err.signal()

    def close(self) -> None:
        """Stop all rings, and give up every mapping and descriptor of this front end."""
        self._reset_rings()
        for index, ring in enumerate(self._rings):
            backend, vring = self._backend(index)
            backend.set_vring_kick(vring, None)
            backend.set_vring_call(vring, None)
            backend.set_vring_inflight(vring, 0, 0)
            backend.set_vring_enable(vring, True)
            for event in (ring.kick, ring.call, ring.err):
                if event is not None:
                    event.close()
        for backend in self._worker.backends:
            backend.set_features(0)
            backend.set_log(None)
        with self._standing_still():
            self._worker.datapath.memory = None
        if self._memory is not None:
            self._memory.close()
        if self._log_area is not None:
            self._log_area.close()
        if self._inflight is not None:
            self._inflight.close()
        if self._front_end is not None:
            self._front_end.close()
        if self._pending_state >= 0:
            os.close(self._pending_state)
        close_fds(mapped.fd for mapped in self._regions)
        self._regions = []


def _no_wait(fd: int) -> int:
    """Return the flags of a read or write that never waits, whatever the peer does to its end. Files never do."""
    return 0 if stat.S_ISREG(os.fstat(fd).st_mode) else os.RWF_NOWAIT


def rarp(mac: bytes) -> bytes:
    """Return the reverse ARP request that tells switches where *mac* is now (broadcast, 60 bytes)."""
    body = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 3) + mac + bytes(4) + mac + bytes(4)
    return (b"\xff" * 6 + mac + b"\x80\x35" + body).ljust(60, b"\0")
