"""A TAP that is deleted while it is used: it is said at once, reported, and counted in the exit status."""

from __future__ import annotations

import subprocess

import pytest

from tests.cli import test_cli
from tests.cli.test_signals import TERM, Command
from tests.programs import test_link_netns
from tests.support.by_hand import wait_for
from tests.support.shell import Shell
from vnetdp.bench.netns import NetnsPair
from vnetdp.endpoints.fault import FaultEndpoint
from vnetdp.endpoints.loopback import GenerateEndpoint
from vnetdp.endpoints.tap import TapEndpoint
from vnetdp.programs.link import Link

shell = test_cli.shell
spaces = test_link_netns.spaces

SAYS = "tap:cut was deleted: start the command again, for a new interface"


@pytest.mark.parametrize("queues", [1, 2])
def test_a_tap_knows_that_it_was_deleted(spaces: NetnsPair, queues: int) -> None:
    with FaultEndpoint(TapEndpoint("cut", queues, spaces.names["a"])) as tap:
        if queues > 1:
            tap.set_queue_active(0, False)
        assert not tap.gone
        assert not tap.failures
        spaces.ip("a", "link set cut down")
        assert not tap.gone
        spaces.ip("a", "link delete cut")
        assert tap.gone
        assert list(tap.failures) == [SAYS]


def test_a_tap_goes_with_the_namespace_that_it_was_moved_to(spaces: NetnsPair) -> None:
    other = f"{spaces.names['a']}-other"
    subprocess.run(["ip", "netns", "add", other], check=True, timeout=60)
    try:
        with TapEndpoint("cut", netns=spaces.names["a"]) as tap:
            spaces.ip("a", f"link set cut netns {other}")
            assert not tap.gone
            subprocess.run(["ip", "netns", "delete", other], check=True, timeout=60)
            wait_for(lambda: tap.gone, "the namespace is gone")
            assert list(tap.failures) == [SAYS]
    finally:
        subprocess.run(["ip", "netns", "delete", other], check=False, timeout=60, capture_output=True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_link_over_a_tap_that_is_gone_is_dead_and_waits_for_no_frame(spaces: NetnsPair, side: str) -> None:
    with (
        TapEndpoint("cut", netns=spaces.names["a"]) as tap,
        GenerateEndpoint(rate=1000) as source,
        Link(*((tap, source) if side == "left" else (source, tap))) as link,
    ):
        assert not link.dead
        spaces.ip("a", "link delete cut")
        assert link.dead
        link.drain()
        assert link.report()["errors"] == [SAYS]


def test_a_link_ends_with_its_tap(shell: Shell, spaces: NetnsPair) -> None:
    command = Command(shell, "link", f"tap:cut,netns={spaces.names['a']}", "generate:rate=1000")
    command.says("linked")
    spaces.ip("a", "link delete cut")
    command.says(f"vnetdp.tap: {SAYS}")
    assert command.ends(1)["errors"] == [SAYS]


def test_a_server_says_so_and_goes_on_for_the_guest(shell: Shell, spaces: NetnsPair) -> None:
    command = Command(shell, "serve", f"tap:cut,netns={spaces.names['a']}", "--socket", "s")
    command.says("serving")
    spaces.ip("a", "link delete cut")
    command.says(f"vnetdp.tap: {SAYS}")
    command.group(TERM)
    assert command.ends(1)["errors"] == [SAYS]


def test_a_guest_that_is_driven_from_a_tap_ends_with_it(shell: Shell, spaces: NetnsPair) -> None:
    back_end = Shell(shell.folder)
    server = back_end.start("serve", "null", "--socket", "s")
    command = Command(shell, "drive", f"tap:cut,netns={spaces.names['a']}", "--socket", "s")
    command.says("driving")
    spaces.ip("a", "link delete cut")
    try:
        assert command.process.wait(60) == 1
    finally:
        server.terminate()
        back_end.finish(server)
    assert command.ends(1)["errors"] == [SAYS]
