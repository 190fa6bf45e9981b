"""Modules that have moved, under the names that documents of earlier versions gave them.

`import vnetdp.driver` and its like give the module itself, with a DeprecationWarning. The names go with the next minor
version (docs/api.md).
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import warnings
from types import ModuleType

_MOVED = {
    "vnetdp.backends.vhost_user": "vnetdp.vhost_user.front_end.front_end",
    "vnetdp.demo": "vnetdp.programs.demo",
    "vnetdp.drive": "vnetdp.programs.drive",
    "vnetdp.driver": "vnetdp.guest.driver",
    "vnetdp.features": "vnetdp.virtio.features",
    "vnetdp.link": "vnetdp.programs.link",
    "vnetdp.memory": "vnetdp.shared.memory",
    "vnetdp.notify": "vnetdp.shared.notify",
    "vnetdp.owners": "vnetdp.device.owners",
    "vnetdp.server": "vnetdp.vhost_user.back_end.server",
    "vnetdp.state": "vnetdp.virtio.state",
    "vnetdp.virtqueue": "vnetdp.virtio.queue",
    "vnetdp.watch": "vnetdp.vhost_user.front_end.watch",
}


class _Loader(importlib.abc.Loader):
    """Loads a module under its former name."""

    def __init__(self, home: str) -> None:
        self._home = home
        self._spec: importlib.machinery.ModuleSpec | None = None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        warnings.warn(
            f"{spec.name} is now {self._home}: import public names from vnetdp", DeprecationWarning, stacklevel=2
        )
        module = importlib.import_module(self._home)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its own spec back, which relative imports need; it has been run already."""
        module.__spec__ = self._spec


def find_spec(name: str) -> importlib.machinery.ModuleSpec | None:
    """Return the spec of a module that has moved, None for any other *name*."""
    home = _MOVED.get(name)
    return None if home is None else importlib.machinery.ModuleSpec(name, _Loader(home))
