"""Two guests on one wire: what either transmits is copied once, from its buffers into the other's receive buffers."""

from __future__ import annotations

from . import split as ring
from .atomic import Bytes, Words, load_i64_acquire
from .io import POLLIN, clock_ns, poll
from .jit import kernel
from .layout import (
    CTL_DOORBELL,
    CTL_PASSES,
    CTL_SLEEPS,
    EP_DROP_ERROR,
    LOOP_BROKEN,
    LOOP_CONTROL,
    VQ_BOUND,
    VQ_CALL_DUE,
    VQ_ENABLED,
    VQ_STATUS,
)
from .loops import BATCH, POLL_WITHOUT_KICK_MS, add_pollfd, call, take_kick
from .net import discard_transmitq, forward
from .port import CLOCK_AT


@kernel
def _usable(vq: Words) -> bool:
    return bool(vq[VQ_BOUND] and vq[VQ_ENABLED] and not vq[VQ_STATUS])


@kernel
def _call_if_due(mem: Bytes, vq: Words, fd: int, pollfds: Words, one: Words) -> None:
    """Make the decision about a call that whoever had the ring before may have left open."""
    if vq[VQ_CALL_DUE] and _usable(vq):
        vq[VQ_CALL_DUE] = 0
        call(mem, vq, fd, pollfds, one)


@kernel
def _one_way(
    mem: Bytes,
    regions: Words,
    log: Bytes,
    txq: Words,
    tx_call: int,
    to_mem: Bytes,
    to_regions: Words,
    to_log: Bytes,
    rxq: Words,
    rx_call: int,
    rows: Words,
    iov: Words,
    chains: Words,
    ep: Words,
    hdr: Bytes,
    held: Bytes,
    pollfds: Words,
    one: Words,
) -> int:
    """Move a batch from a transmitq to the other guest's receiveq; what is sent to nobody is used and dropped."""
    if not txq[VQ_BOUND] or txq[VQ_STATUS]:
        return 0
    if not txq[VQ_ENABLED] or not _usable(rxq):
        moved = discard_transmitq(mem, txq, log, BATCH)
        ep[EP_DROP_ERROR] += moved
    else:
        moved = forward(
            mem, regions, txq, log, rows, to_mem, to_regions, rxq, to_log, iov, chains, ep, hdr, held, BATCH
        )
        if moved:
            call(to_mem, rxq, rx_call, pollfds, one)
    if moved:
        call(mem, txq, tx_call, pollfds, one)
    return moved


@kernel
def _ask(
    mem: Bytes,
    log: Bytes,
    txq: Words,
    tx_kick: int,
    tx_what: int,
    to_mem: Bytes,
    to_log: Bytes,
    rxq: Words,
    rx_kick: int,
    rx_what: int,
    pollfds: Words,
    n: int,
) -> tuple[bool, int]:
    """Ask for the one kick that can set a way going again, and poll for it: (look again at once, entries of pollfds).

    It is the transmitq's; if frames that wait there found no buffers, the receiveq's. Buffers for frames that nobody sends
    are no reason to wake.
    """
    if txq[VQ_BOUND] and not txq[VQ_STATUS]:
        if ring.known_available(txq) == 0:
            return ring.enable_kicks(mem, txq, log), add_pollfd(pollfds, n, tx_kick, POLLIN, tx_what)
        if _usable(rxq):
            return ring.enable_kicks(to_mem, rxq, to_log), add_pollfd(pollfds, n, rx_kick, POLLIN, rx_what)
    return False, n


@kernel
def join(
    a_mem: Bytes,
    a_regions: Words,
    a_log: Bytes,
    a_vqs: Words,
    a_notify: Words,
    b_mem: Bytes,
    b_regions: Words,
    b_log: Bytes,
    b_vqs: Words,
    b_notify: Words,
    eps: Words,
    held: Bytes,
    ctl: Words,
    ctl_fd: int,
    iov: Words,
    rows: Words,
    chains: Words,
    hdr: Bytes,
    scratch: Words,
    pollfds: Words,
    one: Words,
    poll_us: int,
) -> tuple[int, int]:
    """Serve the bound queues of two devices with the same number of pairs; return (LOOP_*, chains moved).

    a_ and b_: as in `loops.serve`. eps int64[2, EP_SLOTS]: the wire's counters, from a and from b. pollfds
    int64[2, 2 * pairs + 1]. poll_us: busy-poll so long before sleeping, -1 = for ever.
    """
    n_pairs = a_vqs.shape[0] // 2
    moved = 0
    idle_since = 0
    while True:
        if load_i64_acquire(ctl, CTL_DOORBELL):
            return LOOP_CONTROL, moved
        ctl[CTL_PASSES] += 1
        before = moved
        for q in range(n_pairs):
            rx, tx = 2 * q, 2 * q + 1
            a_ok = _usable(a_vqs[rx]) + 2 * _usable(a_vqs[tx])
            b_ok = _usable(b_vqs[rx]) + 2 * _usable(b_vqs[tx])
            for i in (rx, tx):
                _call_if_due(a_mem, a_vqs[i], a_notify[i, 1], pollfds, one)
                _call_if_due(b_mem, b_vqs[i], b_notify[i, 1], pollfds, one)
            moved += _one_way(
                a_mem, a_regions, a_log, a_vqs[tx], a_notify[tx, 1], b_mem, b_regions, b_log, b_vqs[rx], b_notify[rx, 1],
                rows, iov, chains, eps[0], hdr, held, pollfds, one,
            )  # fmt: skip
            moved += _one_way(
                b_mem, b_regions, b_log, b_vqs[tx], b_notify[tx, 1], a_mem, a_regions, a_log, a_vqs[rx], a_notify[rx, 1],
                rows, iov, chains, eps[1], hdr, held, pollfds, one,
            )  # fmt: skip
            if (
                a_ok != _usable(a_vqs[rx]) + 2 * _usable(a_vqs[tx])
                or b_ok != _usable(b_vqs[rx]) + 2 * _usable(b_vqs[tx])
            ):  # fmt: skip
                return LOOP_BROKEN, moved
        if moved != before:
            idle_since = 0
            continue
        if poll_us:
            now = clock_ns(scratch[CLOCK_AT:])
            idle_since = idle_since or now
            if poll_us < 0 or now - idle_since < poll_us * 1000:
                continue
        idle_since = 0
        wait_ms = -1
        again = False
        n = add_pollfd(pollfds, 0, ctl_fd, POLLIN, -1)
        for q in range(n_pairs):
            rx, tx = 2 * q, 2 * q + 1
            asked, n = _ask(
                a_mem, a_log, a_vqs[tx], a_notify[tx, 0], tx,
                b_mem, b_log, b_vqs[rx], b_notify[rx, 0], 2 * n_pairs + rx, pollfds, n,
            )  # fmt: skip
            again |= asked
            asked, n = _ask(
                b_mem, b_log, b_vqs[tx], b_notify[tx, 0], 2 * n_pairs + tx,
                a_mem, a_log, a_vqs[rx], a_notify[rx, 0], rx, pollfds, n,
            )  # fmt: skip
            again |= asked
        for k in range(n):
            if pollfds[0, k] & 0xFFFFFFFF == 0xFFFFFFFF:
                wait_ms = POLL_WITHOUT_KICK_MS
        if not again:
            ctl[CTL_SLEEPS] += 1
            woken = poll(pollfds[0], n, wait_ms)
            for k in range(n):
                what = pollfds[1, k]
                if woken > 0 and pollfds[0, k] >> 48 and what >= 0:
                    if what < 2 * n_pairs:
                        take_kick(a_vqs[what], a_notify[what], pollfds[0, k], scratch)
                    else:
                        take_kick(b_vqs[what - 2 * n_pairs], b_notify[what - 2 * n_pairs], pollfds[0, k], scratch)
        for i in range(2 * n_pairs):
            if a_vqs[i, VQ_BOUND]:
                ring.disable_kicks(a_mem, a_vqs[i], a_log)
            if b_vqs[i, VQ_BOUND]:
                ring.disable_kicks(b_mem, b_vqs[i], b_log)
