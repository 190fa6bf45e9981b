"""Campaigns: many cases on many processes, of this machine or of a Dask cluster. A lost worker loses no case."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING, Generic, TypeVar

from ..errors import ConfigError, reason
from ..system import limits

if TYPE_CHECKING:
    from distributed import Client

_TRIES = 3  # of a case whose worker is lost each time

C = TypeVar("C")
R = TypeVar("R")


@dataclass(frozen=True)
class Finding(Generic[C, R]):
    """The result of one case of a campaign."""

    case: C
    """The case, as it was handed to `campaign`."""
    result: R | None
    """The value that the function returned for the case; None if it failed."""
    error: str = ""
    """The exception that the function raised, or the loss of its workers, in one line; empty if there was none."""


def campaign(
    run: Callable[[C], R],
    cases: Iterable[C],
    *,
    jobs: int = 1,
    client: Client | None = None,
    done: Callable[[Finding[C, R]], None] = lambda _: None,
) -> list[Finding[C, R]]:
    """Run *run* with each of *cases*, and return a `Finding` for each, in the order of *cases*.

    - `run`: a function of a module that can be imported; it and the cases are pickled. It may keep objects for its next case
      in a `threading.local`.
    - `jobs`: processes of this machine; 1 runs the cases in this process.
    - `client`: a `distributed.Client`: the cases run on its Dask cluster, whose workers need vnetdp installed.
    - `done`: called with each finding as it comes, in this thread.

    A case whose worker is killed runs again; after three such losses its finding says so. An exception of *run* is
    a finding, too, and ends nothing else. A script that uses several processes needs `if __name__ == "__main__":`, as with
    `multiprocessing`. ConfigError if `jobs` is less than 1.
    """
    if jobs < 1:
        raise ConfigError(f"{jobs} jobs: a campaign needs at least 1")
    listed = list(cases)
    if client is not None:
        found = _on_cluster(run, listed, client)
    elif jobs == 1:
        found = ((n, _here(run, case)) for n, case in enumerate(listed))
    else:
        found = _on_processes(run, listed, jobs)
    findings: dict[int, Finding[C, R]] = {}
    for n, finding in found:
        findings[n] = finding
        done(finding)
    return [findings[n] for n in range(len(listed))]


def _here(run: Callable[[C], R], case: C) -> Finding[C, R]:
    try:
        return Finding(case, run(case))
    except Exception as e:  # noqa: BLE001 - it is the case's result
        return Finding(case, None, reason(e))


# --- processes of this machine ---


def _begin() -> None:
    """Leave ^C to the parent, which waits for the cases under way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _on_processes(run: Callable[[C], R], cases: Sequence[C], jobs: int) -> Iterator[tuple[int, Finding[C, R]]]:
    """Yield each case's number and finding.

    A pool does not say which case a lost worker had. All cases under way run once more, each alone, which tells.
    """
    waiting = deque(range(len(cases)))
    alone: deque[int] = deque()
    losses = dict.fromkeys(waiting, 0)
    while waiting or alone:
        queue, width = (alone, 1) if alone else (waiting, jobs)
        with ProcessPoolExecutor(width, get_context("spawn"), _begin) as pool:
            lost = yield from _through(pool, run, cases, queue, width)
        for n in lost:
            losses[n] += len(lost) == 1
            if losses[n] == _TRIES:
                yield n, Finding(cases[n], None, f"the worker process of this case ended {_TRIES} times")
            else:
                alone.append(n)


def _through(
    pool: ProcessPoolExecutor, run: Callable[[C], R], cases: Sequence[C], waiting: deque[int], width: int
) -> Generator[tuple[int, Finding[C, R]], None, list[int]]:
    """Run the cases *waiting*, *width* at a time; return those under way when a worker was lost, or none at the end."""
    under_way: dict[Future[Finding[C, R]], int] = {}
    try:
        while waiting or under_way:
            while waiting and len(under_way) < width:
                with limits.giving("a process"):
                    under_way[pool.submit(_here, run, cases[waiting[0]])] = waiting[0]
                waiting.popleft()
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                finding = future.result()
                yield under_way.pop(future), finding
    except BrokenProcessPool:
        pass
    return list(under_way.values())


# --- a Dask cluster ---


def _on_cluster(run: Callable[[C], R], cases: Sequence[C], client: Client) -> Iterator[tuple[int, Finding[C, R]]]:
    """Yield each case's number and finding; Dask runs a lost worker's cases elsewhere, as often as its settings allow."""
    from distributed import as_completed

    numbers = {client.submit(_here, run, case, pure=False): n for n, case in enumerate(cases)}
    for future in as_completed(numbers):
        n = numbers.pop(future)
        error = future.exception()
        yield n, future.result() if error is None else Finding(cases[n], None, reason(error))
