"""All schedules of driver, device, hand-over and dirty-log reader over tiny rings, with the kernels that are shipped.

A search runs in a process of its own, in which the kernels are plain Python: each of their operations on shared memory
(`platform/atomic.py`) is a point where another actor may go on, where a store may be on its way to memory still, and where
the device may be killed. docs/explore.md has the scenarios, the mutants that prove the search, and its size.

`python -m vnetdp.testing.explore` makes all searches; `explore` makes one, from Python.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from ...errors import ConfigError, WorkError
from ...system import child, limits
from .mutants import MUTANTS as MUTANTS
from .mutants import Mutant as Mutant
from .report import Job as Job
from .report import Report as Report
from .scenarios import SCENARIOS as SCENARIOS
from .scenarios import Scenario as Scenario

__all__ = ["MUTANTS", "SCENARIOS", "Job", "Mutant", "Report", "Scenario", "explore", "explore_all"]

_MODELS = ("tso", "weak")
_PLAIN = {"NUMBA_DISABLE_JIT": "1"}


def explore(job: Job, progress: Callable[[str], None] | None = None) -> Report:
    """Look at all schedules of a scenario; return the result. As `explore_all`, for one job."""
    (report,) = explore_all([job], progress)
    return report


def explore_all(jobs: Iterable[Job], progress: Callable[[str], None] | None = None) -> Iterator[Report]:
    """Make searches, one after another, in a process of their own; yield the report of each.

    progress: called about every second with a line of text. The process ends with the iterator. ConfigError for a job that
    names no scenario, mutant or model, or whose schedule can't be replayed; WorkError if the process ends.
    """
    jobs = list(jobs)
    for job in jobs:
        _check("scenario", job.scenario, SCENARIOS)
        _check("mutant", job.mutant or next(iter(MUTANTS)), MUTANTS)
        _check("model", job.model or _MODELS[0], _MODELS)
        most = SCENARIOS[job.scenario].most_extra
        if not 0 <= job.extra <= most:
            raise ConfigError(f"extra is {job.extra}: {job.scenario} can have 0 to {most} frames more")
        if job.most_states < 1:
            raise ConfigError(f"most_states is {job.most_states}: 1 is the least")
    with ExitStack() as made:
        ours, theirs = limits.socket_pair(socket.SOCK_STREAM)
        made.enter_context(ours)
        with theirs:
            code = f"from {__name__}.run import main; main({theirs.fileno()})"
            process = child.start(code, theirs, (), _PLAIN)
        searcher = child.Child(process, ours)
        made.callback(searcher.end)
        stream = made.enter_context(ours.makefile("rw"))
        for job in jobs:
            yield _report(job, stream, searcher, progress)


def _check(what: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise ConfigError(f"{what} {name!r} is none of: {', '.join(known)}")


def _report(job: Job, stream: Any, searcher: child.Child, progress: Callable[[str], None] | None) -> Report:
    try:
        stream.write(json.dumps(asdict(job)) + "\n")
        stream.flush()
        for line in stream:
            news = json.loads(line)
            if "report" in news:
                found = news["report"]
                return Report(**{**found, "operations": tuple(found["operations"])})
            if "refused" in news:
                raise ConfigError(f"schedule of {job.scenario}: {news['refused']}")
            if progress is not None:
                progress(news["progress"])
    except OSError:
        pass  # the process has ended
    raise WorkError(f"{job.scenario}: the process of the search {searcher.ended()}")
