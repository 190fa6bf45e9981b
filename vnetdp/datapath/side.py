"""Side: one side of rings by the addresses of its arrays, which kernels take in place of the arrays themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from vnetdp_kernels import rows as r
from vnetdp_kernels.platform.native import kernel_at
from vnetdp_kernels.rows import Control, DriverRings, Limits, LoopScratch, Rings, Wire

from ..shared.memory import Bytes, Words

_OF_WIRE = range(r.SIDE_EPS, r.SIDE_CTL, r.VIEW_SLOTS)
_OF_SCRATCH = range(r.SIDE_IOV, r.SIDE_SLOTS, r.VIEW_SLOTS)
_NO_LIMITS = Limits(-1, -1, -1)

_addresses: dict[Callable[..., Any], int] = {}


class Side:
    """The arrays that *loop*, `serve` or `drive`, works on. It keeps them, and so their addresses in `row` stay good.

    row: int64[SIDE_SLOTS], for `run_side`.
    """

    def __init__(
        self,
        loop: Callable[..., tuple[int, int]],
        rings: Rings | DriverRings,
        wire: Wire,
        control: Control,
        scratch: LoopScratch,
    ) -> None:
        self.row: Words = np.zeros(r.SIDE_SLOTS, np.int64)
        self._rings, self._wire, self._fd, self._scratch = rings, wire, control.fd, scratch
        self._control_words = control.words
        if loop not in _addresses:
            _addresses[loop] = kernel_at(loop, (rings, wire, control, scratch, _NO_LIMITS))
        self.row[r.SIDE_LOOP] = _addresses[loop]
        self.row[r.SIDE_CONTROL_FD] = control.fd
        if isinstance(rings, DriverRings):
            self.row[r.SIDE_IS_DRIVER] = 1
            self._place(r.SIDE_MEM, rings.mem)
            self._place(r.SIDE_STATES, rings.states)
            self._place(r.SIDE_QUEUES, rings.dvqs)
        else:
            self._place(r.SIDE_MEM, rings.guest.mem)
            self._place(r.SIDE_REGIONS, rings.guest.regions)
            self._place(r.SIDE_LOG, rings.guest.log)
            self._place(r.SIDE_QUEUES, rings.vqs)
        self._place(r.SIDE_NOTIFY, rings.notify)
        self._place(r.SIDE_CTL, control.words)
        for view, array in zip(_OF_WIRE, wire, strict=True):
            self._place(view, array)
        for view, array in zip(_OF_SCRATCH, (*scratch.frames, scratch.pollfds, scratch.one), strict=True):
            self._place(view, array)
        self.address = int(self.row.ctypes.data)

    def _place(self, view: int, array: Any) -> None:
        assert array.flags.c_contiguous
        shape = array.shape if array.ndim > 1 else (1, *array.shape)
        self.row[view : view + 1 + len(shape)] = (array.__array_interface__["data"][0], *shape)

    def has(self, mem: Bytes, log: Bytes | None, wire: Wire, fd: int, scratch: LoopScratch) -> bool:
        """Return whether these very arrays are in it: all that may change while the side is in use. log: the device's."""
        rings = self._rings
        if isinstance(rings, DriverRings):
            same = rings.mem is mem
        else:
            same = rings.guest.mem is mem and rings.guest.log is log
        return same and self._wire is wire and self._fd == fd and self._scratch is scratch
