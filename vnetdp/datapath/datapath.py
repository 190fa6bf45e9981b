"""Datapath: a straight line between an endpoint and the rings of one device, shared by every local backend.

A datapath owns the device's queue rows and the scratch that kernels need; the worker or device that has it runs it.
"""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from functools import cache

import numpy as np

from vnetdp_kernels import rows as r
from vnetdp_kernels import spec
from vnetdp_kernels.loops.serve import serve
from vnetdp_kernels.loops.side import run_side
from vnetdp_kernels.platform import peer
from vnetdp_kernels.rows import Control, Guest, LoopScratch, Rings, Scratch
from vnetdp_kernels.wire import frame, port

from ..endpoints.base import Endpoint
from ..shared.memory import Bytes, DirtyLog, GuestMemory, SharedBlock, Words
from ..shared.notify import EventFd
from ..system.owned import Owned
from ..virtio.queue import queues_of
from .loop_thread import call_away
from .side import Side

_UNSET = (
    r.VQ_DESC,
    r.VQ_AVAIL,
    r.VQ_USED,
    r.VQ_DESC_GPA,
    r.VQ_AVAIL_GPA,
    r.VQ_USED_GPA,
    r.VQ_LOG_USED,
)
NO_LOG: Bytes = np.zeros(0, np.uint8)
NO_MEMORY: Bytes = np.zeros(1, np.uint8)
NO_TABLE: Words = np.zeros((0, r.REGION_SLOTS), np.int64)


class _Own(threading.local):
    scratch: LoopScratch | None = None


_own = _Own()


def _forget() -> None:
    _own.scratch = None  # it names the parent's context of asynchronous I/O


os.register_at_fork(after_in_child=_forget)


def scratch_of_thread(pairs: int) -> LoopScratch:
    """Return the scratch arrays that all loops over up to *pairs* queue pairs share which the calling thread runs."""
    scratch = _own.scratch
    if scratch is None or scratch.pollfds.shape[1] <= 3 * pairs:
        scratch = _own.scratch = scratch_for(pairs)
    return scratch


@cache
def _nothing(pairs: int) -> Endpoint:
    """Return the endpoint of every datapath of *pairs* queue pairs while no ring is bound: no frame reaches it."""
    return _Nothing(pairs)


class _Nothing(Endpoint):
    kind = r.KIND_NULL
    name = "nothing"


def scratch_for(pairs: int, max_num: int = spec.VIRTQ_MAX_NUM) -> LoopScratch:
    """Return the scratch arrays of a loop over *pairs* queue pairs of up to *max_num* descriptors."""
    cap = max(max_num, r.MIN_CHAIN_CAP)
    frames = Scratch(
        iov=np.zeros((2 * cap, r.IOV_SLOTS), np.int64),
        frame_iov=np.zeros((cap, r.IOV_SLOTS), np.int64),
        chains=np.zeros((cap, 2), np.int64),
        hdr=np.zeros(frame.HDR_SCRATCH, np.uint8),
        words=np.zeros(port.SCRATCH_WORDS, np.int64),
    )
    return LoopScratch(frames, pollfds=np.zeros((2, 3 * pairs + 1), np.int64), one=peer.tell_words())


class Datapath(Owned):
    """The device's side of the rings of *pairs* queue pairs, for `UserspaceBackend` to steer. Nothing runs but by `run`.

    It is not thread-safe: no verb of its backends may be called while it runs. `block_fd` and `stepped` are internal.
    Its rows, in shared memory, are vqs int64[2 × pairs, VQ_SLOTS]: receiveq 2i, transmitq 2i + 1.
    """

    def __init__(self, pairs: int, block_fd: int | None = None, stepped: bool = False) -> None:
        self.pairs = pairs
        self.stepped = stepped  # nothing sleeps: a descriptor that nobody else has asked for is not made
        with ExitStack() as made:
            self.block = SharedBlock(queues_of(pairs) * r.VQ_SLOTS * 8 + spec.PAGE_SIZE, block_fd, later=True)
            made.callback(self.block.close)
            self._own_endpoint = self.endpoint = _nothing(pairs)
            self.bell = EventFd(later=stepped)
            made.pop_all()
        self.vqs: Words = self.block.carve(np.int64, queues_of(pairs), r.VQ_SLOTS)
        self.ctl: Words = self.block.carve(np.int64, r.CTL_SLOTS)
        self.memory: GuestMemory | None = None
        self.log: DirtyLog | None = None
        self.logging: set[int] = set()  # pairs with VHOST_F_LOG_ALL
        self.translated: list[GuestMemory | None] = [None] * queues_of(pairs)  # by which table a ring's offsets are
        self.notify: Words = np.full((queues_of(pairs), 2), -1, np.int64)
        self._side: Side | None = None
        self._in_kernel = False
        self._abandoned = False
        if block_fd is None:
            for slot in _UNSET:
                self.vqs[:, slot] = -1
            self.vqs[:, r.VQ_ENABLED] = 1

    @property
    def bound(self) -> bool:
        """True while a ring is bound."""
        return self.endpoint is not self._own_endpoint

    @property
    def dirty_bits(self) -> Bytes:
        """The dirty log's bits, if writes are logged; else an empty array. @private"""
        return self.log.log if self.log and self.logging else NO_LOG

    @property
    def rings(self) -> Rings:
        """The rings as kernels take them; guest memory is left out while no ring is bound."""
        memory = self.memory if self.bound else None
        guest = (
            Guest(memory.mem, memory.table, self.dirty_bits) if memory else Guest(NO_MEMORY, NO_TABLE, self.dirty_bits)
        )
        return Rings(guest, self.vqs, self.notify)

    @property
    def side(self) -> Side:
        """The device's side of the rings, for the thread that asks. @private"""
        memory = self.memory if self.bound else None
        mem, scratch = memory.mem if memory else NO_MEMORY, scratch_of_thread(self.pairs)
        wire, fd, side = self.endpoint.wire, self.bell.made, self._side
        if side is None or not side.has(mem, self.dirty_bits, wire, fd, scratch):
            side = self._side = Side(serve, self.rings, wire, Control(self.ctl, fd), scratch)
        return side

    def run(self, budget: int = -1, poll_us: int = 0, timeout_ms: int = 0) -> tuple[int, int]:
        """Serve the bound queues, in this thread. Return two numbers: an internal one, and the frames moved.

        - `budget`: move at most so many frames; -1 sets no limit.
        - `poll_us`: busy-poll so many microseconds before sleeping; -1 never sleeps.
        - `timeout_ms`: 0 returns once there is nothing to do; -1 waits for more, without end.
        """
        self.check_maker()
        endpoint = self.endpoint
        moved = 0
        while True:
            endpoint.service()
            self._in_kernel = True  # before the look at _abandoned: `abandon` does it the other way round
            if self._abandoned:
                self._in_kernel = False
                return r.LOOP_CONTROL, moved
            left = budget if budget < 0 else budget - moved
            reason, n = run_side(self.side.row, left, poll_us, timeout_ms)
            self._in_kernel = False
            moved += n
            if reason != r.LOOP_PYTHON:
                endpoint.service()
                return reason, moved
            if 0 <= budget <= moved:
                endpoint.service()
                return r.LOOP_BUDGET, moved

    def abandon(self) -> bool:
        """Have the thread that runs the datapath enter no kernel ever again; False, and nothing done, if it is in one now.

        The thread may be in an endpoint's Python code for any time; the rings can be taken from it all the same.
        @private
        """
        self._abandoned = True
        if self._in_kernel:
            self._abandoned = False
        return self._abandoned

    def let_go(self) -> None:
        """Forget the endpoint, once no ring is bound: the next one to poll it serves its Python side alone. @private"""
        self.endpoint = self._own_endpoint
        self._side = None  # it would keep guest memory mapped

    def close(self) -> None:
        if self.bell.made >= 0 and not self.inherited:
            call_away(self)
        self.bell.close()
        self.block.close()
