"""Modules that a command or the code of another process names, as text that no linter reads, are there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = r"((?:vnetdp|vnetdp_kernels|tests)\b[\w.]*)"
RUN = re.compile(rf"""-m["', ]+{OURS}""")
IMPORTED = re.compile(rf"from {OURS} import (?!NAME\b)(\w+(?:, \w+)*)")  # a document's NAME is any


TEXTS = ("Makefile", "*.md", "docs/*.md", "vnetdp/**/*.py", "kernels/**/*.py", "bench/*.py", "tests/**/*.py")


def texts() -> Iterator[tuple[str, str]]:
    """Return each file that may name a module, and its text; the tests themselves run what they name."""
    for pattern in TEXTS:
        for path in sorted(ROOT.glob(pattern)):
            if not path.name.startswith("test_"):
                yield str(path.relative_to(ROOT)), path.read_text()


def missing(text: str) -> list[str]:
    """Return what a text runs or imports of our modules, and is not there."""
    found = [module for module in RUN.findall(text) if not _can_run(module)]
    for module, names in IMPORTED.findall(text):
        if not _is_there(module):
            found.append(module)
        else:
            here = import_module(module)
            found += [
                f"{module}.{name}"
                for name in names.split(", ")
                if not hasattr(here, name) and not _is_there(f"{module}.{name}")
            ]
    return found


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _can_run(module: str) -> bool:
    spec = find_spec(module) if _is_there(module) else None
    return spec is not None and (spec.submodule_search_locations is None or _is_there(f"{module}.__main__"))


def test_each_module_that_is_named_is_there() -> None:
    found = {path: missing(text) for path, text in texts()}
    assert {"Makefile", "README.md", "vnetdp/bench/link.py", "tests/support/zygote.py"} < found.keys()
    assert not {path: modules for path, modules in found.items() if modules}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('[sys.executable, "-m", "vnetdp", "link"]', []),
        ('[sys.executable, "-m", "vnetdp.bench.udp_blast"]', []),
        ('[sys.executable, "-m", "vnetdp.bench.udp_storm"]', ["vnetdp.bench.udp_storm"]),
        ("$(RUN) -m tests.shapes | tee", ["tests.shapes"]),
        ("$(RUN) -m vnetdp.bench", ["vnetdp.bench"]),
        ("python -c 'from vnetdp.warmup import warm_up; warm_up(print)'", []),
        ("python -c 'from vnetdp.warm import warm_up; warm_up(print)'", ["vnetdp.warm"]),
        ("f'from vnetdp.system.child import start, followed; followed({fd})'", ["vnetdp.system.child.followed"]),
        ("from vnetdp.system import child, childs", ["vnetdp.system.childs"]),
    ],
)
def test_a_module_that_is_not_there_is_found(text: str, found: list[str]) -> None:
    assert missing(text) == found
