"""Driver: the guest's side of a device, at the speed of the device's side, for tests, benchmarks and simulators.

Like a guest's virtio_net it negotiates features, lays out rings and buffers in guest memory, posts receive
buffers, sends and receives. Its other end is an endpoint, as the device's is; without one, `send` and `receive`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import pairwise
from typing import Protocol

import numpy as np

from vnetdp_kernels import rows as r
from vnetdp_kernels import spec
from vnetdp_kernels.loops.drive import drive
from vnetdp_kernels.loops.side import run_side
from vnetdp_kernels.net import driver as kernels
from vnetdp_kernels.rows import Control, DriverRings
from vnetdp_kernels.virtq import split_driver

from ..datapath.datapath import scratch_of_thread
from ..datapath.loop_thread import LoopThread
from ..datapath.notifiers import Notifiers
from ..datapath.side import Side
from ..endpoints.base import Endpoint
from ..endpoints.clock import Clock
from ..endpoints.mailbox import MailboxEndpoint
from ..errors import ConfigError, GuestError, MachineError
from ..shared.memory import GuestMemory, SharedBlock, Words
from ..shared.notify import EventFd
from ..system.limits import leave_room
from ..system.owned import Owned
from ..virtio import features as f
from ..virtio.queue import check_num, is_receiveq, queues_of, ring_len, vring_of
from ..virtio.state import (
    VIRTIO_CONFIG_S_ACKNOWLEDGE,
    VIRTIO_CONFIG_S_DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK,
)

# An odd number of cache lines: buffers at a stride of 2048 would share a few sets of the cache.
BUFFER_LEN = 2048 + 64
_LONG_BUFFER_LEN = r.FRAME_SLOT + 64
_MARGIN = 1 << 16  # guest memory left alone at its start, and for rounding


_INDICES = (
    r.DVQ_AVAIL_IDX,
    r.DVQ_PUBLISHED_IDX,
    r.DVQ_KICKED_IDX,
    r.DVQ_LAST_USED_IDX,
    r.DVQ_USED_IDX,
)


class Device(Protocol):
    """A device as a driver uses it: its registers and its notifiers."""

    clock: Clock | None
    notifiers: Notifiers

    @property
    def device_features(self) -> int: ...
    @property
    def status(self) -> int: ...
    def set_status(self, status: int) -> None: ...
    def set_driver_features(self, features: int) -> None: ...
    def set_queue(self, index: int, num: int, desc: int, avail: int, used: int) -> None: ...
    def enable_queue(self, index: int) -> None: ...


def _buffer_lens(features: int, frame_len: int) -> tuple[int, int]:
    """Return the bytes of a receive and of a transmit buffer for negotiated *features* and frames up to *frame_len*."""
    gso_in = features & (f.VIRTIO_NET_F_GUEST_TSO4 | f.VIRTIO_NET_F_GUEST_TSO6)
    gso_out = features & (f.VIRTIO_NET_F_HOST_TSO4 | f.VIRTIO_NET_F_HOST_TSO6)
    n_lines = -(-(spec.NET_HDR_LEN + frame_len) // 64) | 1
    whole = max(BUFFER_LEN, 64 * n_lines)
    receive = _LONG_BUFFER_LEN if gso_in else whole
    return BUFFER_LEN if features & f.VIRTIO_NET_F_MRG_RXBUF else receive, _LONG_BUFFER_LEN if gso_out else whole


def memory_for(
    queue_pairs: int = 1, num: int = 256, buffer_len: int = _LONG_BUFFER_LEN, *, private: bool = False
) -> GuestMemory:
    """Return guest memory that is large enough for a `Driver` with *queue_pairs* pairs of queues of *num* descriptors.

    `buffer_len`: bytes of each buffer; the default has room for any features. A page takes memory once it is written.
    `private`: as in `GuestMemory.create`.
    The process's limit of descriptors (`ulimit -n`) is raised when half of it is used, as far as the hard limit allows.
    ConfigError if *num* is not a power of two up to 32768; MachineError if there are no more descriptors or no memory.
    The caller closes it.
    """
    check_num(num)
    rings = sum(ring_len(num)) + 4 * spec.PAGE_SIZE  # each part, and the buffers, begin on a page
    length = _MARGIN + queues_of(queue_pairs) * (rings + num * buffer_len)
    memory = GuestMemory.create([(0, spec.align_up(length, spec.PAGE_SIZE))], private)
    leave_room(memory.regions[0].fd)
    return memory


def driver_block(queue_pairs: int, num: int, fd: int | None = None) -> SharedBlock:
    """Return a block for the private state of a `Driver` with *queue_pairs* pairs of queues of *num* descriptors.

    `fd`: the descriptor of such a block, to map that one; None makes a new one.
    """
    words = queues_of(queue_pairs) * (r.DVQ_SLOTS + num * r.DESC_STATE_SLOTS)
    return SharedBlock(8 * words + spec.PAGE_SIZE, fd, later=True)


class Driver(Owned):
    """The guest's side of *device*, as Linux's virtio_net has it: rings and buffers in *memory*, set up when it is made.

    Nothing runs until `start` (a thread) or `step`. *endpoint* reads the clock of *device*.

    - `endpoint`: where the guest's frames come from and go to. None makes a mailbox: use `send` and `receive`.
    - `queue_pairs`: the pairs to use, at most the device's.
    - `num`: descriptors of each queue, a power of two up to 32768.
    - `wanted`: feature bits to accept of those offered; None accepts all that *endpoint* can use.
    - `frame_len`: bytes of the longest frame that comes in, if longer than the frames that *endpoint* sends.
    - `buffer_len`: bytes of each buffer, virtio_net_hdr included; 0 chooses by frames and features.
    - `start_at`: the guest address of the first ring.
    - `block`: where the driver keeps its private state (`driver_block`), such as a part of guest memory that migrates;
      the driver closes it. None: memory of its own.
    - `adopt`: True takes over rings that are set up, with the private state that *block* holds (see `check_adopted`).
    - `first_idx`: the value at which all ring indices begin, 0 to 65535.

    ConfigError if an argument cannot be, *memory* is too small (`memory_for`), or the device refuses the features.
    """

    def __init__(
        self,
        device: Device,
        memory: GuestMemory,
        endpoint: Endpoint | None = None,
        *,
        queue_pairs: int = 1,
        num: int = 256,
        wanted: int | None = None,
        frame_len: int = 0,
        buffer_len: int = 0,
        start_at: int = _MARGIN,
        block: SharedBlock | None = None,
        adopt: bool = False,
        first_idx: int = 0,
    ) -> None:
        self.device = device
        self.memory = memory
        self.queue_pairs = queue_pairs
        self.num = num
        self.mailbox: MailboxEndpoint | None = None
        """The mailbox behind `send` and `receive`; None if the driver was given an endpoint."""
        with ExitStack() as made:
            if block is not None:
                made.callback(block.close)
            check_num(num)
            if queue_pairs < 1:
                raise ConfigError(f"{queue_pairs} queue pairs: a driver needs at least one")
            if endpoint is None:
                endpoint = self.mailbox = made.enter_context(MailboxEndpoint(queue_pairs))
            if endpoint.queues < queue_pairs:
                raise ConfigError(f"{endpoint.name} has {endpoint.queues} queues, the driver needs {queue_pairs}")
            if device.clock is not None:
                endpoint.read_clock(device.clock)
            if block is None:
                block = driver_block(queue_pairs, num)
                made.callback(block.close)
            self.bell = made.enter_context(EventFd(later=True))
            made.pop_all()
        self.endpoint = endpoint
        self._block = block
        self.dvqs: Words = block.carve(np.int64, queues_of(queue_pairs), r.DVQ_SLOTS)
        self.states: Words = block.carve(np.int64, queues_of(queue_pairs), num, r.DESC_STATE_SLOTS)
        self.ctl: Words = np.zeros(r.CTL_SLOTS, np.int64)
        self.features = 0
        """The negotiated feature bits."""
        self._wanted = wanted
        self._frame_len = max(frame_len, endpoint.longest_frame)
        self._buffer_len = buffer_len
        self.start_at = start_at
        self.notify: Words = np.array(device.notifiers.made, np.int64)[: queues_of(queue_pairs)]
        self._side: Side | None = None
        self._thread: LoopThread | None = None
        device.notifiers.on_made(self._plug)
        device.notifiers.on_close(self._unplug)
        if adopt:
            return
        try:
            self._bring_up(first_idx)
        except Exception:
            self.close()
            raise

    def _bring_up(self, first_idx: int = 0) -> None:
        """Reset the device and set it up as 3.1.1 says, step by step."""
        device = self.device
        device.set_status(0)
        status = VIRTIO_CONFIG_S_ACKNOWLEDGE
        device.set_status(status)
        status |= VIRTIO_CONFIG_S_DRIVER
        device.set_status(status)
        usable = device.device_features
        if not self.endpoint.vnet_hdr:
            usable &= ~f.OFFLOADS
        self.features = f.closure(usable if self._wanted is None else usable & self._wanted)
        device.set_driver_features(self.features)
        status |= VIRTIO_CONFIG_S_FEATURES_OK
        device.set_status(status)
        if not device.status & VIRTIO_CONFIG_S_FEATURES_OK:
            raise ConfigError(f"the device refuses the features {', '.join(f.names(self.features))}")
        self.endpoint.set_offloads(f.host_offload_mask(self.features))
        at = self.start_at
        for index in range(2 * self.queue_pairs):
            at = self.lay_out(index, at, first_idx)
        device.set_status(status | VIRTIO_CONFIG_S_DRIVER_OK)

    def _place(self, index: int, at: int) -> tuple[dict[int, int], list[int], int]:
        """Return the slots of the row of a queue whose rings and buffers lie from guest address *at* on.

        With it, the addresses of the three rings, and the end. ConfigError if the queue is not inside guest memory.
        """
        lens = ring_len(self.num)
        addresses = []
        for length in lens:
            addresses.append(at)
            at += spec.align_up(length, spec.PAGE_SIZE)
        buffer_len = self._buffer_len or _buffer_lens(self.features, self._frame_len)[vring_of(index)]
        row = {
            r.DVQ_NUM: self.num,
            r.DVQ_DESC: self.memory.translate(addresses[0], lens[0]),
            r.DVQ_AVAIL: self.memory.translate(addresses[1], lens[1]),
            r.DVQ_USED: self.memory.translate(addresses[2], lens[2]),
            r.DVQ_EVENT_IDX: int(bool(self.features & f.VIRTIO_RING_F_EVENT_IDX)),
            r.DVQ_IN_ORDER: int(bool(self.features & f.VIRTIO_F_IN_ORDER)),
            r.DVQ_MRG_RXBUF: int(bool(self.features & f.VIRTIO_NET_F_MRG_RXBUF)),
            r.DVQ_HDR_LEN: f.header_len(self.features),
            r.DVQ_BUF_GPA: at,
            r.DVQ_BUF_LEN: buffer_len,
            r.DVQ_BUF_OFFSET: self.memory.translate(at, self.num * buffer_len),
        }
        return row, addresses, at + spec.align_up(self.num * buffer_len, spec.PAGE_SIZE)

    def lay_out(self, index: int, at: int, first_idx: int = 0) -> int:
        """Place a queue's rings and buffers in guest memory from *at* on, and enable it; return the address behind them.

        For a queue that the device has not enabled: at the start, or after a reset of it that lost nothing.

        @private
        """
        mem, row, state = self.memory.mem, self.dvqs[index], self.states[index]
        values, addresses, end = self._place(index, at)
        for address, length in zip(addresses, ring_len(self.num), strict=True):
            offset = self.memory.translate(address, length)
            mem[offset : offset + length] = 0
        row[:] = 0
        for slot, value in values.items():
            row[slot] = value
        row[r.DVQ_CALLS_ON] = 1
        split_driver.reset_driver(row, state)
        if first_idx:
            for slot in _INDICES:
                row[slot] = first_idx
            for ring in addresses[1:]:
                self.memory.write(ring + spec.VIRTQ_RING_IDX, first_idx.to_bytes(2, "little"))
        if is_receiveq(index):
            kernels.post_receive(mem, row, state)
            split_driver.publish_available(mem, row)
        self.device.set_queue(index, self.num, *addresses)
        self.device.enable_queue(index)
        return end

    def check_adopted(self, end: int) -> list[list[int]]:
        """Check the adopted private state, which came from outside, before anything runs on it.

        Return the guest addresses of the descriptor table, avail ring and used ring of each queue. ConfigError unless a
        driver with `features` can have left that state, the queues do not overlap, and all lie below guest address
        *end*.
        """
        window = self.memory.translate(self.start_at, 0) - self.start_at
        seen: Words = np.zeros(self.num, np.int64)
        parts = []
        taken = []
        for index, (row, state) in enumerate(zip(self.dvqs, self.states, strict=True)):
            first = int(row[r.DVQ_DESC]) - window
            try:
                values, addresses, behind = self._place(index, first)
            except ConfigError as e:
                raise ConfigError(f"queue {index}: the driver's ring at {first:#x} lies outside guest memory") from e
            if first % spec.PAGE_SIZE or row[[*values]].tolist() != [*values.values()]:
                raise ConfigError(f"queue {index}: driver state does not match a ring at {first:#x}")
            if not kernels.is_sound(self.memory.mem, row, state, is_receiveq(index), seen):
                raise ConfigError(f"queue {index}: the driver's state of its descriptors contradicts the ring")
            parts.append(addresses)
            taken.append((first, behind))
        taken.sort()
        if any(at < before for (_, before), (at, _) in pairwise([(0, self.start_at), *taken, (end, end)])):
            raise ConfigError(f"queues overlap, or reach outside guest addresses {self.start_at:#x} to {end:#x}")
        return parts

    # --- running ---

    @property
    def rings(self) -> DriverRings:
        """The queues as kernels take them; ConfigError once guest memory is closed. @private"""
        return DriverRings(self.memory.mem, self.dvqs, self.states, self.notify)

    @property
    def side(self) -> Side:
        """The driver's side of the rings, for the thread that asks. @private"""
        mem, scratch = self.memory.mem, scratch_of_thread(self.queue_pairs)
        wire, fd, side = self.endpoint.wire, self.bell.made, self._side
        if side is None or not side.has(mem, None, wire, fd, scratch):
            side = self._side = Side(drive, self.rings, wire, Control(self.ctl, fd), scratch)
        return side

    def run(self, budget: int = -1, poll_us: int = 0, timeout_ms: int = 0) -> tuple[int, int]:
        """Run all queues; return (rows.LOOP_*, frames moved). As `Datapath.run`. @private"""
        self.check_maker()
        endpoint = self.endpoint
        moved = 0
        while True:
            endpoint.service()
            left = budget if budget < 0 else budget - moved
            reason, n = run_side(self.side.row, left, poll_us, timeout_ms)
            moved += n
            if reason != r.LOOP_PYTHON:
                endpoint.service()
                return reason, moved
            if 0 <= budget <= moved:
                endpoint.service()
                return r.LOOP_BUDGET, moved

    def step(self, budget: int = 64) -> int:
        """Move at most *budget* frames between endpoint and rings, in this thread, and return how many. Never waits.

        GuestError if the device broke the specification; ConfigError if the driver has a thread (`start`).
        """
        self.check_stepped()
        moved = self.run(budget, 0, 0)[1]
        self.check()
        return moved

    def check_stepped(self) -> None:
        """Raise ConfigError if the driver has a thread, or in a forked child. @private"""
        self.check_maker()
        if self._thread is not None:
            raise ConfigError("the driver runs in a thread of its own: call stop before step")

    def check(self) -> None:
        """Raise GuestError if the device broke the specification on a queue."""
        for index, row in enumerate(self.dvqs):
            if row[r.DVQ_STATUS]:
                raise GuestError(index, int(row[r.DVQ_STATUS]))

    def start(self, poll_us: int = 0) -> None:
        """Run in a thread, which busy-polls *poll_us* µs before it sleeps: 0 sleeps at once, -1 never sleeps.

        ConfigError if the device has a `clock`; MachineError if the machine has no more threads or descriptors.
        """
        self.check_maker()
        if self.endpoint.clock is not None:
            raise ConfigError("a thread sleeps by the machine's clock: step the driver of a device with a clock=")
        if self._thread is None:
            for make in (self.bell.fileno, self.device.notifiers.make, self.endpoint.open_wakes):
                make()  # the thread sleeps on them
            self._thread = LoopThread(self, "guest-driver", poll_us)
            try:
                self._thread.start()
            except MachineError:
                self._thread = None
                raise

    def paused(self) -> AbstractContextManager[None]:
        """Return a context manager: the driver's thread, if there is one, touches no ring while the block lasts."""
        return nullcontext() if self._thread is None else self._thread.paused()

    @property
    def error(self) -> BaseException | None:
        """The exception that ended the thread; None while it runs, and if `stop` ended it."""
        return None if self._thread is None else self._thread.error

    @property
    def native_id(self) -> int:
        """The kernel's id of the thread, for its affinity. ConfigError if the driver has no thread."""
        if self._thread is None:
            raise ConfigError("the driver has no thread: start it first")
        return self._thread.native_id

    def stop(self) -> None:
        """Stop the thread. Rings and buffers stay as they are, and `start` goes on."""
        if self._thread is not None:
            self._thread.close()
            self._thread = None
            self.ctl[r.CTL_DOORBELL] = 0

    def _plug(self) -> None:
        """Learn the descriptors of the device's notifiers that somebody has asked for."""
        self.notify[:] = self.device.notifiers.made[: len(self.notify)]

    def _unplug(self) -> None:
        """Stop, and use no descriptor of a device that closes its own: another file may have the number next."""
        self.stop()
        self._side = None
        self.notify[:] = -1

    def reset(self, wanted: int | None = None) -> None:
        """Reset the device and set it up anew, with ring indices from 0. Frames in flight are lost.

        `wanted`: feature bits to accept from now on; None keeps the choice.
        """
        if wanted is not None:
            self._wanted = wanted
        running = self._thread
        self.stop()
        self._bring_up()
        if running is not None:
            self.start(running.poll_us)

    def place_of(self, index: int) -> tuple[int, int]:
        """Return the guest address of a queue's first part, and the bytes from there to the end of its buffers.

        @private
        """
        window = self.memory.translate(self.start_at, 0) - self.start_at
        row = self.dvqs[index]
        first = int(row[r.DVQ_DESC]) - window
        return first, int(row[r.DVQ_BUF_GPA]) + self.num * int(row[r.DVQ_BUF_LEN]) - first

    def private_ranges(self) -> list[tuple[int, int]]:
        """Return (guest address, bytes) of each range that only the driver writes: no dirty log has these."""
        ranges: list[tuple[int, int]] = []
        window = self.memory.translate(self.start_at, 0) - self.start_at
        for index, row in enumerate(self.dvqs):
            lens = ring_len(self.num)
            ranges += [
                (int(row[slot]) - window, n) for slot, n in zip((r.DVQ_DESC, r.DVQ_AVAIL), lens[:2], strict=True)
            ]
            if not is_receiveq(index):
                ranges.append((int(row[r.DVQ_BUF_GPA]), self.num * int(row[r.DVQ_BUF_LEN])))
        return ranges

    # --- frames by hand ---

    def send(self, frame: bytes, queue: int = 0) -> bool:
        """Queue an Ethernet frame (no FCS, no virtio_net_hdr) for queue pair *queue*; False if the mailbox is full.

        Errors, and frames that are dropped, are those of `MailboxEndpoint.put`. ConfigError if the driver has another
        endpoint.
        """
        return self._box().put(frame, queue=queue)

    def receive(self) -> list[bytes]:
        """Return the Ethernet frames (no FCS, no virtio_net_hdr) received since the last call, oldest first; maybe none.

        ConfigError if the driver has another endpoint.
        """
        return self._box().take()

    def fileno(self) -> int:
        """Return a descriptor that is readable while frames wait for `receive`, for select() and poll()."""
        return self._box().ready.fileno()

    def _box(self) -> MailboxEndpoint:
        if self.mailbox is None:
            raise ConfigError("the driver has an endpoint of its own: make it without one to send and receive by hand")
        return self.mailbox

    def counters(self) -> list[dict[str, int]]:
        """Return `packets`, `bytes`, `dropped`, `kicks` and `calls` of each queue: receiveq 2i, transmitq 2i + 1."""
        slots = {
            "packets": r.DVQ_PACKETS,
            "bytes": r.DVQ_BYTES,
            "dropped": r.DVQ_DROPPED,
            "kicks": r.DVQ_KICKS,
            "calls": r.DVQ_CALLS,
        }
        return [{name: int(row[slot]) for name, slot in slots.items()} for row in self.dvqs]

    def close(self) -> None:
        """Stop, and give up all that the driver made. Device, memory and endpoint stay the caller's."""
        self.stop()
        self._side = None  # it would keep guest memory mapped
        self._block.close()
        self.bell.close()
        if self.mailbox is not None:
            self.mailbox.close()
