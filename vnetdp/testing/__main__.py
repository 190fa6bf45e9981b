"""`python -m vnetdp.testing replay FILE`: run a recorded schedule, and write its outcome as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..errors import VnetdpError
from ..system.output import say, tell
from .stepper import replay


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 0, or 1 if an invariant was broken, or 2 if there is no schedule to run."""
    parser = argparse.ArgumentParser(prog="python -m vnetdp.testing", description="Tools of vnetdp.testing.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("replay", help="run a recorded schedule, and write its outcome as JSON")
    command.add_argument(
        "file", metavar="FILE", help="a file with the schedule, or a whole failure's text; - reads stdin"
    )
    args = parser.parse_args(argv)
    try:
        outcome = replay(sys.stdin.read() if args.file == "-" else Path(args.file).read_text())
    except (VnetdpError, OSError, UnicodeDecodeError) as e:
        say(f"{parser.prog}: {args.file}: {(isinstance(e, OSError) and e.strerror) or e}")
        return 2
    tell(json.dumps(outcome.as_dict(), indent=2))
    for text in outcome.violations:
        say(text)
    return 1 if outcome.violations else 0


if __name__ == "__main__":
    sys.exit(main())
