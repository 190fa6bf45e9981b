"""`python -m vnetdp.testing.explore`: the searches by name, each with its size and its finding."""

from __future__ import annotations

import argparse
import signal

from ...errors import VnetdpError
from ...system import output
from . import MUTANTS, SCENARIOS, Job, explore_all
from .report import MOST_STATES


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vnetdp.testing.explore",
        description="Look at all schedules of tiny scenarios, with the kernels that are shipped. "
        "Exit status: 0 if no scenario has a fault and every mutant is found, 1 if not, 2 for wrong arguments.",
    )
    parser.add_argument("scenario", nargs="*", metavar="SCENARIO", help=f"which (default: all): {', '.join(SCENARIOS)}")
    parser.add_argument(
        "--mutant",
        metavar="NAME",
        help=f"change the kernels: one mutant, in its scenario or those given, or all: {', '.join(MUTANTS)}",
    )
    parser.add_argument("--model", choices=("tso", "weak"), help="the order of stores (default: that of the scenario)")
    parser.add_argument("--extra", type=int, default=0, metavar="N", help="N frames more in each direction")
    parser.add_argument(
        "--most-states",
        type=int,
        default=MOST_STATES,
        metavar="N",
        help="give up after N states (default: %(default)s)",
    )
    parser.add_argument("--schedule", default="", metavar="STEPS", help="replay a schedule, as a report prints it")
    return parser


def _jobs(args: argparse.Namespace) -> list[Job]:
    mutants = list(MUTANTS) if args.mutant == "all" else [args.mutant or ""]
    jobs = []
    for mutant in mutants:
        known = [MUTANTS[mutant].scenario] if mutant in MUTANTS else list(SCENARIOS)
        jobs += [
            Job(scenario, mutant, args.model or "", args.extra, args.most_states, args.schedule)
            for scenario in args.scenario or known
        ]
    return jobs


def main() -> int:
    """Run the command line; return the exit status. ^C ends the process without a word, and the search with it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    args = _parser().parse_args()
    wrong = 0
    try:
        for report in explore_all(_jobs(args), output.say):
            output.tell(str(report))
            wrong += bool(report.fault) != bool(report.mutant)
            wrong += not (report.fault or report.whole or args.schedule)
        output.flush()
    except VnetdpError as e:
        output.say(f"vnetdp: {e}")
        return 2
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
