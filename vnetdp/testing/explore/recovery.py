"""The recovery of a queue from the inflight area, as `vhost_user.inflight` does it, and its break-off at each store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ...errors import ConfigError, RequestRefused
from ...vhost_user import inflight
from .layout import QUEUES, Layout
from .operations import RuleError


class _KilledError(Exception):
    """The process that recovers was killed."""


class _Memory:
    """Guest memory, with the inflight area beside it, as `InflightArea.recover` uses a `GuestMemory`."""

    def __init__(self, layout: Layout, image: bytes) -> None:
        self._regions = layout.regions()
        self._rest = image[layout.memory.size :]
        self.mem = np.frombuffer(bytearray(image[: layout.memory.size]), np.uint8)
        self.beside_offset = layout.inflight

    def translate(self, gpa: int, length: int) -> int:
        for start, size, at in self._regions.tolist():
            if start <= gpa and gpa + length <= start + size:
                return int(at + gpa - start)
        raise ConfigError(f"guest range {gpa:#x}+{length:#x} is not inside guest memory")

    def image(self) -> bytes:
        return self.mem.tobytes() + self._rest


@contextmanager
def _killed_at(store: int) -> Iterator[None]:
    """Break off at that store of the block, counted from 0."""
    names = vars(inflight)
    before = {name: names[name] for name in ("store_u16", "store_u16_release")}
    left = store

    def counted(plain: Callable[..., None]) -> Callable[..., None]:
        def stored(*args: Any) -> None:
            nonlocal left
            if left == 0:
                raise _KilledError
            left -= 1
            plain(*args)

        return stored

    names.update({name: counted(plain) for name, plain in before.items()})
    try:
        yield
    finally:
        names.update(before)


def recoveries(layout: Layout, image: bytes, queue: int) -> tuple[list[bytes], bytes, int]:
    """Return the images that a recovery of *queue* leaves if it is killed at each of its stores, its own, and its answer.

    `RuleError` if it refuses the area.
    """
    assert layout.area is not None
    used = [layout.part(each, "used").gpa for each in range(len(QUEUES))]
    broken_off: list[bytes] = []
    while True:
        memory: Any = _Memory(layout, image)
        try:
            with _killed_at(len(broken_off)):
                base = layout.area.recover(
                    queue, memory, layout.num, layout.part(queue, "avail").gpa, used[queue], used[1 - queue]
                )
        except _KilledError:
            broken_off.append(memory.image())
            continue
        except RequestRefused as e:
            raise RuleError(f"the successor can't go on from the inflight area: {e}") from e
        return broken_off, memory.image(), base
