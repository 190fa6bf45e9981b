"""vnetdp.testing: a device, its owners and its traffic for the tests of an endpoint, a driver or a back end.

Every name here is public; docs/testing.md shows their use, and docs/api.md lists them. Names are loaded when they are first
used, so that pytest, which loads `vnetdp.testing.plugin` in every project, starts as fast as before.
`vnetdp.testing.strategies` needs hypothesis: `pip install 'vnetdp[testing]'`. `vnetdp.testing.explore` is a package.
"""

from __future__ import annotations

from ..backends.names import VERBS as _VERBS

TYPE_CHECKING = False

OWNERS = ("userspace", "thread", "process", "vhost-user")
"""The owners that `Vnet` can give the rings to."""
VERBS = _VERBS
"""The names of vhost's verbs, for `vnetdp.Fault`, in the order of a start."""

# Public name: the module of this package that has it. The order is that of docs/api.md and of the reference.
_HOME = {
    "Vnet": "net",
    "check": "checks",
    "Check": "checks",
    "FrameLedger": "frames",
    "Fate": "frames",
    "History": "history",
    "BackEndProcess": "back_end",
    "HandRing": "hand_ring",
    "Chain": "hand_ring",
    "Descriptor": "hand_ring",
    "bring_up": "hand_ring",
    "READY": "hand_ring",
    "Setup": "schedule",
    "Step": "schedule",
    "Schedule": "schedule",
    "Stepper": "stepper",
    "Outcome": "outcome",
    "ScheduleError": "outcome",
    "replay": "stepper",
}

if TYPE_CHECKING:
    from typing import Any

    from .back_end import BackEndProcess as BackEndProcess
    from .checks import Check as Check
    from .checks import check as check
    from .frames import Fate as Fate
    from .frames import FrameLedger as FrameLedger
    from .hand_ring import READY as READY
    from .hand_ring import Chain as Chain
    from .hand_ring import Descriptor as Descriptor
    from .hand_ring import HandRing as HandRing
    from .hand_ring import bring_up as bring_up
    from .history import History as History
    from .net import Vnet as Vnet
    from .outcome import Outcome as Outcome
    from .outcome import ScheduleError as ScheduleError
    from .schedule import Schedule as Schedule
    from .schedule import Setup as Setup
    from .schedule import Step as Step
    from .stepper import Stepper as Stepper
    from .stepper import replay as replay
else:  # not for type checkers, as in vnetdp/__init__.py
    __all__ = [*_HOME, "OWNERS", "VERBS"]

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        found = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = found  # next time this function is not asked
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *_HOME})
