"""The package: what an import costs, and what is published."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import vnetdp
import vnetdp_kernels
from tests.project.oldest import oldest

PUBLIC: list[str] = vars(vnetdp)["__all__"]
HOME: dict[str, str] = vars(vnetdp)["_HOME"]


def python(code: str, cwd: Path, **env: str) -> Any:
    """Run *code* in a child, in folder *cwd*; return what it printed, read as JSON."""
    child = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def here() -> str:
    """Return the PYTHONPATH under which a child finds the very packages that this process has."""
    return os.pathsep.join(str(Path(str(package.__file__)).parents[1]) for package in (vnetdp, vnetdp_kernels))


# --- what an import costs ---


@pytest.mark.parametrize("statement", ["import vnetdp", "import vnetdp.cli.parser", "import vnetdp_kernels.spec"])
def test_import_loads_neither_numba_nor_numpy(statement: str, tmp_path: Path) -> None:
    code = f"import sys, json; {statement}; print(json.dumps(sorted(sys.modules)))"
    loaded = set(python(code, tmp_path, PYTHONPATH=here()))
    assert not loaded & {"numba", "llvmlite", "numpy", "scapy", "pytun", "matplotlib"}


# --- what is public ---


def test_every_public_name_is_there() -> None:
    for name in PUBLIC:
        assert getattr(vnetdp, name) is not None
    assert set(PUBLIC) <= set(dir(vnetdp))
    with pytest.raises(AttributeError, match="no attribute 'Virtio'"):
        getattr(vnetdp, "Virtio")  # noqa: B009 - type checkers know that there is none


@pytest.mark.parametrize("name", HOME)
def test_a_public_name_comes_from_the_module_that_defines_it(name: str) -> None:
    module = importlib.import_module(f"vnetdp.{HOME[name]}")
    found = getattr(vnetdp, name)
    if isinstance(found, ModuleType):
        assert found is module
    else:
        assert found is getattr(module, name)
        assert found.__module__ == module.__name__


def test_type_checkers_see_the_public_names_and_no_others() -> None:
    tree = ast.parse(Path(vnetdp.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: f"{node.module}.{alias.name}" if alias.name == "features" else node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
        if alias.asname == alias.name  # else it is not exported
    }
    assert seen == HOME
    assert [*HOME, "__version__"] == PUBLIC


# --- what is published ---


def test_each_package_has_an_oldest_version_that_is_tested() -> None:
    assert {"numba", "numpy", "python-pytun", "scapy", "pytest", "matplotlib", "simpy"} <= oldest().keys()


def test_version_is_the_distribution_s() -> None:
    assert importlib.metadata.version("vnetdp") == vnetdp.__version__


@pytest.mark.parametrize("package", [vnetdp, vnetdp_kernels])
def test_packages_are_typed(package: Any) -> None:
    assert (Path(package.__file__).parent / "py.typed").is_file()


def test_every_module_can_be_imported(tmp_path: Path) -> None:
    code = """
import importlib, json, pkgutil, sys
import vnetdp, vnetdp_kernels
names = [module.name for package in (vnetdp, vnetdp_kernels)
         for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
         if not module.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
print(json.dumps(names))
"""
    names = python(code, tmp_path, PYTHONPATH=here())
    assert {"vnetdp.cli.parser", "vnetdp.backends.process", "vnetdp_kernels.loops.serve"} < set(names)
