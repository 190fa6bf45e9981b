"""The fixtures that put one hostile peer after another before the same back end, in a thread and in a process.

Of a long table each case meets the thread, and by default every fourth the process too; all with VNETDP_CAMPAIGN=1.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.by_hand import CAMPAIGN, no_descriptor_leaks
from tests.support.vhost_user import BackEnd, InProcess, InThread, ping

_EVERY = 4
_LONG = 12  # cases


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what the docstring says."""
    if CAMPAIGN:
        return
    in_process = {item: item.nodeid.partition("[")[0] for item in items if _meets(item) == "process"}
    cases, met = Counter(in_process.values()), Counter[str]()
    left_out = []
    for item, test in in_process.items():
        if cases[test] >= _LONG and met[test] % _EVERY:
            left_out.append(item)
        met[test] += 1
    items[:] = [item for item in items if item not in set(left_out)]
    config.hook.pytest_deselected(items=left_out)


def _meets(item: pytest.Item) -> object:
    """Return the back end that a test of this folder has."""
    if Path(__file__).parent not in item.path.parents:
        return None
    return vars(item).get("callspec") and vars(item)["callspec"].params.get("back_end")


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
