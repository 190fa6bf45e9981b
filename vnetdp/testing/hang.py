"""Whether an endpoint's code hangs, and at which line."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Final

from ..endpoints.base import Endpoint

_LOOK_S: Final = 0.0005
_SOON_S: Final = 0.5
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


class Hang:
    """Whether an endpoint's code hangs: it has not returned from a call for *patience_s*.

    elsewhere: returns a line if the endpoint's code in another process hangs, or none.
    """

    def __init__(self, endpoint: Endpoint, patience_s: float, elsewhere: Callable[[], list[str]] = list) -> None:
        self._endpoint, self._patience_s, self._elsewhere = endpoint, patience_s, elsewhere
        self._seen = False

    def watch(self) -> InHand:
        """Return a watch over the call that the endpoint's code is in, or comes to be in."""
        return InHand(self._endpoint)

    def at_the_end_of(self, stuck_s: float) -> list[str]:
        """Return a line about a hang, or none, when a wait is given up whose watch has seen a call last *stuck_s*."""
        self._seen = stuck_s > self._patience_s / 2
        return [self.text()] if self._seen else self._elsewhere()

    def comes_back(self) -> bool:
        """Return whether the endpoint's code comes back, if it is in a call: a later look shows."""
        in_hand, call = self.watch(), self._endpoint._begun
        while self._endpoint._in_hand and self._endpoint._begun == call:
            if self._seen or in_hand.seconds() > self._patience_s:
                self._seen = True
                return False
            time.sleep(_LOOK_S)
        return True

    def text(self) -> str:
        """Return in one line where it hangs, and the next step."""
        return (
            f"{where_hung(self._endpoint)}: it has not come back for {self._patience_s:g} s; "
            "let it return, or give more patience_s="
        )


def hangs_now(endpoint: Endpoint) -> str:
    """Return where *endpoint* hangs if it does not return from its present call within half a second; else ""."""
    in_hand, call = InHand(endpoint), endpoint._begun
    while endpoint._in_hand and endpoint._begun == call:
        if in_hand.seconds() > _SOON_S:
            return where_hung(endpoint)
        time.sleep(_LOOK_S)
    return ""


def where_hung(endpoint: Endpoint) -> str:
    """Return at which line of its code *endpoint* hangs."""
    for innermost in sys._current_frames().values():
        users: FrameType | None = None
        frame: FrameType | None = innermost
        while frame is not None:
            if users is None and not frame.f_code.co_filename.startswith(_NOT_THE_USERS):
                users = frame
            if users is not None and frame.f_locals.get("self") is endpoint:
                return f"{endpoint.name} hangs in {users.f_code.co_name} at {users.f_code.co_filename}:{users.f_lineno}"
            frame = frame.f_back
    return f"{endpoint.name} hangs with frames in hand"
