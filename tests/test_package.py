"""The package: what an import costs, what is published, and a kernel cache that can't hold yesterday's code."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vnetdp
import vnetdp_kernels


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


@pytest.mark.parametrize("statement", ["import vnetdp", "import vnetdp.cli", "import vnetdp_kernels.layout"])
def test_import_loads_neither_numba_nor_numpy(statement: str, tmp_path: Path) -> None:
    code = f"import sys, json; {statement}; print(json.dumps(sorted(sys.modules)))"
    loaded = set(python(code, tmp_path, PYTHONPATH=here()))
    assert not loaded & {"numba", "llvmlite", "numpy", "scapy", "pytun", "matplotlib"}


def test_every_public_name_is_there() -> None:
    for name in vnetdp.__all__:
        assert getattr(vnetdp, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Virtio'"):
        vnetdp.Virtio  # noqa: B018


# --- what is published ---


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
    assert {"vnetdp.cli", "vnetdp.backends.process", "vnetdp_kernels.loops"} < set(names)


# --- the cache of the kernels ---

_HELPER = """
from .jit import kernel

@kernel
def step(x: int) -> int:
    return x + {step}
"""
_CALLER = """
from .helper import step
from .jit import kernel

@kernel
def twice(x: int) -> int:
    return step(step(x))
"""
_CALL = """
import json
from vnetdp_kernels.caller import twice
from vnetdp_kernels.jit import cache_is_warm

warm = cache_is_warm(twice)
print(json.dumps([twice(0), warm, sum(twice.stats.cache_hits.values()), sum(twice.stats.cache_misses.values())]))
"""


class CopiedKernels:
    """A copy of the package, where a kernel in one file calls a helper in another, with a cache of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.package = folder / "vnetdp_kernels"
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(str(vnetdp_kernels.__file__)).parent, self.package, ignore=ignored)
        (self.package / "caller.py").write_text(_CALLER)
        self.edit_helper(1)

    def edit_helper(self, step: int) -> None:
        (self.package / "helper.py").write_text(_HELPER.format(step=step))

    def call(self, **env: str) -> list[Any]:
        """Call the kernel in a new process; return its result, whether the cache said it was warm, hits and misses."""
        settings = {"NUMBA_DISABLE_JIT": "0", "NUMBA_BOUNDSCHECK": "0", "NUMBA_CACHE_DIR": str(self.folder / "cache")}
        found: list[Any] = python(_CALL, self.folder, PYTHONPATH=str(self.folder), **{**settings, **env})
        return found


@pytest.fixture
def kernels(tmp_path: Path) -> CopiedKernels:
    return CopiedKernels(tmp_path)


def test_a_second_process_compiles_nothing(kernels: CopiedKernels) -> None:
    assert kernels.call() == [2, False, 0, 1]
    assert kernels.call() == [2, True, 1, 0]


def test_an_edited_helper_in_another_file_makes_the_cache_stale(kernels: CopiedKernels) -> None:
    kernels.call()
    kernels.edit_helper(10)
    assert kernels.call() == [20, False, 0, 1]
    assert kernels.call() == [20, True, 1, 0]


def test_a_new_file_in_the_package_makes_the_cache_stale(kernels: CopiedKernels) -> None:
    kernels.call()
    (kernels.package / "another.py").write_text("X = 1\n")
    assert kernels.call() == [2, False, 0, 1]


def test_checked_code_and_unchecked_code_do_not_meet_in_the_cache(kernels: CopiedKernels) -> None:
    assert kernels.call() == [2, False, 0, 1]
    assert kernels.call(NUMBA_BOUNDSCHECK="1") == [2, False, 0, 1]
    assert kernels.call(NUMBA_BOUNDSCHECK="1") == [2, True, 1, 0]
    assert kernels.call() == [2, True, 1, 0]


def test_without_the_jit_nothing_is_cached(kernels: CopiedKernels) -> None:
    code = "import json; from vnetdp_kernels.caller import twice; print(json.dumps(twice(3)))"
    cache = kernels.folder / "cache"
    settings = {"PYTHONPATH": str(kernels.folder), "NUMBA_DISABLE_JIT": "1", "NUMBA_CACHE_DIR": str(cache)}
    assert python(code, kernels.folder, **settings) == 5
    assert not list(cache.rglob("*.nbi"))
