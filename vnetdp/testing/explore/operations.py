"""The operations by which an actor touches shared memory, and the hooks that put them in place of `atomic` and `io`.

An actor is a plain Python function over the kernels. Each time one of them loads from shared memory, the hook asks the
actor's `Record` for the value. Where the record has none, `Pause` leaves the function: the search decides on the value, and
the function is run anew with a longer record. A store gives no value back: it is only written down.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

from vnetdp_kernels.platform import atomic, io, peer

SOURCE_FD = 99  # the descriptor of an actor's own endpoint: readable while frames wait there
EVENT_FD = 100  # the descriptor of event 0; the others follow


class Operation(NamedTuple):
    """An access that the search has to answer: *length* bytes at offset *at* of the image."""

    kind: str  # load, exchange, or, signal, take, poll, choose, recover
    at: int = 0
    length: int = 0
    argument: Any = (
        0  # load: 1 = acquire; exchange and or: the value; poll: (events, another is ready, can be called away)
    )


class Store(NamedTuple):
    """A store that an actor has done; in the store buffer until it reaches memory."""

    at: int
    data: bytes
    release: bool


DOORBELL = -1  # among the events that ended a sleep: the doorbell rang
FENCE = None  # among the effects of an actor, beside `Store`

Effect = Store | None
Answer = bytes | int | tuple[int, ...]


class Pause(BaseException):
    """The running actor asks for a value that its record does not have."""

    def __init__(self, operation: Operation) -> None:
        self.operation = operation


class RuleError(Exception):
    """An actor found a rule broken: a frame that was never sent, a queue that broke."""


class Record:
    """The answers that a run of an actor gets, and the effects since the last one."""

    def __init__(self, answers: tuple[Answer, ...]) -> None:
        self._answers = answers
        self._at = 0
        self.effects: list[Effect] = []

    def ask(self, operation: Operation) -> Any:
        if self._at == len(self._answers):
            raise Pause(operation)
        self._at += 1
        self.effects = []
        return self._answers[self._at - 1]

    def store(self, at: int, data: bytes, release: bool) -> None:
        self.effects.append(Store(at, data, release))

    def fence(self) -> None:
        self.effects.append(FENCE)


class Direct:
    """In place of a `Record` while a scenario is set up: every operation is done at once on *image*."""

    def __init__(self, image: bytearray) -> None:
        self.image = image

    def ask(self, operation: Operation) -> Any:
        before = bytes(self.image[operation.at : operation.at + operation.length])
        if operation.kind == "or":
            self.image[operation.at] |= operation.argument
        return before

    def store(self, at: int, data: bytes, release: bool) -> None:
        self.image[at : at + len(data)] = data

    def fence(self) -> None:
        pass


class Shared:
    """Shared memory as kernels get it: *size* bytes of the image from *base* on."""

    itemsize = 1

    def __init__(self, base: int, size: int) -> None:
        self.base = base
        self.size = size

    def at(self, offset: int, length: int) -> int:
        if not 0 <= offset <= self.size - length:
            raise RuleError(f"an access of {length} bytes at {offset:#x} is outside shared memory of {self.size} bytes")
        return self.base + offset


class Doorbell:
    """The control words of an actor's loop. While *armed*, the search decides at each look whether the doorbell rang."""

    def __init__(self) -> None:
        self.armed = False
        self.rang = False

    def __getitem__(self, slot: int) -> int:
        return 0

    def __setitem__(self, slot: int, value: int) -> None:
        pass  # counters of passes and sleeps

    def look(self) -> int:
        self.rang |= self.armed and bool(Running.record.ask(Operation("choose")))
        return int(self.rang)


class Running:
    """The actor that runs now: its record, and its doorbell."""

    record: Record | Direct
    doorbell: Doorbell = Doorbell()


def _load(size: int, acquire: int, plain: Callable[..., int]) -> Callable[..., int]:
    def load(array: Any, offset: int) -> int:
        if isinstance(array, Doorbell):
            return array.look()
        if not isinstance(array, Shared):
            return plain(array, offset)
        data = Running.record.ask(Operation("load", array.at(int(offset), size), size, acquire))
        return int.from_bytes(data, "little", signed=size == 8)

    return load


def _store(size: int, release: bool, plain: Callable[..., None]) -> Callable[..., None]:
    mask = (1 << 8 * size) - 1

    def store(array: Any, offset: int, value: int) -> None:
        if isinstance(array, Shared):
            data = (int(value) & mask).to_bytes(size, "little")
            Running.record.store(array.at(int(offset), size), data, release)
        else:
            plain(array, offset, value)

    return store


def copy(dst: Any, dst_offset: int, src: Any, src_offset: int, length: int) -> None:
    """`atomic.copy`, as one operation."""
    if not length:
        return
    if isinstance(src, Shared):
        data = Running.record.ask(Operation("load", src.at(int(src_offset), int(length)), int(length)))
    else:
        data = src[src_offset : src_offset + length].tobytes()
    if isinstance(dst, Shared):
        Running.record.store(dst.at(int(dst_offset), len(data)), data, False)
    else:
        dst[dst_offset : dst_offset + length] = bytearray(data)


def _fetch_or(array: Shared, offset: int, value: int) -> int:
    before = Running.record.ask(Operation("or", array.at(int(offset), 1), 1, int(value)))
    return int(before[0])


def _exchange(array: Shared, offset: int, value: int) -> int:
    before = Running.record.ask(Operation("exchange", array.at(int(offset), 8), 8, int(value)))
    return int.from_bytes(before, "little", signed=True)


def fence() -> None:
    """`atomic.fence`."""
    Running.record.fence()


def _signal(fd: int, _one: Any) -> None:
    Running.record.ask(Operation("signal", int(fd) - EVENT_FD, 1))


def _take(fd: int, _scratch: Any, _at: int) -> int:
    return 8 if Running.record.ask(Operation("take", int(fd) - EVENT_FD, 1)) else -io.EAGAIN


def _poll(pollfds: Any, n: int, wait_ms: int) -> int:
    """Wait for an event. The control descriptor, entry 0, counts as readable whenever poll() returns.

    So a loop does all that it does after a sleep, and returns: the state that it leaves then is that of its rows alone.
    """
    fds = [int(word) & 0xFFFFFFFF for word in pollfds[:n]]
    events = tuple(fd - EVENT_FD for fd in fds if fd >= EVENT_FD and fd != 0xFFFFFFFF)
    ready = SOURCE_FD in fds or wait_ms >= 0
    woken = Running.record.ask(Operation("poll", argument=(events, ready, Running.doorbell.armed)))
    Running.doorbell.rang |= DOORBELL in woken
    for k, fd in enumerate(fds):
        if k == 0 or fd == SOURCE_FD or fd - EVENT_FD in woken:
            pollfds[k] = int(pollfds[k]) | io.POLLIN << 48
    return len(woken) + 1


def _hooks() -> Iterator[tuple[Any, Any]]:
    """Return each function of `atomic`, `io` and `peer` that reaches shared memory or an event, and its hook."""
    sizes = {"u8": 1, "u16": 2, "u32": 4, "u64": 8, "i64": 8}
    for name, function in vars(atomic).items():
        verb, _, rest = name.partition("_")
        size, _, order = rest.partition("_")
        if size in sizes and verb == "load":
            yield function, _load(sizes[size], int(order == "acquire"), function)
        elif size in sizes and verb == "store":
            yield function, _store(sizes[size], order == "release", function)
    yield atomic.copy, copy
    yield atomic.fetch_or_u8, _fetch_or
    yield atomic.exchange_u64, _exchange
    yield atomic.fence, fence
    yield io.signal, _signal
    yield io.poll, _poll
    yield peer.take, _take


def modules() -> list[ModuleType]:
    """Return the modules of the kernels above `platform`."""
    platform = atomic.__name__.rpartition(".")[0]
    package = platform.partition(".")[0]
    return [
        module
        for name, module in list(sys.modules.items())
        if name.startswith(package + ".") and not name.startswith(platform)
    ]


@contextmanager
def replaced(pairs: list[tuple[Any, Any]]) -> Iterator[None]:
    """Put functions in place of others, wherever a module of the kernels has them under any name, for the block."""
    done: list[tuple[dict[str, Any], str, Any]] = []
    by_id = {id(old): new for old, new in pairs}
    for module in modules():
        names = vars(module)
        for name, value in list(names.items()):
            if id(value) in by_id:
                done.append((names, name, value))
                names[name] = by_id[id(value)]
    try:
        yield
    finally:
        for names, name, value in done:
            names[name] = value


def hooked() -> Any:
    """Stop the running actor at each access to shared memory, for the block."""
    return replaced(list(_hooks()))
