"""Whether an endpoint's code hangs, and at which line."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Final

from ..endpoints.base import Endpoint

_NOT_THE_USERS: Final = (str(Path(__file__).parents[1]), threading.__file__)


class InHand:
    """The time that an endpoint's code has not returned from one call, as seen by looks at it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._call, self._since = endpoint._begun, time.monotonic()

    def seconds(self) -> float:
        """Look, and return for how many seconds it has been in the call that it is in; 0 if it is in none."""
        if not self._endpoint._in_hand or self._endpoint._begun != self._call:
            self._call, self._since = self._endpoint._begun, time.monotonic()
            return 0.0
        return time.monotonic() - self._since


def where_hung(endpoint: Endpoint, seconds: float) -> str:
    """Return in one line that *endpoint* has not come back for *seconds*, and from which line of its code."""
    for innermost in sys._current_frames().values():
        users: FrameType | None = None
        frame: FrameType | None = innermost
        while frame is not None:
            if users is None and not frame.f_code.co_filename.startswith(_NOT_THE_USERS):
                users = frame
            if users is not None and frame.f_locals.get("self") is endpoint:
                at = f"in {users.f_code.co_name} at {users.f_code.co_filename}:{users.f_lineno}"
                return f"{endpoint.name} hangs {at}: it has not come back for {seconds:g} s"
            frame = frame.f_back
    return f"{endpoint.name} hangs: it has frames in hand, and has not come back for {seconds:g} s"
