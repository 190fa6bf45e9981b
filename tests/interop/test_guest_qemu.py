"""A Debian kernel in QEMU, by emulation alone, on `vnetdp serve`: virtio-net on PCI as virtual machines have it."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from .guests import images
from .guests.machine import FIGURES, Host, QemuGuest, Serve, assert_downloads, assert_pings, up, why_no_guest

pytestmark = [pytest.mark.interop, pytest.mark.timeout(240)]


CAMPAIGN = os.environ.get("VNETDP_CAMPAIGN") == "1"


@pytest.fixture(scope="module", autouse=True)
def qemu() -> None:
    if (missing := why_no_guest("iperf3", "ethtool", "ss")) is not None:
        pytest.skip(missing)
    try:
        images.qemu()
        images.pc()
    except images.MissingError as e:
        pytest.skip(str(e))


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with Host(tmp_path) as host:
        yield host


def offloads(guest: QemuGuest) -> dict[str, str]:
    """What `ethtool -k` says: feature to on or off."""
    return dict(re.findall(r"^\s*([\w-]+): (on|off)", guest.run("ethtool -k eth0"), re.MULTILINE))


def test_one_queue_pair(host: Host, tmp_path: Path) -> None:
    with Serve(tmp_path, host.tap(), tmp_path / "socket") as serve, QemuGuest(tmp_path, serve.sock) as guest:
        host.address()
        guest.boot()
        up(guest)
        assert_pings(guest, 50)
        host.connect(guest)
        assert offloads(guest)["tcp-segmentation-offload"] == "on"
        for reverse in (False, True):
            rate = host.iperf(guest, 2, reverse=reverse)
            FIGURES.info("QEMU, TCP %s: %.0f Mbit/s", "to guest" if reverse else "to host", rate)
            assert rate > 50
        FIGURES.info("QEMU, download: %.0f MB/s", assert_downloads(guest, host, 100 if CAMPAIGN else 30, 120))
        # Frames of more than a packet's size: TCP was segmented by nobody on the way.
        interface = host.ip(f"-s link show dev {Host.TAP}")
        received, packets = map(int, re.findall(r"RX:.*\n\s*(\d+)\s+(\d+)", interface)[0])
        assert received / packets > 1514, interface
        # The driver goes and comes back: rings are stopped by GET_VRING_BASE, the device is reset.
        guest.run("rmmod virtio_net && modprobe virtio_net")
        up(guest)
        assert_pings(guest, 10)
        guest.close()
        report = serve.stop()
        assert report["refused"] == report["endpoint"]["errors"] == 0, serve.said()


def test_two_queue_pairs(host: Host, tmp_path: Path) -> None:
    with ExitStack() as stack:
        serve = stack.enter_context(Serve(tmp_path, host.tap(), tmp_path / "socket", "--queue-pairs", "2"))
        guest = stack.enter_context(QemuGuest(tmp_path, serve.sock, cpus=2, queue_pairs=2))
        host.address()
        guest.boot()
        up(guest)
        for pairs in (2, 1, 2):
            guest.run(f"ethtool -L eth0 combined {pairs}")
            assert_pings(guest, 20)
            host.connect(guest)
            before = packets(guest)
            # Linux sends on the queue of the processor that the sender runs on, and its TAP answers on the same pair.
            for cpu, reverse in itertools.product((0, 1), (False, True)):
                assert host.iperf(guest, 1, reverse=reverse, cpu=cpu) > 50
            moved = {queue: count - before[queue] for queue, count in packets(guest).items()}
            busy = {queue for queue, count in moved.items() if count > 50}
            assert busy == {f"{way}_queue_{pair}" for way in ("rx", "tx") for pair in range(pairs)}, moved
        guest.close()
        assert serve.stop()["refused"] == 0, serve.said()


def packets(guest: QemuGuest) -> dict[str, int]:
    found = re.findall(r"([rt]x_queue_\d)_packets: (\d+)", guest.run("ethtool -S eth0"))
    return {queue: int(count) for queue, count in found}


@pytest.mark.parametrize(
    ("device", "machine"),
    [
        pytest.param("mrg_rxbuf=off,guest_tso4=off,guest_tso6=off,guest_ecn=off", "q35", id="small-buffers"),
        pytest.param("mrg_rxbuf=off", "q35,max-ram-below-4g=128M", id="two-memory-regions"),
        pytest.param("disable-modern=on,disable-legacy=off,mrg_rxbuf=off", "q35", id="legacy"),
        pytest.param("event_idx=off,indirect_desc=off,rx_queue_size=1024", "q35", id="no-event_idx"),
        pytest.param("csum=off,guest_csum=off", "q35", id="no-offloads"),
    ],
)
def test_other_devices(host: Host, tmp_path: Path, device: str, machine: str) -> None:
    with ExitStack() as stack:
        serve = stack.enter_context(Serve(tmp_path, host.tap(), tmp_path / "socket"))
        guest = stack.enter_context(QemuGuest(tmp_path, serve.sock, device=device, machine=machine))
        host.address()
        guest.boot()
        up(guest)
        assert_pings(guest, 20)
        if device.startswith("csum=off"):
            assert offloads(guest)["tx-checksumming"] == "off"
        for reverse in (False, True):
            assert host.iperf(guest, 1, reverse=reverse) > 20
        assert_downloads(guest, host, 10)
        guest.close()
        assert serve.stop()["refused"] == 0, serve.said()


def test_reflect(tmp_path: Path) -> None:
    with Serve(tmp_path, "reflect", tmp_path / "socket") as serve, QemuGuest(tmp_path, serve.sock) as guest:
        guest.boot()
        up(guest)
        assert_pings(guest, 50, "10.0.0.99")


def test_the_generic_device_which_never_tells_driver_ok(host: Host, tmp_path: Path) -> None:
    """It knows nothing of networks: configuration and features are all `serve`'s. It takes STATUS, which is offered."""
    try:
        images.newest_qemu()
    except images.MissingError as e:
        pytest.skip(str(e))
    with Serve(tmp_path, host.tap(), tmp_path / "socket") as serve:
        with QemuGuest(tmp_path, serve.sock, generic=True) as guest:
            host.address()
            guest.boot()
            assert guest.run("cat /sys/class/net/eth0/address").strip() == "52:54:00:12:34:56"
            for _ in range(2):
                up(guest)
                assert_pings(guest, 20)
                guest.run("rmmod virtio_net && modprobe virtio_net")
            up(guest)
            assert_downloads(guest, host, 10)
        assert serve.stop()["refused"] == 0, serve.said()


def test_a_back_end_that_is_killed_and_restarted(host: Host, tmp_path: Path) -> None:
    """QEMU owns the socket; whoever supervises `serve --connect` starts it again, and the guest goes on."""
    socket = tmp_path / "socket"
    with ExitStack() as stack:
        serve = stack.enter_context(Serve(tmp_path, host.tap(), socket, connect=True))
        guest = stack.enter_context(QemuGuest(tmp_path, socket, listen=True))
        host.address()
        guest.boot()
        up(guest)
        assert_pings(guest, 10)
        for _ in range(10 if CAMPAIGN else 1):
            guest.run(f"probe beat {Host.ADDRESS} 10 8 > /beat & sleep 1")
            serve.kill()
            time.sleep(0.5)
            serve.start()
            host.address()
            said = guest.run("wait; cat /beat")
            until = time.monotonic() + 20
            while "heard_until" not in said and time.monotonic() < until:
                time.sleep(0.5)
                said = guest.run("cat /beat")
            heard = re.search(r"lost=(\d+) longest_gap_ms=([\d.]+) heard_until_s=([\d.]+)", said)
            assert heard, said
            FIGURES.info("QEMU, serve killed and restarted: %s", heard[0])
            assert float(heard[3]) > 7.5, f"no answers after the restart: {said}"
            assert_pings(guest, 20)
            assert_downloads(guest, host, 5)
        assert "refused" not in serve.said()
