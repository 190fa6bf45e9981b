"""Processes that we start: each ends with its parent without a word, and none that is stopped is waited for, for ever."""

from __future__ import annotations

import os
import pickle
import socket
import warnings
from collections.abc import Callable

import pytest

from tests.by_hand import PATIENCE, no_descriptor_leaks
from vnetdp.backends import process
from vnetdp.datapath import Datapath
from vnetdp.migration import host
from vnetdp.notify import readable

LOOK = pickle.dumps(("look", ()))
PING = pickle.dumps((0, "ping", ()))


def _be_worker(sock: socket.socket) -> None:
    _, events = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process.main((sock.detach(), events.detach(), os.dup(Datapath(1).block.fd)), 1, 0)


def _be_host(sock: socket.socket) -> None:
    host.main(sock.detach(), quiet=True)


@pytest.mark.parametrize(("main", "request_"), [(_be_worker, PING), (_be_host, LOOK)], ids=["worker", "host"])
def test_a_child_whose_parent_leaves_an_answer_unread_ends_quietly(
    main: Callable[[socket.socket], None], request_: bytes
) -> None:
    """Without the thread that ends a child beside its main thread: either may be first to see that the parent is gone."""
    with no_descriptor_leaks():
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on, if threads run
            pid = os.fork()
        if pid == 0:
            try:
                ours.close()
                main(theirs)
                os._exit(0)
            except BaseException:  # noqa: BLE001 - nothing may pass: behind it are the tests
                os._exit(1)
        with ours, theirs:
            ours.send(request_)
            assert readable(ours, PATIENCE)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
