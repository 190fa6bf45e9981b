"""The frames of a test: which were lost, doubled, late or corrupted, at which avail index, and under which owner.

The rings' kernels count, and note numbers of frames that are not as they should be; nothing is noted of a frame that is. Its
avail index follows from its number: each numbered frame takes one avail entry, so the log of owners, which has a number and
an index for each binding, tells both index and owner.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np

from vnetdp_kernels import rows as r

from ..endpoints.base import Endpoint
from ..endpoints.loopback import GenerateEndpoint, Ledger
from ..shared.memory import Words
from ..virtio.queue import RECEIVEQ, TRANSMITQ, queue_of

_REMEMBERED: Final = r.LEDGER_WINDOW - 4096  # numbers of the window, whose oldest may be overwritten during a look
_BATCH: Final = 64  # frames that an owner has taken at most, and not used yet
_WORDS: Final = {"lost": "was lost", "doubled": "came twice", "late": "came late", "corrupted": "came damaged"}


@dataclass(frozen=True)
class Fate:
    """A frame that was lost, doubled, late or corrupted."""

    kind: str
    """`lost`, `doubled`, `late` or `corrupted`."""
    number: int
    """The frame's number in its flow, from 0; for a corrupted frame, the number that was due."""
    pair: int
    """The queue pair."""
    way: str
    """The frame's way: `guest to wire`, `wire to guest`, or `guest to wire and back`."""
    index: int
    """The avail index that the frame took in its queue, 0 to 65535."""
    queue: int
    """The number of that queue: transmitq 2i + 1, or receiveq 2i for a frame from wire to guest."""
    owner: str
    """The owner of the rings that took this index."""
    noticed_s: float
    """When it was noticed, in seconds since the start."""

    def __str__(self) -> str:
        return (
            f"frame {self.number} of pair {self.pair} ({self.way}) {_WORDS[self.kind]}: avail index {self.index} of queue "
            f"{self.queue}, taken by {self.owner}; noticed at {self.noticed_s:.3f} s"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


@dataclass(frozen=True)
class Way:
    """One way of numbered frames, from *sender* to *receiver*, and the vring whose avail entries they take."""

    name: str
    sender: GenerateEndpoint
    receiver: GenerateEndpoint
    vring: int

    def sent(self, pair: int) -> int:
        return int(self.sender.rows[pair, r.EP_SEQ])

    def placed(self, pair: int) -> int:
        """Return the frames that left the sender: without one that waits in the device for a receive buffer."""
        return self.sent(pair) - bool(self.sender.rows[pair, r.EP_PENDING])

    def following(self, pair: int) -> int:
        return int(self.receiver.ledger[pair, r.LEDGER_NEXT])

    def delivered(self, pair: int) -> int:
        return int(self.receiver.ledger[pair, r.LEDGER_DELIVERED])


def ways_of(guest: GenerateEndpoint, endpoint: Endpoint, returns: bool) -> Sequence[Way]:
    """Return the ways of numbered frames between *guest* and *endpoint*. returns: it sends each frame back."""
    if isinstance(endpoint, GenerateEndpoint):
        return (Way("guest to wire", guest, endpoint, TRANSMITQ), Way("wire to guest", endpoint, guest, RECEIVEQ))
    if returns and endpoint.kind != r.KIND_NULL:
        return (Way("guest to wire and back", guest, guest, TRANSMITQ),)
    return ()


@dataclass(frozen=True)
class _Bound:
    """An owner that got a ring: with frame *number*, at avail index *index*."""

    number: int
    index: int
    owner: str


class OwnerLog:
    """Which owner a queue's frames had, by number."""

    def __init__(self) -> None:
        self._bound: dict[tuple[int, int], list[_Bound]] = {}

    def add(self, pair: int, vring: int, bound: _Bound) -> None:
        """Enter an owner. An entry for the same number, or a later one, gives way: that owner took nothing."""
        log = self._bound.setdefault((pair, vring), [])
        while log and log[-1].number >= bound.number:
            log.pop()
        log.append(bound)

    def last(self, pair: int, vring: int) -> _Bound | None:
        """Return the last entry."""
        log = self._bound.get((pair, vring))
        return log[-1] if log else None

    def of(self, pair: int, vring: int, number: int) -> tuple[str, int]:
        """Return the owner, and the avail index, of a frame."""
        log = self._bound.get((pair, vring), ())
        k = bisect_right(log, number, key=lambda bound: bound.number)
        bound = log[max(0, k - 1)] if log else _Bound(0, 0, "nobody")
        return bound.owner, (bound.index + number - bound.number) & 0xFFFF


class FrameLedger:
    """The frames of a `Vnet` so far: `counts`, and `fates`, the frames that were not as they should be.

    A process that is killed amid a batch may lose the frames that it had in hand, or have sent them already when they are
    sent once more; and frames in a back end's own endpoint stay there when the rings go elsewhere. Frames that were under
    way then are counted, and have no fate.
    """

    def __init__(self, ways: Sequence[Way], pairs: int, now_s: Callable[[], float]) -> None:
        self._ways = ways
        self._pairs = range(pairs)
        self._now_s = now_s
        self._log = OwnerLog()
        self._noticed: dict[tuple[str, int, int, int], float] = {}
        self._passed: dict[tuple[int, int], Words] = {}  # numbers seen to be missing, before the window lost them
        self._under_way: dict[tuple[int, int], list[tuple[int, int]]] = {}  # when a process died
        self._seen: list[int] = []
        self.running = True
        """False once frames that have not arrived count as lost. @private"""

    @property
    def counts(self) -> Ledger:
        """The counts of all frames, both ways; frames under way count as lost."""
        total = Ledger()
        for way in self._ways:
            total += way.receiver.ledger_against(way.sender)
        return total

    @property
    def summary(self) -> str:
        """The counts in a line, in which a frame under way is not lost. @private"""
        counts = self.counts
        missing = sum(int(way.receiver.ledger[:, r.LEDGER_MISSING].sum()) for way in self._ways)
        lost = missing if self.running else counts.lost
        return str(replace(counts, lost=lost)) + (f", {counts.lost - lost:,} under way" if self.running else "")

    @property
    def fates(self) -> list[Fate]:
        """Each frame that was lost, doubled, late or corrupted: the first hundred of each kind, pair and way.

        While traffic runs, a frame counts as lost once a later one has arrived; after `Vnet.settle`, if it has not arrived.
        """
        self.look()
        keys = sorted(self._noticed, key=lambda key: (self._noticed[key], key))
        damaged = {key[1:] for key in keys if key[0] == "corrupted"}  # not lost besides
        return [self._fate(*key) for key in keys if key[0] != "lost" or key[1:] not in damaged]

    def delivered(self, pair: int) -> list[int]:
        """Return the frames of *pair* that have arrived, one number a way."""
        return [way.delivered(pair) for way in self._ways]

    # --- for `Vnet` ---

    def look(self) -> None:
        """Notice what has changed since the last look. @private"""
        seen = [
            int(count)
            for way in self._ways
            for count in way.receiver.ledger[:, r.LEDGER_MISSING : r.LEDGER_CORRUPTED + 1].ravel()
        ]
        if seen == self._seen:
            return
        self._seen = seen
        for w, pair in self._flows():
            self._notice_all(w, pair, tail=False)

    def settled(self) -> bool:
        """Return whether every frame has arrived that is not excused. @private"""
        self.look()
        for w, way, pair in self._each():
            if way.sent(pair) != way.delivered(pair):
                missing, more = self._missing(w, pair, tail=True)
                if missing.size or more:
                    return False
        return True

    def close(self) -> list[str]:
        """Notice the frames that have not arrived as lost; return a line for frames whose numbers are not known. @private"""
        self.running = False
        lines = []
        for w, pair in self._flows():
            for kind, more in self._notice_all(w, pair, tail=True).items():
                if more:
                    lines.append(f"{more} more frames of pair {pair} ({self._ways[w].name}) {_WORDS[kind]}")
        return [text.replace(" was ", " were ") for text in lines]

    def owner_changed(
        self, owner: str, next_index: Callable[[int], int], died: bool = False, left_behind: bool = False
    ) -> None:
        """Enter *owner*, whose next avail index of a queue *next_index* tells.

        died: a process that had the rings did. left_behind: frames in the endpoint of the owner before stay there, as its
        endpoint is another one. To be called once the rings have left an owner, and once another has them, from the first
        on. @private
        """
        for w, way, pair in self._each():
            index = next_index(queue_of(pair, way.vring))
            placed = way.placed(pair)
            before = self._log.last(pair, way.vring)
            if before is None:
                first = 0
            elif way.vring == TRANSMITQ:  # its frames go on while nobody has the rings
                first = placed - ((before.index - before.number + placed - index) & 0xFFFF)
            else:
                first = before.number if before.index == index else placed
            if died or left_behind:
                in_hand = min(way.sent(pair), first + _BATCH) if way.vring == TRANSMITQ else way.sent(pair)
                low, high = min(way.following(pair), first), in_hand if died else first
                self._under_way.setdefault((w, pair), []).append((low, high))
            self._log.add(pair, way.vring, _Bound(first, index, owner))
        self.look()

    def _each(self) -> Iterator[tuple[int, Way, int]]:
        return ((w, way, pair) for w, way in enumerate(self._ways) for pair in self._pairs)

    def _flows(self) -> Iterator[tuple[int, int]]:
        return ((w, pair) for w, _, pair in self._each())

    def _fate(self, kind: str, w: int, pair: int, number: int) -> Fate:
        way = self._ways[w]
        owner, index = self._log.of(pair, way.vring, number)
        return Fate(
            kind, number, pair, way.name, index, queue_of(pair, way.vring), owner, self._noticed[kind, w, pair, number]
        )

    def _notice_all(self, w: int, pair: int, tail: bool) -> dict[str, int]:
        """Notice all frames of a flow that are not as they should be; return how many more there are, by kind."""
        way, more = self._ways[w], {}
        row = way.receiver.ledger[pair]
        missing, more["lost"] = self._missing(w, pair, tail)
        for key in [key for key in self._noticed if key[:3] == ("lost", w, pair)]:
            if key[3] not in missing:
                del self._noticed[key]  # it came after all, and is late
        self._notice("lost", w, pair, missing)
        for kind, notes, count in (
            ("doubled", r.LEDGER_NOTE_DUPLICATED, r.LEDGER_DUPLICATED),
            ("late", r.LEDGER_NOTE_REORDERED, r.LEDGER_REORDERED),
            ("corrupted", r.LEDGER_NOTE_CORRUPTED, r.LEDGER_CORRUPTED),
        ):
            noted = row[notes + 1 : notes + 1 + int(row[notes])].copy()
            windows = [] if kind == "corrupted" else self._under_way.get((w, pair), [])
            outside, more[kind] = _outside(noted, int(row[count]), windows)
            self._notice(kind, w, pair, outside)
        return more

    def _notice(self, kind: str, w: int, pair: int, numbers: Words) -> None:
        now = self._now_s()
        for number in numbers[: r.LEDGER_NOTED].tolist():
            self._noticed.setdefault((kind, w, pair, number), now)

    def _missing(self, w: int, pair: int, tail: bool) -> tuple[Words, int]:
        """Return the numbers of a flow that are missing, and how many are missing besides whose numbers are not known.

        tail: with those after the last that arrived. Those that were under way when a process died are left out.
        """
        way, key = self._ways[w], (w, pair)
        row = way.receiver.ledger[pair]
        following, sent = way.following(pair), way.sent(pair)
        lowest = max(0, following - _REMEMBERED)
        recent = np.arange(lowest, following - 1)  # the last one has been seen
        recent = recent[way.receiver.windows[pair][recent % r.LEDGER_WINDOW] == 0]
        noted = row[r.LEDGER_NOTE_MISSING + 1 :][: int(row[r.LEDGER_NOTE_MISSING])]
        before = np.union1d(noted, self._passed.get(key, noted))
        known = self._passed[key] = np.union1d(before[before < lowest], recent)
        total = int(row[r.LEDGER_MISSING])
        if tail:
            known = np.concatenate([known, np.arange(following, min(sent, following + r.LEDGER_WINDOW))])
            total += sent - following
        return _outside(known, total, self._under_way.get(key, []))


def _outside(known: Words, total: int, windows: Sequence[tuple[int, int]]) -> tuple[Words, int]:
    """Return the numbers of *known* outside all *windows*, and how many of *total* neither they nor the windows explain."""
    inside = np.zeros(known.size, bool)
    for low, high in windows:
        inside |= (known >= low) & (known < high)
    room = max(0, sum(high - low for low, high in windows) - int(inside.sum()))
    return known[~inside], max(0, total - known.size - room)
