"""The examples of event loops, in plain sockets and in asyncio: guests of ours exchange frames through each."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.endpoints.joined import guest_of, receive_all, send_all
from tests.endpoints.wired import Peer
from tests.support.by_hand import PATIENCE, frame, wait_for
from vnetdp.endpoints.sock import StreamEndpoint
from vnetdp.guest.driver import Driver

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="the examples are in the checkout only")


@contextmanager
def running(name: str, *arguments: object) -> Iterator[None]:
    """Run an example, isolated from this checkout, for the length of the block; ^C ends it, without a complaint."""
    argv = [sys.executable, "-I", "-W", "error", str(EXAMPLES / name), *map(str, arguments)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert "^C ends it" in line, process.communicate(timeout=PATIENCE)
        yield
        process.send_signal(signal.SIGINT)
        _, complained = process.communicate(timeout=PATIENCE)
        assert (process.returncode, complained) == (0, "")
    finally:
        process.kill()
        process.communicate()


def guest(stack: ExitStack, path: Path) -> Driver:
    """Return the running driver of a device on the socket *path*."""
    endpoint = stack.enter_context(StreamEndpoint(str(path), reconnect=0.01))
    driver = stack.enter_context(guest_of(endpoint))
    wait_for(lambda: endpoint.connected, "it is connected")
    return driver


def numbered(n: int, source: int, destination: int) -> bytes:
    """Return a frame between two of our guests; destination 0 is all of them."""
    to = b"\xff" * 6 if destination == 0 else bytes([2, 0, 0, 0, 0, destination])
    return to + bytes([2, 0, 0, 0, 0, source]) + frame(n, 100 + 100 * n)


def test_the_switch_in_plain_sockets(tmp_path: Path) -> None:
    path = tmp_path / "switch"
    with running("event_loop.py", path), ExitStack() as stack:
        guests = [guest(stack, path) for _ in range(3)]
        for source, sender in enumerate(guests, 1):
            send_all(sender, [numbered(source, source, 0)])
            for receiver in guests:
                if receiver is not sender:
                    assert receive_all(receiver, 1) == [numbered(source, source, 0)]
        with Peer.connect(path) as liar:
            liar.sock.sendall(bytes(4))
            assert liar.ended()
        for n in range(5):  # learned by now: only its destination gets each
            send_all(guests[0], [numbered(n, 1, 2)])
            send_all(guests[1], [numbered(n, 2, 1)])
            assert receive_all(guests[1], 1) == [numbered(n, 1, 2)]
            assert receive_all(guests[0], 1) == [numbered(n, 2, 1)]
        assert guests[2].receive() == []
    assert not path.exists()


def test_the_wire_in_asyncio(tmp_path: Path) -> None:
    left, right = tmp_path / "left", tmp_path / "right"
    frames = [frame(n, 60 + n) for n in range(200)]
    with running("asyncio_wire.py", left, right, 0.001, 0), ExitStack() as stack:
        a, b = guest(stack, left), guest(stack, right)
        send_all(a, frames)
        send_all(b, frames)
        assert receive_all(b, 200) == receive_all(a, 200) == frames
    assert not left.exists()


def test_the_wire_in_asyncio_loses_as_many_as_it_is_told(tmp_path: Path) -> None:
    left, right = tmp_path / "left", tmp_path / "right"
    frames, chance = [frame(n, 60 + n) for n in range(200)], random.Random(1)
    expected = [one for one in frames if chance.random() >= 0.5]
    with running("asyncio_wire.py", left, right, 0, 0.5), ExitStack() as stack:
        a, b = guest(stack, left), guest(stack, right)
        send_all(a, frames)
        assert receive_all(b, len(expected)) == expected
