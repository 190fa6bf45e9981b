"""The shape of the code: files of 500 lines at most, functions of 70: `python -m tests.project.shape`, in `make check`.

What else has a limit there: ruff counts positional parameters (at most 8; pyproject.toml, `max-positional-args`), and
import-linter finds import circles ("no import circles"). There are no exceptions: what is longer is two things.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("vnetdp", "kernels", "tests", "bench")
FILE_LINES = 500
FUNCTION_LINES = 70


def faults(source: str) -> Iterator[tuple[int, str]]:
    """Return what of a file is too long: the line where it begins, and what it is."""
    lines = source.count("\n")
    if lines > FILE_LINES:
        yield 1, f"the file has {lines} lines, and {FILE_LINES} are the most: split it"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            begin = min(part.lineno for part in (node, *node.decorator_list))
            lines = (node.end_lineno or begin) - begin + 1
            if lines > FUNCTION_LINES:
                yield begin, f"{node.name} has {lines} lines, and {FUNCTION_LINES} are the most: split it"


def main() -> int:
    """Print all that is too long; return the exit status."""
    found = [
        f"{path.relative_to(ROOT)}:{line}: {fault}"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, fault in faults(path.read_text())
    ]
    for line in found:
        sys.stderr.write(f"{line}\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
