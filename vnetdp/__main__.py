"""The command `vnetdp`, and `python -m vnetdp`."""

from __future__ import annotations

import signal


def main() -> int:
    """Run the command line; ^C ends the process without a word until a command handles signals (`signals.handled`)."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .cli.parser import main as run

    return run()


if __name__ == "__main__":
    raise SystemExit(main())
