"""check: the invariants of a device, now, and at each change of owner while a `with` block runs."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from ..device.device import NetDevice
from ..device.owners import Owner
from ..lab.invariants import device_violations

_TRIES = 100  # for a look between two changes of owner


def check(device: NetDevice) -> Check:
    """Check the invariants of *device* now, under traffic too; AssertionError names each that is violated.

    `with check(device):` checks them again after each change of owner in the block, and at its end. The invariants are
    those of docs/migration.md: I2 to I7 and broken rings; the frames (I1, I4, I10) are checked by `Vnet`, or a `Ledger`.
    An endpoint's code that hangs is waited for.
    """
    found = Check(device)
    found.look("at the start")
    found.raise_if_any()
    return found


class Check:
    """The invariants of a device that `check` found violated. Used as a context manager it watches the device."""

    def __init__(self, device: NetDevice) -> None:
        self._device = device
        self._began = time.monotonic()
        self._owner = device.owner
        self.violations: list[str] = []
        """A line for each violation: the time in seconds since the check began, the owner then, and the invariant."""

    def look(self, moment: str) -> None:
        """Look now, and enter all that is violated. The owner of the rings is paused meanwhile."""
        for _ in range(_TRIES):
            before = self._device.owner, self._device.handovers
            with self._device.paused():
                found = device_violations(self._device, still=True)
            if (self._device.owner, self._device.handovers) == before:
                break  # no other thread changed the owner meanwhile
        self._enter(moment, found)

    def owner_changed(self, _gone: bool = False) -> None:
        """Look in the midst of a change of owner, when nothing needs to be paused. @private"""
        owner, before = self._device.owner, self._owner
        self._owner = owner
        moment = f"as {before.value} lost the rings" if owner is Owner.NOBODY else f"as {owner.value} got the rings"
        self._enter(moment, device_violations(self._device))

    def _enter(self, moment: str, found: list[str]) -> None:
        at_s = time.monotonic() - self._began
        self.violations += [f"{at_s:.3f} s, {moment}, owner {self._device.owner.value}: {text}" for text in found]

    def raise_if_any(self) -> None:
        """Raise AssertionError if an invariant was violated."""
        if self.violations:
            raise AssertionError("\n".join(["the device violated its invariants:", *self.violations]))

    def __enter__(self) -> Self:
        self._device.on_owner.append(self.owner_changed)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._device.on_owner.remove(self.owner_changed)
        if error is not None:
            for text in self.violations:
                error.add_note(text)
            return
        self.look("at the end")
        self.raise_if_any()
