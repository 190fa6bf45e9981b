"""Each barrier has its partner: what a comment says that it pairs with is there, and says so too."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import vnetdp_kernels

KERNELS = Path(str(vnetdp_kernels.__file__)).parent
ARCHITECTURE = Path(__file__).parents[2] / "docs/architecture.md"
PAIRS_WITH = re.compile(r"(?:barrier ([A-Z]): )?pairs with(?: the (\w+) in `?(\w+)`?)?", re.IGNORECASE)
CALLS = {
    "acquire": re.compile(r"load_\w+_acquire"),
    "release": re.compile(r"store_\w+_release"),
    "fence": re.compile("fence"),
    "exchange": re.compile(r"exchange_\w+"),
    "OR": re.compile(r"fetch_or_\w+"),
}


class Claim(NamedTuple):
    """That a barrier (`name`, "" for one without) of the function `here` pairs with one of `kind` in `there`."""

    name: str
    here: str
    kind: str
    there: str


def called(source: str) -> dict[str, set[str]]:
    """Return the names of all functions of a module, and of those that each of them calls."""
    return {
        function.name: {
            node.func.id
            for node in ast.walk(function)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        for function in ast.walk(ast.parse(source))
        if isinstance(function, ast.FunctionDef)
    }


def claims(source: str) -> Iterator[Claim]:
    """Return all that a module's comments and strings claim of barriers."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            for name, kind, there in PAIRS_WITH.findall(token.string):
                around = [f for f in functions if f.lineno <= token.start[0] <= (f.end_lineno or 0)]
                yield Claim(name, around[-1].name if around else "", kind, there)


def faults(sources: list[str]) -> list[str]:
    """Return what is wrong with the claims of modules."""
    calls: dict[str, set[str]] = {}
    for source in sources:
        for function, names in called(source).items():
            calls[function] = calls.get(function, set()) | names
    made = [claim for source in sources for claim in claims(source)]
    found = []
    for claim in made:
        kind = CALLS.get(claim.kind)
        if kind is None:
            found.append(f"{claim.here}: a barrier pairs with the {', '.join(CALLS)} in a function")
        elif claim.there not in calls:
            found.append(f"{claim.here}: there is no function {claim.there}")
        elif not any(kind.fullmatch(name) for name in calls[claim.there]):
            found.append(f"{claim.here}: there is no {claim.kind} in {claim.there}")
        elif claim.name and [(o.here, o.there) for o in made if o.name == claim.name and o is not claim] != [
            (claim.there, claim.here)
        ]:
            found.append(f"{claim.here}: barrier {claim.name} is not that of {claim.there} alone")
    return found


def sources() -> list[str]:
    return [path.read_text() for path in sorted(KERNELS.rglob("*.py"))]


def test_each_barrier_of_the_kernels_has_its_partner() -> None:
    assert faults(sources()) == []
    names = sorted(claim.name for source in sources() for claim in claims(source) if claim.name)
    assert names == ["A", "A", "B", "B", "C", "C", "D", "D"]


def test_the_table_of_barriers_names_the_functions_that_have_them() -> None:
    table = dict(re.findall(r"^\| ([A-Z]) (\|.*)$", ARCHITECTURE.read_text(), re.MULTILINE))
    found: dict[str, set[str]] = {name: set(re.findall(r"`(\w+)`", row)) for name, row in table.items()}
    made = [claim for source in sources() for claim in claims(source) if claim.name]
    assert found == {claim.name: {claim.here, claim.there} for claim in made}


ONE = "def one():\n    # Barrier A: pairs with the release in other.\n    load_u16_acquire()\n"
OTHER = "def other():\n    # Barrier A: pairs with the acquire in one.\n    store_u16_release()\n"


@pytest.mark.parametrize(
    ("one", "other", "fault"),
    [
        (ONE, OTHER, []),
        (ONE.replace("in other", "in another"), "", ["one: there is no function another"]),
        (ONE, OTHER.replace("_release", ""), ["one: there is no release in other"]),
        (ONE, OTHER.replace("Barrier A", "Barrier B"), ["one: barrier A is not that of other alone",
                                                       "other: barrier B is not that of one alone"]),
        (ONE, OTHER.replace("# Barrier A: pairs", "# It goes"), ["one: barrier A is not that of other alone"]),
        (ONE, OTHER + OTHER.replace("def other", "def third"), ["one: barrier A is not that of other alone"] +
         [f"{name}: barrier A is not that of one alone" for name in ("other", "third")]),
        ('def one():\n    """Pairs with other."""\n', OTHER.replace("# Barrier A: p", "# P"),
         ["one: a barrier pairs with the acquire, release, fence, exchange, OR in a function",
          "other: there is no acquire in one"]),
    ],
    ids=["sound", "no function", "no release", "two names", "one claim", "three claims", "other words"],
)  # fmt: skip
def test_a_barrier_without_its_partner_is_found(one: str, other: str, fault: list[str]) -> None:
    assert faults([one, other]) == fault
