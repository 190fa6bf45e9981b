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
import vnetdp.testing
import vnetdp_kernels
from tests.project.oldest import oldest

FACES = {
    vnetdp: [*vars(vnetdp)["_HOME"], "__version__"],
    vnetdp.testing: [*vars(vnetdp.testing)["_HOME"], "OWNERS", "VERBS"],
}


def home_of(face: ModuleType) -> dict[str, str]:
    home: dict[str, str] = vars(face)["_HOME"]
    return home


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


@pytest.mark.parametrize("module", ["vnetdp", "vnetdp.cli.parser", "vnetdp.testing.plugin", "vnetdp_kernels.spec"])
def test_import_loads_neither_numba_nor_numpy(module: str, tmp_path: Path) -> None:
    code = f"import sys, json, {module}; print(json.dumps(sorted(sys.modules)))"
    loaded = set(python(code, tmp_path, PYTHONPATH=here()))
    assert not loaded & {"numba", "llvmlite", "numpy", "scapy", "pytun", "matplotlib"}


# --- what is public ---


@pytest.mark.parametrize("face", FACES)
def test_every_public_name_is_there(face: ModuleType) -> None:
    names = vars(face)["__all__"]
    for name in names:
        assert getattr(face, name) is not None
    assert set(names) <= set(dir(face))
    with pytest.raises(AttributeError, match="no attribute 'Virtio'"):
        getattr(face, "Virtio")  # noqa: B009 - type checkers know that there is none


@pytest.mark.parametrize(("face", "name"), [(face, name) for face in FACES for name in home_of(face)])
def test_a_public_name_comes_from_the_module_that_defines_it(face: ModuleType, name: str) -> None:
    module = importlib.import_module(f"{face.__name__}.{home_of(face)[name]}")
    found = getattr(face, name)
    if isinstance(found, ModuleType):
        assert found is module
    else:
        assert found is getattr(module, name)
        assert isinstance(found, int | tuple) or found.__module__ == module.__name__


@pytest.mark.parametrize("face", FACES)
def test_type_checkers_see_the_public_names_and_no_others(face: ModuleType) -> None:
    tree = ast.parse(Path(str(face.__file__)).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: f"{node.module}.{alias.name}" if alias.name == "features" else node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
        if alias.asname == alias.name  # else it is not exported
    }
    assert seen == home_of(face)
    assert vars(face)["__all__"] == FACES[face]


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
