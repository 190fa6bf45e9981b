"""A pair of network namespaces, thrown away after the test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vnetdp.bench.netns import NetnsPair, why_no_netns


@pytest.fixture
def spaces() -> Iterator[NetnsPair]:
    if (missing := why_no_netns()) is not None:
        pytest.skip(missing)
    with NetnsPair() as pair:
        yield pair
