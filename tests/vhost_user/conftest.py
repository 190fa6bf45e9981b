"""The fixtures that put one hostile peer after another before the same back end, in a thread and in a process.

By default every third case of a long table meets the thread, and every sixth the process, which is another one; with
VNETDP_CAMPAIGN=1 each meets both.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.by_hand import CAMPAIGN, no_descriptor_leaks
from tests.support.vhost_user import BackEnd, InProcess, InThread, ping

_LONG = 12  # cases
# The first case of a long table that each back end meets, and the step from there to the next.
_EVERY = {"thread": (0, 3), "process": (1, 6)}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what the docstring says."""
    if CAMPAIGN:
        return
    tests = {item: (item.nodeid.partition("[")[0], _meets(item)) for item in items if _meets(item) is not None}
    cases, met = Counter(tests.values()), Counter[tuple[str, str | None]]()
    left_out = set()
    for item, test in tests.items():
        first, every = _EVERY[str(test[1])]
        if cases[test] >= _LONG and met[test] % every != first:
            left_out.add(item)
        met[test] += 1
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


def _meets(item: pytest.Item) -> str | None:
    """Return the back end that a test of this folder has, if any."""
    if Path(__file__).parent not in item.path.parents or "callspec" not in vars(item):
        return None
    back_end: str | None = vars(item)["callspec"].params.get("back_end")
    return back_end


class _Revived:
    """One process for all tests, and another if it died."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: InProcess | None = None

    def get(self) -> InProcess:
        if self._process is None or not self._process.alive():
            self._process = InProcess(self._folder)
            ping(self._process)  # what is opened once for all is opened by the first
        return self._process

    def close(self) -> None:
        if self._process is not None:
            self._process.close()


@pytest.fixture(scope="session", autouse=True)
def nothing_old_to_look_through() -> Iterator[None]:
    """Keep what is there already, the compiler's objects most of all, out of every later collection."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Revived]:
    revived = _Revived(tmp_path_factory.mktemp("served"))
    yield revived
    revived.close()


@pytest.fixture(params=["thread", "process"])
def back_end(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BackEnd]:
    if request.param == "process":
        yield request.getfixturevalue("process").get()
        return
    with no_descriptor_leaks():
        back_end = InThread(tmp_path)
        yield back_end
        back_end.close()
