"""Sequences of messages that nobody would think of: drawn at random, by their numbers, and played against one back end.

Each begins as a front end might, and goes wrong anywhere: fields, sizes, descriptors, order, and what lies in the memory
that it shares. VNETDP_CAMPAIGN=1 plays 100,000 of them.
"""

from __future__ import annotations

import os
import random
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.by_hand import COMPILED, no_descriptor_leaks
from tests.support.vhost_user import (
    ALL,
    FEATURES,
    GPA,
    LOG_ALL,
    MEMORY_LEN,
    MOVABLE,
    NUM,
    PAIRS,
    UNTOLD,
    UVA,
    ByHand,
    Guest,
    InThread,
    Left,
    inflight,
    ping,
    region,
    settle,
    state,
    table,
    u64,
)
from tests.vhost_user.test_hostile_messages import SHAPES
from vnetdp.testing import HandRing
from vnetdp.vhost_user.message import RULES, ProtocolFeature, Request

CAMPAIGN = os.environ.get("VNETDP_CAMPAIGN") == "1"
SEQUENCES = (100_000 if CAMPAIGN else 200) if COMPILED else 100
LOOK_EVERY = 50  # sequences between two looks at what the back end holds, and whether it still serves others

R = Request
PAGE = 4096
_INDICES = [0, 1, 2, 3, 4, 5, 0xFF, 0x100, 0x10000, 0x10001, 2**31, 2**32 - 1]
_NUMBERS = [0, 1, 2, 16, 255, 4095, 4096, 65535, 65536, 2**31, 2**32 - 1, 2**63 - 1, 2**63, ALL - 4095, ALL]
_MEMORY = ["sealed", "shrinks", "small"]
_EVENTS = ["kick", "call", "semaphore", "full", "pipe", "closed pipe", "socket"]
_OTHER = ["directory", "zero", "path"]


@dataclass(frozen=True)
class Send:
    request: int
    payload: bytes = b""
    fds: tuple[str, ...] = ()
    flags: int = 1
    size: int | None = None


@dataclass(frozen=True)
class Do:
    """Something done beside the socket: wait for an answer, kick, write nonsense into a ring, shrink a file, ..."""

    what: str
    number: int = 0


Step = Send | Do


class Author:
    """Writes the sequence of a number."""

    def __init__(self, number: int) -> None:
        self.random = random.Random(number)
        self.memory = self.random.choice(["sealed", "sealed", "shrinks"])
        self.ack = self.random.random() < 0.8  # else, most refusals end the connection
        self.taken = ProtocolFeature(0)

    def write(self) -> list[Step]:
        chance = self.random.random
        steps: list[Step] = []
        if chance() < 0.95:
            steps += self._greeting()
        if chance() < 0.85:
            steps.append(Send(R.SET_MEM_TABLE, self._table(), (self.memory,)))
            for index in self.random.sample(range(4), self.random.choice([1, 2, 4, 4])):
                steps += self._ring(index)
            steps.append(Do("answer"))
        for _ in range(self.random.randint(1, 25)):
            steps.insert(self.random.randint(0, len(steps)) if chance() < 0.05 else len(steps), self._anything())
        if chance() < 0.2:
            at = self.random.randrange(len(steps))
            steps[at] = self._spoilt(steps[at])
        if chance() < 0.05:
            self.random.shuffle(steps)
        steps.append(Do(self.random.choice(["leave", "leave", "close", "half"]), self.random.randint(1, 19)))
        return steps

    def _greeting(self) -> list[Step]:
        self.taken = self.random.choice([MOVABLE, MOVABLE, UNTOLD, UNTOLD, MOVABLE & self.random.getrandbits(20)])
        features = self.random.choice([FEATURES, FEATURES, FEATURES & ~(1 << 30), FEATURES | LOG_ALL, 0, 1 << 29])
        return [
            Send(R.SET_OWNER),
            Send(R.GET_FEATURES),
            Send(R.GET_PROTOCOL_FEATURES),
            Send(R.SET_PROTOCOL_FEATURES, u64(int(self.taken))),
            Send(R.SET_FEATURES, u64(features)),
        ]

    @staticmethod
    def _table() -> bytes:
        return table(region(GPA, MEMORY_LEN, UVA))

    def _ring(self, index: int) -> list[Step]:
        steps: list[Step] = [
            Send(R.SET_VRING_NUM, state(index, NUM), flags=self._flags()),
            Send(R.SET_VRING_BASE, state(index, 0), flags=self._flags()),
            Send(R.SET_VRING_ADDR, self._addr(index), flags=self._flags()),
            Send(R.SET_VRING_CALL, u64(index), (self._event("call"),), self._flags()),
            Send(R.SET_VRING_KICK, u64(index), (self._event("kick"),), self._flags()),
            Send(R.SET_VRING_ENABLE, state(index, 1), flags=self._flags()),
            Do("offer", index),
        ]
        return steps

    def _addr(self, index: int) -> bytes:
        at = UVA + index * 3 * PAGE
        places = [at, at + 2 * PAGE, at + PAGE]
        if self.random.random() < 0.04:
            places[self.random.randrange(3)] += self.random.choice(
                [1, 2, 4, 8, -PAGE, PAGE, MEMORY_LEN, self._number()]
            )
        flags, log = self.random.choice([(0, 0), (0, 0), (1, GPA), (1, GPA), (1, self._number() >> 12)])
        return struct.pack("<IIQQQQ", index, flags, *(place % (1 << 64) for place in places), log)

    def _flags(self) -> int:
        return 9 if self.ack and self.random.random() < 0.97 else 1

    def _event(self, usual: str) -> str:
        return usual if self.random.random() < 0.8 else self.random.choice(_EVENTS)

    def _number(self) -> int:
        return self.random.choice([*_NUMBERS, self.random.getrandbits(64), self.random.getrandbits(16) * PAGE])

    def _index(self) -> int:
        return self.random.choice(_INDICES) if self.random.random() < 0.2 else self.random.randrange(4)

    def _anything(self) -> Step:
        chance = self.random.random()
        if chance < 0.45:
            what = self.random.choice(["answer", "kick", "offer", "offer", "offer", "scribble", "scribble", "shrink"])
            return Do(what, self.random.getrandbits(32))
        request = self.random.choice(self._open() if self.random.random() < 0.97 else list(Request))
        step = self._fitting(request) if chance < 0.95 else self._usual(request)
        return self._spoilt(step) if self.random.random() < 0.08 else step

    def _open(self) -> list[Request]:
        """Return the messages that may be sent, by what was negotiated."""
        return [request for request, rule in RULES.items() if rule.gate is None or self.taken & rule.gate]

    def _usual(self, request: Request) -> Send:
        payload, fds = SHAPES[request]
        return Send(request, payload, self._fds(fds.start), self._flags())

    def _fds(self, n: int) -> tuple[str, ...]:
        pool = [*_MEMORY, *_EVENTS, *_OTHER]
        return tuple(self.random.choice(pool) for _ in range(n))

    def _fitting(self, request: Request) -> Send:
        """A message whose fields go together with those that were sent before, most of the time."""
        flags, index, number = self._flags(), self._index(), self._number()
        memory = self.random.choice([self.memory, self.memory, *_MEMORY, *_OTHER])
        near = region(GPA + self.random.randrange(4) * MEMORY_LEN, self.random.choice([PAGE, MEMORY_LEN, number]),
                      UVA + self.random.randrange(4) * MEMORY_LEN, self.random.choice([0, 0, PAGE, number]))  # fmt: skip
        shapes: dict[Request, Callable[[], tuple[bytes, tuple[str, ...]]]] = {
            R.SET_FEATURES: lambda: (u64(self.random.choice([FEATURES, FEATURES | LOG_ALL, 0, number])), ()),
            R.SET_PROTOCOL_FEATURES: lambda: (u64(self.random.choice([int(MOVABLE), int(UNTOLD), 0, number])), ()),
            R.SET_MEM_TABLE: lambda: self._some_table(near, memory),
            R.ADD_MEM_REG: lambda: (bytes(8) + near, (memory,)),
            R.REM_MEM_REG: lambda: (bytes(8) + self.random.choice([near, region(GPA, MEMORY_LEN, UVA)]), ()),
            R.SET_LOG_BASE: lambda: (struct.pack("<QQ", self.random.choice([1, 8, PAGE, MEMORY_LEN, number]),
                                                 self.random.choice([0, 0, PAGE, number])), (memory,)),
            R.SET_VRING_NUM: lambda: (state(index, self.random.choice([NUM, NUM, 0, 3, 256, 32768, 65536, ALL >> 32])), ()),
            R.SET_VRING_BASE: lambda: (state(index, self.random.choice([0, 0, 1, 65535, 65536, 2**32 - 1])), ()),
            R.GET_VRING_BASE: lambda: (state(index, self.random.choice([0, 1])), ()),
            R.SET_VRING_ENABLE: lambda: (state(index, self.random.choice([0, 1, 1, 1, 2, 2**32 - 1])), ()),
            R.VRING_KICK: lambda: (state(index, 0), ()),
            R.SET_VRING_ADDR: lambda: (self._addr(index % 2**32), ()),
            R.SET_VRING_KICK: lambda: self._descriptor(index, number, "kick"),
            R.SET_VRING_CALL: lambda: self._descriptor(index, number, "call"),
            R.SET_VRING_ERR: lambda: self._descriptor(index, number, "call"),
            R.NET_SET_MTU: lambda: (u64(self.random.choice([68, 1500, 65535, 67, number])), ()),
            R.SET_STATUS: lambda: (u64(self.random.choice([0, 1, 3, 11, 15, 15, 15, 0x80, number])), ()),
            R.SET_BACKEND_REQ_FD: lambda: (b"", (self.random.choice(["socket", "socket", memory]),)),
            R.GET_CONFIG: lambda: self._config(number),
            R.SET_CONFIG: lambda: self._config(number),
            R.GET_INFLIGHT_FD: lambda: (inflight(0, 0, self.random.choice([1, 4, 4, 0, 5, 65535]),
                                                 self.random.choice([NUM, NUM, 8, 0, 32768, 65535])), ()),
            R.SET_INFLIGHT_FD: lambda: (inflight(self.random.choice([PAGE, PAGE, MEMORY_LEN, number]),
                                                 self.random.choice([0, 0, PAGE, number]),
                                                 self.random.choice([4, 4, 1, 0, 5, 65535]),
                                                 self.random.choice([NUM, NUM, 8, 0, 65535])), (memory,)),
            R.SET_DEVICE_STATE_FD: lambda: (state(self.random.choice([0, 1, 1, 2]), self.random.choice([0, 0, 1])),
                                            (self.random.choice([*_EVENTS, *_MEMORY]),)),
        }  # fmt: skip
        made = shapes.get(request)
        if made is None:
            return self._usual(request)
        payload, fds = made()
        return Send(request, payload, fds, flags)

    def _some_table(self, near: bytes, memory: str) -> tuple[bytes, tuple[str, ...]]:
        mine = region(GPA, MEMORY_LEN, UVA)
        regions = self.random.choice([[mine], [mine], [mine, near], [near], [near, near], [mine, *[near] * 7]])
        return table(*regions), (self.memory, *[memory] * (len(regions) - 1))

    def _descriptor(self, index: int, number: int, usual: str) -> tuple[bytes, tuple[str, ...]]:
        if self.random.random() < 0.15:
            return u64(index & 0xFF | 0x100), ()
        return u64(self.random.choice([index, index, index, number])), (self._event(usual),)

    def _config(self, number: int) -> tuple[bytes, tuple[str, ...]]:
        size = self.random.choice([0, 6, 8, 12, 256, number & 0xFFFFFFFF])
        head = struct.pack(
            "<III", self.random.choice([0, 0, 6, number & 0xFFFFFFFF]), size, self.random.choice([0, 1, 2, 3])
        )
        return head + bytes(min(size, 256)), ()

    def _spoilt(self, step: Step) -> Step:
        """Return a step with one thing in it wrong."""
        if isinstance(step, Do):
            return step
        payload, fds, flags, size, request = bytearray(step.payload), step.fds, step.flags, step.size, step.request
        how = self.random.randrange(8)
        if how == 0 and payload:
            for _ in range(self.random.randint(1, 4)):
                payload[self.random.randrange(len(payload))] = self.random.choice([0, 1, 0x7F, 0x80, 0xFF])
        elif how == 1:
            del payload[self.random.randint(0, len(payload)) :]
        elif how == 2:
            payload += self.random.randbytes(self.random.choice([1, 4, 8, 32, 200]))
        elif how == 3:
            fds = self._fds(self.random.choice([0, 1, 2, 8, 9, 30]))
        elif how == 4:
            flags = self.random.choice([0, 2, 3, 5, 9, 13, 0xFFFFFFFD, 0xFFFFFFFF])
        elif how == 5:
            request = self.random.choice([0, 22, 26, 28, 30, 33, 41, 44, self.random.getrandbits(32)])
        elif how == 6 and len(payload) >= 8:
            struct.pack_into("<Q", payload, 8 * self.random.randrange(len(payload) // 8), self._number())
        elif how == 7:
            size = self.random.choice([0, len(payload) // 2, len(payload) + 8, 4096, 4097, 2**32 - 1])
        return Send(request, bytes(payload), fds, flags, size)


@dataclass
class Stage:
    """What a sequence is played with: a guest's memory, and descriptors by their names; made once, reset each time."""

    guest: Guest
    fds: dict[str, int]
    rings: list[HandRing] = field(default_factory=list)

    @property
    def _shrinks(self) -> int:
        return self.fds["shrinks"]

    def reset(self) -> None:
        os.ftruncate(self._shrinks, 0)
        os.ftruncate(self._shrinks, MEMORY_LEN)
        os.ftruncate(self.fds["small"], PAGE)
        self.guest.memory.write(GPA, bytes(4 * 3 * PAGE))

    def play(self, end: ByHand, steps: list[Step]) -> None:
        for step in steps:
            if isinstance(step, Send):
                end.send(step.request, step.payload, [self.fds[name] for name in step.fds], step.flags, step.size)
            else:
                self._do(end, step)

    def _do(self, end: ByHand, step: Do) -> None:
        n = step.number
        if step.what == "answer":
            end.send(R.GET_FEATURES)
            end.sock.settimeout(0.02)
            with suppress(TimeoutError):  # the message before it was a half
                request = 0
                while request != R.GET_FEATURES:
                    request, _, size = struct.unpack("<III", end.read(12))
                    end.read(size)
        elif step.what == "kick":
            os.eventfd_write(self.fds["kick"], 1)
        elif step.what == "offer":
            at = GPA + n % 4 * 3 * PAGE
            write = n % 2 == 0
            for i in range(NUM):
                self._write(at + 16 * i, struct.pack("<QIHH", GPA + (16 + i) * PAGE, 2048, 2 if write else 0, 0))
            self._write(at + PAGE, struct.pack(f"<HH{NUM}H", 0, n % 19, *range(NUM)))
            os.eventfd_write(self.fds["kick"], 1)
        elif step.what == "scribble":
            data = random.Random(n).randbytes(64)
            self._write(GPA + n % (4 * 3 * PAGE - 64), data)
            os.eventfd_write(self.fds["kick"], 1)
        elif step.what == "shrink":
            os.ftruncate(self._shrinks, n % 3 * PAGE)
            os.ftruncate(self.fds["small"], 0)
            os.eventfd_write(self.fds["kick"], 1)
        elif step.what == "half":
            end.sock.send(struct.pack("<IIIQ", R.SET_VRING_NUM, 1, 8, 0)[:n])
            end.leave()
        elif step.what == "leave":
            end.leave()
        elif step.what == "close":
            end.close()

    def _write(self, gpa: int, data: bytes) -> None:
        self.guest.memory.write(gpa, data)
        os.pwrite(self._shrinks, data, gpa - GPA)


@contextmanager
def staged(folder: Path) -> Iterator[Stage]:
    with ExitStack() as stack:
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        guest = stack.enter_context(Guest(ByHand(ours), PAIRS))

        def own(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        reader, writer = (own(fd) for fd in os.pipe2(os.O_NONBLOCK))
        closed, gone = os.pipe()
        os.close(gone)
        (folder / "file").write_bytes(bytes(PAGE))
        fds = {
            "sealed": guest.fd,
            "shrinks": own(os.memfd_create("shrinks")),
            "small": own(os.memfd_create("small")),
            "kick": own(os.eventfd(0, os.EFD_NONBLOCK)),
            "call": own(os.eventfd(0, os.EFD_NONBLOCK)),
            "semaphore": own(os.eventfd(3, os.EFD_NONBLOCK | os.EFD_SEMAPHORE)),
            "full": own(os.eventfd(2**32 - 1, os.EFD_NONBLOCK)),
            "pipe": writer,
            "closed pipe": own(closed),
            "socket": own(theirs.detach()),
            "directory": own(os.open(folder, os.O_RDONLY)),
            "zero": own(os.open("/dev/zero", os.O_RDWR)),
            "path": own(os.open(folder / "file", os.O_PATH)),
        }
        assert reader >= 0
        yield Stage(guest, fds)


@pytest.mark.timeout(7200 if CAMPAIGN else 300)
def test_any_sequence_costs_nothing_but_itself(tmp_path: Path) -> None:
    with no_descriptor_leaks(), staged(tmp_path) as stage:
        back_end = InThread(tmp_path)
        ping(back_end)
        before = back_end.holds()
        met: set[str] = set()
        for number in range(SEQUENCES):
            steps = Author(number).write()
            stage.reset()
            with ByHand.dial(back_end.path) as end, suppress(Left, OSError):
                stage.play(end, steps)
            settle(back_end.path)
            lines = back_end.lines()
            assert back_end.alive() and not any("Traceback" in line for line in lines), (number, steps, lines)
            met.update(line.split(": ")[2] for line in lines if line.count(": ") > 2)
            if number % LOOK_EVERY == LOOK_EVERY - 1:
                ping(back_end)
                after = back_end.holds()
                assert after == before, f"after sequence {number}: {after}, before all: {before}"
        back_end.close()
        assert len(met) > 20  # the sequences went wrong in many ways
