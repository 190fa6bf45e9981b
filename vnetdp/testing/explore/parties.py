"""The actors: the guest's driver, the device with its successors, and the reader of the dirty log.

Driver and device run the loops that are shipped, `loops.drive` and `loops.serve`, over all that lies below them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from vnetdp_kernels import rows as r
from vnetdp_kernels import spec
from vnetdp_kernels.loops.drive import drive
from vnetdp_kernels.loops.serve import serve
from vnetdp_kernels.net.driver import post_receive, send
from vnetdp_kernels.rows import Control, DriverRings, Guest, Limits, LoopScratch, Rings, Scratch, Wire
from vnetdp_kernels.virtq import bind, split_driver
from vnetdp_kernels.virtq.memory import take_dirty
from vnetdp_kernels.wire.port import SCRATCH_WORDS, source_of

from ...errors import STATUS_TEXT
from .actors import Actor, Node
from .layout import BUFFER_LEN, CALLS, KICKS, QUEUES, Layout
from .operations import EVENT_FD, SOURCE_FD, Operation, RuleError, Running, copy, fence
from .scenarios import SLOTS

_FRAME_LEN = 16
_CONTROL_FD = 0
_FOR_EVER = Limits(-1, 0, -1)
_SPARE = 8  # entries of each scratch array
RX, TX = range(2)


def frame(number: int) -> bytes:
    """Return the frame of that number, without its virtio_net_hdr."""
    return bytes([0x10 + number]) * _FRAME_LEN


def number_of(data: bytes) -> int:
    """Return the number of a frame; `RuleError` for bytes that are no frame's."""
    number = data[0] - frame(0)[0] if data else -1
    if number < 0 or data != frame(number):
        raise RuleError(f"a frame arrived as {data.hex(' ')}, which was never sent")
    return number


class Port:
    """An endpoint in Python, as kernels see it: frames go in batch by batch, and come out by number."""

    def __init__(self, actor: Actor, kind: int, batches: tuple[int, ...]) -> None:
        slot = BUFFER_LEN
        self.eps = actor.carve(np.int64, 1, r.EP_SLOTS)
        self.fds = actor.carve(np.int64, 1)
        self.wire = Wire(
            self.eps,
            self.fds,
            actor.carve(np.uint8, 1, slot),
            actor.carve(np.uint8, 1, SLOTS * slot),
            actor.carve(np.int64, 1, SLOTS),
            actor.carve(np.uint8, 1, SLOTS * slot),
            actor.carve(np.int64, 1, SLOTS),
            np.zeros((0, r.LEDGER_SLOTS), np.int64),
            np.zeros((0, 1), np.uint8),
        )
        self._ends = tuple(int(n) for n in np.cumsum(batches))
        self._kind = kind
        self.reset()

    def reset(self) -> None:
        self.eps[:] = 0
        self.eps[0, r.EP_KIND] = self._kind
        self.eps[0, r.EP_LIMIT] = -1

    def feed(self, fed: int) -> int:
        """Lay the next batch in, if the one before is through; return the frames fed so far, *fed* before this."""
        ep = self.eps[0]
        if ep[r.EP_COUNT] == 0:
            end = next((end for end in self._ends if end > fed), fed)
            for slot, number in enumerate(range(fed, end)):
                data = bytes(spec.NET_HDR_LEN) + frame(number)
                at = slot * BUFFER_LEN
                self.wire.in_frames[0, at : at + len(data)] = bytearray(data)
                self.wire.in_lengths[0, slot] = len(data)
            ep[r.EP_FIRST], ep[r.EP_COUNT] = 0, end - fed
            fed = end
        self.fds[0] = SOURCE_FD if self._ends and fed < self._ends[-1] else -1
        return fed

    def waiting(self) -> int:
        """Return the frames fed that no kernel has taken yet."""
        return int(self.eps[0, r.EP_COUNT])

    def out(self) -> tuple[int, ...]:
        """Return the numbers of the frames that went out in this turn; as `number_of`."""
        found = []
        for slot in range(int(self.eps[0, r.EP_OUT_COUNT])):
            length = int(self.wire.out_lengths[0, slot])
            at = slot * BUFFER_LEN + spec.NET_HDR_LEN
            found.append(number_of(self.wire.out_frames[0, at : at - spec.NET_HDR_LEN + length].tobytes()))
        return tuple(found)

    def take(self) -> tuple[int, ...]:
        """Take the frames out; return their numbers."""
        found = self.out()
        for slot in (r.EP_OUT_COUNT, r.EP_TO_WIRE, r.EP_FROM_WIRE, r.EP_BYTES_TO_WIRE, r.EP_BYTES_FROM_WIRE):
            self.eps[0, slot] = 0
        return found


def _scratch() -> LoopScratch:
    frames = Scratch(
        iov=np.zeros((_SPARE, r.IOV_SLOTS), np.int64),
        frame_iov=np.zeros((_SPARE, r.IOV_SLOTS), np.int64),
        chains=np.zeros((_SPARE, 2), np.int64),
        hdr=np.zeros(64, np.uint8),
        words=np.zeros(SCRATCH_WORDS, np.int64),
    )
    return LoopScratch(frames, pollfds=np.zeros((2, 4), np.int64), one=np.zeros(1, np.int64))


def _notify() -> Any:
    return np.array([(EVENT_FD + KICKS[q], EVENT_FD + CALLS[q]) for q in range(len(QUEUES))], np.int64)


def _check(queues: Any, status: int, side: str) -> None:
    for queue, row in zip(QUEUES, queues, strict=True):
        if row[status]:
            raise RuleError(f"{side} broke {queue}: {STATUS_TEXT.get(int(row[status]), int(row[status]))}")


class DriverKept(NamedTuple):
    fed: int = 0
    got: tuple[int, ...] = ()


class Driver(Actor):
    """The guest's driver in `loops.drive`."""

    name = "driver"

    def __init__(self, layout: Layout, event_idx: bool, batches: tuple[int, ...]) -> None:
        super().__init__()
        num = layout.num
        self._port = Port(self, r.KIND_PYTHON, batches)
        dvqs = self.carve(np.int64, len(QUEUES), r.DVQ_SLOTS)
        states = self.carve(np.int64, len(QUEUES), num, r.DESC_STATE_SLOTS)
        for queue, dvq in enumerate(dvqs):
            buffer = layout.part(queue, "buffer")
            dvq[r.DVQ_NUM] = num
            dvq[r.DVQ_DESC : r.DVQ_USED + 1] = [layout.part(queue, part).at for part in ("desc", "avail", "used")]
            dvq[r.DVQ_EVENT_IDX] = event_idx
            dvq[r.DVQ_HDR_LEN] = spec.NET_HDR_LEN
            dvq[r.DVQ_BUF_OFFSET], dvq[r.DVQ_BUF_GPA], dvq[r.DVQ_BUF_LEN] = buffer.at, buffer.gpa, BUFFER_LEN
            dvq[r.DVQ_CALLS_ON] = 1
            split_driver.reset_driver(dvq, states[queue])
        post_receive(layout.memory, dvqs[RX], states[RX])
        split_driver.publish_available(layout.memory, dvqs[RX])
        dvqs[RX, r.DVQ_KICKED_IDX] = dvqs[RX, r.DVQ_AVAIL_IDX]
        self._rings = DriverRings(layout.memory, dvqs, states, _notify())
        self._scratch = _scratch()
        self.kept = DriverKept()

    def send(self) -> None:
        """Send the first batch at once, while the scenario is set up."""
        self._port.feed(0)
        dvqs, states = self._rings.dvqs, self._rings.states
        source = source_of(self._port.wire, 0)
        send(self._rings.mem, dvqs[TX], states[TX], source, self._scratch.frames.words, SLOTS)

    def turn(self) -> bool:
        fed = self._port.feed(self.kept.fed)
        drive(self._rings, self._port.wire, Control(self.doorbell, _CONTROL_FD), self._scratch, _FOR_EVER)
        dvqs = self._rings.dvqs
        _check(dvqs, r.DVQ_STATUS, "the device")
        dvqs[:, [r.DVQ_CALLS, r.DVQ_KICKS]] = 0
        self.kept = DriverKept(fed, self.kept.got + self._port.take())
        return True

    def outcome(self) -> tuple[int, ...]:
        """Return the numbers of the frames received, in order."""
        kept: DriverKept = self.kept
        return kept.got + self._port.out()


class DeviceKept(NamedTuple):
    fed: int = 0
    got: tuple[int, ...] = ()
    kills: int = 0  # that may still come
    hand_overs: int = 0
    dead: bool = False  # killed; the successor has not taken over yet
    owner: int = 0
    known: tuple[int, ...] = ()  # frames that owners before this one published to the guest
    begin: int = 0  # the first frame of this owner's
    budget: int = -1  # frames that it moves at once


class DeviceOutcome(NamedTuple):
    got: tuple[int, ...]  # the frames that went to the wire
    taken: int  # frames from the wire that were taken off it
    due: tuple[int, ...]  # the frames from the wire that the guest has to have in the end


class Device(Actor):
    """The device in `loops.serve`, and each owner of its rings that follows the first."""

    name = "device"

    def __init__(self, layout: Layout, event_idx: bool, kind: int, batches: tuple[int, ...], kept: DeviceKept) -> None:
        super().__init__()
        self._layout = layout
        self._event_idx = event_idx
        self._port = Port(self, kind, batches)
        self._total = sum(batches)
        self._owners = self.carve(np.int64, 2, len(QUEUES), r.VQ_SLOTS)
        self._guest = Guest(layout.memory, layout.regions(), layout.log)
        self._notify = _notify()
        self._scratch = _scratch()
        self.kept = kept
        self.mortal = kept.kills > 0
        self._bind((0, 0))
        self._owners[:, :, r.VQ_CALL_DUE] = 0  # it has been bound for long

    def _bind(self, bases: tuple[int, int]) -> None:
        """Give the rings to the present owner, with the next avail index of each."""
        layout = self._layout
        vqs = self._owners[self.kept.owner]
        vqs[:] = 0
        for queue, vq in enumerate(vqs):
            parts = [layout.part(queue, part) for part in ("desc", "avail", "used")]
            vq[r.VQ_NUM] = layout.num
            vq[r.VQ_DESC : r.VQ_USED + 1] = [part.at for part in parts]
            vq[r.VQ_DESC_GPA : r.VQ_USED_GPA + 1] = [part.gpa for part in parts]
            vq[r.VQ_LOG_USED] = parts[-1].gpa if layout.log.size else -1
            vq[r.VQ_EVENT_IDX] = self._event_idx
            vq[r.VQ_HDR_LEN] = spec.NET_HDR_LEN
            vq[r.VQ_ENABLED] = 1
            if layout.area is not None:
                vq[r.VQ_INFLIGHT] = layout.inflight + layout.area.area_at(queue)
                if queue == TX and self._port.eps[0, r.EP_KIND] == r.KIND_ECHO:
                    vq[r.VQ_JOURNAL] = layout.inflight + layout.area.journal_at(queue)
        bind.bind(layout.memory, vqs, self._port.eps, layout.log, np.array(list(enumerate(bases)), np.int64))

    def turn(self) -> bool:
        if self.kept.dead:
            self._take_over()
            return True
        fed = self._port.feed(self.kept.fed)
        self.kept = self.kept._replace(fed=fed)
        self.doorbell.armed = self.kept.hand_overs > 0
        vqs = self._owners[self.kept.owner]
        rings = Rings(self._guest, vqs, self._notify)
        limits = _FOR_EVER._replace(budget=self.kept.budget)
        serve(rings, self._port.wire, Control(self.doorbell, _CONTROL_FD), self._scratch, limits)
        _check(vqs, r.VQ_STATUS, "the driver")
        vqs[:, [r.VQ_CALLS, r.VQ_KICKS]] = 0
        self.kept = self.kept._replace(got=self.kept.got + self._port.take())
        if self.doorbell.rang:
            self._hand_over(vqs)
        return True

    def _hand_over(self, vqs: Any) -> None:
        """Stop the present owner, and start the next at the index of each ring where it stands."""
        fence()  # the lock under which a thread is paused
        bases = int(vqs[RX, r.VQ_LAST_AVAIL_IDX]), int(vqs[TX, r.VQ_LAST_AVAIL_IDX])
        vqs[:] = 0
        self.kept = self.kept._replace(owner=1 - self.kept.owner, hand_overs=self.kept.hand_overs - 1)
        self._bind(bases)

    def _take_over(self) -> None:
        """Be the successor of an owner that was killed: go on from the inflight area."""
        rx, tx = (int(Running.record.ask(Operation("recover", queue))) for queue in (RX, TX))
        kept = self.kept
        known = kept.known + tuple(range(kept.begin, kept.begin + rx - len(kept.known)))
        self.kept = kept._replace(dead=False, known=known, begin=kept.fed)
        self._bind((rx, tx))

    def outcome(self) -> DeviceOutcome:
        kept = self.kept
        due = kept.known + tuple(range(kept.begin, self._total))
        return DeviceOutcome(kept.got + self._port.out(), kept.fed - self._port.waiting(), due)

    def killed(self, node: Node) -> Node | None:
        kept: DeviceKept = node.kept
        if not kept.kills:
            return None
        self.clear()
        self._port.reset()
        seen: DeviceOutcome = node.outcome
        self.kept = kept._replace(kills=kept.kills - 1, dead=True, fed=seen.taken, got=seen.got)
        return self.first()


class ReaderKept(NamedTuple):
    rounds: int
    copies: tuple[tuple[int, bytes], ...]  # page, and its bytes


class Reader(Actor):
    """The source of a migration: it takes the dirty log, then copies the pages that it names."""

    name = "reader"

    def __init__(self, layout: Layout, rounds: int, image: bytes) -> None:
        super().__init__()
        self._layout = layout
        self._pages = layout.pages()
        self._found = np.zeros(64, np.int64)
        self.kept = ReaderKept(rounds, tuple((page, self._bytes(page, image)) for page in self._pages))

    def _bytes(self, page: int, image: bytes) -> bytes:
        return b"".join(image[at : at + length] for at, length in self._pages[page])

    def turn(self) -> bool:
        copies = dict(self.kept.copies)
        n, _ = take_dirty(self._layout.log, 0, self._found)
        for page in self._found[:n].tolist():
            ranges = self._pages[page]
            data = np.zeros(sum(length for _, length in ranges), np.uint8)
            done = 0
            for at, length in ranges:
                copy(data, done, self._layout.memory, at, length)
                done += length
            copies[page] = data.tobytes()
        rounds = self.kept.rounds - 1
        self.kept = ReaderKept(rounds, tuple(copies.items()))
        return bool(rounds)

    def outcome(self) -> dict[int, bytes]:
        """Return the copies: page to bytes."""
        return dict(self.kept.copies)
