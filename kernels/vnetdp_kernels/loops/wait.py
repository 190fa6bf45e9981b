"""How a loop's turn ends, the same for every loop: it leaves, busy-polls, or sleeps until a descriptor is ready.

A loop is a pass over its rings, `leave`, `busy`; then it asks for notifications, fills pollfds (`add_pollfd`), and calls
`sleep`, `take_woken` and `take_notifications`. Sleeping is a poll() on the control descriptor, the eventfds and the
endpoints, without the GIL.
"""

from __future__ import annotations

from .. import rows as r
from ..platform.atomic import Words, load_i64_acquire
from ..platform.io import EAGAIN, EINTR, POLLGONE, POLLIN, POLLOUT, clock_ns, poll
from ..platform.jit import inlined, kernel
from ..platform.peer import take
from ..rows import Control, Limits, LoopScratch
from ..wire.faulty import FROM_WIRE, takes
from ..wire.port import CLOCK_AT, due_in_ns, out_due_ns

BATCH = 64  # frames a queue moves before the next has its turn, and before its indices are published
NO_END = 1 << 62  # frames of a pass without a budget
POLL_UNNOTIFIED_MS = 1  # a ring whose other side has no descriptor to notify is looked at this often
BLOCKED_MS = 1  # an endpoint in Python that takes no frames is asked this often
LOST_MS = 20  # a socket without a connection is looked at this often

GO_ON = -1  # beside LOOP_*: the loop does not return

# The findings of a pass, and of poll().
BROKEN = 1  # a queue broke
PYTHON = 2  # an endpoint in Python has work
SERVED = 4  # there is a queue to serve: busy-polling makes sense
JOINS_PYTHON = 8  # one of these has an endpoint in Python
CONTROL = 16  # the control descriptor is readable

# The role of a pollfd, beside the number of a queue.
_CONTROL = -1
_ENDPOINT = -2  # the endpoint of pair 0; -3 that of pair 1, ...


@inlined
def turn(left: int) -> int:
    """Return the frames that a queue may move at once, of *left*."""
    return min(BATCH, left)


@inlined
def budget_left(limits: Limits, moved: int) -> int:
    """Return the frames that the loop may still move."""
    return NO_END if limits.budget < 0 else limits.budget - moved


@inlined
def leave(control: Control, limits: Limits, moved: int, found: int) -> int:
    """Return why the loop has to return after a pass that found *found*, or GO_ON. *moved*: frames since it began."""
    control.words[r.CTL_PASSES] += 1
    if found & BROKEN:
        return r.LOOP_BROKEN
    # Asked for only after a pass: a thread that is halted again and again still gets one each time.
    if load_i64_acquire(control.words, r.CTL_DOORBELL):
        return r.LOOP_CONTROL
    if found & PYTHON:
        return r.LOOP_PYTHON
    if 0 <= limits.budget <= moved:
        return r.LOOP_BUDGET
    return GO_ON


@inlined
def busy(limits: Limits, scratch: LoopScratch, since: int) -> tuple[bool, int]:
    """Return (whether to look again at once, since when nothing moved in ns); *since* is 0 after a pass that moved."""
    if limits.poll_us == 0:
        return False, 0
    now = clock_ns(scratch.frames.words[CLOCK_AT:])
    if since == 0:
        since = now
    if limits.poll_us < 0 or now - since < limits.poll_us * 1000:
        return True, since
    return False, 0


@inlined
def add_pollfd(pollfds: Words, n: int, fd: int, events: int, what: int) -> int:
    """Make entry *n* of pollfds int64[2, k]: a struct pollfd, and below it the queue it stands for; return n + 1."""
    pollfds[0, n] = (fd & 0xFFFFFFFF) | events << 32
    pollfds[1, n] = what
    return n + 1


@inlined
def add_control(pollfds: Words, control: Control) -> int:
    """Make entry 0 of pollfds the control descriptor; return 1."""
    return int(add_pollfd(pollfds, 0, control.fd, POLLIN, _CONTROL))


@inlined
def add_endpoint(pollfds: Words, n: int, fd: int, events: int, pair: int) -> int:
    """Make entry *n* of pollfds the endpoint of a pair; return n + 1."""
    return int(add_pollfd(pollfds, n, fd, events, _ENDPOINT - pair))


@inlined
def is_polled(ep: Words) -> bool:
    """Return whether the endpoint's descriptor tells of frames that can be taken: a faulty wire may be full."""
    kind = ep[r.EP_KIND]
    if kind < r.KIND_TAP or ep[r.EP_GONE]:
        return False
    return (kind != r.KIND_FAULT and kind != r.KIND_FAULT_PYTHON) or takes(ep, FROM_WIRE)


@kernel
def held_up(ep: Words, events: int, wait_ms: int) -> tuple[int, int, int]:
    """Return (events to poll for, ms to wait at most, PYTHON or 0) of an endpoint that takes no frames now."""
    if ep[r.EP_KIND] >= r.KIND_PYTHON:
        return events, BLOCKED_MS if wait_ms < 0 else min(wait_ms, BLOCKED_MS), PYTHON
    if load_i64_acquire(ep, r.EP_LOST):
        return events, LOST_MS if wait_ms < 0 else min(wait_ms, LOST_MS), 0
    if ep[r.EP_OUT_COUNT]:
        return events | POLLOUT, wait_ms, 0
    ep[r.EP_BLOCKED] = 0  # it has another connection
    return events, wait_ms, 0


@kernel
def due_ms(ep: Words, words: Words, timeout_ms: int) -> int:
    """Shorten a timeout to when the next frame from the wire is due: whole ms, since below that a loop looks again."""
    return _shortened(timeout_ms, due_in_ns(ep, words))


@kernel
def held_ms(ep: Words, words: Words, timeout_ms: int) -> int:
    """Shorten a timeout to when a frame that faulty wires hold back may go to the wire."""
    return _shortened(timeout_ms, out_due_ns(ep, words))


@inlined
def _shortened(timeout_ms: int, due: int) -> int:
    """Return a timeout of ms, -1 = none, that ends within *due* ns, -1 = never."""
    if due < 0:
        return timeout_ms
    due_ms = due // 1_000_000
    return int(due_ms if timeout_ms < 0 else min(timeout_ms, due_ms))


@kernel
def sleep(control: Control, limits: Limits, pollfds: Words, n: int, wait_ms: int, waited: int) -> tuple[int, int]:
    """Sleep until one of *n* pollfds is ready, *wait_ms* at most, -1 = no end; return (LOOP_* or GO_ON, ms waited in vain).

    waited: the ms that this loop has waited in vain before.
    """
    control.words[r.CTL_SLEEPS] += 1
    woken = poll(pollfds[0], n, wait_ms)
    if woken < 0 and woken != -EINTR and woken != -EAGAIN:
        return r.LOOP_CONTROL, waited
    if woken == 0:
        waited += wait_ms
    if woken == -EINTR or (woken == 0 and 0 < limits.timeout_ms <= waited):
        return r.LOOP_IDLE, waited
    return GO_ON, waited


@kernel
def take_woken(pollfds: Words, n: int, eps: Words) -> int:
    """Return CONTROL if the control descriptor is ready, and PYTHON if an endpoint is.

    A TAP whose interface was deleted, or a socket whose peer is gone, is not polled again (EP_GONE): it would never let the
    loop sleep.
    """
    woken = 0
    for k in range(n):
        revents = pollfds[0, k] >> 48
        what = pollfds[1, k]
        if revents and what == _CONTROL:
            woken |= CONTROL
        elif revents and what <= _ENDPOINT:
            woken |= PYTHON
            if revents & POLLGONE:
                eps[_ENDPOINT - what, r.EP_GONE] = 1
    return woken


@kernel
def take_notifications(
    scratch: LoopScratch, n: int, first: int, rows: Words, counter: int, notify: Words, column: int
) -> None:
    """Take the notifications that *n* pollfds report for the queues *first* and following, and count each in its row.

    rows int64[queues, ...], counter: the slot of each; notify int64[queues, 2], column: where the descriptor stands there. A
    descriptor that will never be written to again becomes -1: polled again, it would never let the loop sleep.
    """
    for k in range(n):
        queue = scratch.pollfds[1, k] - first
        if scratch.pollfds[0, k] >> 48 and 0 <= queue < rows.shape[0]:
            taken = take(scratch.pollfds[0, k] & 0xFFFFFFFF, scratch.frames.words, CLOCK_AT)
            if taken > 0:
                rows[queue, counter] += 1
            elif taken != -EAGAIN and taken != -EINTR:
                notify[queue, column] = -1


@inlined
def leave_awake(woken: int, eps: Words) -> int:
    """Return why the loop has to return after a sleep that *woken* ended, or GO_ON."""
    if woken & CONTROL:
        return r.LOOP_CONTROL
    if woken & PYTHON and _joins_python(eps):
        return r.LOOP_PYTHON
    return GO_ON


@kernel
def _joins_python(eps: Words) -> bool:
    """Return whether one of the pairs has an endpoint in Python."""
    for q in range(eps.shape[0]):  # noqa: SIM110 - compiled code has no any()
        if eps[q, r.EP_KIND] >= r.KIND_PYTHON:
            return True
    return False
