"""An endpoint and the rings in one line, and the thread that runs it; read `datapath` first."""

from .datapath import Datapath as Datapath
