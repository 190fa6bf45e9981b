"""User Mode Linux on `vnetdp serve`: Linux's own vhost-user front end and virtio-net driver, at native speed.

It is the strictest front end: it wants the message acknowledged that agrees on acknowledgements, sends memory tables
with room to spare, takes whatever is offered, and would hand its control queue to us if we offered one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .guests import images
from .guests.machine import FIGURES, Host, Serve, Uml, assert_downloads, assert_pings, up, why_no_guest

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if (missing := why_no_guest("iperf3", "ethtool", "ss")) is not None:
        pytest.skip(missing)
    try:
        images.uml()
    except images.MissingError as e:
        pytest.skip(str(e))
    return tmp_path_factory.mktemp("uml")


@pytest.fixture
def host(folder: Path) -> Iterator[Host]:
    with Host(folder) as host:
        yield host


@pytest.fixture(scope="module")
def lasting_host(folder: Path) -> Iterator[Host]:
    with Host(folder) as host:
        yield host


@pytest.fixture(scope="module")
def serve(folder: Path, lasting_host: Host) -> Iterator[Serve]:
    with Serve(folder, lasting_host.tap(), folder / "socket") as serve:
        lasting_host.address()
        yield serve


@pytest.fixture(scope="module")
def guest(folder: Path, serve: Serve) -> Iterator[Uml]:
    with Uml(folder, serve.sock) as guest:
        guest.boot()
        up(guest)
        yield guest


def test_ping(guest: Uml, lasting_host: Host) -> None:
    assert_pings(guest)
    said = lasting_host.run("ping", "-q", "-f", "-c", "2000", "-s", "1400", Host.GUEST)
    assert " 0% packet loss" in said


def test_its_mac_is_the_one_we_say(guest: Uml) -> None:
    assert guest.run("cat /sys/class/net/eth0/address").strip() == "52:54:00:12:34:56"


@pytest.mark.parametrize("reverse", [False, True], ids=["to-host", "to-guest"])
def test_tcp(guest: Uml, lasting_host: Host, reverse: bool) -> None:
    rate = lasting_host.iperf(guest, 2, reverse=reverse)
    FIGURES.info("UML, TCP %s: %.0f Mbit/s", "to guest" if reverse else "to host", rate)
    assert rate > 100


def test_a_download(guest: Uml, lasting_host: Host) -> None:
    FIGURES.info("UML, download: %.0f MB/s", assert_downloads(guest, lasting_host, 100))


def test_the_interface_goes_down_and_comes_back(guest: Uml) -> None:
    for _ in range(3):
        guest.run("ip link set eth0 down; ip link set eth0 up")
        assert_pings(guest, 10)


def test_the_driver_is_unloaded_and_loaded(guest: Uml) -> None:
    """Linux gives up its rings without a word but SET_VRING_ENABLE 0, and sets up others."""
    churn = "mount -t tmpfs -o size=80m none /tmp; dd if=/dev/urandom of=/tmp/x bs=1M count=60; umount /tmp"
    for _ in range(2):
        guest.run(f"rmmod virtio_net && ({churn}) && modprobe virtio_net")
        up(guest)
        assert_pings(guest, 10)


def test_its_end_leaves_room_for_the_next(guest: Uml, serve: Serve, folder: Path) -> None:
    guest.close()
    with Uml(folder, serve.sock) as following:
        following.boot()
        up(following)
        assert_pings(following, 10)
    report = serve.stop()
    assert report["served"] == 2
    assert report["refused"] == 0
    assert report["endpoint"]["errors"] == 0


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--inband"], id="inband"),
        pytest.param(["--queue-pairs", "2", "--features=-mq"], id="a-pair-it-never-enables"),
        pytest.param(["--features=-mrg_rxbuf"], id="no-mrg_rxbuf"),
        pytest.param(["--features=-event_idx,-indirect_desc"], id="no-event_idx"),
        pytest.param(["--poll"], id="poll"),
    ],
)
def test_served_otherwise(host: Host, tmp_path: Path, arguments: list[str]) -> None:
    with Serve(tmp_path, host.tap(), tmp_path / "socket", *arguments) as serve, Uml(tmp_path, serve.sock) as guest:
        host.address()
        guest.boot()
        up(guest)
        assert_pings(guest, 30)
        host.connect(guest)
        assert host.iperf(guest, 1) > 50
        assert host.iperf(guest, 1, reverse=True) > 50
        guest.close()
        report = serve.stop()
        assert report["refused"] == 0, serve.said()


def test_reflect(folder: Path, tmp_path: Path) -> None:
    with Serve(tmp_path, "reflect", tmp_path / "socket") as serve, Uml(folder, serve.sock) as guest:
        guest.boot()
        up(guest)
        assert_pings(guest, 50, "10.0.0.99")
