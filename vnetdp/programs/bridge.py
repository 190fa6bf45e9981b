"""Bridge: two vhost-user front ends, each a guest, joined with one copy from ring to ring."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import Any

import numpy as np

from vnetdp_kernels import rows as r
from vnetdp_kernels.loops import join
from vnetdp_kernels.rows import Control, Limits

from ..backends.worker import WorkerBackend
from ..datapath.datapath import Datapath, scratch_for
from ..datapath.loop_thread import LoopThread, call_away
from ..endpoints.loopback import NullEndpoint
from ..errors import ConfigError
from ..shared.memory import Bytes, Words
from ..shared.notify import EventFd
from ..system.listener import check_free
from ..system.owned import Owned
from ..system.socket_path import check_path
from ..vhost_user.back_end.server import Server
from ..vhost_user.back_end.session import USUAL_PROTOCOL_FEATURES
from ..vhost_user.message import ProtocolFeature
from ..virtio.state import DEFAULT_MAC
from ..warmup import compile_once

_LOOK_S = 0.2
_MACS = (DEFAULT_MAC, DEFAULT_MAC[:-1] + b"\x57")  # for guests that ask which they have


class _Side:
    """One guest's half: its own rings, memory and log, in a thread that both halves share."""

    def __init__(self, loop_thread: LoopThread, datapath: Datapath) -> None:
        self.loop_thread = loop_thread
        self.datapath = datapath
        self.backends = [WorkerBackend(loop_thread, datapath, pair) for pair in range(datapath.pairs)]


class Join(Owned):
    """The rings of two guests, for one thread to run (see `Runnable`)."""

    def __init__(self, queue_pairs: int = 1) -> None:
        with ExitStack() as stack:
            self._datapaths: list[Datapath] = []
            for _ in range(2):
                self._datapaths.append(Datapath(queue_pairs))
                stack.callback(self._datapaths[-1].close)
            self.ctl: Words = np.zeros(r.CTL_SLOTS, np.int64)
            self.bell = stack.enter_context(EventFd())
            self._wire: Words = np.zeros((2, r.EP_SLOTS), np.int64)
            self._wire[:, r.EP_KIND] = r.KIND_ECHO
            self._held: Bytes = np.zeros(r.FRAME_SLOT, np.uint8)
            self._scratch = scratch_for(2 * queue_pairs)
            self.ctl[r.CTL_DOORBELL] = 1
            self.run()  # compiles, if that is to be done, before a front end waits for an answer
            self.ctl[r.CTL_DOORBELL] = 0
            self._made = stack.pop_all()

    def run(self, budget: int = -1, poll_us: int = 0, timeout_ms: int = 0) -> tuple[int, int]:
        """Join the two guests (see `Runnable`)."""
        a, b = (datapath.rings for datapath in self._datapaths)
        control, limits = Control(self.ctl, self.bell.fd), Limits(budget, poll_us, timeout_ms)
        return join.join(a, b, self._wire, self._held, control, self._scratch, limits)

    def close(self) -> None:
        if self.bell.fd >= 0 and not self.inherited:
            call_away(self)
        self._made.close()


def warm_up(say: Callable[[str], None]) -> None:
    """Compile, or load from the cache, the kernels that join two guests."""
    compile_once("the kernel that joins two guests", [join.join], lambda: Join().close(), say)


def check_sockets(left: str, right: str) -> None:
    """Raise ConfigError unless two sockets can be listened on at these paths; nothing stays behind."""
    for path in (left, right):
        check_path(path, "cannot listen on")
    if os.path.realpath(left) == os.path.realpath(right):
        raise ConfigError(f"both guests are to attach to {left}: name another socket for one of them")
    for path in (left, right):
        check_free(path)


class Bridge(Join):
    """Two back ends, each on a socket of its own: each guest receives the frames that the other sends.

    Offloads are not offered: a checksum or segment that one guest leaves undone, the other may not be able to do. Nor
    is RARP: where a guest has moved to matters to a switch, and there is none. poll_us as in `Worker`.
    """

    def __init__(self, left: str, right: str, *, queue_pairs: int = 1, poll_us: int = 0) -> None:
        check_sockets(left, right)
        super().__init__(queue_pairs)
        with ExitStack() as stack:
            stack.callback(super().close)
            self._loop_thread = LoopThread(self, "bridge", poll_us)
            stack.callback(self._loop_thread.close)
            self._loop_thread.start()
            self._sides = [_Side(self._loop_thread, datapath) for datapath in self._datapaths]
            self.servers = []
            for path, side, mac in zip((left, right), self._sides, _MACS, strict=True):
                end = stack.enter_context(NullEndpoint(queue_pairs))
                server = Server(
                    end,
                    path,
                    queue_pairs=queue_pairs,
                    protocol_features=USUAL_PROTOCOL_FEATURES & ~ProtocolFeature.RARP,
                    mac=mac,
                    worker=side,
                )
                self.servers.append(stack.enter_context(server))
            self._stack = stack.pop_all()

    def serve(self, stop: Callable[[], bool]) -> None:
        """Serve both sockets until *stop* says so (looked at five times a second), or one can't be served any more.

        An error that ends one side ends the other as well, and is raised.
        """
        ended = threading.Event()
        with EventFd() as left, EventFd() as right, ThreadPoolExecutor(len(self.servers), "bridge-server") as pool:
            sides = [
                pool.submit(server.run, ended.is_set, wake.fd)
                for server, wake in zip(self.servers, (left, right), strict=True)
            ]
            try:
                while not stop() and not wait(sides, _LOOK_S, FIRST_COMPLETED).done:
                    pass
            finally:
                ended.set()
                left.signal()
                right.signal()
            for side in sides:
                side.result()

    def report(self) -> dict[str, Any]:
        """Return the counts of frames and drops each way, as plain values."""
        names = ("left_to_right", "right_to_left")
        return {
            name: {
                "packets": int(row[r.EP_TO_WIRE]),
                "dropped_short": int(row[r.EP_DROP_SHORT]),
                "dropped_no_buffer": int(row[r.EP_DROP_NO_BUFFER]),
                "dropped_offload": int(row[r.EP_DROP_OFFLOAD]),
                "dropped_no_guest": int(row[r.EP_DROP_ERROR]),  # there was no guest to receive them
            }
            for name, row in zip(names, self._wire, strict=True)
        } | {"served": [server.served for server in self.servers]}

    def close(self) -> None:
        """Stop the thread, and give up both sockets."""
        self._stack.close()
