"""Kicks and calls on descriptors that a peer fills, empties and makes blocking: no call waits, whatever it does."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from tests.kernels.rig import Rig
from tests.support.by_hand import scaled
from vnetdp_kernels import rows as r
from vnetdp_kernels.platform import peer
from vnetdp_kernels.platform.atomic import Words

_FULL = (1 << 64) - 2


@pytest.fixture
def one() -> Words:
    return peer.tell_words()


def tell(fd: int, one: Words) -> int:
    return int(peer.tell(fd, one, np.zeros((2, 1), np.int64)))


def take(fd: int) -> int:
    return int(peer.take(fd, np.zeros(8, np.int64), 2))


@pytest.fixture
def event() -> Iterator[int]:
    fd = os.eventfd(0)  # blocking
    yield fd
    os.close(fd)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    yield reader, writer
    for fd in (reader, writer):
        try:
            os.close(fd)
        except OSError as e:
            assert e.errno == errno.EBADF  # the test closed it


def test_each_call_counts(event: int, one: Words) -> None:
    for _ in range(1000):  # more than the kernel has completions for
        assert tell(event, one) == 0
    assert os.eventfd_read(event) == 1000


def test_a_full_eventfd_is_not_waited_for(event: int, one: Words) -> None:
    os.eventfd_write(event, _FULL)
    for _ in range(3):
        assert tell(event, one) == 0
    assert os.eventfd_read(event) >= _FULL


def test_a_full_pipe_is_not_waited_for(pipe: tuple[int, int], one: Words) -> None:
    reader, writer = pipe
    for _ in range(1024):
        assert tell(writer, one) == 0
    assert os.read(reader, 1 << 16) == struct.pack("<Q", 1) * 512


def test_a_full_socket_is_not_waited_for(one: Words) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for _ in range(scaled(1 << 16, 1 << 12)):
            assert tell(theirs.fileno(), one) == 0
        assert ours.recv(8) == struct.pack("<Q", 1)


def test_a_call_that_nobody_hears_says_so(pipe: tuple[int, int], one: Words) -> None:
    reader, writer = pipe
    assert tell(reader, one) == -errno.EBADF
    os.close(reader)
    assert tell(writer, one) == -errno.EPIPE


def test_a_kernel_without_asynchronous_io_is_called_all_the_same(event: int, one: Words) -> None:
    one[1] = 0
    assert tell(event, one) == 0
    assert os.eventfd_read(event) == 1
    os.eventfd_write(event, _FULL)
    assert tell(event, one) == 0


def test_what_somebody_else_took_is_not_waited_for(event: int, pipe: tuple[int, int]) -> None:
    assert take(event) == -errno.EAGAIN
    os.eventfd_write(event, 5)
    assert take(event) == 8
    assert take(pipe[0]) == -errno.EAGAIN
    os.write(pipe[1], b"abc")
    assert take(pipe[0]) == 3
    os.close(pipe[1])
    assert take(pipe[0]) == 0


def test_a_peer_that_fills_and_empties_all_the_time_holds_nobody_up(event: int, one: Words) -> None:
    done = threading.Event()

    def play() -> None:
        while not done.is_set():
            for call in (lambda: os.write(mine, struct.pack("<Q", _FULL)), lambda: os.read(mine, 8)):
                try:
                    call()
                except BlockingIOError:
                    continue
            os.set_blocking(mine, True)
            os.set_blocking(mine, False)

    mine = os.dup(event)
    thread = threading.Thread(target=play)
    thread.start()
    try:
        for _ in range(scaled(20_000, 2_000)):
            assert tell(event, one) == 0
            assert take(event) in (8, -errno.EAGAIN)
    finally:
        done.set()
        thread.join()
        os.close(mine)


def test_a_kick_that_will_never_come_again_is_let_go_of(pipe: tuple[int, int]) -> None:
    """Polled on, it would not let the loop sleep."""
    rig = Rig(16, device=r.KIND_NULL)
    rig.notify[1, 0] = pipe[0]
    os.write(pipe[1], bytes(8))
    os.close(pipe[1])
    rig.serve(timeout_ms=50)
    assert rig.tx.vq[r.VQ_KICKS] == 1
    assert rig.notify[1, 0] == -1
