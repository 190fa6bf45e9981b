"""Findings: all that is wrong with a device under traffic, in lines, and its state in one more."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..device.device import NetDevice
from ..device.owners import Owner
from ..endpoints.base import Endpoint
from ..endpoints.loopback import GenerateEndpoint
from ..errors import GuestError, place, reason
from ..guest.driver import Driver
from .back_end import BackEndProcess
from .frames import FrameLedger
from .hang import Hang
from .parts import Offload

_SHOWN = 10  # frames in an error


class Findings:
    """What a `Vnet` finds wrong with its endpoint, its rings and its frames, and the error that says so.

    now_s: the time in seconds since the start. may_raise: the endpoint's code may raise.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        device: NetDevice,
        driver: Driver,
        ledger: FrameLedger,
        offload: Offload,
        *,
        now_s: Callable[[], float],
        may_raise: bool,
        patience_s: float,
    ) -> None:
        self._endpoint, self._device, self._driver = endpoint, device, driver
        self._ledger, self._offload = ledger, offload
        self._now_s, self._may_raise = now_s, may_raise
        worker = offload.worker
        self.hang = Hang(endpoint, patience_s, worker.hangs if isinstance(worker, BackEndProcess) else list)
        self.raised: AssertionError | None = None
        """The last error, which has the state of the device already."""

    def raise_trouble(self) -> None:
        """Raise AssertionError if there is trouble in this process."""
        if wrong := self.trouble(look_far=False):
            raise self.error(wrong)

    def trouble(self, look_far: bool = True) -> list[str]:
        """Return what stops a test at once: the endpoint raised, or a side of the rings broke the specification.

        look_far: ask the back end's process, too.
        """
        wrong = []
        endpoint, worker = self._endpoint, self._offload.worker
        if endpoint.errors and not self._may_raise:
            error = endpoint.last_error
            wrong.append(_raised(endpoint.errors, reason(error) + place(error) if error is not None else ""))
        if look_far and isinstance(worker, BackEndProcess) and not self._may_raise:
            errors, text = worker.errors
            if errors:
                wrong.append(f"in the back end's process: {_raised(errors, text)}")
        if self._driver.error is not None:
            wrong.append(f"the driver's thread has ended: {reason(self._driver.error)}")
        try:
            self._driver.check()
        except GuestError as e:
            wrong.append(f"the device broke the specification: {e}")
        return wrong + [f"the driver broke the specification: {error}" for error in self._device.ring_errors()]

    def frames(self) -> list[str]:
        """Return a line for each of the first frames that were not as they should be, and one for all others."""
        fates = self._ledger.fates
        more = len(fates) - _SHOWN
        return [str(fate) for fate in fates[:_SHOWN]] + ([f"and {more} more frames"] if more > 0 else [])

    def drops(self) -> list[str]:
        """Return a line with the endpoint's counters of frames that it dropped; nothing if there are none."""
        counts = self._endpoint.counters().items()
        drops = [f"{name} {n}" for name, n in counts if n and (name.startswith("dropped") or name == "errors")]
        return [f"the endpoint's own counters: {', '.join(drops)}"] if drops else []

    def silence(self) -> list[str]:
        """Return a line if nobody has the rings, or the endpoint has sent back none of the frames that it got; else none."""
        counts = self._ledger.counts
        if self._device.owner is Owner.NOBODY:
            return ["nobody runs the rings, so no frame moves"]
        if isinstance(self._endpoint, GenerateEndpoint) or not counts.sent or counts.delivered:
            return []
        return [f"{self._endpoint.name} has sent no frame back: let it send back each, or give returns=False"]

    def error(self, lines: Sequence[str]) -> AssertionError:
        """Return the error of these lines and the state of the device."""
        self.raised = AssertionError("\n".join([*lines, self.state()]))
        return self.raised

    def state(self) -> str:
        """Return a line about the device, its owner and its traffic."""
        error = self._device.last_error
        return (
            f"[{self._endpoint.name} after {self._now_s():.3f} s: owner {self._offload.named(self._device.owner)}, "
            f"last error {reason(error) if error is not None else None}; {self._ledger.summary}]"
        )


def _raised(errors: int, text: str) -> str:
    return f"the endpoint raised {errors} time{'s' * (errors != 1)}, the last time: {text}"
