"""What a test of a device, a driver or a fallback needs: rings by hand, recorded schedules, hypothesis strategies.

Every name here is public, as those of `vnetdp` are; docs/testing.md has the examples. Names are loaded when they are
first used. `vnetdp.testing.strategies` needs hypothesis: `pip install 'vnetdp[testing]'`.
"""

from __future__ import annotations

TYPE_CHECKING = False

# Public name: the module that defines it. The order is that of docs/api.md and of the reference.
_HOME = {
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

    from .hand_ring import READY as READY
    from .hand_ring import Chain as Chain
    from .hand_ring import Descriptor as Descriptor
    from .hand_ring import HandRing as HandRing
    from .hand_ring import bring_up as bring_up
    from .outcome import Outcome as Outcome
    from .outcome import ScheduleError as ScheduleError
    from .schedule import Schedule as Schedule
    from .schedule import Setup as Setup
    from .schedule import Step as Step
    from .stepper import Stepper as Stepper
    from .stepper import replay as replay
else:  # not for type checkers, as in `vnetdp`
    __all__ = [*_HOME]

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        home = _HOME[name]
        module = importlib.import_module(f".{home}", __name__)
        found = getattr(module, name)
        globals()[name] = found  # next time this function is not asked
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *_HOME})
