"""The loop of a guest's side: passes over all queues of a driver, and the sleep between them, as `serve` has them."""

from __future__ import annotations

from .. import rows as r
from ..net import driver
from ..platform.atomic import Bytes, Words
from ..platform.io import POLLIN, signal
from ..platform.jit import inlined, kernel
from ..rows import Control, DriverRings, Limits, LoopScratch, Wire
from ..virtq import split_driver
from ..wire.answer import answers
from ..wire.port import send_on, sink_of, source_of, takes
from . import wait


@inlined
def _kick(mem: Bytes, dvq: Words, fd: int, one: Words) -> None:
    if split_driver.needs_kick(mem, dvq):
        dvq[r.DVQ_KICKS] += 1
        if fd >= 0:
            signal(fd, one)


@inlined
def _drive_pass(rings: DriverRings, wire: Wire, scratch: LoopScratch, left: int) -> tuple[int, int]:
    """Give each queue a turn, and kick its device; return (frames moved, *left* at most; findings, as in `wait`)."""
    mem, states, notify = rings.mem, rings.states, rings.notify
    moved = 0
    found = wait.SERVED
    for q in range(rings.dvqs.shape[0] // 2):
        rxq = rings.dvqs[2 * q]
        txq = rings.dvqs[2 * q + 1]
        if rxq[r.DVQ_STATUS] or txq[r.DVQ_STATUS]:
            continue
        ep = wire.eps[q]
        if ep[r.EP_KIND] >= r.KIND_PYTHON:
            found |= wait.JOINS_PYTHON
        turn = wait.turn(left - moved)
        moved += driver.receive(mem, rxq, states[2 * q], txq, states[2 * q + 1], sink_of(wire, q), scratch.frames, turn)
        turn = wait.turn(left - moved)
        moved += driver.send(mem, txq, states[2 * q + 1], source_of(wire, q), scratch.frames.words, turn)
        _kick(mem, txq, notify[2 * q + 1, 0], scratch.one)
        _kick(mem, rxq, notify[2 * q, 0], scratch.one)
        if rxq[r.DVQ_STATUS] or txq[r.DVQ_STATUS]:
            return moved, wait.BROKEN
        if ep[r.EP_OUT_COUNT] > 0 and send_on(sink_of(wire, q), scratch.frames.words):
            found |= wait.PYTHON
    return moved, found


@kernel
def _watch_driver(
    rings: DriverRings, wire: Wire, control: Control, scratch: LoopScratch, wait_ms: int
) -> tuple[bool, int, int, int]:
    """Ask for the calls that can set a queue going again, and fill pollfds; returns as `serve._watch_device`."""
    pollfds = scratch.pollfds
    again = False
    found = 0
    n = wait.add_control(pollfds, control)
    for q in range(rings.dvqs.shape[0] // 2):
        rxq = rings.dvqs[2 * q]
        txq = rings.dvqs[2 * q + 1]
        ep = wire.eps[q]
        if rxq[r.DVQ_STATUS] or txq[r.DVQ_STATUS]:
            continue
        events = 0
        held = 0
        if ep[r.EP_BLOCKED]:
            events, wait_ms, held = wait.held_up(ep, events, wait_ms)
            found |= held  # received frames wait in the ring
        # With a full faulty wire they wait there until a frame that is held back was due.
        full = ep[r.EP_KIND] >= r.KIND_FAULT and not takes(ep, wire.out_lengths.shape[1])
        if not (held or full) and (txq[r.DVQ_NUM_FREE] or not answers(ep)):
            again |= split_driver.enable_calls(rings.mem, rxq)
            n = wait.add_pollfd(pollfds, n, rings.notify[2 * q, 1], POLLIN, 2 * q)
            wait_ms = wait_ms if rings.notify[2 * q, 1] >= 0 else wait.POLL_UNNOTIFIED_MS
        if txq[r.DVQ_NUM_FREE] == 0:
            again |= split_driver.enable_calls(rings.mem, txq)
            n = wait.add_pollfd(pollfds, n, rings.notify[2 * q + 1, 1], POLLIN, 2 * q + 1)
            wait_ms = wait_ms if rings.notify[2 * q + 1, 1] >= 0 else wait.POLL_UNNOTIFIED_MS
        else:
            wait_ms = wait.due_ms(ep, scratch.frames.words, wait_ms)
            events |= POLLIN
        if events and wait.is_polled(ep):
            n = wait.add_endpoint(pollfds, n, wire.fds[q], events, q)
        if ep[r.EP_OUT_COUNT]:
            wait_ms = wait.held_ms(ep, scratch.frames.words, wait_ms)
    return again, n, wait_ms, found


@kernel
def drive(rings: DriverRings, wire: Wire, control: Control, scratch: LoopScratch, limits: Limits) -> tuple[int, int]:
    """Run the guest's driver on all pairs: endpoint to transmitq, receiveq to endpoint; return (LOOP_*, frames moved)."""
    moved = 0
    waited = 0
    since = 0
    while True:
        n, found = _drive_pass(rings, wire, scratch, wait.budget_left(limits, moved))
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
            if found & wait.JOINS_PYTHON and limits.poll_us < 0:
                return r.LOOP_PYTHON, moved  # only Python can tell whether its endpoint has more
            continue
        wait_ms = limits.timeout_ms if limits.timeout_ms < 0 else limits.timeout_ms - waited
        again, n_fds, wait_ms, blocked = _watch_driver(rings, wire, control, scratch, wait_ms)
        woken = 0
        if not again:
            why, waited = wait.sleep(control, limits, scratch.pollfds, n_fds, wait_ms, waited)
            if why != wait.GO_ON:
                return why, moved
            woken = blocked | wait.take_woken(scratch.pollfds, n_fds, wire.eps)
            wait.take_notifications(scratch, n_fds, 0, rings.dvqs, r.DVQ_CALLS, rings.notify, 1)
        for i in range(rings.dvqs.shape[0]):
            split_driver.disable_calls(rings.mem, rings.dvqs[i])
        why = wait.leave_awake(woken, wire.eps)
        if why != wait.GO_ON:
            return why, moved
