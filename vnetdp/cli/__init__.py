"""The command line: arguments in, a report out. `main` runs it."""

from .parser import main as main
