"""What a back end leaves in the inflight area, wherever it is cut off: its successor loses nothing, and repeats nothing.

A move from ring to ring is stopped behind each of its lines in turn, as plain Python, and what then lies in memory is all
that the next back end gets to know.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import pytest

from tests.support.by_hand import frame, no_descriptor_leaks
from tests.support.vhost_user import NUM, ByHand, Guest, InThread, inflight
from vnetdp.backends.userspace import UserspaceBackend
from vnetdp.datapath.datapath import NO_LOG, Datapath, scratch_for
from vnetdp.endpoints.base import Endpoint
from vnetdp.endpoints.loopback import EchoEndpoint, MacswapEndpoint, ReflectEndpoint
from vnetdp.errors import ConfigError, RequestRefused
from vnetdp.shared.memory import Bytes, GuestMemory
from vnetdp.testing import HandRing
from vnetdp.vhost_user.inflight import InflightArea
from vnetdp.vhost_user.message import Inflight, Request
from vnetdp.virtio import features as f
from vnetdp_kernels import rows, spec
from vnetdp_kernels import rows as r
from vnetdp_kernels.net import device
from vnetdp_kernels.virtq import split_device

R = Request
LEN = 1 << 18  # from guest address 0 on, so that the window has no hole


@dataclass
class Scene:
    """A guest's two rings and its inflight area, as one window; back ends come and go."""

    kind: type[Endpoint]
    start: int
    journalled: bool = True
    stack: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        self.area = InflightArea.create(2, NUM, 2)
        self.stack.callback(self.area.close)
        parts = GuestMemory.create([(0, LEN)])
        self.memory = self.stack.enter_context(GuestMemory(parts.regions, beside=self.area.region()))
        parts.close()
        self.receiveq = HandRing(self.memory, 0, NUM, self.start)
        self.transmitq = HandRing(self.memory, LEN // 2, NUM, self.start)

    @property
    def window(self) -> Bytes:
        return self.memory.mem

    def back_end(self) -> BackEndAtWork:
        return BackEndAtWork(self)

    def arrived(self) -> list[bytes]:
        """Return the frames that were published to the guest, in order."""
        self.receiveq.taken_from(self.start)
        return [
            self.memory.read(self.receiveq.buffer(head) + spec.NET_HDR_LEN, length - spec.NET_HDR_LEN)
            for head, length in self.receiveq.taken()
        ]


class BackEndAtWork:
    """A back end that has just started: it recovers both rings from the area, as a session does."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        memory, area = scene.memory, scene.area
        self._stack = ExitStack()
        self._endpoint = self._stack.enter_context(scene.kind())
        self._datapath = Datapath(1)
        self._stack.callback(self._datapath.close)
        backend = UserspaceBackend(self._datapath, 0)
        self._stack.callback(backend.set_backend, 1, None)
        self._stack.callback(backend.set_backend, 0, None)
        backend.set_features(f.VIRTIO_F_VERSION_1 | f.VIRTIO_NET_F_MRG_RXBUF)
        backend.set_memory(memory)
        for index, ring in enumerate((scene.receiveq, scene.transmitq)):
            other = (scene.transmitq, scene.receiveq)[index]
            backend.set_vring_num(index, NUM)
            backend.set_vring_addr(index, ring.desc, ring.avail, ring.used)
            base = area.recover(index, memory, NUM, ring.avail, ring.used, other.used)
            journal = area.journal_at(index)
            at = memory.beside_offset
            backend.set_vring_inflight(index, at + area.area_at(index), at + journal if scene.journalled else 0)
            backend.set_vring_base(index, base)
        for index in (0, 1):
            backend.set_backend(index, self._endpoint)
        self._scratch = scratch_for(1, NUM).frames

    def arguments(self, budget: int = NUM) -> tuple[Any, ...]:
        """Return what `forward` is called with."""
        guest = rows.Guest(self._scene.memory.mem, self._scene.memory.table, NO_LOG)
        rxq, txq = self._datapath.vqs
        return guest, txq, guest, rxq, self._endpoint.rows[0], self._endpoint.pending[0], self._scratch, budget

    def work(self) -> None:
        """Move all there is to move."""
        while device.forward(*self.arguments(3)):
            pass

    def close(self) -> None:
        self._stack.close()


PUBLISHES = (
    (split_device, "publish_used"),
    (device, "_publish_forwarded"),
    (device, "_write_journal"),
)  # what `forward` publishes with


def states_on_the_way(window: Bytes, move: Callable[..., object], arguments: tuple[Any, ...]) -> list[Bytes]:
    """Call *move* as plain Python, and return the window as it was before each of its lines, each state once."""
    parts = (move, *(getattr(module, name) for module, name in PUBLISHES))
    code = {getattr(function, "py_func", function).__code__ for function in parts}
    seen: list[Bytes] = [window.copy()]
    ran: set[CodeType] = set()

    def look(here: FrameType, event: str, _arg: object) -> Any:
        if here.f_code not in code:
            return None
        ran.add(here.f_code)
        if event in ("line", "return") and not np.array_equal(seen[-1], window):
            seen.append(window.copy())
        return look

    before = sys.gettrace()
    sys.settrace(look)
    try:
        getattr(move, "py_func", move)(*arguments)
    finally:
        sys.settrace(before)
    left_out = {one.co_name for one in code - ran}
    assert left_out <= {"_write_journal"}, f"compiled, and so without a look at each step: {left_out}"
    return [*seen, window.copy()]


@contextmanager
def plain_publish() -> Iterator[None]:
    """Have plain Python code publish as plain Python too, so that it can be stopped in the middle of that."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in PUBLISHES:
            compiled = getattr(module, name)
            patch.setattr(module, name, getattr(compiled, "py_func", compiled))
        yield


ARP = (
    b"\xff" * 6
    + bytes(6)
    + bytes.fromhex("0806 0001 0800 06 04 0001")
    + bytes(6)
    + b"\x0a\0\0\2"
    + bytes(6)
    + b"\x0a\0\0\1"
)


def echoed(kind: type[Endpoint], data: bytes) -> bytes:
    if kind is MacswapEndpoint:
        return data[6:12] + data[:6] + data[12:]
    return data


def frames_for(kind: type[Endpoint]) -> list[bytes]:
    if kind is ReflectEndpoint:
        return [ARP + bytes(18) if n % 3 else frame(n) for n in range(9)]  # every third is answered by nothing
    return [frame(n, 8 if n == 4 else 60 + n) for n in range(9)]  # the fifth is too short, and dropped


def after_a_crash(kind: type[Endpoint], start: int, journalled: bool) -> Iterator[tuple[list[bytes], list[bytes]]]:
    """Crash at every point of a move; yield what arrived in the end, and what would have without any crash."""
    with ExitStack() as stack:
        scene = Scene(kind, start, journalled)
        stack.enter_context(scene.stack)
        scene.receiveq.post(*range(NUM))
        for head, data in enumerate(frames_for(kind)):
            scene.transmitq.send(head, data)
        first = scene.back_end()
        with plain_publish():
            states = states_on_the_way(scene.window, device.forward, first.arguments())
        first.close()
        assert scene.transmitq.used_idx == (start + 9) & 0xFFFF
        whole = scene.arrived()
        for at_the_crash in states:
            scene.window[:] = at_the_crash
            second = scene.back_end()
            second.work()
            second.close()
            assert scene.transmitq.used_idx == (start + 9) & 0xFFFF
            yield scene.arrived(), whole


KINDS = [EchoEndpoint, MacswapEndpoint, ReflectEndpoint]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("start", [0, 65530])
def test_wherever_a_back_end_is_cut_off_its_successor_loses_and_repeats_nothing(
    kind: type[Endpoint], start: int
) -> None:
    with no_descriptor_leaks():
        points = 0
        for arrived, whole in after_a_crash(kind, start, journalled=True):
            assert arrived == whole
            points += 1
    assert len(whole) in (6, 8)
    if kind is not ReflectEndpoint:
        assert whole == [echoed(kind, data) for data in frames_for(kind) if len(data) >= spec.ETH_HLEN]
    assert points > 10


def test_without_the_journal_there_is_a_point_where_frames_are_repeated() -> None:
    """The control of the test above: it does stop between the two publications."""
    found = list(after_a_crash(EchoEndpoint, 0, journalled=False))
    repeated = [arrived for arrived, whole in found if arrived != whole]
    assert repeated
    assert all(arrived[:8] == whole and len(arrived) == 16 for (arrived, whole) in found if arrived != whole)


def test_a_second_crash_during_the_recovery_is_survived_too() -> None:
    scene = Scene(EchoEndpoint, 65530)
    with scene.stack:
        scene.receiveq.post(*range(NUM))
        for head in range(5):
            scene.transmitq.send(head, frame(head))
        first = scene.back_end()
        with plain_publish():
            states = states_on_the_way(scene.window, device.forward, first.arguments())
        first.close()
        for at_the_crash in states:
            scene.window[:] = at_the_crash
            for index in (0, 1, 0):  # one that came as far as this, and died
                ring, other = (scene.receiveq, scene.transmitq)[:: 1 - 2 * index]
                scene.area.recover(index, scene.memory, NUM, ring.avail, ring.used, other.used)
            second = scene.back_end()
            second.work()
            second.close()
            assert scene.arrived() == [frame(n) for n in range(5)]


def test_a_journal_of_another_time_is_not_believed() -> None:
    """The rings went on without us (a fallback, a reset): what was cut off then is not finished now."""
    for receiveq_idx, transmitq_idx in ((3, 4), (0, 400), (1, 0xFFFF), (65535, 5)):
        scene = Scene(EchoEndpoint, 0)
        with scene.stack:
            at = scene.memory.beside_offset + scene.area.journal_at(1)
            recover = partial(
                scene.area.recover,
                1,
                scene.memory,
                NUM,
                scene.transmitq.avail,
                scene.transmitq.used,
                scene.receiveq.used,
            )
            recover()
            scene.window[at : at + 6] = np.frombuffer(struct.pack("<HHH", receiveq_idx, transmitq_idx, 1), np.uint8)
            assert recover() == 0
            assert scene.transmitq.used_idx == 0
            assert scene.window[at + r.JOURNAL_VALID] == 0


# --- the area itself ---


def test_an_area_is_laid_out_as_the_protocol_says() -> None:
    area = InflightArea.create(4, NUM, 4)
    try:
        said = area.describe()
        assert (said.num_queues, said.queue_size, said.offset) == (4, NUM, 0)
        assert [area.area_at(n) for n in range(4)] == [0, 320, 640, 960]  # 16 + 16 * 16, rounded up to 64
        assert said.size % spec.PAGE_SIZE == 0
        assert os.fstat(area.fd).st_size >= said.size
        assert os.pread(area.fd, 1 << 16, 0) == bytes(said.size)
        assert [area.journal_at(n) for n in range(4)] == [1280, 1344, 1408, 1472]
    finally:
        area.close()


def test_an_area_of_another_back_end_serves_and_nothing_behind_it_is_written(tmp_path: Path) -> None:
    """libvhost-user and DPDK leave no room for journals; that its last page has some is no leave to take it."""
    path = tmp_path / "area"
    path.write_bytes(bytes(4 * 320) + b"\xaa" * (spec.PAGE_SIZE - 4 * 320))
    with no_descriptor_leaks():
        back_end = InThread(tmp_path)
        with ByHand.dial(back_end.path) as end, Guest(end) as guest:
            end.shake_hands()
            fd = os.open(path, os.O_RDWR)
            assert end.tell(R.SET_INFLIGHT_FD, inflight(4 * 320, 0, 4, NUM), [fd])
            os.close(fd)
            assert end.tell(R.SET_MEM_TABLE, guest.table, [guest.fd])
            guest.start(0, 1)
            for n in range(20):
                guest.echo(n)
            end.leave()
        back_end.close()
        version, num, _, used_idx = struct.unpack_from("<HHHH", path.read_bytes(), 320 + spec.INFLIGHT_VERSION)
        assert (version, num, used_idx) == (1, NUM, 20)
        assert path.read_bytes()[4 * 320 :] == b"\xaa" * (spec.PAGE_SIZE - 4 * 320)


@pytest.mark.parametrize(("queues", "size"), [(0, 8), (5, 8), (4, 0), (4, 40000)])
def test_absurd_counts_are_refused(queues: int, size: int) -> None:
    with no_descriptor_leaks(), pytest.raises(RequestRefused):
        InflightArea.create(queues, size, 4)


def test_a_ring_that_is_not_in_the_area_is_refused() -> None:
    scene = Scene(EchoEndpoint, 0)
    with scene.stack:
        for index, num in ((2, NUM), (0, 2 * NUM)):
            with pytest.raises(RequestRefused, match="not in an inflight area"):
                scene.area.recover(index, scene.memory, num, scene.receiveq.avail, scene.receiveq.used, None)
        for avail, used in ((scene.receiveq.avail, 1 << 40), (1 << 40, scene.receiveq.used)):
            with pytest.raises(RequestRefused):
                scene.area.recover(0, scene.memory, NUM, avail, used, None)


def test_an_area_that_ends_behind_its_file_is_refused_when_it_comes() -> None:
    fd = os.memfd_create("area")
    os.ftruncate(fd, 4096)
    try:
        for said in (Inflight(8192, 0, 4, NUM), Inflight(4096, 4096, 4, NUM), Inflight(4096, 0, 4, 300)):
            with pytest.raises((RequestRefused, ConfigError)):
                InflightArea.attach(said, fd, 4)
    finally:
        os.close(fd)


# --- an area that another back end leaves ---


def predecessor(
    scene: Scene, in_flight: dict[int, int], used_idx: int, last_batch_head: int = 0, **following: int
) -> Callable[[], int]:
    """Fill the transmitq's part: heads with their counters, and `next` of those of the last batch; return `recover`."""
    area = bytearray(scene.area.area_at(1))
    struct.pack_into("<QHHHH", area, 0, 0, 1, NUM, last_batch_head, used_idx)
    for head, counter in in_flight.items():
        struct.pack_into("<B5xHQ", area, 16 + 16 * head, 1, following.get(f"next_{head}", 0), counter)
    at = scene.memory.beside_offset + scene.area.area_at(1)
    scene.window[at : at + len(area)] = np.frombuffer(area, np.uint8)
    return partial(
        scene.area.recover, 1, scene.memory, NUM, scene.transmitq.avail, scene.transmitq.used, scene.receiveq.used
    )


def flagged(scene: Scene) -> list[int]:
    at = scene.memory.beside_offset + scene.area.area_at(1) + spec.INFLIGHT_HEADER_LEN
    return [head for head in range(NUM) if scene.window[at + 16 * head]]


@pytest.mark.parametrize("start", [0, 65534])
def test_chains_in_flight_that_are_the_next_ones_are_taken_again(start: int) -> None:
    scene = Scene(EchoEndpoint, start)
    with scene.stack:
        for head in (5, 3, 9, 4):
            scene.transmitq.send(head, frame(head))
        scene.transmitq.used_idx = start + 1
        assert predecessor(scene, {3: 7, 9: 8}, (start + 1) & 0xFFFF)() == (start + 1) & 0xFFFF
        assert not flagged(scene)


def test_the_last_batch_was_used_though_its_flags_still_stand() -> None:
    scene = Scene(EchoEndpoint, 0)
    with scene.stack:
        for head in (5, 3, 9, 4):
            scene.transmitq.send(head, frame(head))
        scene.transmitq.used_idx = 3
        flags = {5: 1, 3: 2, 9: 3, 4: 4}
        assert predecessor(scene, flags, 0, last_batch_head=9, next_9=3, next_3=5)() == 3
        assert not flagged(scene)


@pytest.mark.parametrize("in_flight", [{0: 0}, {1: 0, 0: 1}, {2: 5, 1: 6}, {1: 0, 2: 1, 3: 2}, {15: 0}], ids=str)
def test_chains_in_flight_out_of_order_are_refused_and_stay_flagged(in_flight: dict[int, int]) -> None:
    """An index can't tell them from those that are done: one would be repeated, and another lost."""
    scene = Scene(EchoEndpoint, 0)
    with scene.stack:
        for head in range(3):
            scene.transmitq.send(head, frame(head))
        scene.transmitq.used_idx = 1
        recover = predecessor(scene, in_flight, 1)
        for _ in range(2):
            with pytest.raises(RequestRefused, match="in flight are not the next in the avail ring"):
                recover()
        assert flagged(scene) == sorted(in_flight)
