"""Vrings: the rings that one front end described, the memory they lie in, and their start and stop."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

from vnetdp_kernels import rows as r

from ...backends.base import Backend
from ...datapath.datapath import Datapath
from ...datapath.loop_thread import LoopThread
from ...endpoints.base import Endpoint
from ...errors import BackendError, GuestError, RequestRefused
from ...shared.memory import DirtyLog, GuestMemory, Region
from ...shared.notify import EventFd
from ...system.poll import readable
from ...virtio.queue import RECEIVEQ, pair_of, partner_of, queues_of, vring_of
from ..connection import BackEndConnection
from ..inflight import InflightArea
from ..message import VHOST_VRING_F_LOG, BackendRequest, MemoryRegion, ProtocolFeature, VringAddr
from ..transport import close_fds

_log = logging.getLogger("vnetdp.session")


class InbandEvent(EventFd):
    """A call, or a ring's error, that is to be passed on as the message *request*: the front end gave no descriptor."""

    def __init__(self, request: BackendRequest) -> None:
        super().__init__()
        self.request = request


class Served(Protocol):
    """The worker that a session drives: the backends of a datapath, and the thread that runs it."""

    loop_thread: LoopThread
    datapath: Datapath

    @property
    def backends(self) -> Sequence[Backend]: ...


@dataclass
class Vring:
    """A ring as its front end described it; addresses are user addresses until the ring is started."""

    num: int = 0
    base: int = 0
    addr: VringAddr | None = None
    kick: EventFd | None = None
    call: EventFd | None = None
    err: EventFd | None = None
    has_kick: bool = False  # SET_VRING_KICK came, with a descriptor or without
    has_base: bool = False  # SET_VRING_BASE came: most front ends send it, and not all of them kick a ring that runs on
    kicks_before: int = 0  # seen when the ring was bound
    enabled: bool | None = None  # None = not set yet: such a ring waits, a disabled one discards
    bound: bool = False
    broken: bool = False  # its break was reported


@dataclass
class Mapped:
    """A region of the memory table, and its descriptor, owned."""

    region: MemoryRegion
    fd: int


class Vrings:
    """A front end's rings: 2i and 2i + 1 are served by backend i of *worker*, and lead to queue pair i of *endpoint*.

    regions: the memory table as it was told; memory: the same, mapped, with the inflight area beside it.
    """

    def __init__(self, connection: BackEndConnection, worker: Served, endpoint: Endpoint) -> None:
        self._connection = connection
        self._worker = worker
        self._endpoint = endpoint
        self.rings = [Vring() for _ in range(queues_of(len(worker.backends)))]
        self.has_features = False  # SET_FEATURES came
        self.regions: list[Mapped] = []
        self.memory: GuestMemory | None = None
        self.inflight: InflightArea | None = None
        self._log_area: DirtyLog | None = None

    def get(self, index: int) -> Vring:
        """Return a ring; RequestRefused if there is none of that number."""
        if not 0 <= index < len(self.rings):
            raise RequestRefused(f"vring {index}: there are vrings 0 to {len(self.rings) - 1}")
        return self.rings[index]

    def backend(self, index: int) -> tuple[Backend, int]:
        """Return the backend of a ring, and the ring's index there."""
        pair, vring = pair_of(index), vring_of(index)
        return self._worker.backends[pair], vring

    def enable(self, index: int, enabled: bool) -> None:
        ring = self.rings[index]
        backend, vring = self.backend(index)
        ring.enabled = enabled
        backend.set_vring_enable(vring, enabled)
        if vring == 0:
            self._endpoint.set_queue_active(pair_of(index), enabled)
        self.start_if_ready(index)

    def forget_enabled(self) -> None:
        """Have every ring wait to be enabled. Meanwhile a TAP's queue may get no flows, as no ring serves it."""
        for index, ring in enumerate(self.rings):
            self.enable(index, False)
            ring.enabled = None

    def _is_described(self, index: int) -> bool:
        """Return whether a ring is described and its kick is known.

        Not DRIVER_OK: QEMU's generic device takes STATUS and never tells it, and a front end has no kick to give before.
        """
        ring = self.rings[index]
        described = ring.num and ring.addr is not None and self.memory is not None
        return bool(described and ring.has_kick and ring.enabled is not None)

    def _waits_for_kick(self, index: int) -> bool:
        """Return whether more may come to be said of a ring: it starts when it is kicked, and all it needs was said."""
        ring = self.rings[index]
        return ring.kick is not None and not (ring.has_base and self.has_features)

    def start_if_ready(self, index: int) -> None:
        """Start a ring once it is described; one of which only a part was said, when its kick is readable."""
        ring = self.rings[index]
        if self._is_described(index) and not ring.bound and not (self._waits_for_kick(index) and not _kicked(ring)):
            with self.standing_still():
                self.start(index)

    def kicks(self) -> dict[int, int]:
        """Return the kicks that rings wait for to be started: descriptor to ring."""
        return {
            ring.kick.fd: index
            for index, ring in enumerate(self.rings)
            if ring.kick is not None and not ring.bound and self._waits_for_kick(index) and self._is_described(index)
        }

    def start_kicked(self, index: int) -> None:
        """Start a ring whose kick is readable. A ring with a wrong address waits for the front end's next message."""
        try:
            self.start_if_ready(index)
        except (BackendError, RequestRefused) as e:
            _log.warning("vring %d was kicked, and can't be started: %s", index, e)
            self.rings[index].has_base = self.has_features = True

    @contextmanager
    def before_start(self, *indices: int) -> Iterator[None]:
        """Take back rings that have not started yet for the length of the block: their settings may still change."""
        with self.standing_still():
            back = [index for index in indices if self.rings[index].bound and not self._has_started(index)]
            for index in back:
                self.stop(index)
            try:
                yield
            finally:
                for index in indices:
                    self.start_if_ready(index)

    def _has_started(self, index: int) -> bool:
        """Return whether a ring that is bound was kicked, or had a chain taken."""
        ring = self.rings[index]
        row = self._worker.datapath.vqs[index]
        took = row[r.VQ_LAST_AVAIL_IDX] != ring.base or row[r.VQ_KICKS] != ring.kicks_before
        return bool(took) or (ring.kick is not None and _kicked(ring))

    def start(self, index: int) -> None:
        """Bind a ring, from where its inflight area says if there is one. Nothing may run meanwhile."""
        ring = self.rings[index]
        addr = ring.addr
        if addr is None or self.memory is None:
            return
        backend, vring = self.backend(index)
        if self._connection.has(ProtocolFeature.INBAND_NOTIFICATIONS):
            # Linux sends neither SET_VRING_CALL nor SET_VRING_ERR then.
            if ring.call is None:
                ring.call = InbandEvent(BackendRequest.VRING_CALL)
                backend.set_vring_call(vring, ring.call)
            ring.err = ring.err or InbandEvent(BackendRequest.VRING_ERR)
        logged = addr.log if addr.flags & VHOST_VRING_F_LOG else None
        desc, avail, used = self.gpa(addr.desc, "desc"), self.gpa(addr.avail, "avail"), self.gpa(addr.used, "used")
        backend.set_vring_addr(vring, desc, avail, used, logged)
        if self.inflight is not None and self.memory.beside_offset >= 0:
            partner = self.rings[partner_of(index)]
            other_used = self.gpa(partner.addr.used, "used") if partner.addr is not None else None
            ring.base = self.inflight.recover(index, self.memory, ring.num, avail, used, other_used)
            at = self.memory.beside_offset
            # A move from ring to ring within this guest can be journalled; the other end of a bridge is not ours.
            journal = self.inflight.journal_at(index) if self._endpoint.answers else 0
            backend.set_vring_inflight(vring, at + self.inflight.area_at(index), at + journal if journal else 0)
            backend.set_vring_base(vring, ring.base)
        else:
            backend.set_vring_inflight(vring, 0, 0)
        ring.kicks_before = backend.counters(vring)["kicks"]
        backend.set_backend(vring, self._endpoint)
        ring.bound = True
        ring.broken = False
        self.call(ring)
        if self.inflight is not None and vring == RECEIVEQ and self.rings[partner_of(index)].bound:
            # The transmitq's journal could not be compared with both rings before this one was known.
            self.stop(index + 1)
            self.start(index + 1)

    def stop(self, index: int) -> None:
        """Unbind a ring, if it is bound, and keep how far it came."""
        ring = self.rings[index]
        if ring.bound:
            backend, vring = self.backend(index)
            backend.set_backend(vring, None)
            ring.base = backend.get_vring_base(vring)
            ring.bound = False

    def move(self, index: int, addr: VringAddr) -> None:
        """Set the addresses of a ring; a bound ring goes on there, or stays where it was if it can't be there."""
        ring = self.get(index)
        before = ring.addr
        with self.standing_still():
            was_bound = ring.bound
            ring.addr = addr
            try:
                if was_bound:
                    self.stop(index)
                    self.start(index)
                elif self.memory is not None:
                    self.gpa(addr.desc, "desc")
                    self.gpa(addr.avail, "avail")
                    self.gpa(addr.used, "used")
            except (BackendError, RequestRefused):
                ring.addr = before
                if was_bound and not ring.bound:
                    self.start(index)
                raise
        self.start_if_ready(index)

    def release(self, index: int) -> int:
        """Stop a ring, give up its kick and call, and return its base: the next chain to take."""
        ring = self.get(index)
        backend, vring = self.backend(index)
        if ring.bound:
            self.stop(index)
            self.forget_inflight(index)
        ring.has_kick = False
        ring.base = backend.get_vring_base(vring)
        backend.set_vring_kick(vring, None)
        backend.set_vring_call(vring, None)
        for event in (ring.kick, ring.call):
            if event is not None:
                event.close()
        ring.kick = ring.call = None
        return ring.base

    def abandon(self, index: int) -> None:
        """Stop and forget a ring that is disabled: Linux, as a front end, sets it up anew without GET_VRING_BASE."""
        ring = self.rings[index]
        if ring.bound and not ring.enabled:
            self.stop(index)
            self.forget_inflight(index)
            ring.addr = None
            ring.has_kick = False
            ring.enabled = None

    def stop_all(self) -> None:
        """Stop all rings, and give up a frame that waits for buffers."""
        with self.standing_still():
            for index in range(len(self.rings)):
                self.stop(index)
            self._endpoint.rows[:, r.EP_PENDING] = 0

    def reset(self) -> None:
        """Stop all rings, and forget their addresses; GET_VRING_BASE may still ask for their next indices."""
        self.stop_all()
        for index, ring in enumerate(self.rings):
            self.forget_inflight(index)
            ring.addr, ring.has_kick = None, False

    def forget_inflight(self, index: int) -> None:
        """Clear the part of a stopped ring in the inflight area: it has nothing in flight."""
        if self.inflight is not None and self.memory is not None and self.memory.beside_offset >= 0:
            self.inflight.forget(index, self.memory)

    def rewind(self) -> None:
        """Have all rings, stopped, begin at 0 again."""
        for index, ring in enumerate(self.rings):
            backend, vring = self.backend(index)
            backend.set_vring_base(vring, 0)
            ring.base, ring.has_base = 0, False

    def call(self, ring: Vring) -> None:
        """Call the driver, from the thread: on a peer's descriptor a write may fail, or wait."""
        if ring.call is not None:
            self._worker.loop_thread.signal_later(ring.call)

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """Have the thread touch no ring for the length of the block."""
        with self._worker.loop_thread.paused():
            yield

    def tell_broken(self) -> None:
        """A ring broke (called in the worker's thread): say so on its error descriptor."""
        for index, ring in enumerate(self.rings):
            backend, vring = self.backend(index)
            status = backend.status(vring)
            if ring.bound and status and not ring.broken:
                ring.broken = True
                _log.warning("%s; the ring is stopped until the front end starts it again", GuestError(index, status))
                if ring.err is not None:
                    with suppress(OSError):  # it is the peer's, and may be anything
                        ring.err.signal()

    # --- the memory they lie in ---

    def change_memory(self, mapped: list[Mapped], inflight: InflightArea | None = None) -> None:
        """Map a new table, or another inflight area beside it, and move the rings over to it under their owner's feet."""
        uvas = sorted((m.region.uva, m.region.size) for m in mapped)
        for (uva, size), (following, _) in itertools.pairwise(uvas):
            if uva + size > following:
                raise RequestRefused(f"regions overlap at user address {following:#x}")
        if any(uva + size > 1 << 64 for uva, size in uvas):
            raise RequestRefused("a region wraps around the user address space")
        regions = [Region(m.region.gpa, m.region.size, m.fd, m.region.mmap_offset) for m in mapped]
        before_inflight = self.inflight
        inflight = inflight or before_inflight
        beside = inflight.region() if inflight else None
        try:
            memory = GuestMemory(regions, foreign=True, beside=beside) if regions else None
        except OSError as e:
            raise RequestRefused(f"the memory cannot be mapped: {e}") from e
        before, self.memory = self.memory, memory
        kept = self.regions
        with self.standing_still():
            bound = [index for index, ring in enumerate(self.rings) if ring.bound]
            for index in bound:
                self.stop(index)
            self.regions, self.inflight = mapped, inflight
            try:
                if memory is not None:
                    for backend in self._worker.backends:
                        backend.set_memory(memory)
                for index in bound:
                    self.start(index)
            except Exception:
                self.regions, self.memory, self.inflight = kept, before, before_inflight
                try:
                    for index in bound:
                        self.stop(index)
                    if before is not None:
                        for backend in self._worker.backends:
                            backend.set_memory(before)
                    for index in bound:
                        self.start(index)
                finally:
                    if memory is not None:
                        memory.close()
                raise
            if memory is None:
                self._worker.datapath.memory = None
        if before is not None:
            before.close()
        for index in range(len(self.rings)):
            # A ring that was described may have waited for its memory; some rings may have to wait on.
            with suppress(BackendError, RequestRefused):
                self.start_if_ready(index)

    def gpa(self, uva: int, what: str) -> int:
        """Return the guest address of a user address of the front end."""
        for mapped in self.regions:
            into = uva - mapped.region.uva
            if 0 <= into < mapped.region.size:
                return mapped.region.gpa + into
        raise RequestRefused(f"{what} at user address {uva:#x} is in no memory region")

    def take_inflight(self, area: InflightArea) -> None:
        """Go on with *area* in place of the area before; it is ours from now on, and closed if that fails."""
        before = self.inflight
        try:
            if self.regions:
                self.change_memory(self.regions, area)
        except Exception:
            area.close()
            raise
        self.inflight = area
        if before is not None:
            before.close()

    def set_log(self, log: DirtyLog) -> None:
        """Mark writes to guest memory in *log*, which is ours from now on."""
        before = self._log_area
        with self.standing_still():
            try:
                for backend in self._worker.backends:
                    backend.set_log(log)
            finally:  # a verb that failed leaves the one before in use
                taken = self._worker.datapath.log is log
                self._log_area, other = (log, before) if taken else (before, log)
                if other is not None:
                    other.close()

    def close(self) -> None:
        """Stop all rings, and give up every mapping and descriptor of theirs."""
        self.stop_all()
        self.rewind()
        for index, ring in enumerate(self.rings):
            backend, vring = self.backend(index)
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
        with self.standing_still():
            self._worker.datapath.memory = None
        if self.memory is not None:
            self.memory.close()
        if self._log_area is not None:
            self._log_area.close()
        if self.inflight is not None:
            self.inflight.close()
        close_fds(mapped.fd for mapped in self.regions)
        self.regions = []


def _kicked(ring: Vring) -> bool:
    return ring.kick is not None and readable(ring.kick, 0)
