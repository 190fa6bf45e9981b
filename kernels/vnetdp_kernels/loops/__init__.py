"""The loops of a thread: each runs until it is called away. Read `serve` first, then `wait`."""

from .drive import drive as drive
from .serve import serve as serve
