"""The line at which an endpoint's code hangs."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Final

from ..endpoints.base import Endpoint

_NOT_THE_USERS: Final = (str(Path(__file__).parents[1]), threading.__file__)


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
