"""The help of every command: each option says what it does, in which unit, and its default."""

from __future__ import annotations

import argparse
import re

import pytest

from vnetdp.cli import parser

UNITS = "seconds|ms|µs|bytes|frames|queue pairs|descriptors|hand-overs|rounds|migrations|processes"


def _options() -> dict[str, argparse.Action]:
    """Return every option and argument of `vnetdp` and its commands, by command and name."""
    whole = parser._parser()
    (commands,) = (action for action in whole._actions if isinstance(action, argparse._SubParsersAction))
    return {
        f"{name} {' '.join(action.option_strings) or action.dest}".strip(): action
        for name, command in {"": whole, **commands.choices}.items()
        for action in command._actions
        if action is not commands
    }


OPTIONS = _options()


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_says_its_unit_and_its_default(name: str) -> None:
    option = OPTIONS[name]
    said = option.help or ""
    assert said, "it has no help"
    default = re.search(r" \(default: ([^()]+)\)$", said)
    if not option.option_strings or option.nargs == 0:
        assert "default" not in said
    elif option.required:
        assert said.endswith("(required)")
    else:
        assert default, f"no default: {said}"
        if option.default not in (None, "", []):
            value = f"{option.default:g}" if isinstance(option.default, int | float) else option.default
            assert default[1] == value
    is_number = option.type not in (None, parser._file, parser._picture)
    assert is_number == (option.metavar == "N")
    if is_number:
        assert re.search(rf"\bN ({UNITS})\b|\bindex N\b", said), f"no unit: {said}"
