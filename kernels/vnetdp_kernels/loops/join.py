"""Two guests on one wire: a frame is copied once, from the sender's buffers into the receiver's."""

from __future__ import annotations

from .. import rows as r
from ..net.device import discard_transmitq, forward
from ..platform.atomic import Bytes, Words
from ..platform.io import POLLIN
from ..platform.jit import inlined, kernel
from ..rows import Control, Limits, LoopScratch, Rings
from ..virtq import split_device as ring
from . import wait
from .serve import call, disable_kicks


@inlined
def _usable(vq: Words) -> bool:
    return bool(vq[r.VQ_BOUND] and vq[r.VQ_ENABLED] and not vq[r.VQ_STATUS])


@kernel
def _call_if_due(rings: Rings, queue: int, scratch: LoopScratch) -> None:
    """Make the decision about a call that an owner of the ring before this one may have left open."""
    vq = rings.vqs[queue]
    if vq[r.VQ_CALL_DUE] and _usable(vq):
        vq[r.VQ_CALL_DUE] = 0
        call(rings.guest.mem, vq, rings.notify[queue, 1], scratch.one, scratch.pollfds)


@kernel
def _one_way(src: Rings, dst: Rings, pair: int, ep: Words, slot: Bytes, scratch: LoopScratch) -> int:
    """Move a batch from a transmitq to the other guest's receiveq; frames for an unusable receiveq are used and dropped."""
    rx, tx = 2 * pair, 2 * pair + 1
    txq, rxq = src.vqs[tx], dst.vqs[rx]
    if not txq[r.VQ_BOUND] or txq[r.VQ_STATUS]:
        return 0
    if not txq[r.VQ_ENABLED] or not _usable(rxq):
        moved = discard_transmitq(src.guest.mem, txq, src.guest.log, wait.BATCH)
        ep[r.EP_DROP_ERROR] += moved
    else:
        moved = forward(src.guest, txq, dst.guest, rxq, ep, slot, scratch.frames, wait.BATCH)
        if moved:
            call(dst.guest.mem, rxq, dst.notify[rx, 1], scratch.one, scratch.pollfds)
    if moved:
        call(src.guest.mem, txq, src.notify[tx, 1], scratch.one, scratch.pollfds)
    return moved


@inlined
def _usable_of(rings: Rings, pair: int) -> int:
    return int(_usable(rings.vqs[2 * pair])) + 2 * int(_usable(rings.vqs[2 * pair + 1]))


@kernel
def _pass(a: Rings, b: Rings, eps: Words, slot: Bytes, scratch: LoopScratch) -> tuple[int, int]:
    """Give each queue pair a turn, both ways; return (chains moved; findings, as in `wait`)."""
    moved = 0
    for pair in range(a.vqs.shape[0] // 2):
        a_ok, b_ok = _usable_of(a, pair), _usable_of(b, pair)
        for queue in (2 * pair, 2 * pair + 1):
            _call_if_due(a, queue, scratch)
            _call_if_due(b, queue, scratch)
        moved += _one_way(a, b, pair, eps[0], slot, scratch)
        moved += _one_way(b, a, pair, eps[1], slot, scratch)
        if a_ok != _usable_of(a, pair) or b_ok != _usable_of(b, pair):
            return moved, wait.BROKEN
    return moved, wait.SERVED


@kernel
def _ask(src: Rings, src_first: int, dst: Rings, dst_first: int, pair: int, pollfds: Words, n: int) -> tuple[bool, int]:
    """Ask for the one kick that can set a way going again, and poll for it: (look again at once, entries of pollfds).

    It is the transmitq's; if frames that wait there found no buffers, the receiveq's. Buffers for frames that do not
    come are no reason to wake. src_first and dst_first: the code of a pollfd of queue 0 of either.
    """
    rx, tx = 2 * pair, 2 * pair + 1
    txq, rxq = src.vqs[tx], dst.vqs[rx]
    if txq[r.VQ_BOUND] and not txq[r.VQ_STATUS]:
        if ring.known_available(txq) == 0:
            n = wait.add_pollfd(pollfds, n, src.notify[tx, 0], POLLIN, src_first + tx)
            return ring.enable_kicks(src.guest.mem, txq, src.guest.log), n
        if _usable(rxq):
            n = wait.add_pollfd(pollfds, n, dst.notify[rx, 0], POLLIN, dst_first + rx)
            return ring.enable_kicks(dst.guest.mem, rxq, dst.guest.log), n
    return False, n


@kernel
def _watch(a: Rings, b: Rings, control: Control, pollfds: Words, wait_ms: int) -> tuple[bool, int, int]:
    """Ask for kicks both ways, and fill pollfds; return (look again at once, pollfds, ms to wait at most)."""
    again = False
    n = wait.add_control(pollfds, control)
    queues = a.vqs.shape[0]
    for pair in range(queues // 2):
        asked, n = _ask(a, 0, b, queues, pair, pollfds, n)
        again |= asked
        asked, n = _ask(b, queues, a, 0, pair, pollfds, n)
        again |= asked
    for k in range(n):
        if pollfds[0, k] & 0xFFFFFFFF == 0xFFFFFFFF:
            wait_ms = wait.POLL_UNNOTIFIED_MS
    return again, n, wait_ms


@kernel
def join(
    a: Rings, b: Rings, eps: Words, slot: Bytes, control: Control, scratch: LoopScratch, limits: Limits
) -> tuple[int, int]:
    """Serve the bound queues of two devices with the same number of pairs; return (LOOP_*, chains moved).

    eps int64[2, EP_SLOTS]: the wire's counters, from a and from b. scratch.pollfds int64[2, 2 * pairs + 1]. A pass is whole,
    so more chains than limits.budget may move.
    """
    moved = 0
    waited = 0
    since = 0
    while True:
        n, found = _pass(a, b, eps, slot, scratch)
        moved += n
        why = wait.leave(control, limits, moved, found)
        if why != wait.GO_ON:
            return why, moved
        if n:
            since = 0
            waited = 0
            continue
        if limits.timeout_ms == 0:
            return r.LOOP_IDLE, moved
        again, since = wait.busy(limits, scratch, since)
        if again:
            continue
        wait_ms = limits.timeout_ms if limits.timeout_ms < 0 else limits.timeout_ms - waited
        again, n_fds, wait_ms = _watch(a, b, control, scratch.pollfds, wait_ms)
        woken = 0
        if not again:
            why, waited = wait.sleep(control, limits, scratch.pollfds, n_fds, wait_ms, waited)
            if why != wait.GO_ON:
                return why, moved
            woken = wait.take_woken(scratch.pollfds, n_fds, eps)
            wait.take_notifications(scratch, n_fds, 0, a.vqs, r.VQ_KICKS, a.notify, 0)
            wait.take_notifications(scratch, n_fds, a.vqs.shape[0], b.vqs, r.VQ_KICKS, b.notify, 0)
        disable_kicks(a)
        disable_kicks(b)
        why = wait.leave_awake(woken, eps)
        if why != wait.GO_ON:
            return why, moved
