"""QEMU at the other end of a socket: its `-netdev stream` and `-netdev dgram` carry a guest's frames to a link of ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from vnetdp.endpoints.loopback import ReflectEndpoint
from vnetdp.endpoints.spec import parse_endpoint
from vnetdp.programs.link import Link

from .guests import images
from .guests.machine import QemuGuest, assert_pings, up, why_no_guest

pytestmark = [pytest.mark.interop, pytest.mark.timeout(300)]

STREAM = "stream,id=n0,addr.type=unix,addr.path={0}/wire,server="
DGRAM = "dgram,id=n0,local.type=unix,local.path={0}/qemu,remote.type=unix,remote.path={0}/wire"


@pytest.mark.parametrize(
    ("endpoint", "netdev"),
    [
        ("stream:{0}/wire,listen", STREAM + "off"),
        ("stream:{0}/wire,reconnect=0.1", STREAM + "on"),
        ("dgram:{0}/wire,remote={0}/qemu,reconnect=0.1", DGRAM),
        ("dgram:{0}/wire,reconnect=0.1", DGRAM),
    ],
    ids=["stream-listen", "stream", "dgram-remote", "dgram"],
)
def test_a_guest_pings_through_the_socket(tmp_path: Path, endpoint: str, netdev: str) -> None:
    if (missing := why_no_guest()) is not None:
        pytest.skip(missing)
    try:
        images.qemu()
        images.pc()
    except images.MissingError as e:
        pytest.skip(str(e))
    card = ["-netdev", netdev.format(tmp_path), "-device", "virtio-net-pci,netdev=n0,romfile="]
    with parse_endpoint(endpoint.format(tmp_path)) as wire, ReflectEndpoint() as host, Link(wire, host):
        with QemuGuest(tmp_path, None, more=card) as guest:
            guest.boot(120)
            up(guest)
            assert_pings(guest, 20)
        assert wire.errors == 0
