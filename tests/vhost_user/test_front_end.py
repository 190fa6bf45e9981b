"""Our front end against back ends that are full, silent, hang, lie, die, and come back."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.by_hand import PATIENCE, no_descriptor_leaks
from vnetdp.backends.vhost_user import VhostUserFrontEnd
from vnetdp.drive import drive
from vnetdp.endpoints.loopback import NullEndpoint
from vnetdp.errors import ConfigError


@pytest.fixture
def path(tmp_path: Path) -> Iterator[str]:
    with no_descriptor_leaks():
        yield str(tmp_path / "s")


@pytest.fixture(params=["has a full backlog", "takes the connection and says nothing"])
def silent(request: pytest.FixtureRequest, path: str) -> Iterator[str]:
    """A path where somebody listens, and nobody answers."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(0 if request.param == "has a full backlog" else 64)
        waiting = []
        while request.param == "has a full backlog":
            waiting.append(socket.socket(socket.AF_UNIX))
            waiting[-1].setblocking(False)
            try:
                waiting[-1].connect(path)
            except BlockingIOError:
                break
        yield path
        for sock in waiting:
            sock.close()


# --- time ---


def test_connecting_takes_no_longer_than_was_said(silent: str) -> None:
    front_end = VhostUserFrontEnd(silent)
    began = time.monotonic()
    assert not front_end.connect(0.1)
    assert time.monotonic() - began < 5  # and not the 10 s that an answer may take
    front_end.close()


def test_waiting_for_a_back_end_ends_when_the_time_is_up_or_the_user_says_so(silent: str) -> None:
    with NullEndpoint() as guest, pytest.raises(ConfigError, match=r"within 0\.2 s"):
        drive(guest, silent, lambda: False, lambda _: None, wait_s=0.2)
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    began = time.monotonic()
    with NullEndpoint() as guest, pytest.raises(ConfigError, match="ended before"):
        drive(guest, silent, stop.is_set, lambda _: None, wait_s=PATIENCE)
    assert time.monotonic() - began < 5
