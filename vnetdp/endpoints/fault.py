"""FaultEndpoint: another endpoint, behind a wire that loses, damages, delays and refuses frames as told.

The faults to inject (`FrameFaults`) and each way's frames held back (`_Way`) are kept apart. Each fault of each way
of each queue has a random sequence of its own, so the n-th frame meets the same fate however frames are batched.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import select
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vnetdp_kernels import rows as r
from vnetdp_kernels import spec
from vnetdp_kernels.rows import Frame
from vnetdp_kernels.wire import answer, port

from ..errors import EndpointError
from ..shared.memory import Bytes, Words
from ..system import limits
from .base import Endpoint

_LINE = 4096  # frames that a queue holds back each way; those beyond stay where they are
_RETRY_NS = 1_000_000  # after EAGAIN
_LOST_NS = 20_000_000  # between two looks at a socket without a connection
_NOW = 1  # as a time on the clock: long past
_NEVER = 0

_CLOCK_MONOTONIC = 1
_TFD_NONBLOCK_CLOEXEC = os.O_NONBLOCK | os.O_CLOEXEC
_TFD_TIMER_ABSTIME = 1
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class FrameFaults:
    """The faults to inject: probabilities for each frame each way; eio and eagain only on the way to the wire.

    drop: it vanishes. corrupt: one bit of it is flipped. eio: sending fails, the frame is lost, and an error
    is counted. eagain: sending is put off, and the frames behind wait too. delay_ms: each frame is held back.
    """

    drop: float = 0.0
    corrupt: float = 0.0
    eio: float = 0.0
    eagain: float = 0.0
    delay_ms: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("drop", "corrupt", "eio", "eagain"):
            chance = getattr(self, name)
            if not 0 <= chance <= 1:
                raise EndpointError(f"fault: {name} {chance} is not a probability between 0 and 1")
        if not 0 <= self.delay_ms <= 60_000:
            raise EndpointError(f"fault: delay_ms {self.delay_ms} is not between 0 and 60000")


class _Way:
    """One way of one queue: the frames held back, oldest first, with the time each is due."""

    def __init__(self, faults: FrameFaults, queue: int, way: str, struck: Counter[str]) -> None:
        self.waiting: deque[tuple[int, bytes]] = deque()
        self._faults = faults
        self._struck = struck
        self._random = {
            name: random.Random(f"{faults.seed} {queue} {way} {name}")
            for name in ("drop", "corrupt", "eio", "eagain", "bit")
        }

    def strikes(self, fault: str) -> bool:
        """Decide whether a fault strikes now, and count it."""
        struck: bool = self._random[fault].random() < getattr(self._faults, fault)
        self._struck[fault] += struck
        return struck

    def admit(self, frame: bytes) -> None:
        """Take a frame in, unless it is dropped."""
        if self.strikes("drop"):
            return
        if self.strikes("corrupt"):
            bit = self._random["bit"].randrange(8 * spec.NET_HDR_LEN, 8 * len(frame))
            damaged = bytearray(frame)
            damaged[bit // 8] ^= 1 << bit % 8
            frame = bytes(damaged)
        due = _NOW
        if self._faults.delay_ms:
            self._struck["delay"] += 1
            due = time.monotonic_ns() + round(self._faults.delay_ms * 1e6)
        self.waiting.append((due, frame))

    def due(self) -> bytes | None:
        """Return the oldest frame if its time has come; it stays."""
        if self.waiting and self.waiting[0][0] <= time.monotonic_ns():
            return self.waiting[0][1]
        return None

    @property
    def full(self) -> bool:
        return len(self.waiting) >= _LINE


class FaultEndpoint(Endpoint):
    """Another endpoint, behind a wire that loses, damages, delays and refuses frames. It closes *inner* with itself.

    - `drop`, `corrupt`: the probability, 0 to 1, that a frame, either way, is lost, or has one bit flipped.
    - `delay_ms`: how long each frame, either way, is held back, 0 to 60000 ms.
    - `eio`: the probability that sending a frame to the wire fails: it is lost, and an error is counted.
    - `eagain`: the probability that sending is put off for 1 ms; frames behind it wait, too.
    - `seed`: the same seed strikes the same frames, however they are batched.

    Frames that echo, macswap or reflect send back meet the faults twice.
    """

    def __init__(
        self,
        inner: Endpoint,
        drop: float = 0.0,
        corrupt: float = 0.0,
        delay_ms: float = 0.0,
        eio: float = 0.0,
        eagain: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.faults = FrameFaults(drop, corrupt, eio, eagain, delay_ms, seed)
        with ExitStack() as made:
            super().__init__(inner.queues)
            made.callback(super().close)
            self._alarms: list[_Alarm] = []
            for fd in inner.fds:
                self._alarms.append(_Alarm(int(fd), inner.innermost.kind == r.KIND_STREAM))
                made.callback(self._alarms[-1].close)
            made.pop_all()
        self.inner = inner
        self.name = f"fault:{inner.name}"
        self.vnet_hdr = inner.vnet_hdr
        self.struck: Counter[str] = Counter(dict.fromkeys(("drop", "corrupt", "delay", "eio", "eagain"), 0))
        """How often each fault struck, by name."""
        self._to_wire = [_Way(self.faults, q, "to wire", self.struck) for q in range(inner.queues)]
        self._from_wire = [_Way(self.faults, q, "from wire", self.struck) for q in range(inner.queues)]
        self._frame: Bytes = np.zeros(r.FRAME_SLOT, np.uint8)
        self._iov: Words = np.zeros((1, r.IOV_SLOTS), np.int64)
        self._words: Words = np.zeros(port.SCRATCH_WORDS, np.int64)
        self._sources = [inner.source(queue) for queue in range(inner.queues)]
        self._sinks = [inner.sink(queue) for queue in range(inner.queues)]
        self._ended = False
        self.fds[:] = np.array([alarm.fileno() for alarm in self._alarms])

    # --- frames, to the inner endpoint and from it ---

    def service(self) -> None:
        with self._python_side:
            for queue in range(self.queues):
                self._send_on(queue)
            super().service()
            for queue, alarm in enumerate(self._alarms):
                inner = self.inner.rows[queue]
                if not inner[r.EP_LOST] and alarm.broke:
                    inner[r.EP_GONE] = 1
                alarm.set(self._next_ns(queue), not self._from_wire[queue].full and not inner[r.EP_GONE])
            waiting = any(way.waiting for way in (*self._to_wire, *self._from_wire))
            self._ended = self.inner.finished and not waiting and not self.rows[:, r.EP_COUNT].any()

    def takes_frames(self, queue: int) -> bool:
        return not self._to_wire[queue].full

    def transmit_frames(self, queue: int, frames: Sequence[bytes]) -> None:
        for frame in frames:
            self._to_wire[queue].admit(frame)
        self._send_on(queue)

    def receive_frames(self, queue: int, limit: int) -> Sequence[bytes]:
        self.inner.service()
        way = self._from_wire[queue]
        room = limit
        while room and not way.full and (taken := self._take(queue)):
            way.admit(taken)
            room -= 1
        frames: list[bytes] = []
        while len(frames) < limit and (frame := way.due()) is not None:
            way.waiting.popleft()
            frames.append(frame)
        return frames

    def _send_on(self, queue: int) -> None:
        """Give the inner endpoint the frames that are due, as far as it takes them."""
        way = self._to_wire[queue]
        while (frame := way.due()) is not None:
            if way.strikes("eagain"):
                break
            if way.strikes("eio"):
                self._failed(queue, 1, OSError(errno.EIO, os.strerror(errno.EIO)))
            elif not self._give(queue, frame):
                self.inner.service()
                if not self._give(queue, frame):
                    break
            way.waiting.popleft()
        self.inner.service()

    def _give(self, queue: int, frame: bytes) -> bool:
        """Send one frame as the loop would; False if the inner endpoint takes none now."""
        inner = self.inner
        self._frame[: len(frame)] = np.frombuffer(frame, np.uint8)
        if inner.answers:
            if self._from_wire[queue].full:
                return False
            self._loop_back(queue, len(frame))
            return True
        frame_len = len(frame) - spec.NET_HDR_LEN
        self._iov[0] = spec.NET_HDR_LEN, frame_len, 0
        whole = Frame(self._frame, self._iov, 0, 1, frame_len)
        return int(port.emit(whole, self._frame, self._sinks[queue], self._words)) != r.E_BLOCKED

    def _take(self, queue: int) -> bytes:
        """Return one frame of the inner endpoint's, empty if there is none now."""
        length = port.produce(self._sources[queue], self._frame, 0, r.FRAME_SLOT, time.monotonic_ns())
        return self._frame[:length].tobytes()

    def _loop_back(self, queue: int, length: int) -> None:
        """Have echo, macswap or reflect turn the frame at hand around."""
        row = self.inner.rows[queue]
        row[r.EP_TO_WIRE] += 1
        row[r.EP_BYTES_TO_WIRE] += length - spec.NET_HDR_LEN
        if not answer.answer(self.inner.kind, self._frame, spec.NET_HDR_LEN, length - spec.NET_HDR_LEN):
            return
        row[r.EP_FROM_WIRE] += 1
        row[r.EP_BYTES_FROM_WIRE] += length - spec.NET_HDR_LEN
        self._from_wire[queue].admit(self._frame[:length].tobytes())

    def _next_ns(self, queue: int) -> int:
        """Return when (CLOCK_MONOTONIC) there is work that no descriptor tells of; _NEVER if none will be."""
        times = []
        if self._to_wire[queue].waiting:
            due = self._to_wire[queue].waiting[0][0]
            now = time.monotonic_ns()
            times.append(due if due > now else now + _RETRY_NS)
        if self._from_wire[queue].waiting:
            times.append(self._from_wire[queue].waiting[0][0])
        if self.rows[queue, r.EP_COUNT] and self.inner.finished:
            times.append(_NOW)  # to see the last frames taken
        row = self.inner.rows[queue]
        if row[r.EP_LOST]:
            times.append(time.monotonic_ns() + _LOST_NS)
        if (
            self.inner.kind == r.KIND_GENERATE
            and not self._from_wire[queue].full
            and not 0 <= row[r.EP_LIMIT] <= row[r.EP_SEQ]
        ):
            times.append(int(row[r.EP_NEXT_NS]) or _NOW)
        return min(times, default=_NEVER)

    # --- calls by the device ---

    def set_offloads(self, mask: int) -> None:
        self.inner.set_offloads(mask)

    def set_queue_active(self, queue: int, active: bool) -> None:
        self.inner.set_queue_active(queue, active)
        self._alarms[queue].ring()  # whether it is to be watched is looked at in `service`

    @property
    def files(self) -> Sequence[Path]:
        return self.inner.files

    def open_sink(self, others: Sequence[Path] = ()) -> None:
        self.inner.open_sink(others)

    @property
    def mtu(self) -> int | None:
        return self.inner.mtu

    def set_mtu(self, mtu: int) -> None:
        self.inner.set_mtu(mtu)

    @property
    def longest_frame(self) -> int:
        return self.inner.longest_frame

    @property
    def gives(self) -> bool:
        return self.inner.gives

    @property
    def idle(self) -> bool:
        waiting = any(way.waiting for way in (*self._to_wire, *self._from_wire))
        return not waiting and self.inner.idle and super().idle

    @property
    def innermost(self) -> Endpoint:
        return self.inner.innermost

    @property
    def gone(self) -> bool:
        return self.inner.gone

    @property
    def failures(self) -> Sequence[str]:
        return self.inner.failures

    @property
    def finished(self) -> bool:
        # Seen in `service`, where no frame is between two places.
        return self._ended and not self.rows[:, r.EP_PENDING].any()

    def counters(self) -> dict[str, int]:
        """Return the counts of an endpoint, with the drops of *inner*, and `fault_NAME`: how often each fault struck."""
        own, inner = super().counters(), self.inner.counters()
        lost = {key: n + inner[key] for key, n in own.items() if key.startswith("dropped_") or key == "errors"}
        return own | lost | {f"fault_{name}": n for name, n in self.struck.items()}

    def close(self) -> None:
        for alarm in self._alarms:
            alarm.close()
        self._sources.clear()  # their descriptors may soon be another file's
        self._sinks.clear()
        self.inner.close()
        super().close()


class _Alarm:
    """A descriptor that is readable when another one (-1 = none) is, or from a given time on."""

    def __init__(self, fd: int, renewed: bool = False) -> None:
        """*renewed*: other files are put behind the descriptor, of which each has to be registered."""
        # os.timerfd_create exists from Python 3.13 on only.
        self._timer = _libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_NONBLOCK_CLOEXEC)
        if self._timer < 0:
            code = ctypes.get_errno()
            with limits.giving("a timer"):
                raise OSError(code, os.strerror(code))
        self._fd = fd
        self._watched = fd >= 0
        self._renewed = renewed
        self._at = _NEVER
        with ExitStack() as made:
            made.callback(os.close, self._timer)
            self._poll = made.enter_context(limits.epoll())
            self._poll.register(self._timer, select.EPOLLIN)
            if fd >= 0:
                self._poll.register(fd, select.EPOLLIN)
            made.pop_all()

    def fileno(self) -> int:
        return self._poll.fileno()

    def set(self, at_ns: int, watch: bool) -> None:
        """Ring at *at_ns* (CLOCK_MONOTONIC; _NEVER = not); if *watch*, also when the other is readable."""
        if (watch != self._watched or (watch and self._renewed)) and self._fd >= 0:
            with suppress(FileExistsError, FileNotFoundError):  # of a file that is there since, or no more
                if watch:
                    self._poll.register(self._fd, select.EPOLLIN)
                else:
                    self._poll.unregister(self._fd)  # an error would be reported with any events asked for
            self._watched = watch
        if at_ns != self._at:
            # struct itimerspec: interval, value. Setting it also makes the descriptor unreadable until then.
            when = (ctypes.c_long * 4)(0, 0, *divmod(at_ns, 1_000_000_000))
            _libc.timerfd_settime(self._timer, _TFD_TIMER_ABSTIME, when, None)
            self._at = at_ns

    def ring(self) -> None:
        """Ring now."""
        self.set(_NOW, self._watched)

    @property
    def broke(self) -> bool:
        """True if the other descriptor reports an error, as that of a TAP that was deleted does for good."""
        return any(events & (select.EPOLLERR | select.EPOLLHUP) for _, events in self._poll.poll(0))

    def close(self) -> None:
        self._poll.close()
        fd, self._timer = self._timer, -1
        if fd >= 0:
            os.close(fd)
