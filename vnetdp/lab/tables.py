"""The tables of docs/migration.md, printed from the code: fields, sections, and the fault matrix.

`python -m vnetdp.lab.tables docs/migration.md` rewrites them, each between its two marks; with --seed and --delta,
two reports of `vnetdp faults --json`, also the table that sets the patch beside its replacement.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ..migration import channel
from ..migration.snapshot import FIELDS
from ..migration.source import Source
from ..migration.stream import Phase, SectionType
from ..migration.target import Target
from .changes import CHANGES, EVENTS
from .matrix import Case, cases

_LISTED = 8  # values of one line of the matrix; more are not named
_PAIRS = (1, 4)

_SECTIONS: Final[dict[str, str]] = {
    "setup": "queue pairs, queue size and length of guest memory, which have to be equal",
    "ram": "at most 128 pages, each with its number",
    "virtio-net-early": "every field, and the queues in use; provisional",
    "check": "CRC-32 of each region of guest memory, to be compared",
    "virtio-net": "every field, and 1,024 queues in two walks, as QEMU's version 11 has them",
    "virtio-net-delta": "the fields and queues that changed, and last_avail_idx of each other enabled queue",
    "virtio-delta": "last_avail_idx of each enabled queue: nothing else changed",
    "virtio-net-vhost": "set all bases, then bind all backends",
    "end": "nothing follows but the commit",
    "ready": "the destination has loaded everything",
    "failed": "the reason for which the destination gave up",
    "commit": "the source gives the machine up",
    "running": "the machine runs: the owner of its rings, and the spans",
}


def _table(heads: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fields() -> str:
    """Return the table of the fields of a device's state."""
    rows = ((f"`{each.name}`", each.kind, each.says, each.cost) for each in FIELDS)
    return _table(("field", "type", "meaning", "cost of a change"), rows)


def sections() -> str:
    """Return the table of sections."""
    rows = []
    for section in (each for each in vars(channel).values() if isinstance(each, SectionType)):
        policies = [name for name, known in channel.POLICIES.items() if section.name in known]
        who = ", ".join(policies) if len(policies) < len(channel.POLICIES) else "all"
        rows.append(
            (
                f"`{section.name}`",
                section.phase.name.lower(),
                section.version,
                section.priority if section.phase is Phase.FINAL else "",
                f"{section.longest:,}",
                who if policies else "all, from the destination",
                _SECTIONS[section.name],
            )
        )
    return _table(("section", "phase", "version", "priority", "longest, bytes", "policies", "payload"), rows)


# --- the matrix: cases that differ in one number or name are one line ---


@dataclass
class _Line:
    """Cases of one row that say the same but for a number or a name."""

    values: list[str] = field(default_factory=list)
    ends: dict[str, str] = field(default_factory=dict)  # by how often the fault strikes
    counts: dict[int, int] = field(default_factory=dict)  # by queue pairs


def row_of(case_id: str) -> str:
    """Return the row of the matrix that a case belongs to."""
    return case_id.split("/", 1)[0]


def _template(case: Case) -> tuple[str, list[str]]:
    """Return a case's text with i, j and * in place of numbers and names, and the names replaced."""
    text = re.sub(r"\bvhost \d+", "vhost i", case.says)
    text = re.sub(r"\bring \d+,\d+", "ring i,j", text)
    names = {*Source.POINTS, *Target.POINTS, *CHANGES, *EVENTS, "set_log", "set_features", "set_vring_addr"}
    found = []
    for name in (part for parts in case.id.split("/")[1:] for part in parts.split("+")):
        if name in names and re.search(rf"\b{name}\b", text):
            text = re.sub(rf"\b{name}\b", "*", text)
            found.append(name)
    return text, found


def _end(case: Case) -> str:
    text = " or ".join(case.expected)
    return f"{case.detects} is found broken" if case.detects else text


def matrix() -> str:
    """Return the table of the fault matrix."""
    lines: dict[tuple[str, str, str], _Line] = {}
    for pairs in _PAIRS:
        for case in cases(pairs):
            text, names = _template(case)
            often = case.id.rsplit("/", 1)[-1]
            often = often if often in ("once", "always") else ""
            line = lines.setdefault((row_of(case.id), text, "" if often else _end(case)), _Line())
            line.ends[often] = _end(case)
            line.counts[pairs] = line.counts.get(pairs, 0) + 1
            for name in names:
                if name not in line.values:
                    line.values.append(name)
    rows = []
    for (row, text, _), line in sorted(lines.items(), key=lambda item: _order(item[0][0])):
        ends = "; ".join(f"{often}: {end}" if often else end for often, end in line.ends.items())
        counts = " / ".join(str(line.counts.get(pairs, 0)) for pairs in _PAIRS)
        rows.append((row, _filled(text, line.values), ends, counts))
    return _table(("row", "failure or change", "required outcome", "cases with 1 / 4 pairs"), rows)


def _order(row: str) -> tuple[str, int, str]:
    match = re.fullmatch(r"([A-Z])(\d*)(.*)", row)
    assert match is not None
    return match[1], int(match[2] or 0), match[3]


def _filled(text: str, values: list[str]) -> str:
    if len(values) == 1:
        return text.replace("*", values[0])
    if text.count("*") != 1:
        return text.replace("*", "a field")
    return text.replace("*", "any of " + ", ".join(values) if len(values) <= _LISTED else "a field")


# --- the patch, and its replacement ---


@dataclass
class _Seen:
    """The worst of several cases."""

    wrong: int = 0
    cases: int = 0
    lost: int = 0
    duplicated: int = 0
    stuck: tuple[int, int] = (0, 0)  # queues, of so many
    broken: set[str] = field(default_factory=set)

    def add(self, row: dict[str, Any]) -> None:
        self.cases += 1
        self.wrong += not row["ok"]
        self.lost = max(self.lost, row["lost"])
        self.duplicated = max(self.duplicated, row["duplicated"])
        stuck = set()
        for text in row["violations"]:
            queue = re.search(r"queue (\d+) is enabled, and .* does not serve it", text)
            if queue:
                stuck.add(int(queue[1]))
            elif " frames " not in text:
                self.broken |= set(re.findall(r"\b([A-Z]\d+): ", text)[:1])
        self.stuck = max(self.stuck, (len(stuck), 2 * row["queue_pairs"]))

    @property
    def cells(self) -> tuple[str, ...]:
        stuck = f"{self.stuck[0]} of {self.stuck[1]}" if self.stuck[0] else "0"
        also = ", ".join(sorted(self.broken)) or "-"
        return f"{self.wrong} of {self.cases}", f"{self.lost:,}", f"{self.duplicated:,}", stuck, also


def comparison(seed: dict[str, Any], delta: dict[str, Any]) -> str:
    """Return the table of the rows that *seed*, a report of `vnetdp faults`, gets wrong, beside the same of *delta*."""
    wrong: dict[str, set[str]] = {}
    for row in seed["rows"]:
        if not row["ok"]:
            wrong.setdefault(row_of(row["id"]), set()).add(row["id"])
    rows = []
    for group, ids in sorted(wrong.items(), key=lambda item: _order(item[0])):
        name = min(ids) if len(ids) == 1 else group
        ours, theirs = _Seen(), _Seen()
        says = ""
        for report, seen in ((seed, theirs), (delta, ours)):
            for row in report["rows"]:
                if row["id"] == name or (name == group and row_of(row["id"]) == group):
                    seen.add(row)
                    text = re.sub(r"\d+,\d+", "i,j", row["says"].split(";")[0])
                    says = says or text
        rows.append((name, says, *theirs.cells, *ours.cells[:4]))
    heads = ("row", "injected", "`seed`: cases wrong", "lost", "duplicated", "queues stuck", "also broken")
    return _table((*heads, "`delta`: cases wrong", "lost", "duplicated", "queues stuck"), rows)


# --- the file ---

BLOCKS: Final[dict[str, Callable[[], str]]] = {"fields": fields, "sections": sections, "matrix": matrix}


def _block(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- begin: {name} -->\n)(.*?)\n?(<!-- end: {name} -->)", re.DOTALL)


def block_of(text: str, name: str) -> str:
    """Return the text between a block's marks."""
    match = _block(name).search(text)
    if match is None:
        raise ValueError(f"there is no block {name}")
    return match[2]


def rewrite(text: str, blocks: dict[str, str]) -> str:
    """Return *text* with *blocks* in it, by name."""
    for name, table in blocks.items():
        block_of(text, name)
        text = _block(name).sub(lambda match, table=table: f"{match[1]}{table}\n{match[3]}", text)  # type: ignore[misc]
    return text


def main() -> None:
    """Rewrite a file's tables."""
    parser = argparse.ArgumentParser(prog="python -m vnetdp.lab.tables", description=__doc__)
    parser.add_argument("--seed", type=Path, metavar="FILE", help="the report of vnetdp faults --policy seed")
    parser.add_argument("--delta", type=Path, metavar="FILE", help="the report of vnetdp faults --policy delta")
    parser.add_argument("file", type=Path, metavar="PAGE", help="the document to rewrite, such as docs/migration.md")
    args = parser.parse_args()
    blocks = {name: table() for name, table in BLOCKS.items()}
    if args.seed and args.delta:
        blocks["comparison"] = comparison(json.loads(args.seed.read_text()), json.loads(args.delta.read_text()))
    args.file.write_text(rewrite(args.file.read_text(), blocks))


if __name__ == "__main__":
    main()
