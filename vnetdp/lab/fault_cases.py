"""A case of the fault matrix as a function, for campaigns: each thread keeps two hosts for the cases that it runs."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from ..migration.machine import MachineConfig
from .campaigns import Finding
from .matrix import GONE, Case, Matrix, Row


@dataclass(frozen=True)
class FaultCase:
    """One case of the fault matrix, its machine, and the policy by which that migrates."""

    policy: str
    config: MachineConfig
    case: Case


class _Kept(threading.local):
    """The matrix that this thread ran its last case with."""

    policy = ""
    matrix: Matrix | None = None


_kept = _Kept()


def run_case(each: FaultCase) -> Row:
    """Run a case of the fault matrix on this thread's two hosts, which are started with its first case."""
    if _kept.matrix is None or _kept.policy != each.policy:
        give_up()
        _kept.policy, _kept.matrix = each.policy, Matrix(each.policy)
    return _kept.matrix.run(each.case, each.config)


def give_up() -> None:
    """End the two hosts of this thread. Those of a process that ends are ended with it."""
    if _kept.matrix is not None:
        _kept.matrix.close()
        _kept.matrix = None


def lost_row(found: Finding[FaultCase, Row]) -> Row:
    """Return the row of a case that has no result: its worker was lost again and again, or the case broke it."""
    return Row(found.case.case, GONE, [f"I6: {found.error}"], ok=False)
