"""Guard: the context in which an endpoint's own code runs, and can do no harm but to its frames."""

from __future__ import annotations

from types import TracebackType
from typing import Any


class Guard:
    """As `Endpoint._guarded` says. It is a class, and no generator, as it is entered for each batch of frames."""

    __slots__ = ("_endpoint", "_frames", "_queue")

    def __init__(self, endpoint: Any, queue: int, frames: int) -> None:
        self._endpoint, self._queue, self._frames = endpoint, queue, frames

    def __enter__(self) -> None:
        endpoint = self._endpoint
        endpoint._python_side.acquire()
        endpoint._begun += 1
        endpoint._in_hand += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        endpoint = self._endpoint
        endpoint._in_hand -= 1
        endpoint._python_side.release()
        endpoint.check_maker()
        if error is None or isinstance(error, KeyboardInterrupt):
            return False  # ^C is the user's, while a device is stepped
        endpoint._failed(self._queue, self._frames, error)
        return True
