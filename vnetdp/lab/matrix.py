"""The fault matrix: every point where a migration can fail, and the conditions that hold then (docs/migration.md).

A case is one migration (some are two) of a fresh machine, with its faults, and the outcomes that are allowed.
Its id begins with the row of the matrix that it belongs to.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Final

from ..errors import VnetdpError, WorkError
from ..migration.machine import MachineConfig
from ..migration.names import POLICIES
from ..migration.source import Source
from ..migration.target import Target
from ..virtio.queue import RECEIVEQ, TRANSMITQ
from .changes import CHANGES
from .couple import Couple, Result
from .host import Orders
from .invariants import differences
from .taps import TapNamespace, why_no_taps

VHOST, USERSPACE, SOURCE, GONE = "vhost", "userspace", "source", "lost"
RATE = 2000.0  # frames a second, queue and direction: enough to notice, and nobody waits for it

ONCE_ONLY = ("ring_setup", "features")  # there is room for two places of a ring; a device reset waits for every frame

EARLY = ("seed", "delta")  # the policies that start early


@dataclass(frozen=True)
class Case:
    """One case. expected: outcomes allowed; after: further steps and checks, once the machine has moved or stayed.

    detects: a violation that has to be found, since the case breaks something on purpose. strikes: the policies with which
    its faults have to strike; with the others they may not.
    """

    id: str
    says: str
    expected: tuple[str, ...] = (VHOST,)
    source: Orders = field(default_factory=Orders)
    target: Orders = field(default_factory=Orders)
    other_policy: bool = False  # at the destination
    source_vhost: bool = True
    target_vhost: bool = True
    after: str = ""
    detects: str = ""
    strikes: tuple[str, ...] = ("none", *EARLY)
    process: bool = False  # vhost is a process of its own
    tap: bool = False  # the endpoints are TAPs, which only root can make


def cases(pairs: int) -> Iterator[Case]:
    """Return every case for machines of so many queue pairs."""
    yield from _starts(pairs)
    yield from _ends(pairs)
    yield from _others(pairs)
    yield from _changes()
    yield from _deaths()
    yield from _taps()


def _both(row: str, point: str, says: str, phase: str) -> Iterator[Case]:
    """The fault once in *phase*, which one retry mends, and always, which leaves userspace."""
    target = Orders(faults=(f"{phase}.{point}:once",))
    yield Case(f"{row}/{point}/once", says, target=target, strikes=EARLY)
    always = Orders(faults=(f"{point}:always",))
    yield Case(f"{row}/{point}/always", says, (USERSPACE,), target=always, after="status")


def _per_ring(pairs: int) -> Iterator[str]:
    for pair, ring in itertools.product(range(pairs), (RECEIVEQ, TRANSMITQ)):
        yield f"{pair},{ring}"


def _starts(pairs: int) -> Iterator[Case]:
    """B: the early start fails."""
    yield Case("B1", "the destination has no vhost", (USERSPACE,), target_vhost=False)
    each_pair = {
        "B2": ("set_mtu", "SET_MTU"),
        "B4": ("grab_ioeventfd", "an ioeventfd cannot be grabbed"),
        "B9": ("set_features", "SET_FEATURES"),
        "B10": ("set_memory", "SET_MEM_TABLE"),
        "B12": ("set_log", "SET_LOG_BASE"),
    }
    for row, (point, says) in each_pair.items():
        for pair in range(pairs):
            yield from _both(row, f"{point}:{pair}", f"{says}, vhost {pair}", "early")
    yield from _both("B6", "set_guest_notifiers", "guest notifiers cannot be set", "early")
    each_ring = {
        "B5": ("set_host_notifier", "a host notifier"),
        "B11a": ("set_vring_num", "SET_VRING_NUM"),
        "B11b": ("set_vring_base", "SET_VRING_BASE, early"),
        "B11g": ("set_vring_addr", "SET_VRING_ADDR, or mapping a part of the ring"),
        "B11h": ("set_vring_kick", "SET_VRING_KICK"),
        "B11i": ("set_vring_call", "SET_VRING_CALL"),
    }
    for row, (point, says) in each_ring.items():
        for ring in _per_ring(pairs):
            yield from _both(row, f"{point}:{ring}", f"{says}, ring {ring}", "early")
    changed = Orders(changes=(("mac", "early"), ("rx_mode", "round")))
    yield Case("B13", "the early state comes again while vhost is prepared", source=changed)
    yield Case("B14/end", "the stream ends after the early start", (SOURCE,), source=Orders(cancel_at="round"))
    version = Orders(damage="version")
    yield Case("B14/version", "a section is of another version", (SOURCE,), source=version)
    off = Orders(changes=(("queue_off", "logging"), ("queue_on", "stopping")))
    yield Case("B15", "a queue has no addresses in the early state", source=off)


def _ends(pairs: int) -> Iterator[Case]:
    """C, D, E1 and E2: the end fails."""
    mac = Orders(changes=(("mac", "stopping"),))
    for ring in _per_ring(pairs):
        fault = Orders(faults=(f"get_vring_base:{ring}:always",))
        # Only a vhost that is stopped for a full load is asked for an index that nothing has moved.
        yield Case(f"C1/{ring}", "a delta, and GET_VRING_BASE fails", source=mac, target=fault, strikes=("seed",))
        yield from _final("D1", "set_vring_base", ring, "the final SET_VRING_BASE")
        yield from _final("D2", "set_backend", ring, "SET_BACKEND")
        faults = (f"final.set_backend:{ring}:once", "unbind:always")
        yield Case(f"D3/{ring}", "and unbinding fails while that is undone", target=Orders(faults=faults))
    faults = ("early.set_features:once", "unset_guest_notifiers:always")
    given_back = Orders(faults=faults)
    yield Case("C2", "guest notifiers cannot be given back", source=mac, target=given_back, strikes=EARLY)
    damaged = Orders(changes=(("mac", "stopping"),), damage="state")
    yield Case("C3", "the state cannot be loaded", (SOURCE,), source=damaged)
    fault = Orders(faults=("final.set_backend:0,0:once", "retry.set_features:always"))
    yield Case("C4", "the start when the machine runs fails", (USERSPACE,), target=fault)
    faults = ("final.set_backend:0,0:once", "unset_guest_notifiers:always")
    yield Case("D4", "guest notifiers cannot be given back in the unwind", target=Orders(faults=faults))
    fault = Orders(faults=("final.set_backend:always", "retry.set_backend:always"))
    kick = Orders(left="kick")
    yield Case("D6", "a kick comes while the end is undone", (USERSPACE,), source=kick, target=fault)


def _final(row: str, verb: str, ring: str, says: str) -> Iterator[Case]:
    moved = Orders(changes=(("frames", "stopping"),))  # an index that is as it was is not set again
    once = Orders(faults=(f"final.{verb}:{ring}:once",))
    yield Case(f"{row}/{ring}/once", f"{says}, ring {ring}; E1: the retry succeeds", source=moved, target=once)
    always = Orders(faults=(f"final.{verb}:{ring}:always", f"retry.{verb}:{ring}:always"))
    says = f"{says}, ring {ring}; E2: the retry fails"
    yield Case(f"{row}/{ring}/always", says, (USERSPACE,), source=moved, target=always, after="status")


def _others(pairs: int) -> Iterator[Case]:
    """E3 to E9, and A: faults outside of verbs."""
    down = Orders(changes=(("link", "stopping"),))
    yield Case("E3", "the link goes down before the machine stops", (USERSPACE,), source=down, after="link")
    yield Case("E4", "the source has no vhost, the destination has", source_vhost=False)
    yield Case("E5", "the source has vhost, the destination has not", (USERSPACE,), target_vhost=False)
    yield Case("E6", "the two sides have different policies", (SOURCE,), other_policy=True)
    held = Orders(look_at=("prepared", "loading"))
    yield Case("E7", "vhost is in another process, which may start nothing early", target=held, process=True)
    down = Orders(changes=(("link", "logging"),))
    yield Case("E8", "the link is down when the early state is saved", (USERSPACE,), source=down, after="link")
    loaded = Orders(cancel_at="loaded")
    sent = Orders(left="sent")
    yield Case("E9", "cancelled when all is loaded", (SOURCE,), source=sent, target=loaded)
    torn = Orders(churn="mac_table")
    yield Case("A1", "the guest changes its MAC table while it is saved", source=torn, after="whole")
    for point in Source.POINTS:
        if point not in ("ready", "committed"):
            cancelled = Orders(cancel_at=point, left="sent")
            yield Case(
                f"A2/{point}", f"cancelled at {point}, and migrated again", (SOURCE,), source=cancelled, after="again"
            )
    for ring in _per_ring(pairs):
        fault = Orders(faults=(f"get_vring_base:{ring}:always",))
        yield Case(f"A3/{ring}", "GET_VRING_BASE fails when the source stops", source=fault)
    for verb in ("set_log", "set_features", "set_vring_addr"):
        fault = Orders(faults=(f"{verb}:once",))
        yield Case(f"A4/{verb}", f"logging cannot be started: {verb}", (SOURCE,), source=fault, after="unlogged")
    nothing = Orders(forget_log=True, changes=(("frames", "stopping"),))
    yield Case("A5/nothing", "a back end that logs nothing is found out", source=nothing, detects="I8")
    elsewhere = Orders(changes=(("log_elsewhere", "logging"), ("frames", "stopping")))
    says = "a back end that logs used rings under a wrong address is found out"
    yield Case("A5/used", says, source=elsewhere, detects="I8")
    yield Case("A7", "back and forth", after="ping-pong")
    for what, says in (("kick", "frames were sent"), ("call", "frames were received and not looked at")):
        for owner in (VHOST, USERSPACE):
            yield Case(
                f"I9/{what}/{owner}",
                f"{says}, none comes after them, and {owner} has the rings then",
                (owner,),
                source=Orders(left=what),
                target=Orders(asleep=True),
                target_vhost=owner == VHOST,
            )


def _changes() -> Iterator[Case]:
    """A6: the guest, or its host, changes something while the migration is under way."""
    for name in CHANGES:
        expected, after = ((USERSPACE,), "link") if name == "link" else ((VHOST,), "")
        for point in ("round", "stopping"):
            orders = Orders(changes=((name, point),))
            yield Case(f"A6/{name}/{point}", f"{name} changes", expected, source=orders, after=after)
        back = Orders(changes=((name, "early"),), back_at="stopping")
        yield Case(f"A6/{name}/back", f"{name} changes, and changes back", source=back, after="as before")
    # The link last: while it is down nothing is used, and no queue can be reset.
    for one, other in itertools.combinations(sorted(CHANGES, key=lambda name: name == "link"), 2):
        expected, after = ((USERSPACE,), "link") if other == "link" else ((VHOST,), "")
        orders = Orders(changes=((one, "stopping"), (other, "stopping")))
        yield Case(f"A6/{one}+{other}", f"{one} and {other} change", expected, source=orders, after=after)
    for name in CHANGES:
        if name not in ONCE_ONLY:
            ends = (VHOST, USERSPACE) if name == "link" else (VHOST,)
            yield Case(f"A6/{name}/1000", f"{name} changes 1,000 times a second", ends, source=Orders(churn=name))


def _taps() -> Iterator[Case]:
    """T: with TAPs, which have to be given back, and whose network has to hear the announcement."""
    yield Case("T/vhost", "TAPs, and nothing goes wrong", after="announced", tap=True)
    fault = Orders(faults=("set_backend:0,0:always",))
    yield Case("T/userspace", "TAPs, and SET_BACKEND", (USERSPACE,), target=fault, after="announced", tap=True)
    yield Case("T/source", "TAPs, and cancelled at loaded", (SOURCE,), target=Orders(cancel_at="loaded"), tap=True)


def _deaths() -> Iterator[Case]:
    """K: one of the two is killed."""
    for point in Source.POINTS:
        expected = (VHOST,) if point == "committed" else (GONE,)
        yield Case(f"K/source/{point}", f"the source is killed at {point}", expected, source=Orders(die_at=point))
    for point in Target.POINTS:
        # Killed between its answer and the commit, it is gone before the source can know, or just after.
        allowed = {"bound": (GONE,), "ready": (SOURCE, GONE)}.get(point, (SOURCE,))
        says = f"the destination is killed at {point}"
        yield Case(f"K/target/{point}", says, allowed, source=Orders(left="sent"), target=Orders(die_at=point))


# --- running them ---


@dataclass
class Row:
    """The result of a case."""

    case: Case
    outcome: str
    violations: list[str]
    ok: bool
    error: str = ""
    lost: int = 0
    duplicated: int = 0
    hits: int = 0
    false_deltas: int = 0

    @property
    def predicted(self) -> str:
        """The name in DEFECTS of the patch's bug in this case; empty if none was foreseen."""
        return next((name for name in DEFECTS if f"{self.case.id}/".startswith(f"{name}/")), "")

    def as_dict(self) -> dict[str, Any]:
        return {
            "id": self.case.id,
            "says": self.case.says,
            "outcome": self.outcome,
            "expected": list(self.case.expected),
            "violations": self.violations,
            "lost": self.lost,
            "duplicated": self.duplicated,
            "hits": self.hits,
            "false_deltas": self.false_deltas,
            "error": self.error,
            "ok": self.ok,
            "predicted": bool(self.predicted),
        }


class Matrix:
    """Runs cases, one after the other, on two hosts; a new host takes the place of one that a case killed."""

    def __init__(self, policy: str) -> None:
        self._policy = policy
        self._couple: Couple | None = None

    def run(self, case: Case, config: MachineConfig) -> Row:
        """Run a case on a fresh machine, and give everything up again."""
        try:
            couple = self._couple = self._couple or Couple(quiet=True)
        except WorkError as e:
            return Row(case, GONE, [f"I6: {e}"], ok=False)
        config = replace(config, vhost=case.source_vhost, process=case.process)
        try:
            with TapNamespace() if case.tap else nullcontext() as taps:
                result, left = self._migrate(case, couple, config, taps)
            couple.replace_dead()
        except VnetdpError as e:
            self.close()
            return Row(case, GONE, [f"I6: {e}"], ok=False)
        violations = result.violations + [f"leak: {count} {what}" for what, count in left.items()]
        return self._judge(case, result, violations)

    def _migrate(
        self, case: Case, couple: Couple, config: MachineConfig, taps: TapNamespace | None
    ) -> tuple[Result, dict[str, int]]:
        """Run a case; return its result, and the resources left once the machine is given up."""
        if taps is not None:
            config = replace(config, endpoint=taps.source)
        couple.start(config)
        result = couple.migrate(
            self._policy,
            source=case.source,
            target=case.target,
            target_policy=next(name for name in reversed(POLICIES) if (name != self._policy) is case.other_policy),
            target_vhost=case.target_vhost,
            target_endpoint="" if taps is None else taps.target,
        )
        if case.after == "announced" and taps is not None:
            _expect(result, taps.hears_of(couple.source.call("look")["control"].mac), "announce: nobody heard of it")
        elif result.outcome != GONE and not case.detects:
            self._afterwards(case, couple, result)
            couple.settle(result)
        left = couple.drop()
        if taps is not None and taps.interfaces():
            left["interfaces"] = len(taps.interfaces())
        return result, left

    def _judge(self, case: Case, result: Result, violations: list[str]) -> Row:
        if case.source.faults or case.target.faults:
            expected, strikes = self._policy in case.strikes, bool(result.counts.get("hits"))
            if strikes != expected:
                violations.append("faults: they strike, and should not" if strikes else "faults: none of them struck")
        found = [text for text in violations if case.detects and text.split(": ", 1)[-1].startswith(case.detects)]
        clean = bool(found) if case.detects else not violations
        ledger = result.ledger
        ok = clean and result.outcome in case.expected
        hits = result.counts.get("hits", 0)
        return Row(
            case,
            result.outcome,
            violations,
            ok,
            result.error,
            ledger.lost,
            ledger.duplicated,
            hits,
            result.false_deltas,
        )

    def _afterwards(self, case: Case, couple: Couple, result: Result) -> None:
        """Run the steps after the migration, and add their violations to *result*."""
        steps: dict[str, Callable[[Couple, Result], None]] = {
            "status": _still_userspace,
            "link": _link_up,
            "again": _again,
            "whole": _whole,
            "as before": _as_before,
            "unlogged": _unlogged,
            "ping-pong": _ping_pong,
        }
        if case.after:
            steps[case.after](couple, result)

    def close(self) -> None:
        if self._couple is not None:
            self._couple.close()
            self._couple = None


def _expect(result: Result, is_so: bool, text: str) -> None:
    if not is_so:
        result.violations.append(text)


def _still_userspace(couple: Couple, result: Result) -> None:
    """A fault that stays leaves the rings with userspace, also at the next status set."""
    if result.outcome == USERSPACE:
        owner = couple.source.call("set_status_again")
        _expect(result, owner == USERSPACE, f"E2: the next status set gives the rings to {owner}")


def _link_up(couple: Couple, result: Result) -> None:
    owner = couple.source.call("look")["owner"]
    _expect(result, owner == "nobody", f"E8: {owner} has the rings while the link is down")
    couple.source.call("change", "link")
    owner = couple.source.call("look")["owner"]
    _expect(result, owner == VHOST, f"E8: {owner} has the rings when the link is up again")


def _again(couple: Couple, result: Result) -> None:
    second = couple.migrate(result.policy)
    result.violations += second.violations
    _expect(result, second.outcome == VHOST, f"A2: the second migration ends with {second.outcome}: {second.error}")


def _unlogged(couple: Couple, result: Result) -> None:
    seen = couple.source.call("look")
    _expect(result, not seen["logging"], "A4: the log is still on")
    _expect(result, seen["handovers"] == 1, f"A4: the rings changed hands {seen['handovers'] - 1} times")
    _again(couple, result)


def _whole(couple: Couple, result: Result) -> None:
    control = couple.source.call("look")["control"]
    parts = {mac[4] for mac in control.mac_table}
    whole = len(parts) <= 1 and control.mac_first_multi == len(control.mac_table) // 2
    _expect(result, whole, f"A1: the MAC table is torn: {control.mac_table}")


def _as_before(couple: Couple, result: Result) -> None:
    assert couple.booted is not None
    others = differences(couple.booted, couple.source.call("state"))
    _expect(result, not others, f"A6: changed back, and not as before: {', '.join(others)}")


def _ping_pong(couple: Couple, result: Result) -> None:
    """Back while the guest is announced: its acknowledgement is a delta that nothing has to be done for."""
    acknowledged = Orders(changes=(("announce", "stopping"),))
    for _ in range(5):
        again = couple.migrate(result.policy, source=acknowledged)
        result.false_deltas += again.counts["changed"]
        result.violations += again.violations
        _expect(result, again.outcome == VHOST, f"A7: back again, and {again.outcome}: {again.error}")
    seen = 0 if result.policy == "none" else 5
    _expect(result, result.false_deltas == seen, f"A7: {result.false_deltas} false deltas, not {seen}")


DEFECTS: Final[dict[str, str]] = {
    "D1": "vhosts above the one that failed stay started and unpolled; the early index takes the final one's place",
    "D2": "the same where binding failed",
    "D6": "kicks that came before userspace took over are swallowed",
    "E4": "vhost counts as started though nothing was bound",
    "C4": "D2, and the retry fails",
    "T/userspace": "D2, with TAPs",
    "E9": "the destination moves packets before the source gave up",
    "A2/saved": "as E9",
    "K/target/loaded": "as E9",
    "E8": "the link is not looked at before the start",
    "B13": "a second early start on top of the first",
}


def can_run(case: Case) -> bool:
    """Return whether this user, on this machine, can run a case."""
    return not case.tap or why_no_taps() is None


def chosen(pairs: Iterable[int], traffics: Iterable[str], only: str) -> list[tuple[MachineConfig, Case]]:
    """Return every case whose id begins with the parts of *only*, for each number of pairs and traffic, with its machine.

    Parts lie between slashes: A6/mac is no beginning of A6/mac_table/back. A row's letter stands for all of its
    rows, and B11 for B11a to B11i, but B1 not for B10. Upper and lower case are the same.
    """
    return [
        (MachineConfig(queue_pairs=n_pairs, traffic=traffic, rate=RATE, faulty=True), case)
        for n_pairs, traffic in itertools.product(pairs, traffics)
        for case in cases(n_pairs)
        if _begins(case.id.lower(), only.lower()) and can_run(case)
    ]


def _begins(case_id: str, only: str) -> bool:
    if not only:
        return True
    row, *rest = case_id.split("/")
    wanted, *more = only.split("/")
    follows = row[len(wanted) : len(wanted) + 1]
    in_row = row == wanted or (not more and row.startswith(wanted) and follows.isdigit() != wanted[-1:].isdigit())
    return in_row and rest[: len(more)] == more
