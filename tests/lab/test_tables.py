"""The tables of docs/migration.md are what the code prints, and its comparison speaks of rows that there are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from vnetdp.lab import tables
from vnetdp.lab.matrix import DEFECTS, cases
from vnetdp.migration import channel
from vnetdp.migration.snapshot import FIELDS
from vnetdp.migration.stream import SectionType

PAGE = Path(__file__).parents[2] / "docs" / "migration.md"

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the documentation is in the checkout only")


@pytest.mark.parametrize("name", tables.BLOCKS)
def test_a_table_is_what_the_code_prints(name: str) -> None:
    assert tables.block_of(PAGE.read_text(), name).rstrip("\n") == tables.BLOCKS[name](), (
        "run `python -m vnetdp.lab.tables docs/migration.md`"
    )


def test_every_field_and_section_is_in_a_table() -> None:
    assert all(f"`{each.name}`" in tables.fields() for each in FIELDS)
    for section in vars(channel).values():
        if isinstance(section, SectionType):
            assert f"`{section.name}`" in tables.sections()


def test_the_matrix_counts_every_case() -> None:
    counts = [re.search(r"(\d+) / (\d+) \|$", line) for line in tables.matrix().splitlines()[2:]]
    assert all(counts)
    for column, pairs in ((1, 1), (2, 4)):
        assert sum(int(match[column]) for match in counts if match) == len(list(cases(pairs)))


def test_the_comparison_names_rows_of_the_matrix() -> None:
    ids = {case.id for case in cases(4)}
    known = ids | {tables.row_of(case_id) for case_id in ids}
    lines = tables.block_of(PAGE.read_text(), "comparison").strip().splitlines()[2:]
    rows = [line.split("|")[1].strip() for line in lines]
    assert set(rows) <= known
    assert {"D1", "D2", "D6", "E4", "E9"} <= set(rows)
    for name in (*rows, *DEFECTS):
        assert re.search(rf"\b{name}\b", PAGE.read_text().split("<!-- end: comparison -->")[1]), name


def test_every_invariant_is_explained() -> None:
    section = PAGE.read_text().split("## Invariants")[1].split("\n## ")[0]
    assert re.findall(r"^\| (I\d+) \|", section, re.MULTILINE) == [f"I{n}" for n in range(1, 11)]


def row(case_id: str, **values: Any) -> dict[str, Any]:
    plain = {"says": "it fails, ring 0,0", "ok": True, "lost": 0, "duplicated": 0, "violations": [], "queue_pairs": 4}
    return {"id": case_id, **plain, **values}


def test_a_comparison_has_the_worst_of_each_row() -> None:
    stuck = [f"target: I4: queue {n} is enabled, and userspace, which has the rings, does not serve it" for n in (1, 2)]
    seed = [
        row("D1/0,0/once", ok=False, duplicated=7, violations=["target: I2: queue 0: it broke", "I1: 7 frames lost"]),
        row("D1/0,1/once", ok=False, lost=3, violations=[*stuck, f"afterwards: {stuck[0]}"]),
        row("E9", ok=False, lost=1),
        row("A2/saved", ok=False, lost=2),
        row("A2/early"),
        row("B1"),
    ]
    delta = [row(each["id"]) for each in seed]
    lines = tables.comparison({"rows": seed}, {"rows": delta}).splitlines()[2:]
    says = "it fails, ring i,j"
    assert lines == [
        f"| A2/saved | {says} | 1 of 1 | 2 | 0 | 0 | - | 0 of 1 | 0 | 0 | 0 |",
        f"| D1 | {says} | 2 of 2 | 3 | 7 | 2 of 8 | I2 | 0 of 2 | 0 | 0 | 0 |",
        f"| E9 | {says} | 1 of 1 | 1 | 0 | 0 | - | 0 of 1 | 0 | 0 | 0 |",
    ]


def test_a_block_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="no block fields"):
        tables.rewrite("text", {"fields": "table"})


def test_the_command_rewrites_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    marks = [f"<!-- begin: {name} -->\nold\n<!-- end: {name} -->\n" for name in (*tables.BLOCKS, "comparison")]
    page.write_text("before\n" + "".join(marks) + "after\n")
    report = tmp_path / "report.json"
    report.write_text('{"rows": []}')
    monkeypatch.setattr("sys.argv", ["tables", "--seed", str(report), "--delta", str(report), str(page)])
    tables.main()
    once = page.read_text()
    assert "old" not in once
    assert tables.fields() in once
    tables.main()
    assert page.read_text() == once
