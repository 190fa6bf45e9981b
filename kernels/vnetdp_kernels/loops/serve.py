"""The loop of a device's side: passes over all queues, and the sleep between them.

`serve` returns only when the doorbell rings, a budget is used up, an endpoint in Python has work, or a queue broke (`wait`).
Before a loop sleeps, it asks for notifications and looks at the rings once more.
"""

from __future__ import annotations

from .. import rows as r
from ..net.device import discard_transmitq, drain_transmitq, fill_receiveq, forward
from ..platform.atomic import Bytes, Words
from ..platform.io import POLLIN, POLLOUT, signal
from ..platform.jit import inlined, kernel
from ..platform.peer import tell
from ..rows import Control, Limits, LoopScratch, Rings, Wire
from ..virtq import split_device as ring
from ..wire.answer import answers
from ..wire.faulty import TO_WIRE, takes
from ..wire.port import send_on, sink_of, source_of
from . import wait


@kernel
def call(mem: Bytes, vq: Words, fd: int, one: Words, pollfds: Words) -> None:
    """Send a used buffer notification to *fd* (-1 = none), if the driver wants to hear of it.

    one, pollfds: of `LoopScratch`.
    """
    if ring.needs_call(mem, vq):
        vq[r.VQ_CALLS] += 1
        if fd >= r.NOTIFY_PEER:
            tell(fd & 0xFFFFFFFF, one, pollfds)
        elif fd >= 0:
            signal(fd, one)


@inlined
def _serves(vq: Words) -> bool:
    return bool(vq[r.VQ_BOUND] and not vq[r.VQ_STATUS])


@kernel
def disable_kicks(rings: Rings) -> None:
    """Tell the driver of each bound queue that kicks are not needed."""
    for n in range(rings.vqs.shape[0]):
        if rings.vqs[n, r.VQ_BOUND]:
            ring.disable_kicks(rings.guest.mem, rings.vqs[n], rings.guest.log)


@inlined
def _serve_pass(rings: Rings, wire: Wire, scratch: LoopScratch, left: int) -> tuple[int, int]:
    """Give each queue a turn, and call its driver; return (frames moved, *left* at most; findings, as in `wait`)."""
    guest = rings.guest
    moved = 0
    found = 0
    for q in range(rings.vqs.shape[0] // 2):
        rxq = rings.vqs[2 * q]
        txq = rings.vqs[2 * q + 1]
        ep = wire.eps[q]
        if rxq[r.VQ_BOUND] or txq[r.VQ_BOUND]:
            found |= wait.SERVED
            if ep[r.EP_KIND] >= r.KIND_PYTHON:
                found |= wait.JOINS_PYTHON
        turn = wait.turn(left - moved)
        serve_tx = _serves(txq)
        serve_rx = _serves(rxq) and rxq[r.VQ_ENABLED] != 0
        chains_tx = 0
        frames_rx = 0
        if serve_tx and not txq[r.VQ_ENABLED]:
            chains_tx = discard_transmitq(guest.mem, txq, guest.log, turn)
            moved += chains_tx
        elif answers(ep):
            if serve_tx and serve_rx:
                chains_tx = forward(guest, txq, guest, rxq, ep, wire.pending[q], scratch.frames, turn)
                frames_rx = chains_tx
                moved += chains_tx
        else:
            if serve_tx and turn:
                chains_tx = drain_transmitq(guest, txq, sink_of(wire, q), scratch.frames, turn)
                moved += chains_tx
            turn = wait.turn(left - moved)
            if serve_rx and turn:
                frames_rx = fill_receiveq(guest, rxq, source_of(wire, q), scratch.frames, turn)
                moved += frames_rx
            if ep[r.EP_OUT_COUNT] > 0 and txq[r.VQ_BOUND] and send_on(sink_of(wire, q), scratch.frames.words):
                found |= wait.PYTHON
        if serve_tx and (chains_tx or txq[r.VQ_CALL_DUE]):
            call(guest.mem, txq, rings.notify[2 * q + 1, 1], scratch.one, scratch.pollfds)
        if serve_rx and (frames_rx or rxq[r.VQ_CALL_DUE]):
            call(guest.mem, rxq, rings.notify[2 * q, 1], scratch.one, scratch.pollfds)
        txq[r.VQ_CALL_DUE] &= not serve_tx
        rxq[r.VQ_CALL_DUE] &= not serve_rx
        if (serve_tx and txq[r.VQ_STATUS]) or (serve_rx and rxq[r.VQ_STATUS]):
            return moved, wait.BROKEN
    return moved, found


@kernel
def _watch_device(
    rings: Rings, wire: Wire, control: Control, scratch: LoopScratch, wait_ms: int
) -> tuple[bool, int, int, int]:
    """Ask for the kicks that can set a queue going again, and fill pollfds.

    Returns (look again at once, pollfds, ms to wait at most, PYTHON if an endpoint in Python takes no frames now).
    """
    guest, notify, pollfds = rings.guest, rings.notify, scratch.pollfds
    again = False
    found = 0
    n = wait.add_control(pollfds, control)
    for q in range(rings.vqs.shape[0] // 2):
        rxq = rings.vqs[2 * q]
        txq = rings.vqs[2 * q + 1]
        ep = wire.eps[q]
        events = 0
        forwards = answers(ep) and txq[r.VQ_ENABLED] != 0
        no_room = False  # frames to forward wait for receive buffers: more frames change nothing
        serve_rx = _serves(rxq) and rxq[r.VQ_ENABLED] != 0
        if _serves(txq) and (serve_rx or not forwards):
            # Known chains that are still there are held up by something else. Chains that came since the last look are
            # for enable_kicks to find: taken for held up, they would be slept on.
            if ring.known_available(txq) > 0:
                no_room = forwards
                if ep[r.EP_KIND] < r.KIND_FAULT:
                    events |= POLLOUT
                elif ep[r.EP_KIND] != r.KIND_PYTHON:
                    again |= takes(ep, TO_WIRE)  # frames that were due have made room
            else:
                again |= ring.enable_kicks(guest.mem, txq, guest.log)
                n = wait.add_pollfd(pollfds, n, notify[2 * q + 1, 0], POLLIN, 2 * q + 1)
                wait_ms = wait_ms if notify[2 * q + 1, 0] >= 0 else wait.POLL_UNNOTIFIED_MS
        if serve_rx:
            # Buffers for frames to forward are looked at only when there are such frames.
            if no_room or (not forwards and (ep[r.EP_PENDING] or ring.known_available(rxq) == 0)):
                again |= ring.enable_kicks(guest.mem, rxq, guest.log)
                n = wait.add_pollfd(pollfds, n, notify[2 * q, 0], POLLIN, 2 * q)
                wait_ms = wait_ms if notify[2 * q, 0] >= 0 else wait.POLL_UNNOTIFIED_MS
            else:
                events |= POLLIN
                wait_ms = wait.due_ms(ep, scratch.frames.words, wait_ms)
        if txq[r.VQ_BOUND] and ep[r.EP_BLOCKED]:
            events, wait_ms, held = wait.held_up(ep, events, wait_ms)
            found |= held
        if events and wait.is_polled(ep):
            n = wait.add_endpoint(pollfds, n, wire.fds[q], events, q)
        if txq[r.VQ_BOUND] and ep[r.EP_OUT_COUNT]:
            wait_ms = wait.held_ms(ep, scratch.frames.words, wait_ms)
    return again, n, wait_ms, found


@kernel
def serve(rings: Rings, wire: Wire, control: Control, scratch: LoopScratch, limits: Limits) -> tuple[int, int]:
    """Serve the bound queues of all pairs; return (LOOP_*, frames moved). An endpoint may have more pairs than the rings."""
    moved = 0
    waited = 0
    since = 0
    if limits.poll_us:
        # A ring just bound asks for kicks, and a loop that never sleeps would never take that back.
        disable_kicks(rings)
    while True:
        n, found = _serve_pass(rings, wire, scratch, wait.budget_left(limits, moved))
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
        if found & wait.SERVED:
            again, since = wait.busy(limits, scratch, since)
            if again:
                if found & wait.JOINS_PYTHON and limits.poll_us < 0:
                    return r.LOOP_PYTHON, moved  # only Python can tell whether its endpoint has more
                continue
        wait_ms = limits.timeout_ms if limits.timeout_ms < 0 else limits.timeout_ms - waited
        again, n_fds, wait_ms, blocked = _watch_device(rings, wire, control, scratch, wait_ms)
        woken = 0
        if not again:
            why, waited = wait.sleep(control, limits, scratch.pollfds, n_fds, wait_ms, waited)
            if why != wait.GO_ON:
                return why, moved
            woken = blocked | wait.take_woken(scratch.pollfds, n_fds, wire.eps)
            wait.take_notifications(scratch, n_fds, 0, rings.vqs, r.VQ_KICKS, rings.notify, 0)
        disable_kicks(rings)
        why = wait.leave_awake(woken, wire.eps)
        if why != wait.GO_ON:
            return why, moved
