"""A scenario, put up: its image, its actors, and the check of each end of a schedule."""

from __future__ import annotations

import struct

from vnetdp_kernels import rows as r
from vnetdp_kernels import spec

from .actors import Actor
from .layout import BUFFER_LEN, LOG_LEN, QUEUES, Layout
from .operations import Direct, RuleError, Running
from .parties import RX, TX, Device, DeviceKept, DeviceOutcome, Driver, Reader, number_of
from .recovery import recoveries
from .scenarios import Scenario
from .search import Search, State


class World:
    """The actors of a scenario. Hooks have to be in place (`operations.hooked`) as long as it is used."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self.layout = layout = Layout(scenario.num, scenario.reader > 0, scenario.kills > 0)
        image = bytearray(layout.length)
        Running.record = Direct(image)
        driver = Driver(layout, scenario.event_idx, scenario.sent)
        kind = r.KIND_ECHO if scenario.echo else r.KIND_PYTHON
        if layout.area is not None and not scenario.fresh:
            for queue in range(len(QUEUES)):
                image[:] = recoveries(layout, bytes(image), queue)[1]
        kept = DeviceKept(
            kills=scenario.kills, hand_overs=scenario.hand_overs, dead=scenario.fresh, budget=scenario.budget
        )
        self.actors: list[Actor] = [Device(layout, scenario.event_idx, kind, scenario.received, kept)]
        if scenario.driver:
            self.actors.append(driver)
        elif scenario.sent:
            driver.send()
        if scenario.reader:
            image[layout.log.base : layout.log.base + LOG_LEN] = bytes(LOG_LEN)
            self.actors.append(Reader(layout, scenario.reader, bytes(image)))
        self._image = bytes(image)

    def search(self, model: str, every: bool) -> Search:
        """Return the search of all its schedules. every: of `Search`."""
        first = [actor.first() for actor in self.actors]
        return Search(first, self._image, self.layout, model, self._check, every)

    def _idx(self, image: bytes, queue: int, part: str) -> int:
        at = self.layout.part(queue, part).at + spec.VIRTQ_RING_IDX
        return int.from_bytes(image[at : at + 2], "little")

    def _check(self, state: State) -> str:
        """Return the rule that is broken where no actor can go on: all sleep, or have ended."""
        scenario = self._scenario
        outcomes = {place.node.actor.name: place.node.outcome for place in state.places}
        device: DeviceOutcome = outcomes["device"]
        sent = tuple(range(sum(scenario.sent)))
        used, avail = self._idx(state.image, TX, "used"), self._idx(state.image, TX, "avail")
        if used != avail:
            return f"all sleep while chains wait in the transmitq: avail.idx is {avail}, used.idx {used}"
        try:
            got = outcomes["driver"] if scenario.driver else self._received(state.image)
        except RuleError as e:
            return str(e)
        fault = _compare("received", got, sent if scenario.echo else device.due)
        if fault:
            return fault
        if not scenario.echo:
            wire = tuple(dict.fromkeys(device.got)) if scenario.kills else device.got
            fault = _compare("sent", wire, sent)
            if fault:
                return fault
        return self._check_log(state.image, outcomes["reader"]) if scenario.reader else ""

    def _received(self, image: bytes) -> tuple[int, ...]:
        """Return the numbers of the frames in the receiveq's used buffers, for a scenario without a driver."""
        used, buffer = self.layout.part(RX, "used").at, self.layout.part(RX, "buffer").at
        found = []
        for k in range(self._idx(image, RX, "used")):
            at = used + spec.VIRTQ_RING_ENTRIES + spec.VIRTQ_USED_ELEM_SIZE * k
            head, length = struct.unpack_from("<II", image, at)
            data = image[buffer + BUFFER_LEN * head :][:length]
            found.append(number_of(data[spec.NET_HDR_LEN :]))
        return tuple(found)

    def _check_log(self, image: bytes, copies: dict[int, bytes]) -> str:
        """Return the page that the device wrote, and that neither the reader's copy nor the dirty log has."""
        layout = self.layout
        for page, ranges in layout.pages().items():
            if image[layout.log.base + page // 8] >> page % 8 & 1:
                continue
            done = 0
            for at, length in ranges:
                copied = copies[page][done : done + length]
                done += length
                for begin, end in layout.written(at, length, self._idx(image, RX, "used")):
                    if image[begin:end] != copied[begin - at : end - at]:
                        name = layout.name(begin)
                        return f"page {page} ({name}) was written behind its copy, and is not in the dirty log"
        return ""


def _compare(what: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    if found == wanted:
        return ""
    for number in wanted:
        if found.count(number) != wanted.count(number):
            how = "lost" if number not in found else "doubled"
            return f"frame {number} is {how}: {what} {list(found)}, not {list(wanted)}"
    return f"frames {what}: {list(found)}, not {list(wanted)}"
