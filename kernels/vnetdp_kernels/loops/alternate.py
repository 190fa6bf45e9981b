"""The loop that a benchmark times: driver and device in turns, in one thread, the clock around the device's side only."""

from __future__ import annotations

from ..platform.atomic import Words
from ..platform.io import clock_ns
from ..platform.jit import kernel
from ..rows import Control, DriverRings, Limits, LoopScratch, Rings, Wire
from .drive import drive
from .serve import serve
from .wait import BATCH


@kernel
def alternate(
    device: Rings,
    device_wire: Wire,
    guest: DriverRings,
    guest_wire: Wire,
    control: Control,
    scratch: LoopScratch,
    clock: Words,
    rounds: int,
) -> tuple[int, int]:
    """Run driver and device *rounds* times in turn, each until it has nothing to do; return (ns of the device, frames).

    clock int64[2] is scratch.
    """
    ns = 0
    frames = 0
    for _ in range(rounds):
        drive(guest, guest_wire, control, scratch, Limits(2 * guest.dvqs.shape[0] * BATCH, 0, 0))
        began = clock_ns(clock)
        _, moved = serve(device, device_wire, control, scratch, Limits(-1, 0, 0))
        ns += clock_ns(clock) - began
        frames += moved
    return ns, frames
