"""The socket's file: taken over from the dead by one alone, and removed by none but its maker."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.by_hand import no_descriptor_leaks
from vnetdp.errors import ConfigError
from vnetdp.system.listener import Listener
from vnetdp.system.poll import readable

RIVALS = 8


def leave_behind(path: Path) -> None:
    """Leave a socket's file that nobody listens on."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


def answers(path: Path, listener: Listener) -> bool:
    """Return whether *listener* is who listens on *path*. Those who only looked whether somebody does say nothing."""
    with socket.socket(socket.AF_UNIX) as front_end:
        front_end.connect(str(path))
        front_end.sendall(b"x")
        while readable(listener, 1):
            with listener.accept() as accepted:
                if accepted.recv(1) == b"x":
                    return True
    return False


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_who_want_a_path_at_once_one_gets_it(tmp_path: Path, stale: bool) -> None:
    path = tmp_path / "net.sock"
    gate = threading.Barrier(RIVALS)

    def take() -> Listener | str:
        gate.wait(60)
        try:
            return Listener(str(path), 2 * RIVALS)
        except ConfigError as e:
            return str(e)

    with no_descriptor_leaks(), ThreadPoolExecutor(RIVALS) as pool:
        for _ in range(20):
            if stale:
                leave_behind(path)
            taken = [rival.result(60) for rival in [pool.submit(take) for _ in range(RIVALS)]]
            winners = [one for one in taken if isinstance(one, Listener)]
            assert len(winners) == 1, taken
            assert [one for one in taken if isinstance(one, str)] == [
                f"another program listens on {path}: end that program, or take another path"
            ] * (RIVALS - 1)
            assert answers(path, winners[0])
            winners[0].close()
            assert not path.exists()


def test_a_file_that_somebody_else_put_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "net.sock"
    first = Listener(str(path), 1)
    path.rename(tmp_path / "moved")
    with Listener(str(path), 1) as second:
        first.close()
        assert answers(path, second)
        first.close()
        assert path.is_socket()
    assert not path.exists()
    third = Listener(str(path), 1)
    path.unlink()
    path.write_text("mine")
    third.close()
    assert path.read_text() == "mine"


def test_what_is_no_socket_stays(tmp_path: Path) -> None:
    path = tmp_path / "net.sock"
    with Listener(str(tmp_path / "target"), 1) as target, no_descriptor_leaks():
        path.symlink_to(tmp_path / "target")
        with pytest.raises(ConfigError, match="exists and is not a socket"):
            Listener(str(path), 1)
        assert path.is_symlink()
        assert answers(tmp_path / "target", target)
        path.unlink()
        path.symlink_to(tmp_path / "nowhere")
        with pytest.raises(ConfigError, match="exists and is not a socket"):
            Listener(str(path), 1)
        with pytest.raises(ConfigError, match=r"cannot listen on .*: Not a dir"):
            Listener(str(tmp_path / "target" / "net.sock"), 1)


def test_a_folder_whose_lock_somebody_keeps_can_be_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vnetdp.system.listener._LOCK_S", 0.01)
    path = tmp_path / "net.sock"
    leave_behind(path)
    with ExitStack() as stack:
        fd = os.open(tmp_path, os.O_RDONLY)
        stack.callback(os.close, fd)
        fcntl.flock(fd, fcntl.LOCK_SH)
        began = time.monotonic()
        listener = stack.enter_context(Listener(str(path), 1))
        assert time.monotonic() - began < 30
        assert answers(path, listener)
