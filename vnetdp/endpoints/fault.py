"""FaultEndpoint: another endpoint, behind a wire that loses, damages, doubles, delays and refuses frames as told.

Kernels serve it (`wire/faulty.py`): the rows of the endpoint behind, its ledger and its frame slots move into the block of
the wire. The faults to inject (`FrameFaults`) are words of that block, so that they can change while frames pass.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from vnetdp_kernels import rows as r
from vnetdp_kernels.wire.faulty import FROM_WIRE, TO_WIRE

from ..errors import EndpointError
from ..shared.memory import Bytes, Words
from .base import Endpoint
from .clock import Clock

_log = logging.getLogger("vnetdp.endpoints")

_STRUCK: Final = {
    "drop": r.CHANCE_DROP,
    "corrupt": r.CHANCE_CORRUPT,
    "duplicate": r.CHANCE_DUPLICATE,
    "reorder": r.CHANCE_REORDER,
    "eio": r.CHANCE_EIO,
    "eagain": r.CHANCE_EAGAIN,
    "burst": r.STRUCK_BURST,
    "delay": r.STRUCK_DELAY,
    "rate": r.STRUCK_RATE,
}
_CHANCES: Final = ("drop", "corrupt", "duplicate", "reorder", "eio", "eagain")  # by CHANCE_…
_WAYS: Final = {TO_WIRE: "to wire", FROM_WIRE: "from wire"}
_MAX_MS: Final = 60_000
_SEED_BYTES: Final = 4


@dataclass(frozen=True)
class FrameFaults:
    """The faults to inject, for each frame each way; eio and eagain only on the way to the wire.

    drop: it vanishes. corrupt: one bit of it is flipped. eio: sending fails, the frame is lost, and an error
    is counted. eagain: sending is put off, and the frames behind wait too. delay_ms: each frame is held back, jitter_ms:
    so much longer or shorter. duplicate: it comes twice. reorder: the next one overtakes it. burst: the Gilbert–Elliott
    model. rate: bits a second. at: the one frame that is struck.
    """

    drop: float = 0.0
    corrupt: float = 0.0
    eio: float = 0.0
    eagain: float = 0.0
    delay_ms: float = 0.0
    seed: int = 0
    duplicate: float = 0.0
    reorder: float = 0.0
    jitter_ms: float = 0.0
    rate: float = 0.0
    burst: tuple[float, ...] = ()
    at: int = 0

    def __post_init__(self) -> None:
        for name in _CHANCES:
            chance = getattr(self, name)
            if not 0 <= chance <= 1:
                raise EndpointError(f"fault: {name} {chance} is not a probability between 0 and 1")
        for name in ("delay_ms", "jitter_ms"):
            if not 0 <= getattr(self, name) <= _MAX_MS:
                raise EndpointError(f"fault: {name} {getattr(self, name)} is not between 0 and {_MAX_MS}")
        if self.rate and not 1e3 <= self.rate <= 1e12:
            raise EndpointError(f"fault: rate {self.rate} is not between 1e3 and 1e12 bits a second, nor 0")
        if self.burst and not (2 <= len(self.burst) <= 4 and all(0 <= chance <= 1 for chance in self.burst)):
            shown = "/".join(f"{chance:g}" for chance in self.burst)
            raise EndpointError(
                f"fault: burst {shown} is not 2 to 4 probabilities between 0 and 1, as in burst=0.01/0.3"
            )
        if not 0 <= self.at < 1 << 62:
            raise EndpointError(f"fault: at {self.at} is not between 1, the first frame, and 2^62, nor 0")

    @property
    def chances(self) -> list[int]:
        """The probabilities in the order of CHANCE_…, in parts of 2^32. A burst loses all in the bad state, unless told."""
        told = len(self.burst)
        burst = (*self.burst, *(0.0, 0.0, 1.0, 0.0)[told:]) if told else (0.0,) * 4
        return [round(chance * 2**32) for chance in (*(getattr(self, name) for name in _CHANCES), *burst)]


class FaultEndpoint(Endpoint):
    """Another endpoint, behind a wire that loses, damages, doubles, delays and refuses frames. It closes *inner* itself.

    - `drop`, `corrupt`: the probability, 0 to 1, that a frame, either way, is lost, or has one bit flipped.
    - `delay_ms`: how long each frame, either way, is held back, 0 to 60000 ms.
    - `eio`: the probability that sending a frame to the wire fails: it is lost, and an error is counted.
    - `eagain`: the probability that sending is put off for 1 ms; frames behind it wait, too.
    - `seed`: the same seed strikes the same frames, however they are batched.
    - `duplicate`: the probability that a frame, either way, comes twice, one right after the other.
    - `reorder`: the probability that the next frame that is not lost overtakes a frame; it waits for that 1 s at most.
    - `jitter_ms`: each frame is held back up to so much longer or shorter, evenly distributed, 0 to 60000 ms. Frames keep
      their order.
    - `rate`: bits of frames a second, each way of each queue, 1e3 to 1e12; 0 is no limit. The frames of 10 ms are on the
      wire, further ones wait before it.
    - `burst`: losses in bursts (Gilbert–Elliott, as netem's `gemodel`): the probabilities of going from the good state to
      the bad one and back, and, if given, of losing a frame in the bad state (else 1), and in the good one (else 0).
    - `at`: faults strike frame number *at* alone, of each way of each queue, the first is 1; 0 strikes any. It leaves delay,
      jitter and rate alone.

    Frames that echo, macswap or reflect send back meet the faults twice, those of the device's own (`send_to_wire`) none.
    EndpointError if a value is outside its range, a device has *inner* already, or it is a socket (`StreamEndpoint`,
    `DgramEndpoint`).
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
        *,
        duplicate: float = 0.0,
        reorder: float = 0.0,
        jitter_ms: float = 0.0,
        rate: float = 0.0,
        burst: tuple[float, ...] = (),
        at: int = 0,
    ) -> None:
        faults = FrameFaults(
            drop, corrupt, eio, eagain, delay_ms, seed, duplicate, reorder, jitter_ms, rate, tuple(burst), at
        )
        if inner.polled_by:
            raise EndpointError(f"fault: {inner.name} is in use: put the faults around it before a device has it")
        if inner.innermost.kind in (r.KIND_STREAM, r.KIND_DGRAM):
            raise EndpointError(
                f"fault: {inner.name} is a socket: put the faults around the endpoint at the other side"
            )
        self.kind = r.KIND_FAULT_PYTHON if inner.kind >= r.KIND_PYTHON else r.KIND_FAULT
        self.lines = inner.lines + 1
        super().__init__(inner.queues)
        self.inner = inner
        self.name = f"fault:{inner.name}"
        self.vnet_hdr = inner.vnet_hdr
        self.fds[:] = inner.fds
        self._move_inner(self.ledger, self.windows)
        self.faults = faults
        """The faults that are injected now; `set` changes them."""
        self._tell_kernels()

    def lie_in(self, rows: Words, lengths: Words, frames: Bytes, ledger: Words, windows: Bytes) -> None:
        rows[:] = self.rows
        self.rows, self.in_lengths, self.in_frames = rows, lengths, frames
        self._move_inner(ledger, windows)

    def _move_inner(self, ledger: Words, windows: Bytes) -> None:
        self.inner.lie_in(
            self.rows[:, r.STAGE_SLOTS :],
            self.in_lengths[:, 2 * r.LINE_TABLE :],
            self.in_frames[:, 2 * r.LINE_BYTES :],
            ledger,
            windows,
        )

    # --- the faults ---

    def set(self, **changes: Any) -> None:
        """Inject other faults from the next frame on: `set(drop=0.5, delay_ms=0)`; those not named stay as they are.

        It may be called while frames pass, in any thread. Frames on the wire come when they were due, and frames behind
        them not before. EndpointError, and nothing is changed, if a value is outside its range.
        """
        self.faults = replace(self.faults, **changes)
        self._tell_kernels()

    def _tell_kernels(self) -> None:
        faults = self.faults
        for way, name in _WAYS.items():
            lines = self._lines(way)
            for queue, line in enumerate(lines):
                named = f"{faults.seed} {queue} {name}".encode()
                line[r.LINE_KEY] = int.from_bytes(hashlib.blake2b(named, digest_size=_SEED_BYTES).digest(), "little")
            chances = np.array(faults.chances)
            if way == FROM_WIRE:
                chances[[r.CHANCE_EIO, r.CHANCE_EAGAIN]] = 0
            lines[:, r.LINE_CHANCE : r.LINE_CHANCE + chances.size] = chances
            lines[:, r.LINE_AT] = faults.at
            lines[:, r.LINE_DELAY_NS] = round(faults.delay_ms * 1e6)
            lines[:, r.LINE_JITTER_NS] = round(faults.jitter_ms * 1e6)
            if (lines[:, r.LINE_RATE] != round(faults.rate)).any():
                lines[:, r.LINE_FREE_NS] = 0
                lines[:, r.LINE_RATE] = round(faults.rate)

    def _lines(self, way: int) -> Words:
        """Return the lines of one way, int64[queues, LINE_SLOTS]."""
        at = r.EP_SLOTS + way * r.LINE_SLOTS
        return self.rows[:, at : at + r.LINE_SLOTS]

    @property
    def struck(self) -> Counter[str]:
        """How often each fault struck, by name."""
        lines = np.concatenate([self._lines(way) for way in _WAYS])
        total = lines[:, r.LINE_STRUCK : r.LINE_TOLD_NS].sum(axis=0)
        return Counter({name: int(total[at]) for name, at in _STRUCK.items()})

    @property
    def held(self) -> int:
        """The number of frames on the wire, both ways."""
        held = 0
        for way in _WAYS:
            lines = self._lines(way)
            aside = lines[:, r.LINE_ASIDE_COPIES] * (lines[:, r.LINE_ASIDE_LEN] > 0)
            held += int((lines[:, r.LINE_HELD] + aside).sum())
        return held

    # --- the clock ---

    def take_clock(self, clock: Clock) -> None:
        self.inner.take_clock(clock)
        super().take_clock(clock)

    def tell_time(self, now_ns: int) -> None:
        super().tell_time(now_ns)
        self.inner.tell_time(now_ns)
        for way in _WAYS:
            self._lines(way)[:, r.LINE_TOLD_NS] = now_ns + 1

    # --- frames ---

    def service(self) -> int:
        done = self.inner.service()
        self.rows[:, r.EP_BLOCKED] = self.inner.rows[:, r.EP_BLOCKED]
        self._tell_errors()
        return done

    def _tell_errors(self) -> None:
        struck = self.struck["eio"]
        if struck and not self.errors:
            error = OSError(errno.EIO, os.strerror(errno.EIO))
            _log.warning("%s: OSError: %s (logged once; counted from now on)", self.name, error)
            self.last_error = error
        self.errors = struck
        self.last_error = self.inner.last_error or self.last_error

    def open_wakes(self) -> None:
        self.inner.open_wakes()
        self.fds[:] = self.inner.fds

    def wake(self, queue: int = 0) -> None:
        self.inner.wake(queue)

    def send_to_wire(self, frame: bytes) -> None:
        self.inner.send_to_wire(frame)

    # --- calls by the device ---

    def set_offloads(self, mask: int) -> None:
        self.inner.set_offloads(mask)

    def set_queue_active(self, queue: int, active: bool) -> None:
        self.inner.set_queue_active(queue, active)
        self.rows[queue, r.EP_GONE] = self.inner.rows[queue, r.EP_GONE]

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
        return not self.held and self.inner.idle and super().idle

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
        return self.inner.finished and not self.held and not self.rows[:, r.EP_PENDING].any()

    def counters(self) -> dict[str, int]:
        """Return the counts of an endpoint, with the drops of *inner*, and `fault_NAME`: how often each fault struck."""
        self._tell_errors()
        own, inner = super().counters(), self.inner.counters()
        lost = {key: n + inner[key] for key, n in own.items() if key.startswith("dropped_") or key == "errors"}
        return own | lost | {f"fault_{name}": n for name, n in self.struck.items()}

    def close(self) -> None:
        self.inner.close()
        super().close()
