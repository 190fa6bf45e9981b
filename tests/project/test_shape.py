"""The limits of the code's shape are kept by `make check`, which finds what is beyond each of them."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.project import shape

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
SHORT = "def short():\n" + "    pass\n" * (shape.FUNCTION_LINES - 1)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (SHORT, []),
        (SHORT + "    pass\n", [(1, "short has 71 lines, and 70 are the most: split it")]),
        ("\n@first\n" + SHORT, [(2, "short has 71 lines, and 70 are the most: split it")]),
        ("class Some:\n    async " + SHORT.replace("\n", "\n    ") + "    return\n",
         [(2, "short has 71 lines, and 70 are the most: split it")]),
        ("\n" * shape.FILE_LINES, []),
        ("\n" * shape.FILE_LINES + "last = 1\n", [(1, "the file has 501 lines, and 500 are the most: split it")]),
    ],
    ids=["short", "long", "long with its decorator", "long method", "short file", "long file"],
)  # fmt: skip
def test_what_is_too_long_is_found(source: str, found: list[tuple[int, str]]) -> None:
    assert list(shape.faults(source)) == found


def test_nothing_is_too_long(capsys: pytest.CaptureFixture[str]) -> None:
    assert shape.main() == 0, capsys.readouterr().err


@pytest.mark.skipif(find_spec("ruff") is None, reason="ruff is not installed")
@pytest.mark.parametrize(
    ("parameters", "found"),
    [
        ("a, b, c, d, e, f, g, h", False),
        ("a, b, c, d, e, f, g, h, *, i, j", False),
        ("self, a, b, c, d, e, f, g, h", False),
        ("a, b, c, d, e, f, g, h, i", True),
        ("a, b, /, c, d, e, f, g, h, i=1", True),
    ],
    ids=["eight", "more by keyword", "eight of a method", "nine", "nine of all kinds"],
)
def test_more_than_eight_positional_parameters_are_found(parameters: str, found: bool) -> None:
    source = (
        f"class Some:\n    def method({parameters}): ...\n" if "self" in parameters else f"def f({parameters}): ...\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--config", str(PYPROJECT), "--output-format=concise",
         "--stdin-filename", str(PYPROJECT.with_name("vnetdp") / "some.py"), "-"],
        input=source, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ("PLR0917" in done.stdout) is found, done.stdout + done.stderr


def contract() -> dict[str, Any]:
    config = tomllib.loads(PYPROJECT.read_text())["tool"]["importlinter"]
    (found,) = (each for each in config["contracts"] if each["name"] == "no import circles")
    assert found["ancestors"] == config["root_packages"] == ["vnetdp", "vnetdp_kernels", "tests"]
    return dict(found)


@pytest.mark.skipif(find_spec("importlinter") is None, reason="import-linter is not installed")
@pytest.mark.parametrize(
    ("modules", "kept"),
    [
        ({"one": "from . import two", "two": ""}, True),
        ({"one": "from . import two", "two": "from . import one"}, False),
        (
            {"one": "from . import two", "two": "def f():\n    from .three import g", "three": "from .one import h"},
            False,
        ),
        ({"sub/__init__": "", "sub/one": "from .two import f", "sub/two": "from .one import g"}, False),
    ],
    ids=["none", "of two", "by way of a function", "in a folder"],
)
def test_import_circles_are_found(modules: dict[str, str], kept: bool, tmp_path: Path) -> None:
    for name, text in {"__init__": "", **modules}.items():
        path = tmp_path / f"circles/{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "pyproject.toml").write_text(
        '[tool.importlinter]\nroot_packages = ["circles"]\n[[tool.importlinter.contracts]]\nname = "circles"\n'
        f'type = "{contract()["type"]}"\nancestors = ["circles"]\n'
    )
    # In a process of its own, since it configures logging for all.
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if kept else 1), done.stdout + done.stderr
