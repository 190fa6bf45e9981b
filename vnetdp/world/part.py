"""Part: one of the objects that a saved world is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..system.owned import Owned, OwnedLock


class Part:
    """An object of a world: how it is saved, loaded and checked. name: as data and errors name it, such as `device 0`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def owned(self) -> Sequence[Owned | OwnedLock]:
        """Return all objects that belong to one process."""
        return ()

    def adopt(self) -> None:
        """Have it belong to this process, a forked child."""
        for thing in self.owned():
            thing.adopt()

    def check_private(self) -> None:
        """Raise ConfigError, with the next step, if a forked child shares it with its parent."""

    def check_at_rest(self) -> None:
        """Raise ConfigError, with the next step, if it can be neither saved nor loaded."""

    def shape(self) -> dict[str, Any]:
        """Return the arguments that it was made with, as plain data: those of the saved one have to be the same."""
        return {}

    def save(self) -> Any:
        """Return its state as plain data, which shares nothing with it."""
        raise NotImplementedError

    def load(self, state: Any) -> None:
        """Take over a state, which came from outside. If that is none it raises any error, and is undone by another call."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise ConfigError unless kernels can run on the state that it has, now that all parts have theirs."""
