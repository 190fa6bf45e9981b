"""The documentation is true: its examples run, its commands parse, its links lead somewhere, its lists are whole."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vnetdp
import vnetdp.testing
from tests.project import reference
from tests.support.by_hand import CAMPAIGN, wait_for
from tests.support.zygote import popen
from vnetdp.bench.netns import why_no_netns
from vnetdp.cli import parser

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
HACKING = ROOT / "HACKING.md"
COMMANDS = ROOT / "docs" / "commands.md"
GLOSSARY = ROOT / "docs" / "glossary.md"
PAGES = [README, HACKING, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(
    r"(?:<!-- test: (?P<test>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)

PIPES: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

pytestmark = pytest.mark.skipif(not README.exists(), reason="the documentation is in the checkout only")


class Block:
    """A fenced block: the test that a comment before it names, its language and text, and the text block after it."""

    def __init__(self, page: Path, match: re.Match[str]) -> None:
        self.page = page
        self.test, self.language, self.text = match["test"] or "", match["language"], match["text"]
        after = re.compile(r"\n*```text\n(?P<text>.*?)```", re.DOTALL).match(match.string, match.end())
        self.output = after["text"] if after else None
        self.line = match.string.count("\n", 0, match.start("language")) + 1


def blocks(page: Path) -> list[Block]:
    return [Block(page, match) for match in _FENCE.finditer(page.read_text())] if page.exists() else []


def marked(test: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.test == test]


def name_of(block: Block) -> str:
    return f"{block.page.name}:{block.line}"


def only(test: str) -> Block:
    (block,) = marked(test)
    return block


def run(argv: list[str], cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture
def shell_env(tmp_path: Path) -> dict[str, str]:
    """The environment of a reader who has activated .venv: `vnetdp` is this very checkout's."""
    command = tmp_path / "bin" / "vnetdp"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m vnetdp "$@"\n')
    command.chmod(0o755)
    return {**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}"}


# --- examples ---


@pytest.mark.parametrize("block", marked("python"), ids=name_of)
def test_python_example(block: Block, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(block.text)
    code = (
        f"import runpy, warnings; warnings.simplefilter('error'); runpy.run_path('{script.name}', run_name='__main__')"
    )
    process = popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert out == block.output


@pytest.mark.parametrize("block", marked("pytest"), ids=name_of)
def test_pytest_example(block: Block, tmp_path: Path) -> None:
    """It passes, or fails with the lines that the page shows, whatever the time in them is."""
    (tmp_path / "test_example.py").write_text(block.text)
    done = run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:benchmark", "-W", "error"], tmp_path
    )
    assert done.returncode == (0 if block.output is None else 1), done.stdout
    for line in (block.output or "").splitlines():
        assert re.sub(r"[\d.]+ s$", "", line) in done.stdout


@pytest.mark.parametrize("block", [*marked("python"), *marked("pytest")], ids=name_of)
def test_python_example_imports_from_the_public_face_alone(block: Block) -> None:
    assert not re.search(r"^\s*(from|import) vnetdp(_kernels|\.(?!testing\b))", block.text, re.MULTILINE)


def test_every_example_file_is_shown_or_run_by_a_test() -> None:
    shown = {block.text for block in marked("python")}
    run_elsewhere = (ROOT / "tests/endpoints/test_examples.py").read_text()
    examples = sorted((ROOT / "examples").glob("*.py"))
    assert examples
    for path in examples:
        assert path.read_text() in shown or f'"{path.name}"' in run_elsewhere, path.name


def test_every_python_block_is_an_example() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert block.language != "python" or block.test in ("python", "pytest"), name_of(block)


def test_every_marked_block_is_one_that_a_test_runs() -> None:
    tests = "".join((ROOT / "tests" / name).read_text() for name in ("project/test_docs.py", "interop/test_attach.py"))
    for page in PAGES:
        for block in blocks(page):
            assert not block.test or f'"{block.test}"' in tests, name_of(block)


@pytest.mark.parametrize("block", marked("run"), ids=name_of)
def test_shell_example(block: Block, tmp_path: Path, shell_env: dict[str, str]) -> None:
    """By a shell with VNETDP_CAMPAIGN=1; else each line by itself, forked."""
    commands: Iterable[subprocess.Popen[str]]
    if CAMPAIGN:
        commands = [subprocess.Popen(["sh", "-eu", "-c", block.text], cwd=tmp_path, env=shell_env, **PIPES)]
    else:
        lines = [shlex.split(line) for line in block.text.splitlines()]
        assert {name for name, *_ in lines} == {"vnetdp"}
        commands = (popen([sys.executable, "-m", *words], cwd=tmp_path, **PIPES) for words in lines)
    for command in commands:
        out, err = command.communicate(timeout=240)
        assert command.returncode == 0, err
        assert " 0 lost, 0 duplicated, 0 reordered, 0 corrupted" in out


@pytest.fixture
def namespaces() -> Iterator[dict[str, str]]:
    """Names in place of those in the README, so that two runs can't meet; gone after the test, if they were made."""
    names = {side: f"vnetdp-docs-{os.getpid()}-{side}" for side in ("left", "right")}
    yield names
    for name in names.values():
        if (Path("/run/netns") / name).exists():
            subprocess.run(["ip", "netns", "delete", name], check=True)


def test_two_namespaces(tmp_path: Path, shell_env: dict[str, str], namespaces: dict[str, str]) -> None:
    if (missing := why_no_netns()) is not None:
        pytest.skip(missing)
    if shutil.which("ping") is None:
        pytest.skip("ping isn't installed (Debian's package iputils-ping)")
    first, second = only("link").text, only("link, meanwhile").text
    for side, name in namespaces.items():
        first, second = first.replace(f"vnet-{side}", name), second.replace(f"vnet-{side}", name)
    *setup, link = first.splitlines()
    subprocess.run(["sh", "-eu", "-c", "\n".join(setup)], check=True, timeout=60)
    with open(tmp_path / "log", "w+") as log:
        linked = subprocess.Popen(["sh", "-c", f"exec {link}"], env=shell_env, stdout=log, stderr=log, cwd=tmp_path)
        try:
            wait_for(lambda: "linked" in (tmp_path / "log").read_text() or linked.poll() is not None, "it is linked")
            done = run(["sh", "-eu", "-c", second], tmp_path)
        finally:
            linked.send_signal(signal.SIGINT)
            status = linked.wait(60)
    said = (tmp_path / "log").read_text()
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{said}"
    assert " 0% packet loss" in done.stdout
    assert status == 0, said
    assert "left to right" in said


def test_the_demo_prints_what_the_readme_shows(tmp_path: Path) -> None:
    # As on a terminal, where both streams are one.
    command = "exec 2>&1; " + shlex.join(
        [sys.executable, "-m", "vnetdp", "demo", "--seconds", "0.1", "--json", "report"]
    )
    done = run(["sh", "-c", command], tmp_path)
    assert done.returncode == 0, done.stdout

    def without_figures(text: str) -> list[str]:
        lines = [re.sub(r"[ \d,.]+", " ", line) for line in text.splitlines()]
        return [line for line in lines if not line.startswith("compil")]

    assert without_figures(done.stdout) == without_figures(only("demo").text)
    assert json.loads((tmp_path / "report").read_text())["ok"]


# --- what it says ---


def test_commands_are_ones_that_exist() -> None:
    found = 0
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for block in blocks(page):
            if block.language != "sh":
                continue
            for line in block.text.replace("\\\n", " ").splitlines():
                words = [word for word in shlex.split(line, comments=True) if word not in ("sudo", "&")]
                if words[:1] == ["vnetdp"]:
                    parser._parser().parse_args(words[1:])
                    found += 1
                if words[:1] == ["make"]:
                    assert set(words[1:]) <= targets, line
    assert found > 3


def test_every_endpoint_is_in_the_table() -> None:
    from vnetdp.endpoints.spec import _KINDS

    table = COMMANDS.read_text().split("## Endpoints")[1].split("##")[0]
    for kind in _KINDS:
        assert f"`{kind}" in table


def test_every_public_name_is_in_the_list() -> None:
    names = re.findall(r"^- `(\w+)`: ", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert [*names, "__version__"] == vars(vnetdp)["__all__"]
    names = re.findall(r"^- `testing\.(\w+)`: ", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert names == vars(vnetdp.testing)["__all__"]


@pytest.mark.skipif(importlib.util.find_spec("pdoc") is None, reason="pdoc isn't installed: pip install 'vnetdp[docs]'")
def test_the_reference_has_every_public_name(tmp_path: Path) -> None:
    reference.build(tmp_path)
    for path, package in (("vnetdp.html", vnetdp), ("vnetdp/testing.html", vnetdp.testing)):
        page = (tmp_path / path).read_text()
        for name in {*vars(package)["__all__"]} - {"__version__", "READY"}:  # READY: a number, which `bring_up` names
            assert f'<section id="{name}">' in page or [*tmp_path.rglob(f"{name}.html")], name
        assert "@private" not in page


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target
        if anchor and "://" not in target:
            assert anchor in anchors(page.parent / target if target else page), f"{target}#{anchor}"


def test_the_readme_has_at_most_8_kb() -> None:
    assert len(README.read_bytes()) <= 8192


def test_the_glossary_is_in_alphabetical_order_and_each_term_is_used() -> None:
    terms = re.findall(r"^\| ([^|]+) \| ", GLOSSARY.read_text(), re.MULTILINE)[1:]
    assert len(terms) > 50
    assert terms == sorted(set(terms), key=str.casefold)
    sources = [path for folder in ("vnetdp", "kernels") for path in (ROOT / folder).rglob("*.py")]
    pages = [page for page in PAGES if page not in (GLOSSARY, ROOT / "CHANGELOG.md")]
    text = " ".join(" ".join(path.read_text() for path in (*pages, *sources)).lower().split())
    assert [term for term in terms if not re.search(rf"\b{re.escape(term.lower())}", text)] == []


def test_the_map_has_every_file() -> None:
    """Each folder has a row, and each file of no folder; a row of the kernels names every file in its folder."""
    table = HACKING.read_text().split("## The code")[1].split("\n## ")[0]
    named = set(re.findall(r"`((?:\w+/)*\w+(?:\.py|/))`", table)) - {"kernels/vnetdp_kernels/", "vnetdp/"}
    kernels, control = ROOT / "kernels" / "vnetdp_kernels", ROOT / "vnetdp"
    folders = {
        f"{path.parent.relative_to(package)}/"
        for package in (kernels, control)
        for path in package.glob("*/**/__init__.py")
    }
    files = {path.name for pattern in ("*.py", "*/*.py") for path in kernels.glob(pattern)}
    files |= {path.name for path in control.glob("*.py")}
    files = {name for name in files if not name.startswith("_")}
    assert {name for name in named if name.endswith("/")} == folders
    assert files <= {name.rpartition("/")[2] for name in named}
    assert all(any(package.rglob(name) for package in (kernels, control)) for name in named)
