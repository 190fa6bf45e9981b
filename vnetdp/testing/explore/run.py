"""The process of a search: kernels as plain Python. It reads jobs, and writes a report for each."""

from __future__ import annotations

import itertools
import json
import re
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

from . import operations
from .layout import Layout
from .mutants import MUTANTS
from .report import Job, Report
from .scenarios import SCENARIOS, Scenario
from .search import Done, Found, Step
from .world import World

_STEP = re.compile(r"(?P<who>\w+)\.(?P<verb>go|store|kill)(?P<which>\d*)(\*(?P<times>\d+))?")
_LISTED = 8  # bytes of a value that is printed as a number


def _longer(scenario: Scenario, extra: int) -> Scenario:
    def more(batches: tuple[int, ...]) -> tuple[int, ...]:
        return (*batches[:-1], batches[-1] + extra) if batches else ()

    return replace(scenario, sent=more(scenario.sent), received=more(scenario.received))


def do(job: Job, progress: Callable[[str], None]) -> Report:
    """Make a search. The kernels have to be plain Python; they are as before afterwards."""
    began = time.process_time()
    scenario = _longer(SCENARIOS[job.scenario], job.extra)
    model = job.model or scenario.model
    with ExitStack() as changes:
        if job.mutant:
            changes.enter_context(MUTANTS[job.mutant].applied())
        changes.enter_context(operations.hooked())
        world = World(scenario)
        search = world.search(model, every=bool(job.schedule))
        names = [actor.name for actor in world.actors]
        if job.schedule:
            steps = _steps(job.schedule, names)
            found = Found(0, len(steps), None, False, "", steps)
        else:
            found = search.run(job.most_states, lambda states: progress(f"{job.scenario}: {states:,} states"))
        done, fault = search.follow(found.schedule) if found.schedule else ([], "")
        return Report(
            scenario=job.scenario,
            mutant=job.mutant,
            model=model,
            states=found.states,
            steps=found.steps,
            schedules=found.schedules,
            seconds=time.process_time() - began,
            whole=found.whole,
            fault=found.fault or fault,
            schedule=_text([each.step for each in done if each.step is not None], names),
            operations=tuple(_line(each, names, world.layout) for each in done),
        )


def _text(steps: list[Step], names: list[str]) -> str:
    """Return a schedule as text: ACTOR.go, ACTOR.store2, with *3 behind a step that is done three times."""
    words = [f"{names[step.who]}.{step.verb}" + (str(step.which) if step.which else "") for step in steps]
    runs = [(word, len(list(same))) for word, same in itertools.groupby(words)]
    return " ".join(word + (f"*{times}" if times > 1 else "") for word, times in runs)


def _steps(text: str, names: list[str]) -> tuple[Step, ...]:
    """Return the steps of a schedule as `_text` writes them; ValueError for one that names no actor or verb."""
    steps: list[Step] = []
    for word in text.split():
        match = _STEP.fullmatch(word)
        if match is None or match["who"] not in names:
            raise ValueError(f"{word!r} is no step: one is ACTOR.go, ACTOR.store or ACTOR.kill, of {', '.join(names)}")
        steps += [Step(names.index(match["who"]), match["verb"], int(match["which"] or 0))] * int(match["times"] or 1)
    return tuple(steps)


def _line(done: Done, names: list[str], layout: Layout) -> str:
    who, verb, at, data, _ = done
    text = f"{names[who]:<7} {verb}"
    if at >= 0:
        text += f" {layout.name(at)}"
    if data:
        value = hex(int.from_bytes(data, "little")) if len(data) <= _LISTED else f"{len(data)} bytes {data[:4].hex()}…"
        text += f" = {value}"
    return text


def main(fd: int) -> None:
    """Do the jobs that come on the socket, a line of JSON each; write a line for each news: progress, report or refusal."""
    stream = socket.socket(fileno=fd).makefile("rw")

    def tell(**news: Any) -> None:
        stream.write(json.dumps(news) + "\n")
        stream.flush()

    for line in stream:
        try:
            report = do(Job(**json.loads(line)), lambda text: tell(progress=text))
        except ValueError as e:
            tell(refused=str(e))
        else:
            tell(report=asdict(report))
