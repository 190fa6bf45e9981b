"""What every test with DPDK needs: testpmd itself, and back ends of ours that it attaches to, one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.interop.peers import Command
from vnetdp.bench.dpdk import why_no_dpdk

Serve = Callable[[str, bool], tuple[Command, Path]]


@pytest.fixture(scope="session")
def dpdk() -> None:
    if (missing := why_no_dpdk()) is not None:
        pytest.skip(missing)


@pytest.fixture(scope="module")
def serve(dpdk: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """A function that gives `vnetdp serve ENDPOINT`, and its socket: one for all tests, as front ends come and go."""
    running: dict[tuple[str, bool], tuple[Command, Path]] = {}
    with ExitStack() as stack:

        def get(endpoint: str, connect: bool) -> tuple[Command, Path]:
            if (endpoint, connect) not in running:
                folder = tmp_path_factory.mktemp("serve")
                args = ["serve", endpoint, "--socket", str(folder / "s"), "--queue-pairs", "2"]
                command = stack.enter_context(Command(folder, "serve", *args, *(["--connect"] if connect else [])))
                command.wait_until_it_says("connecting" if connect else "serving")
                running[endpoint, connect] = command, folder / "s"
            return running[endpoint, connect]

        yield get
        for command, _ in running.values():
            assert command.stop()["refused"] == 0, command.log
