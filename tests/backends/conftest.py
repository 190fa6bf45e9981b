"""The fixture that asks every kind of backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.backends.places import KINDS, Place, Spare
from tests.support.by_hand import no_descriptor_leaks


@pytest.fixture(scope="package")
def spare() -> Iterator[Spare]:
    spare = Spare()
    yield spare
    spare.close()


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, spare: Spare) -> Iterator[Place]:
    with no_descriptor_leaks():
        place = Place(request.param, spare)
        yield place
        place.close()
        assert place.endpoint.polls_started == place.endpoint.polls_stopped
        assert not place.endpoint.polled_by
