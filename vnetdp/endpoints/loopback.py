"""Endpoints that live wholly in kernels: null, echo, macswap, reflect and generate."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import numpy as np

from vnetdp_kernels import rows as r
from vnetdp_kernels import spec

from ..errors import EndpointError
from .base import Endpoint

_MAX_COUNT = 1 << 62


class NullEndpoint(Endpoint):
    """Takes every frame and gives none."""

    kind = r.KIND_NULL
    name = "null"


class EchoEndpoint(Endpoint):
    """Sends every frame back unchanged, copied once from ring to ring."""

    kind = r.KIND_ECHO
    name = "echo"


class MacswapEndpoint(Endpoint):
    """Sends every frame back with its Ethernet addresses exchanged."""

    kind = r.KIND_MACSWAP
    name = "macswap"


class ReflectEndpoint(Endpoint):
    """A host that has every IPv4 address: answers ARP requests and ICMP echo, and drops all other frames."""

    kind = r.KIND_REFLECT
    name = "reflect"


@dataclass(frozen=True)
class Ledger:
    """The fate of numbered frames, each a count. `a + b` adds two ledgers."""

    sent: int = 0
    """Frames that the sender made."""
    delivered: int = 0
    """Frames that arrived, each number counted once."""
    lost: int = 0
    """`sent` less `delivered`: frames in flight count as lost."""
    duplicated: int = 0
    """Frames that arrived again."""
    reordered: int = 0
    """Frames that arrived after one of a higher number."""
    corrupted: int = 0
    """Frames that arrived with other bytes than were sent."""

    @property
    def clean(self) -> bool:
        """True if no frame was lost, duplicated, reordered or corrupted."""
        return not (self.lost or self.duplicated or self.reordered or self.corrupted)

    def as_dict(self) -> dict[str, int]:
        """Return the counts by name."""
        return asdict(self)

    def __add__(self, other: Ledger) -> Ledger:
        mine, theirs = asdict(self), asdict(other)
        return Ledger(**{key: mine[key] + theirs[key] for key in mine})

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {what}" for what, count in asdict(self).items())


@dataclass(frozen=True)
class FrameNumbers:
    """The numbers of the frames that a `Ledger` counts: (queue, number) of the first hundred of each queue, in order."""

    lost: tuple[tuple[int, int], ...] = ()
    """Frames that have not arrived."""
    duplicated: tuple[tuple[int, int], ...] = ()
    """Frames that arrived again."""
    reordered: tuple[tuple[int, int], ...] = ()
    """Frames that arrived after one of a higher number."""
    corrupted: tuple[tuple[int, int], ...] = ()
    """Numbers that were due when a frame came whose bytes, and so its number, can't be trusted."""


class GenerateEndpoint(Endpoint):
    """Sends numbered frames, and checks those that arrive from the other side: see `Ledger`. Queue i sends flow i.

    - `size`: bytes of a frame, 30 to 65550, Ethernet header included, FCS and virtio_net_hdr not.
    - `rate`: frames a second and queue, 1e-9 to 1e9; 0 sends as fast as the ring takes them.
    - `count`: frames a queue; -1 sends without end.
    - `block_fd`: internal.
    """

    kind = r.KIND_GENERATE
    name = "generate"

    def __init__(
        self,
        queues: int = 1,
        size: int = 64,
        rate: float = 0.0,
        count: int = -1,
        block_fd: int | None = None,
    ) -> None:
        self.check(size, rate, count)
        super().__init__(queues, block_fd)
        self.count = count
        if block_fd is None:
            self.rows[:, r.EP_SIZE] = size
            self.rows[:, r.EP_INTERVAL_NS] = round(1e9 / rate) if rate else 0
            self.rows[:, r.EP_LIMIT] = count
            self.rows[:, r.EP_CHECK] = 1

    @staticmethod
    def check(size: int = 64, rate: float = 0.0, count: int = -1) -> None:
        """Raise EndpointError unless a generator can have these arguments."""
        if not r.LEDGER_MIN_LEN <= size <= spec.MAX_FRAME_LEN:
            raise EndpointError(f"generate: size {size} is not between {r.LEDGER_MIN_LEN} and {spec.MAX_FRAME_LEN}")
        if rate and not 1e-9 <= rate <= 1e9:
            raise EndpointError(f"generate: rate {rate} is not between 1e-9 and 1e9 frames a second, nor 0")
        if not -1 <= count <= _MAX_COUNT:
            raise EndpointError(f"generate: count {count} is not between 0 and 2^62")

    @property
    def longest_frame(self) -> int:
        return int(self.rows[:, r.EP_SIZE].max())

    @property
    def sent(self) -> int:
        """The number of frames made so far, on all queues, those in flight included."""
        return int(self.rows[:, r.EP_SEQ].sum())

    def stop(self) -> None:
        """Make no more frames. Those in flight still arrive.

        A loop that is just making a frame still makes it, and `sent` grows once more: to have the last number, stop within
        `paused()` of what runs the rings on this side, `NetDevice` or `Driver`.
        """
        self.rows[:, r.EP_LIMIT] = self.rows[:, r.EP_SEQ]

    @property
    def finished(self) -> bool:
        limit = self.rows[:, r.EP_LIMIT]
        return bool(((limit >= 0) & (self.rows[:, r.EP_SEQ] >= limit)).all())

    def ledger_against(self, sender: GenerateEndpoint) -> Ledger:
        """Return the fate of the frames of *sender*, the generator at the other side of the rings, as seen here."""
        total = self.ledger[:, : r.LEDGER_COUNTS].sum(axis=0)
        delivered, sent = int(total[r.LEDGER_DELIVERED]), sender.sent
        return Ledger(
            sent=sent,
            delivered=delivered,
            lost=sent - delivered,
            duplicated=int(total[r.LEDGER_DUPLICATED]),
            reordered=int(total[r.LEDGER_REORDERED]),
            corrupted=int(total[r.LEDGER_CORRUPTED]),
        )

    def numbers_against(self, sender: GenerateEndpoint) -> FrameNumbers:
        """Return the numbers of the frames that `ledger_against` counts; frames in flight are among those lost.

        The last 65536 numbers of a queue are told from one another, and of those before them the first hundred that were
        missing.
        """
        queues = range(min(self.queues, sender.queues))
        return FrameNumbers(
            lost=tuple((queue, number) for queue in queues for number in self._missing(queue, sender)),
            duplicated=self._noted(r.LEDGER_NOTE_DUPLICATED),
            reordered=self._noted(r.LEDGER_NOTE_REORDERED),
            corrupted=self._noted(r.LEDGER_NOTE_CORRUPTED),
        )

    def _notes(self, queue: int, notes: int) -> list[int]:
        row: list[int] = self.ledger[queue].tolist()
        return sorted(row[notes + 1 : notes + 1 + row[notes]])

    def _noted(self, notes: int) -> tuple[tuple[int, int], ...]:
        return tuple((queue, number) for queue in range(self.queues) for number in self._notes(queue, notes))

    def _missing(self, queue: int, sender: GenerateEndpoint) -> list[int]:
        """Return the first hundred numbers of flow *queue* that have not arrived."""
        following, sent = int(self.ledger[queue, r.LEDGER_NEXT]), int(sender.rows[queue, r.EP_SEQ])
        lowest = max(0, following - r.LEDGER_WINDOW)
        recent = np.arange(lowest, following - 1)  # the last one has been seen
        recent = recent[self.windows[queue][recent % r.LEDGER_WINDOW] == 0]
        before = [number for number in self._notes(queue, r.LEDGER_NOTE_MISSING) if number < lowest]
        first: list[int] = (before + recent[: r.LEDGER_NOTED].tolist())[: r.LEDGER_NOTED]
        return [*first, *range(following, min(sent, following + r.LEDGER_NOTED - len(first)))]


def drained(one: GenerateEndpoint, other: GenerateEndpoint, quiet_s: float = 5.0) -> Ledger:
    """Stop both generators, wait until their frames have arrived, and return the sum of both ledgers.

    The wait ends once no frame has arrived for *quiet_s* seconds.
    """
    one.stop()
    other.stop()
    delivered, since = -1, 0.0
    while True:
        ledger = one.ledger_against(other) + other.ledger_against(one)
        now = time.monotonic()
        if ledger.delivered != delivered:
            delivered, since = ledger.delivered, now
        if ledger.lost <= 0 or now - since > quiet_s:
            return ledger
        time.sleep(0.01)
