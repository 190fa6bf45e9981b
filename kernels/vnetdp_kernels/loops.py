"""What a worker runs between two looks at its control plane: passes over all queues, and the sleep between them.

`serve` is the device's side, `drive` the guest's. Either returns only when the doorbell rings, a budget is used up, an
endpoint in Python has work, or a queue broke. Sleeping is a poll() on the control descriptor, the eventfds and the
endpoints, without the GIL; before it, notifications are asked for and the rings looked at once more.
"""

from __future__ import annotations

from . import driver, split_driver
from . import split as ring
from .atomic import Bytes, Words, load_i64_acquire
from .io import EAGAIN, EINTR, POLLGONE, POLLIN, POLLOUT, clock_ns, poll, signal
from .jit import kernel
from .layout import (
    CTL_DOORBELL,
    CTL_SLEEPS,
    DVQ_CALLS,
    DVQ_KICKS,
    DVQ_NUM_FREE,
    DVQ_STATUS,
    EP_BLOCKED,
    EP_GONE,
    EP_HELD,
    EP_KIND,
    EP_OUT_COUNT,
    KIND_ECHO,
    KIND_PYTHON,
    KIND_REFLECT,
    KIND_TAP,
    LOOP_BROKEN,
    LOOP_BUDGET,
    LOOP_CONTROL,
    LOOP_IDLE,
    LOOP_PYTHON,
    NOTIFY_PEER,
    VQ_BOUND,
    VQ_CALL_DUE,
    VQ_CALLS,
    VQ_ENABLED,
    VQ_KICKS,
    VQ_STATUS,
)
from .net import discard_transmitq, drain_transmitq, fill_receiveq, forward
from .peer import take, tell
from .port import CLOCK_AT, due_in_ns

BATCH = 64  # frames a queue moves before the next has its turn, and before its indices are published
POLL_WITHOUT_KICK_MS = 1  # a driver that gave no kick descriptor is looked at this often
_BLOCKED_MS = 1  # an endpoint in Python that takes no frames is asked this often
_CONTROL = -1  # what a pollfd stands for, beside the number of a queue
_ENDPOINT = -2  # the endpoint of pair 0; -3 that of pair 1, ...


@kernel
def _due_ms(ep: Words, scratch: Words, timeout_ms: int) -> int:
    """Shorten a timeout to when a generator's next frame is due: whole ms, since below that a loop looks again."""
    due = due_in_ns(ep, scratch)
    if due < 0:
        return timeout_ms
    due_ms = due // 1_000_000
    return int(due_ms if timeout_ms < 0 else min(timeout_ms, due_ms))


@kernel
def add_pollfd(pollfds: Words, n: int, fd: int, events: int, what: int) -> int:
    """Make entry *n* of pollfds int64[2, k]: a struct pollfd, and below it what it stands for; return n + 1."""
    pollfds[0, n] = (fd & 0xFFFFFFFF) | events << 32
    pollfds[1, n] = what
    return n + 1


@kernel
def call(mem: Bytes, vq: Words, fd: int, pollfds: Words, one: Words) -> None:
    """Send a used buffer notification to *fd* (-1 = none), if the driver wants to hear of it. *pollfds* is scratch."""
    if ring.needs_call(mem, vq):
        vq[VQ_CALLS] += 1
        if fd >= NOTIFY_PEER:
            tell(fd & 0xFFFFFFFF, one, pollfds)
        elif fd >= 0:
            signal(fd, one)


@kernel
def take_kick(vq: Words, notify: Words, pollfd: int, scratch: Words) -> None:
    """Take what made the kick of row *vq* readable, as *pollfd* says; one that will never kick again is let go of.

    notify int64[2]: of that queue. Polled again, a broken kick would never let the loop sleep.
    """
    n = take(pollfd & 0xFFFFFFFF, scratch, CLOCK_AT)
    if n > 0:
        vq[VQ_KICKS] += 1
    elif n != -EAGAIN and n != -EINTR:
        notify[0] = -1


@kernel
def _is_polled(ep: Words) -> bool:
    return (ep[EP_KIND] == KIND_TAP or ep[EP_KIND] == KIND_PYTHON) and not ep[EP_GONE]


@kernel
def _idle_long_enough(since: int, now: int, poll_us: int) -> bool:
    return poll_us >= 0 and now - since >= poll_us * 1000


@kernel
def serve(
    mem: Bytes,
    regions: Words,
    log: Bytes,
    vqs: Words,
    eps: Words,
    ep_fds: Words,
    held: Bytes,
    in_frames: Bytes,
    in_lengths: Words,
    out_frames: Bytes,
    out_lengths: Words,
    ledger: Words,
    windows: Bytes,
    notify: Words,
    ctl: Words,
    ctl_fd: int,
    iov: Words,
    rows: Words,
    chains: Words,
    hdr: Bytes,
    scratch: Words,
    pollfds: Words,
    one: Words,
    budget: int,
    poll_us: int,
    timeout_ms: int,
) -> tuple[int, int]:
    """Serve the bound queues of all pairs; return (LOOP_*, frames moved).

    vqs int64[2 * pairs, VQ_SLOTS], receiveq 2i, transmitq 2i + 1; eps int64[pairs, EP_SLOTS], ep_fds int64[pairs];
    notify int64[2 * pairs, 2]: kick and call descriptors, -1 = none. ctl int64[CTL_SLOTS]. budget: frames, -1 = no
    end. poll_us: busy-poll so long before sleeping, -1 = for ever. timeout_ms: 0 = do not wait, -1 = as long as it takes.
    """
    n_pairs = eps.shape[0]
    moved = 0
    waited = 0
    idle_since = 0
    if poll_us:
        # A ring just bound asks for kicks, and whoever never sleeps would never take that back.
        for q in range(2 * n_pairs):
            if vqs[q, VQ_BOUND]:
                ring.disable_kicks(mem, vqs[q], log)
    while True:
        before = moved
        python = False
        bound = False
        in_python = False
        for q in range(n_pairs):
            rxq = vqs[2 * q]
            txq = vqs[2 * q + 1]
            ep = eps[q]
            if rxq[VQ_BOUND] or txq[VQ_BOUND]:
                bound = True
                in_python |= ep[EP_KIND] == KIND_PYTHON
            turn = BATCH if budget < 0 else min(BATCH, budget - moved)
            serve_tx = txq[VQ_BOUND] and not txq[VQ_STATUS]
            serve_rx = rxq[VQ_BOUND] and not rxq[VQ_STATUS] and rxq[VQ_ENABLED]
            chains_tx = 0
            frames_rx = 0
            if serve_tx and not txq[VQ_ENABLED]:
                chains_tx = discard_transmitq(mem, txq, log, turn)
                moved += chains_tx
            elif KIND_ECHO <= ep[EP_KIND] <= KIND_REFLECT:
                if serve_tx and serve_rx:
                    chains_tx = forward(
                        mem,
                        regions,
                        txq,
                        log,
                        rows,
                        mem,
                        regions,
                        rxq,
                        log,
                        iov,
                        chains,
                        ep,
                        hdr,
                        held[q],
                        turn,
                    )
                    frames_rx = chains_tx
                    moved += chains_tx
            else:
                if serve_tx and turn:
                    chains_tx = drain_transmitq(
                        mem, regions, txq, log, iov, ep, ep_fds[q], hdr, out_frames[q], out_lengths[q], ledger,
                        windows, scratch, turn,
                    )  # fmt: skip
                    moved += chains_tx
                turn = BATCH if budget < 0 else min(BATCH, budget - moved)
                if serve_rx and turn:
                    frames_rx = fill_receiveq(
                        mem, regions, rxq, log, iov, chains, ep, ep_fds[q], held[q], in_frames[q], in_lengths[q],
                        scratch, rows, turn,
                    )  # fmt: skip
                    moved += frames_rx
                python |= ep[EP_OUT_COUNT] > 0 and ep[EP_KIND] == KIND_PYTHON and not ep[EP_BLOCKED]
            if serve_tx and (chains_tx or txq[VQ_CALL_DUE]):
                call(mem, txq, notify[2 * q + 1, 1], pollfds, one)
            if serve_rx and (frames_rx or rxq[VQ_CALL_DUE]):
                call(mem, rxq, notify[2 * q, 1], pollfds, one)
            txq[VQ_CALL_DUE] &= not serve_tx
            rxq[VQ_CALL_DUE] &= not serve_rx
            if (serve_tx and txq[VQ_STATUS]) or (serve_rx and rxq[VQ_STATUS]):
                return LOOP_BROKEN, moved
        # Asked for only after a pass: whoever is halted again and again still gets one each time.
        if load_i64_acquire(ctl, CTL_DOORBELL):
            return LOOP_CONTROL, moved
        if python:
            return LOOP_PYTHON, moved
        if budget >= 0 and moved >= budget:
            return LOOP_BUDGET, moved
        if moved != before:
            idle_since = 0
            waited = 0
            continue
        if timeout_ms == 0:
            return LOOP_IDLE, moved
        if poll_us and bound:
            now = clock_ns(scratch[CLOCK_AT:])
            idle_since = idle_since or now
            if not _idle_long_enough(idle_since, now, poll_us):
                if in_python and poll_us < 0:
                    return LOOP_PYTHON, moved  # only Python can tell whether its endpoint has more
                continue
        idle_since = 0
        wait_ms = timeout_ms if timeout_ms < 0 else timeout_ms - waited
        again = False
        control = False
        blocked = False
        n = add_pollfd(pollfds, 0, ctl_fd, POLLIN, _CONTROL)
        for q in range(n_pairs):
            rxq = vqs[2 * q]
            txq = vqs[2 * q + 1]
            ep = eps[q]
            events = 0
            forwards = KIND_ECHO <= ep[EP_KIND] <= KIND_REFLECT and txq[VQ_ENABLED]
            no_room = False  # frames to forward wait for receive buffers: more frames change nothing
            serve_rx = rxq[VQ_BOUND] and not rxq[VQ_STATUS] and rxq[VQ_ENABLED]
            if txq[VQ_BOUND] and not txq[VQ_STATUS] and (serve_rx or not forwards):
                # Known, and still there: something else holds them up. What has come in since the last look is for
                # enable_kicks to find: taken for held up, it would be slept on.
                if ring.known_available(txq) > 0:
                    no_room = forwards
                    if ep[EP_KIND] != KIND_PYTHON:
                        events |= POLLOUT
                else:
                    again |= ring.enable_kicks(mem, txq, log)
                    n = add_pollfd(pollfds, n, notify[2 * q + 1, 0], POLLIN, 2 * q + 1)
                    wait_ms = wait_ms if notify[2 * q + 1, 0] >= 0 else POLL_WITHOUT_KICK_MS
            if serve_rx:
                # Buffers for frames to forward are looked at only when there are such frames.
                if no_room or (not forwards and (ep[EP_HELD] or ring.known_available(rxq) == 0)):
                    again |= ring.enable_kicks(mem, rxq, log)
                    n = add_pollfd(pollfds, n, notify[2 * q, 0], POLLIN, 2 * q)
                    wait_ms = wait_ms if notify[2 * q, 0] >= 0 else POLL_WITHOUT_KICK_MS
                else:
                    events |= POLLIN
                    wait_ms = _due_ms(ep, scratch, wait_ms)
            if events and _is_polled(ep):
                n = add_pollfd(pollfds, n, ep_fds[q], events, _ENDPOINT - q)
            if txq[VQ_BOUND] and ep[EP_BLOCKED]:
                blocked = True
                wait_ms = _BLOCKED_MS if wait_ms < 0 else min(wait_ms, _BLOCKED_MS)
        if not again:
            ctl[CTL_SLEEPS] += 1
            woken = poll(pollfds[0], n, wait_ms)
            python |= blocked
            if woken < 0 and woken != -EINTR and woken != -EAGAIN:
                return LOOP_CONTROL, moved
            if woken == 0:
                waited += wait_ms
            if woken == -EINTR or (woken == 0 and 0 < timeout_ms <= waited):
                return LOOP_IDLE, moved
            for k in range(n):
                if woken > 0 and pollfds[0, k] >> 48:
                    what = pollfds[1, k]
                    control |= what == _CONTROL
                    if what >= 0:
                        take_kick(vqs[what], notify[what], pollfds[0, k], scratch)
                    elif what <= _ENDPOINT:
                        python = True
                        if pollfds[0, k] >> 48 & POLLGONE:
                            # A TAP whose interface was deleted: polled again, it would never let the loop sleep.
                            eps[_ENDPOINT - what, EP_GONE] = 1
        for q in range(n_pairs):
            if vqs[2 * q, VQ_BOUND]:
                ring.disable_kicks(mem, vqs[2 * q], log)
            if vqs[2 * q + 1, VQ_BOUND]:
                ring.disable_kicks(mem, vqs[2 * q + 1], log)
        if control:
            return LOOP_CONTROL, moved
        if python and _any_python(eps):
            return LOOP_PYTHON, moved


@kernel
def _any_python(eps: Words) -> bool:
    for q in range(eps.shape[0]):  # noqa: SIM110 - compiled code has no any()
        if eps[q, EP_KIND] == KIND_PYTHON:
            return True
    return False


@kernel
def _kick(mem: Bytes, dvq: Words, fd: int, one: Words) -> None:
    if split_driver.needs_kick(mem, dvq):
        dvq[DVQ_KICKS] += 1
        signal(fd, one)


@kernel
def drive(
    mem: Bytes,
    dvqs: Words,
    states: Words,
    eps: Words,
    ep_fds: Words,
    in_frames: Bytes,
    in_lengths: Words,
    out_frames: Bytes,
    out_lengths: Words,
    ledger: Words,
    windows: Bytes,
    notify: Words,
    ctl: Words,
    ctl_fd: int,
    iov: Words,
    hdr: Bytes,
    scratch: Words,
    pollfds: Words,
    one: Words,
    budget: int,
    poll_us: int,
    timeout_ms: int,
) -> tuple[int, int]:
    """Run the guest's driver on all pairs: endpoint to transmitq, receiveq to endpoint; return (LOOP_*, frames moved).

    dvqs int64[2 * pairs, DVQ_SLOTS], states int64[2 * pairs, num, DESC_STATE_SLOTS]; the rest as in `serve`.
    """
    n_pairs = eps.shape[0]
    moved = 0
    waited = 0
    idle_since = 0
    while True:
        before = moved
        python = False
        for q in range(n_pairs):
            rxq = dvqs[2 * q]
            txq = dvqs[2 * q + 1]
            ep = eps[q]
            if rxq[DVQ_STATUS] or txq[DVQ_STATUS]:
                continue
            turn = BATCH if budget < 0 else min(BATCH, budget - moved)
            moved += driver.receive(
                mem, rxq, states[2 * q], txq, states[2 * q + 1], iov, ep, ep_fds[q], hdr, out_frames[q],
                out_lengths[q], ledger, windows, scratch, turn,
            )  # fmt: skip
            turn = BATCH if budget < 0 else min(BATCH, budget - moved)
            moved += driver.send(mem, txq, states[2 * q + 1], ep, ep_fds[q], in_frames[q], in_lengths[q], scratch, turn)
            _kick(mem, txq, notify[2 * q + 1, 0], one)
            _kick(mem, rxq, notify[2 * q, 0], one)
            if rxq[DVQ_STATUS] or txq[DVQ_STATUS]:
                return LOOP_BROKEN, moved
            python |= ep[EP_OUT_COUNT] > 0 and ep[EP_KIND] == KIND_PYTHON and not ep[EP_BLOCKED]
        # Asked for only after a pass: whoever is halted again and again still gets one each time.
        if load_i64_acquire(ctl, CTL_DOORBELL):
            return LOOP_CONTROL, moved
        if python:
            return LOOP_PYTHON, moved
        if budget >= 0 and moved >= budget:
            return LOOP_BUDGET, moved
        if moved != before:
            idle_since = 0
            waited = 0
            continue
        if timeout_ms == 0:
            return LOOP_IDLE, moved
        if poll_us:
            now = clock_ns(scratch[CLOCK_AT:])
            idle_since = idle_since or now
            if not _idle_long_enough(idle_since, now, poll_us):
                if poll_us < 0 and _any_python(eps):
                    return LOOP_PYTHON, moved  # only Python can tell whether its endpoint has more
                continue
        idle_since = 0
        wait_ms = timeout_ms if timeout_ms < 0 else timeout_ms - waited
        again = False
        control = False
        blocked = False
        n = add_pollfd(pollfds, 0, ctl_fd, POLLIN, _CONTROL)
        for q in range(n_pairs):
            rxq = dvqs[2 * q]
            txq = dvqs[2 * q + 1]
            ep = eps[q]
            if rxq[DVQ_STATUS] or txq[DVQ_STATUS]:
                continue
            if ep[EP_BLOCKED]:
                blocked = True  # what has been received waits in the ring
                wait_ms = _BLOCKED_MS if wait_ms < 0 else min(wait_ms, _BLOCKED_MS)
            elif txq[DVQ_NUM_FREE] or not KIND_ECHO <= ep[EP_KIND] <= KIND_REFLECT:
                again |= split_driver.enable_calls(mem, rxq)
                n = add_pollfd(pollfds, n, notify[2 * q, 1], POLLIN, 2 * q)
            if txq[DVQ_NUM_FREE] == 0:
                again |= split_driver.enable_calls(mem, txq)
                n = add_pollfd(pollfds, n, notify[2 * q + 1, 1], POLLIN, 2 * q + 1)
            else:
                wait_ms = _due_ms(ep, scratch, wait_ms)
                if _is_polled(ep):
                    n = add_pollfd(pollfds, n, ep_fds[q], POLLIN, _ENDPOINT - q)
        if not again:
            ctl[CTL_SLEEPS] += 1
            woken = poll(pollfds[0], n, wait_ms)
            python |= blocked
            if woken < 0 and woken != -EINTR and woken != -EAGAIN:
                return LOOP_CONTROL, moved
            if woken == 0:
                waited += wait_ms
            if woken == -EINTR or (woken == 0 and 0 < timeout_ms <= waited):
                return LOOP_IDLE, moved
            for k in range(n):
                if woken > 0 and pollfds[0, k] >> 48:
                    what = pollfds[1, k]
                    control |= what == _CONTROL
                    if what >= 0:
                        take(pollfds[0, k] & 0xFFFFFFFF, scratch, CLOCK_AT)
                        dvqs[what, DVQ_CALLS] += 1
                    elif what <= _ENDPOINT:
                        python = True
                        if pollfds[0, k] >> 48 & POLLGONE:
                            # A TAP whose interface was deleted: polled again, it would never let the loop sleep.
                            eps[_ENDPOINT - what, EP_GONE] = 1
        for q in range(2 * n_pairs):
            split_driver.disable_calls(mem, dvqs[q])
        if control:
            return LOOP_CONTROL, moved
        if python and _any_python(eps):
            return LOOP_PYTHON, moved
