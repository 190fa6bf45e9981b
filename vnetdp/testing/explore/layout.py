"""The image of a scenario: guest memory, the inflight area, the dirty log and the events, with a name for each place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import numpy as np

from vnetdp_kernels import rows as r
from vnetdp_kernels import spec
from vnetdp_kernels.platform.atomic import Words

from ...vhost_user.inflight import InflightArea
from .operations import Shared

BUFFER_LEN: Final = 32  # bytes of a buffer: a frame, and its virtio_net_hdr
LOG_LEN: Final = 8
_IN_FIRST_PAGE: Final = 2
QUEUES: Final = ("rx", "tx")
KICKS: Final = (0, 2)  # the event of each queue's kick
CALLS: Final = (1, 3)


class Place(NamedTuple):
    """A named part of the image; gpa: its guest address, -1 = it has none."""

    name: str
    at: int
    length: int
    gpa: int


class Layout:
    """Where in the image everything is, for rings of *num* descriptors.

    Each part has pages of its own in guest memory, and lies close to the others in the window. The first two buffers of
    a queue lie in one page, and the rest in the next.
    """

    def __init__(self, num: int, logs: bool, inflight: bool) -> None:
        self.num = num
        self.places: list[Place] = []
        self._place("event", len(KICKS) + len(CALLS))
        self._parts: dict[tuple[str, str], Place] = {}
        page = 1
        for queue in QUEUES:
            for part, length in (
                ("desc", spec.VIRTQ_DESC_SIZE * num),
                ("avail", spec.VIRTQ_RING_ENTRIES + 2 * num + 2),
                ("used", spec.VIRTQ_RING_ENTRIES + spec.VIRTQ_USED_ELEM_SIZE * num + 2),
            ):
                self._parts[queue, part] = self._place(f"{queue}.{part}", length, page * spec.PAGE_SIZE)
                page += 1
            gpa = (page + 1) * spec.PAGE_SIZE - _IN_FIRST_PAGE * BUFFER_LEN
            self._parts[queue, "buffer"] = self._place(f"{queue}.buffer", BUFFER_LEN * num, gpa)
            page += 2
        size = spec.align_up(len(QUEUES) * r.JOURNAL_LEN, spec.PAGE_SIZE)  # the least that has journals
        self.area = InflightArea(-1, 0, size, len(QUEUES), num) if inflight else None
        self.inflight = self._place("inflight", self._inflight_len()).at
        self.memory: Any = Shared(0, self._end())
        self.log: Any = Shared(self._place("log", LOG_LEN).at, LOG_LEN if logs else 0)
        self.length = self._end()

    def _end(self) -> int:
        return spec.align_up(self.places[-1].at + self.places[-1].length, 16) if self.places else 0

    def _place(self, name: str, length: int, gpa: int = -1) -> Place:
        self.places.append(Place(name, self._end(), length, gpa))
        return self.places[-1]

    def _inflight_len(self) -> int:
        return self.area.journal_at(len(QUEUES)) if self.area else 0

    def part(self, queue: int, part: str) -> Place:
        """Return the place of a queue's part: desc, avail, used or buffer."""
        return self._parts[QUEUES[queue], part]

    def regions(self) -> Words:
        """Return the region table of the kernels."""
        rows = [(place.gpa, place.length, place.at) for place in self.places if place.gpa >= 0]
        return np.array(rows, np.int64)

    def pages(self) -> dict[int, list[tuple[int, int]]]:
        """Return the pages of guest memory: number to the ranges (offset in the image, bytes) that lie in it."""
        found: dict[int, list[tuple[int, int]]] = {}
        for place in self.places:
            done = 0
            while place.gpa >= 0 and done < place.length:
                page, into = divmod(place.gpa + done, spec.PAGE_SIZE)
                part = min(place.length - done, spec.PAGE_SIZE - into)
                found.setdefault(page, []).append((place.at + done, part))
                done += part
        return found

    def written(self, at: int, length: int, published: int) -> Iterator[tuple[int, int]]:
        """Return the parts of a range that the device writes, and the driver may look at: the offsets of begin and end.

        published: the used.idx of the receiveq. Each of its buffers has been used once at most, in order.
        """
        for queue in range(len(QUEUES)):
            used = self.part(queue, "used")
            if used.at == at:
                yield at, at + length
        buffer = self.part(0, "buffer")
        begin, end = max(at, buffer.at), min(at + length, buffer.at + BUFFER_LEN * published)
        if begin < end:
            yield begin, end

    def name(self, at: int) -> str:
        """Return the name of the byte at offset *at*, such as tx.avail.idx."""
        place = next(place for place in reversed(self.places) if place.at <= at and place.length)
        into = at - place.at
        _, _, part = place.name.partition(".")
        if part == "desc":
            return f"{place.name}[{into // 16}]" + (".addr", ".len")[into % 16 // 8]
        if part == "buffer":
            return f"{place.name}[{into // BUFFER_LEN}]" + (f"+{into % BUFFER_LEN}" if into % BUFFER_LEN else "")
        if part in ("avail", "used"):
            return f"{place.name}.{self._field(part, into)}"
        if place.name == "event":
            queue, which = divmod(into, 2)
            return f"{QUEUES[queue]}.{('kick', 'call')[which]}"
        if place.name == "inflight":
            return self._inflight_field(into)
        return f"log[{into}]"

    def _field(self, part: str, into: int) -> str:
        size = 2 if part == "avail" else spec.VIRTQ_USED_ELEM_SIZE
        into -= spec.VIRTQ_RING_ENTRIES
        if into < 0:
            return ("flags", "idx")[into // 2 + 2]
        entry, rest = divmod(into, size)
        if entry == self.num:
            return {"avail": "used_event", "used": "avail_event"}[part]
        return f"ring[{entry}]" + ("" if part == "avail" else (".id", ".len")[rest // 4])

    def _inflight_field(self, into: int) -> str:
        assert self.area is not None
        journals = self.area.journal_at(0)
        if into >= journals:
            queue, rest = divmod(into - journals, r.JOURNAL_LEN)
            fields = {r.JOURNAL_RECEIVEQ_IDX: "receiveq_idx", r.JOURNAL_TRANSMITQ_IDX: "transmitq_idx"}
            return f"{QUEUES[queue]}.journal.{fields.get(rest, 'valid')}"
        queue, rest = divmod(into, self.area.area_at(1))
        fields = {
            spec.INFLIGHT_VERSION: "version",
            spec.INFLIGHT_DESC_NUM: "desc_num",
            spec.INFLIGHT_USED_IDX: "used_idx",
        }
        return f"{QUEUES[queue]}.inflight.{fields.get(rest, f'+{rest}')}"
