"""A module that has moved is found under its former name, with a warning, and is the module itself."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import vnetdp
from vnetdp.moved import _MOVED


@pytest.mark.parametrize("former", _MOVED)
def test_a_former_name_gives_the_module_itself(former: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, former, raising=False)
    home = importlib.import_module(_MOVED[former])
    spec = home.__spec__
    with pytest.warns(DeprecationWarning, match=f"{former} is now {_MOVED[former]}: import public names from vnetdp"):
        assert importlib.import_module(former) is home
    assert home.__spec__ is spec
    assert (home.__name__, home.__package__) == (_MOVED[former], _MOVED[former].rpartition(".")[0])


def test_names_of_the_former_documents_are_there() -> None:
    code = (
        "from vnetdp.driver import Driver, memory_for; from vnetdp.device import NetDevice; from vnetdp.watch import Watch\n"
        "from vnetdp.backends.vhost_user import VhostUserFrontEnd; from vnetdp.cli import main; import vnetdp\n"
        "assert Driver is vnetdp.Driver and NetDevice is vnetdp.NetDevice and callable(main)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("DeprecationWarning") == 3


def test_a_module_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'vnetdp\.drivers'"):
        importlib.import_module("vnetdp.drivers")
    assert not hasattr(vnetdp, "drivers")
