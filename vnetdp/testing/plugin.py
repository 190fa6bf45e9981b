"""The pytest plugin: the fixtures `vnet`, `faults` and `ledger`, and the marker `vnet`, as docs/testing.md shows them.

pytest loads this file in every project where vnetdp is installed: NumPy and Numba wait for the first test that asks for
`vnet`.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ..backends.faulty import Faults
    from .frames import FrameLedger
    from .net import Vnet

_SHOWN = 20  # events of a history, in the report of a test that failed
_NET = pytest.StashKey["Vnet"]()
_LISTS = ("faults",)  # options that are lists themselves


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("vnetdp").addoption(
        "--vnet-history",
        metavar="FOLDER",
        help="write the history of each test with the fixture vnet that fails into FOLDER, as JSON lines",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "vnet(**options): the arguments of the Vnet that the fixture vnet is; an option that is a list (but for "
        "faults) makes a test for each of its values",
    )


def _asked(item: pytest.Item | pytest.Function) -> dict[str, Any]:
    """Return the arguments that the test's markers give; the nearest marker wins."""
    options: dict[str, Any] = {}
    for mark in reversed([*item.iter_markers("vnet")]):
        if mark.args:
            raise pytest.UsageError(f"{item.nodeid}: the marker vnet takes keywords alone, such as endpoint=…")
        options |= mark.kwargs
    return options


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "vnet" not in metafunc.fixturenames:
        # A marker of a class or module may be for its other tests.
        if any(mark.name == "vnet" for mark in metafunc.definition.own_markers):
            raise pytest.Collector.CollectError(
                f"{metafunc.definition.nodeid}: it has the marker vnet, and runs without one: its arguments name none of "
                "the fixtures vnet, faults and ledger"
            )
        return
    options = _asked(metafunc.definition)
    several = {name: value for name, value in options.items() if isinstance(value, list) and name not in _LISTS}
    if several:
        cases = [options | dict(zip(several, values, strict=True)) for values in product(*several.values())]
        ids = ["-".join(_id(case[name]) for name in several) for case in cases]
        metafunc.parametrize("vnet", cases, ids=ids, indirect=True)


def _id(value: object) -> str:
    return str(getattr(value, "__name__", value))


@pytest.fixture
def vnet(request: pytest.FixtureRequest) -> Iterator[Vnet]:
    """A device under traffic, with driver, worker and endpoints: a `vnetdp.testing.Vnet`, which the marker `vnet` describes.

    It is checked at the end of the test, which fails if a frame is not accounted for, an invariant is violated, or the
    endpoint raised.
    """
    from .net import Vnet

    net = Vnet(**(getattr(request, "param", None) or _asked(request.node)))
    try:
        net.__enter__()
        request.node.stash[_NET] = net
        yield net
    finally:
        net.close()  # if the test did not come to its end


@pytest.fixture
def faults(vnet: Vnet) -> Faults:
    """The faults of vhost's verbs of `vnet`: a list to append a `vnetdp.Fault` to."""
    return vnet.faults


@pytest.fixture
def ledger(vnet: Vnet) -> FrameLedger:
    """The frames of `vnet`: counts, and which were lost, doubled, late or corrupted."""
    return vnet.ledger


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """End a test's `vnet` within the test, so that the test itself fails by what it finds."""
    net = item.stash.get(_NET, None)
    try:
        yield
    except BaseException as e:
        if net is not None:
            net.__exit__(type(e), e, e.__traceback__)
        raise
    if net is not None:
        net.__exit__(None, None, None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    net = item.stash.get(_NET, None)
    if net is not None and report.when == "call" and report.failed:
        shown = net.history.lines().splitlines()[-_SHOWN:]
        report.sections.append((f"the last {len(shown)} events of vnet", "\n".join(shown)))
        folder = item.config.getoption("--vnet-history")
        if folder:
            path = Path(folder)
            path.mkdir(parents=True, exist_ok=True)
            net.history.write(path / (re.sub(r"[^\w.-]+", "_", item.nodeid) + ".jsonl"))
    return report
