"""The base of endpoints: shared state that kernels work on, a descriptor a queue, and one owner that polls it.

A frame is virtio_net_hdr (12 bytes), then Ethernet without its FCS. An endpoint in Python overrides `receive_frames`
and `transmit_frames`, which work in batches; an endpoint that kernels serve by themselves overrides neither.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from vnetdp_kernels import rows as r
from vnetdp_kernels import spec
from vnetdp_kernels.rows import Sink, Wire
from vnetdp_kernels.wire import port

from ..errors import ConfigError, EndpointError, place
from ..shared.memory import Bytes, SharedBlock, Words
from ..shared.notify import EventFd
from ..system.owned import Owned, OwnedLock
from .claims import Claims
from .clock import Clock
from .guard import Guard

_log = logging.getLogger("vnetdp.endpoints")

_VLAN_TAG_LEN = 4
PYTHON_SLOTS = 64  # frames that go to, or come from, an endpoint in Python in one batch
GO_ON = 1  # what `service` did
TOOK = 2
_SLOTS_AT = range(0, PYTHON_SLOTS * r.FRAME_SLOT, r.FRAME_SLOT)


def frame_len(mtu: int) -> int:
    """Return the bytes of the longest frame on a link of that MTU."""
    return spec.ETH_HLEN + _VLAN_TAG_LEN + mtu


class Endpoint(Owned):
    """Where frames meet the outside: the base of all endpoints. Queue i serves queue pair i; there are 1 to 32768 queues.

    An endpoint in Python is a subclass that overrides `receive_frames` and `transmit_frames`, and more as needed; one of
    `FrameEndpoint` needs neither batches nor headers.
    They are called in the thread that runs the rings, one call at a time. An exception drops the frames at hand, is
    counted (`errors`) and logged once, and stops nothing. A frame is virtio_net_hdr (12 bytes; zeros will do), then
    Ethernet without its FCS, 65600 bytes at most in all. `block_fd` is internal.

    Kernels work on: rows int64[queues, EP_SLOTS]; fds int64[queues] (-1 = none); pending uint8[queues, FRAME_SLOT];
    in_frames and out_frames uint8[queues, slots × FRAME_SLOT] with in_lengths and out_lengths int64[queues, slots];
    ledger int64[queues, LEDGER_SLOTS], counts and then notes, and windows uint8[queues, LEDGER_WINDOW], a row a flow.
    """

    kind: int = r.KIND_PYTHON
    vnet_hdr = False
    """True if frames may come and go with offloads in virtio_net_hdr: checksums and segmentation left to do."""
    name = "endpoint"
    """The name that errors, logs and reports have."""
    lines = 0
    """The number of faulty wires before it. @private"""

    def __init__(self, queues: int = 1, block_fd: int | None = None) -> None:
        if not 1 <= queues <= 0x8000:
            raise EndpointError(f"{queues} queues: an endpoint has 1 to 32768")
        slots = PYTHON_SLOTS if self.kind >= r.KIND_PYTHON else r.STREAM_SLOTS if self.kind == r.KIND_STREAM else 1
        row_slots = self.lines * r.STAGE_SLOTS + r.EP_SLOTS
        lengths = 2 * (self.lines * r.LINE_TABLE + slots)
        frame_bytes = 2 * (self.lines * r.LINE_BYTES + slots * r.FRAME_SLOT)
        words = queues * (row_slots + r.LEDGER_SLOTS + lengths)
        frames = queues * (r.FRAME_SLOT + frame_bytes + r.LEDGER_WINDOW)
        self.queues = queues
        """The number of queues."""
        with ExitStack() as made:
            self.block = SharedBlock(8 * words + frames + 8 * spec.PAGE_SIZE, block_fd, later=True)
            made.callback(self.block.close)
            self.polled_by: dict[int, object] = {}
            self._claims = Claims(self.block, self.polled_by)
            made.callback(self._claims.close)
            asked = self.kind == r.KIND_PYTHON and type(self).receive_frames is not Endpoint.receive_frames
            self._wakes = [made.enter_context(EventFd(later=True)) for _ in range(queues if asked else 0)]
            made.pop_all()
        self._closed = False
        self.close_on_fork()
        self.rows: Words = self.block.carve(np.int64, queues, row_slots)
        self._cells: Any = self.rows.data  # of which Python reads and writes one number in a tenth of the time
        self.ledger: Words = self.block.carve(np.int64, queues, r.LEDGER_SLOTS)
        self.windows: Bytes = self.block.carve(np.uint8, queues, r.LEDGER_WINDOW)
        self.pending: Bytes = self.block.carve(np.uint8, queues, r.FRAME_SLOT)
        self.in_lengths: Words
        self.in_frames: Bytes
        if self.lines:  # an answer goes from one way to the other: both ways are in one array
            self.in_lengths = self.out_lengths = self.block.carve(np.int64, queues, lengths)
            self.in_frames = self.out_frames = self.block.carve(np.uint8, queues, frame_bytes)
        else:
            self.in_lengths = self.block.carve(np.int64, queues, slots)
            self.out_lengths = self.block.carve(np.int64, queues, slots)
            self.in_frames = self.block.carve(np.uint8, queues, slots * r.FRAME_SLOT)
            self.out_frames = self.block.carve(np.uint8, queues, slots * r.FRAME_SLOT)
        self.fds: Words = np.full(queues, -1, np.int64)
        self._woken: set[int] = set()  # queues whose descriptor of `wake` may be readable
        self.wire = Wire(
            self.rows,
            self.fds,
            self.pending,
            self.in_frames,
            self.in_lengths,
            self.out_frames,
            self.out_lengths,
            self.ledger,
            self.windows,
        )
        if block_fd is None:
            self.rows[:, r.EP_KIND] = self.kind
            self.rows[:, r.EP_LINES] = self.lines
            self.rows[:, r.EP_FLOW] = np.arange(queues)
            self.rows[:, r.EP_LIMIT] = -1
        # The owner that polls it serves its Python side; frames of our own (`send_to_wire`) come from any thread.
        self._python_side = OwnedLock(self)
        self._begun = 0  # calls of a user's code
        self._in_hand = 0  # calls of a user's code that have not returned
        self._late: dict[int, Sequence[bytes]] = {}  # by queue: frames that came after the rings had another owner
        self.clock: Clock | None = None
        """The clock of its device, if one was handed in; None: the machine's."""
        self.polls_started = 0
        self.polls_stopped = 0
        self.polls_refused = 0
        self.errors = 0
        """The number of errors so far."""
        self.last_error: BaseException | None = None
        """The last error, such as an exception in `receive_frames`; None if there was none."""

    @property
    def closed(self) -> bool:
        """True once the endpoint is closed."""
        return self._closed or self.inherited

    def sink(self, queue: int) -> Sink:
        """Return the rows of one queue to which kernels give frames.

        @private
        """
        return Sink(
            self.rows[queue],
            int(self.fds[queue]),
            self.out_frames[queue],
            self.out_lengths[queue],
            self.ledger,
            self.windows,
        )

    def lie_in(self, rows: Words, lengths: Words, frames: Bytes, ledger: Words, windows: Bytes) -> None:
        """Go on in arrays of the faulty wire before it, which is about to be given frames. @private

        lengths and frames: the out slots of each queue, then its in slots.
        """
        rows[:] = self.rows
        if self.ledger.any():
            ledger[:], windows[:] = self.ledger, self.windows
        slots = lengths.shape[1] // 2
        self.rows, self.ledger, self.windows = rows, ledger, windows
        self._cells = rows.data
        self.out_lengths, self.in_lengths = lengths[:, :slots], lengths[:, slots:]
        self.out_frames, self.in_frames = frames[:, : slots * r.FRAME_SLOT], frames[:, slots * r.FRAME_SLOT :]

    # --- the clock that it reads ---

    def read_clock(self, clock: Clock) -> None:
        """Read *clock* from now on, if not already; ConfigError if it has read another one, or the machine's. @private"""
        if self.clock is not clock:
            self.take_clock(clock)
            clock.add(self)

    def take_clock(self, clock: Clock) -> None:
        """Keep *clock*, which tells the time to this endpoint or to the wire before it. @private"""
        if self.clock is not None or self.polls_started or self.rows[:, r.EP_NEXT_NS].any():
            raise ConfigError(f"{self.name}: it has read another clock before: give the device a new endpoint")
        self.clock = clock

    def tell_time(self, now_ns: int) -> None:
        """Set the time that kernels read. @private"""
        self.rows[:, r.EP_TOLD_NS] = now_ns + 1

    def next_due_ns(self) -> int | None:
        """Return the next time, in ns, at which time alone lets a frame move, as `Clock.next_due_ns`; None if there is none.

        The time is that of its `clock`, or CLOCK_MONOTONIC.
        """
        words = np.zeros(port.SCRATCH_WORDS, np.int64)
        return min((at for row in self.rows if (at := port.next_due_ns(row, words)) >= 0), default=None)

    # --- the owner that polls it ---

    def start_polling(self, queue: int, owner: object) -> None:
        """Record that *owner* alone moves frames of *queue* from now on; EndpointError while another owner does.

        The other owner may be in another process that shares the block; the claim of a process ends with it.
        @private
        """
        holder = self.polled_by.get(queue)
        if holder is owner:
            return
        if self.closed:
            raise EndpointError(f"{self.name}: the endpoint is closed")
        if holder is not None or not self._claim(queue, 1):
            self.polls_refused += 1
            raise EndpointError(f"{self.name}: queue {queue} is polled by another owner")
        self.polled_by[queue] = owner
        self.polls_started += 1

    def start_polling_all(self, queues: range, owner: object) -> bool:
        """`start_polling` of neighbours, all with one claim; False, and none is taken, if one is polled. @private"""
        if not self.polled_by.keys().isdisjoint(queues) or not self._claim(queues[0], len(queues)):
            return False
        self.polled_by.update(dict.fromkeys(queues, owner))
        self.polls_started += len(queues)
        return True

    def stop_polling(self, queue: int, owner: object) -> None:
        """Record that *owner* has let go of *queue*; nothing if it did not hold it. @private"""
        if self.polled_by.get(queue) is owner:
            del self.polled_by[queue]
            self.polls_stopped += 1
            self._claims.give_up(queue)

    def _claim(self, queue: int, n: int) -> bool:
        """Claim *n* queues against all others that share the block; False if one is taken."""
        return not self.closed and self._claims.take(queue, n)

    # --- the meeting of kernels and Python, in batches ---

    def service(self) -> int:
        """Transmit the frames in the out slots, and fill the in slots. For an endpoint in Python.

        Return GO_ON if that lets kernels go on that had come to an end, plus TOOK if it took frames. @private
        """
        if self.kind != r.KIND_PYTHON:
            return 0
        stopped = self.polls_stopped
        cells, done = self._cells, 0
        for queue in range(self.queues):
            n = cells[queue, r.EP_OUT_COUNT]
            cells[queue, r.EP_BLOCKED] = blocked = n > 0 and not self.takes_frames(queue)
            if n and not blocked:
                slots, lengths = self.out_frames[queue].data, self.out_lengths[queue, :n].tolist()
                frames = [bytes(slots[at : at + length]) for at, length in zip(_SLOTS_AT, lengths, strict=False)]
                cells[queue, r.EP_OUT_COUNT] = 0
                done |= TOOK | (GO_ON if n == PYTHON_SLOTS else 0)
                self._guarded_transmit(queue, frames)
                if self.polls_stopped != stopped:
                    return done  # that took so long that the rings have another owner: the slots are its affair
            if cells[queue, r.EP_COUNT] == 0 and (queue in self._woken or self.may_give(queue)):
                self._fill(queue)
                done |= GO_ON if cells[queue, r.EP_COUNT] else 0
        return done

    def _guarded(self, queue: int, frames: int) -> Guard:
        """Return a context to run a user's code in: an exception, sys.exit() too, costs its *frames*, and not the datapath.

        ConfigError if that code forked, in the child: it may not go on to the rings.
        """
        return Guard(self, queue, frames)

    def _guarded_transmit(self, queue: int, frames: Sequence[bytes]) -> None:
        with self._guarded(queue, len(frames)):
            self.transmit_frames(queue, frames)

    def wake(self, queue: int = 0) -> None:
        """Have `receive_frames` asked for frames of *queue* again, soon, also if the loop sleeps. Any thread may call it.

        Needless if *queue* has a descriptor of the endpoint's own in `fds`: its own has to be readable then, and this
        raises ConfigError; so it does if there is no such queue, or no `receive_frames`. Nothing happens once the
        endpoint is closed.
        """
        if not 0 <= queue < self.queues:
            raise ConfigError(f"queue pair {queue}: the last one is {self.queues - 1}")
        if not self._wakes:
            raise ConfigError(f"{self.name}: it has no receive_frames of its own to ask")
        own = self._wakes[queue]
        fd = (
            own.made
        )  # before the look at fds: `close` does it the other way round; and after it, as it may just be made
        if self.fds[queue] not in (fd, -1) and self.fds[queue] != own.made:
            raise ConfigError(f"{self.name}: queue {queue} has another descriptor in fds: make that one readable")
        self._wake(queue)

    def share(self) -> None:
        """Give the block a file, for another process; EndpointError while a loop of this one may run on it. @private"""
        if not self.block.shared and self.polled_by:
            raise EndpointError(f"{self.name}: an owner in this process polls it: no other process can have it before")
        _ = self.block.fd

    def open_wakes(self) -> None:
        """Make the descriptors on which a loop waits for `wake`; MachineError if there are no more. @private"""
        for queue, wake in enumerate(self._wakes):
            if wake.made < 0:
                fd = wake.fileno()
                if self.fds[queue] == -1:
                    self.fds[queue] = fd

    def _wake(self, queue: int) -> None:
        self._wakes[queue].signal()
        self._woken.add(queue)  # only now: a descriptor that is readable, and not known to be, would never be cleared

    def _fill(self, queue: int) -> None:
        self._cells[queue, r.EP_FIRST] = 0
        if woken := queue in self._woken:
            self._woken.discard(queue)
            self._wakes[queue].clear()  # before the asking, so that a wake-up meanwhile is not lost
        more = True
        with self._guarded(queue, 0):
            more = self.fill_slots(queue)
        if woken and more:
            self._wake(queue)

    def fill_slots(self, queue: int) -> bool:
        """Put the frames of `receive_frames` into the in slots of *queue*, all free now; EP_COUNT says how many.

        Return whether more frames may wait. @private
        """
        n = given = 0
        stopped = self.polls_stopped
        late = self._late.pop(queue, ())
        frames = late or self.receive_frames(queue, PYTHON_SLOTS)
        if self.polls_stopped != stopped:
            self._late[queue] = frames  # for the next owner, which has the slots by now
            return True
        cells = self._cells
        for frame in frames:
            given += 1
            if n == PYTHON_SLOTS:
                cells[queue, r.EP_DROP_ERROR] += 1  # more than were asked for
            elif len(frame) > r.FRAME_SLOT:
                cells[queue, r.EP_DROP_LONG] += 1
            else:
                at = n * r.FRAME_SLOT
                self.in_frames[queue].data[at : at + len(frame)] = frame
                self.in_lengths[queue, n] = len(frame)
                cells[queue, r.EP_COUNT] = n = n + 1
        return bool(late) or given >= PYTHON_SLOTS

    def _failed(self, queue: int, frames: int, error: BaseException) -> None:
        self.rows[queue, r.EP_DROP_ERROR] += frames
        self.errors += 1
        self.last_error = error
        if self.errors == 1:
            # An endpoint's own error names its file or interface; a capture that can't be read on fails no second time.
            named = isinstance(error, EndpointError) and str(error).startswith(self.name.partition(":")[0] + ":")
            what = str(error) if named else f"{self.name}: {type(error).__name__}: {error}{place(error)}"
            _log.warning("%s%s", what, "" if named and not frames else " (logged once; counted from now on)")
            _log.debug("%s: the error came from here:", self.name, exc_info=error)

    def receive_frames(self, queue: int, limit: int) -> Sequence[bytes]:
        """Return at most *limit* frames for the ring, virtio_net_hdr first, or none. It must not block.

        It is asked each time the loop is in Python; a loop that sleeps asks none, unless `wake` is called. After *limit*
        frames, or an exception, a queue that was woken is asked again.
        """
        return ()

    def may_give(self, queue: int) -> bool:
        """Return False if `receive_frames` would return none for *queue*, and need not be asked. @private"""
        return True

    def takes_frames(self, queue: int) -> bool:
        """Return True, or False to leave frames for the wire in the ring for now."""
        return True

    def transmit_frames(self, queue: int, frames: Sequence[bytes]) -> None:
        """Take *frames*, virtio_net_hdr first, that came off the ring. It must not block."""

    # --- calls by the device ---

    def set_offloads(self, mask: int) -> None:
        """Learn which offloads the other side of the ring takes in virtio_net_hdr: the bits of TUNSETOFFLOAD."""

    def set_queue_active(self, queue: int, active: bool) -> None:
        """Learn whether *queue* is in use (VIRTIO_NET_CTRL_MQ): an unused queue gets no frames."""

    def send_to_wire(self, frame: bytes) -> None:
        """Put a frame of the device's own (Ethernet, no FCS, no virtio_net_hdr) on the wire, such as a RARP announcement."""
        if self.kind == r.KIND_PYTHON:
            self._guarded_transmit(0, [bytes(spec.NET_HDR_LEN) + frame])

    @property
    def files(self) -> Sequence[Path]:
        """The files that it reads or writes. @private"""
        return ()

    def open_sink(self, others: Sequence[Path] = ()) -> None:
        """Create or overwrite the file that frames are written to, if that was put off when the endpoint was made.

        EndpointError, and nothing is overwritten, if that file is one of *others*, which other endpoints use.
        """

    @property
    def mtu(self) -> int | None:
        """The MTU of its interface, in bytes; None if it has no interface, or its MTU can't be told."""
        return None

    def set_mtu(self, mtu: int) -> None:
        """Learn the MTU that the driver was told, in bytes; raise EndpointError if frames of that size can't pass."""

    @property
    def longest_frame(self) -> int:
        """The bytes of the longest frame that comes from it: Ethernet, without FCS, virtio_net_hdr and offloads."""
        return frame_len(1500)

    @property
    def gives(self) -> bool:
        """True if it sends frames by itself; False if it only answers frames, or sends none."""
        return self.kind != r.KIND_NULL and not self.answers

    @property
    def answers(self) -> bool:
        """True if it is echo, macswap or reflect: frames come from it only as answers to frames.

        @private
        """
        return self.kind in (r.KIND_ECHO, r.KIND_MACSWAP, r.KIND_REFLECT)

    @property
    def idle(self) -> bool:
        """True if it holds no frame, neither on its way to the wire nor from it."""
        slots = self.rows[:, (r.EP_OUT_COUNT, r.EP_COUNT, r.EP_PENDING)]
        return not (self._in_hand or slots.any())

    @property
    def innermost(self) -> Endpoint:
        """The endpoint itself; for a `FaultEndpoint`, the innermost endpoint that it is around. @private"""
        return self

    @property
    def finished(self) -> bool:
        """True once no frame will ever come from it again, such as a capture that was read to its end."""
        return False

    @property
    def gone(self) -> bool:
        """True once no frame will ever pass it again, since its interface was deleted; `failures` then says so."""
        return False

    @property
    def failures(self) -> Sequence[str]:
        """One line for each failure at its own end that lost frames, such as a capture that can't be written."""
        return ()

    def counters(self) -> dict[str, int]:
        """Return counts since it was made, summed over the queues.

        Frames and bytes each way: `to_wire`, `from_wire`, `bytes_to_wire`, `bytes_from_wire`. Frames dropped:
        `dropped_short` (under 14 bytes), `dropped_long` (no buffer can hold it), `dropped_error`, `dropped_no_buffer`
        (the ring had none), `dropped_offload` (the receiver does not take its offload). And `errors`.
        """
        total = self.rows.sum(axis=0)
        return {
            "to_wire": int(total[r.EP_TO_WIRE]),
            "from_wire": int(total[r.EP_FROM_WIRE]),
            "bytes_to_wire": int(total[r.EP_BYTES_TO_WIRE]),
            "bytes_from_wire": int(total[r.EP_BYTES_FROM_WIRE]),
            "dropped_short": int(total[r.EP_DROP_SHORT]),
            "dropped_long": int(total[r.EP_DROP_LONG]),
            "dropped_error": int(total[r.EP_DROP_ERROR]),
            "dropped_no_buffer": int(total[r.EP_DROP_NO_BUFFER]),
            "dropped_offload": int(total[r.EP_DROP_OFFLOAD]),
            "errors": self.errors,
        }

    # --- calls by `World` ---

    def save_own(self) -> object:
        """Return, as plain data, the state that a subclass keeps besides frames and counters; None if it has none."""
        return None

    def load_own(self, data: object) -> None:
        """Take over the state that `save_own` returned, here or in another process; raise an exception if it is none."""

    def close(self) -> None:
        """Give up its descriptors. Close the device or driver that uses it first."""
        self._closed = True
        self.fds[:] = -1
        if self.clock is not None:
            self.clock.remove(self)
        for wake in self._wakes:
            wake.close()
        self.block.close()
        self.leave_to_parent()

    def leave_to_parent(self) -> None:
        self._claims.close()
