"""What a benchmark times: driver and device in turns, in one thread, with the clock around the device's side only."""

from __future__ import annotations

from .atomic import Bytes, Words
from .io import clock_ns
from .jit import kernel
from .loops import drive, serve


@kernel
def alternate(
    mem: Bytes,
    regions: Words,
    log: Bytes,
    vqs: Words,
    eps: Words,
    fds: Words,
    held: Bytes,
    in_frames: Bytes,
    in_lengths: Words,
    out_frames: Bytes,
    out_lengths: Words,
    ledger: Words,
    windows: Bytes,
    dvqs: Words,
    states: Words,
    d_eps: Words,
    d_in_frames: Bytes,
    d_in_lengths: Words,
    d_out_frames: Bytes,
    d_out_lengths: Words,
    d_ledger: Words,
    d_windows: Bytes,
    notify: Words,
    ctl: Words,
    iov: Words,
    rows: Words,
    chains: Words,
    hdr: Bytes,
    scratch: Words,
    pollfds: Words,
    one: Words,
    clock: Words,
    rounds: int,
) -> tuple[int, int]:
    """Run driver and device *rounds* times in turn, each until it has nothing to do; return (ns of the device, frames).

    Arguments as in `loops.serve` and, behind d_, `loops.drive`. clock int64[2] is scratch.
    """
    ns = 0
    frames = 0
    for _ in range(rounds):
        drive(
            mem, dvqs, states, d_eps, fds, d_in_frames, d_in_lengths, d_out_frames, d_out_lengths, d_ledger,
            d_windows, notify, ctl, -1, iov, hdr, scratch, pollfds, one, 2 * dvqs.shape[0] * 64, 0, 0,
        )  # fmt: skip
        began = clock_ns(clock)
        _, moved = serve(
            mem, regions, log, vqs, eps, fds, held, in_frames, in_lengths, out_frames, out_lengths, ledger, windows,
            notify, ctl, -1, iov, rows, chains, hdr, scratch, pollfds, one, -1, 0, 0,
        )  # fmt: skip
        ns += clock_ns(clock) - began
        frames += moved
    return ns, frames
