"""A machine that runs, and one for it to move to."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.migration.rig import SMALL
from tests.support.by_hand import no_descriptor_leaks
from vnetdp.migration.machine import Machine, make_wire


@pytest.fixture
def machines() -> Iterator[tuple[Machine, Machine]]:
    """Two of SMALL, on one wire; what fails on the way is logged by neither."""
    logging.disable()
    with (
        no_descriptor_leaks(),
        make_wire(SMALL) as wire,
        Machine(SMALL, wire.block.fd) as one,
        Machine(SMALL, wire.block.fd) as other,
    ):
        one.boot()
        one.run()
        yield one, other
    logging.disable(logging.NOTSET)
