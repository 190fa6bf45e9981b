"""Real TAPs, in network namespaces that are thrown away: nothing here touches the machine's own interfaces."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytun

from tests.endpoints.joined import guest_of
from tests.kernels.net.test_hostile_net import put
from tests.kernels.rig import Rig, pattern
from tests.support.by_hand import no_descriptor_leaks, wait_for
from vnetdp.bench.netns import NetnsPair
from vnetdp.endpoints.mailbox import MailboxEndpoint
from vnetdp.endpoints.netns import run_in
from vnetdp.endpoints.tap import TapEndpoint
from vnetdp.errors import EndpointError
from vnetdp_kernels import rows as r
from vnetdp_kernels import spec


def interface(spaces: NetnsPair, name: str, side: str = "a") -> dict[str, Any]:
    """Return what `ip` knows of an interface."""
    found: dict[str, Any] = json.loads(spaces.ip(side, f"-j -d link show dev {name}"))[0]
    return found


def python(spaces: NetnsPair, code: str, *before: str) -> str:
    """Return what a Python of its own prints, in namespace a."""
    path = [str(entry) for entry in sys.path if entry]
    return spaces.run("a", [*before, sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"], 120)


# --- making one ---


def test_one_is_made_up_and_goes_away(spaces: NetnsPair) -> None:
    with TapEndpoint("vtap", netns=spaces.names["a"]) as tap:
        assert tap.vnet_hdr
        assert tap.name == "tap:vtap"
        state = interface(spaces, "vtap")
        assert "UP" in state["flags"]
        info = state["linkinfo"]["info_data"]
        assert (info["type"], info["pi"], info["vnet_hdr"], info["persist"]) == ("tap", False, True, False)
        assert not os.get_inheritable(int(tap.fds[0]))
        assert not os.get_blocking(int(tap.fds[0]))
        assert not spaces.has_interface("b", "vtap")
    assert not spaces.has_interface("a", "vtap")


def test_several_queues(spaces: NetnsPair) -> None:
    with TapEndpoint("vtap", queues=5, netns=spaces.names["a"]) as tap:
        assert len(set(tap.fds.tolist())) == 5
        assert not any(os.get_blocking(fd) or os.get_inheritable(fd) for fd in tap.fds.tolist())
        assert interface(spaces, "vtap")["linkinfo"]["info_data"]["numqueues"] == 5
    assert not spaces.has_interface("a", "vtap")


def test_as_many_queues_as_the_kernel_has(spaces: NetnsPair) -> None:
    with no_descriptor_leaks():
        with TapEndpoint("vtap", queues=256, netns=spaces.names["a"]) as tap:
            assert len(set(tap.fds.tolist())) == 256
        with pytest.raises(EndpointError, match="257 queues: a TAP has at most 256"):
            TapEndpoint("vtap", queues=257, netns=spaces.names["a"])


def test_one_that_persists_is_attached_to_and_left(spaces: NetnsPair, caplog: pytest.LogCaptureFixture) -> None:
    a = spaces.names["a"]
    with TapEndpoint("vtap", netns=a, persist=True):
        pass
    with TapEndpoint("vtap", netns=a):
        assert caplog.messages == []
    spaces.ip("a", "link set dev vtap down")
    with TapEndpoint("vtap", netns=a):
        assert "UP" not in interface(spaces, "vtap")["flags"], "an interface of the user's is left as it is"
    assert caplog.messages == [f"tap:vtap is down, and passes no frame: sudo ip -n {a} link set vtap up"]
    assert spaces.has_interface("a", "vtap")


@pytest.mark.parametrize("header_len", [10, 20])
def test_one_that_persists_is_left_as_it_was(spaces: NetnsPair, header_len: int) -> None:
    spaces.add_tap("a", "vtap")
    spaces.ip("a", "link set dev vtap mtu 1400")

    def header(wanted: int | None = None) -> int:
        device = pytun.TunTapDevice("vtap", pytun.IFF_TAP | pytun.IFF_NO_PI | pytun.IFF_VNET_HDR)
        try:
            if wanted is not None:
                fcntl.ioctl(device.fileno(), 0x400454D8, struct.pack("i", wanted))  # TUNSETVNETHDRSZ
            found: int = struct.unpack("i", fcntl.ioctl(device.fileno(), 0x800454D7, bytes(4)))[0]  # TUNGETVNETHDRSZ
            return found
        finally:
            device.close()

    assert run_in(spaces.names["a"], lambda: header(header_len)) == header_len
    with TapEndpoint("vtap", netns=spaces.names["a"]) as tap:
        tap.set_mtu(9000)
        tap.set_mtu(1300)
        assert interface(spaces, "vtap")["mtu"] == 1300
    assert run_in(spaces.names["a"], header) == header_len
    assert interface(spaces, "vtap")["mtu"] == 1400


def test_one_queue_of_an_interface_with_several(spaces: NetnsPair) -> None:
    spaces.add_tap("a", "vtap", multi_queue=True)
    with TapEndpoint("vtap", netns=spaces.names["a"]) as tap:
        assert tap.queues == 1
        assert interface(spaces, "vtap")["linkinfo"]["info_data"]["numqueues"] == 1


def test_the_kernel_may_choose_the_number(spaces: NetnsPair) -> None:
    with TapEndpoint("vtap%d", netns=spaces.names["a"]), TapEndpoint("vtap%d", netns=spaces.names["a"]):
        assert spaces.has_interface("a", "vtap0")
        assert spaces.has_interface("a", "vtap1")


def test_without_a_namespace_it_is_made_where_we_are(spaces: NetnsPair) -> None:
    code = """
from vnetdp.endpoints.tap import TapEndpoint
import socket
with TapEndpoint("vtap") as tap:
    tap.set_mtu(1400)
    print([name for _, name in socket.if_nameindex()], open("/proc/net/dev").read().count("vtap"))
print([name for _, name in socket.if_nameindex()])
"""
    assert python(spaces, code).splitlines() == ["['lo', 'vtap'] 1", "['lo']"]


# --- what a device tells it ---


def test_every_mask_of_offloads_is_taken(spaces: NetnsPair) -> None:
    with TapEndpoint("vtap", netns=spaces.names["a"]) as tap:
        for mask in range(128):
            tap.set_offloads(mask)


def test_frames_longer_than_the_mtu_come_only_if_asked_for(spaces: NetnsPair) -> None:
    """A UDP datagram of 8 segments leaves the TAP in one frame with USO, in 8 without."""
    send = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_UDP, 103, 1000)  # UDP_SEGMENT
s.sendto(b"x" * 8000, ("10.9.9.2", 9))
"""
    with TapEndpoint("vtap", netns=spaces.names["a"]) as tap:
        spaces.ip("a", "address add 10.9.9.1/24 dev vtap")
        spaces.ip("a", "neighbour replace 10.9.9.2 lladdr 02:00:00:00:00:02 dev vtap nud permanent")
        seen = {}
        every = (1 << 7) - 1
        for mask in (0, every, spec.OFFLOAD_CSUM):
            tap.set_offloads(mask)
            python(spaces, send)
            frames = []
            while True:
                try:
                    frames.append(os.read(int(tap.fds[0]), r.FRAME_SLOT))
                except BlockingIOError:
                    break
            ours = [f for f in frames if f[24:26] == b"\x08\x00" and f[35] == 17]
            seen[mask] = [(f[1] & 0x7F, len(f) - spec.NET_HDR_LEN) for f in ours]
    assert seen[0] == seen[spec.OFFLOAD_CSUM] == [(spec.VIRTIO_NET_HDR_GSO_NONE, 1042)] * 8
    assert seen[every] in ([(spec.VIRTIO_NET_HDR_GSO_UDP_L4, 8042)], seen[0])  # a kernel before 6.2 has no USO


def test_a_frame_that_the_tap_cut_off_is_dropped_and_counted(spaces: NetnsPair) -> None:
    """Somebody raises the MTU of a running guest's interface: its buffers were made for the one before."""
    send = """
import socket
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(("vtap", 0))
for length in (1500, 4000, 60):
    s.send(b"\\2" * 12 + b"\\x88\\xb5" + bytes(length - 14))
"""
    with (
        TapEndpoint("vtap", netns=spaces.names["a"]) as tap,
        MailboxEndpoint() as wire,
        guest_of(wire, tap),
    ):
        spaces.ip("a", "link set dev vtap mtu 9000")
        python(spaces, send)
        ours: list[int] = []

        def both() -> bool:
            ours.extend(len(data) for data in wire.take() if data[12:14] == b"\x88\xb5")
            return len(ours) == 2

        wait_for(both, "the two whole frames are on the wire")
        assert ours == [1500, 60]
        assert tap.counters()["dropped_long"] == 1


def test_the_mtu_is_the_interfaces(spaces: NetnsPair) -> None:
    with TapEndpoint("vtap", netns=spaces.names["a"]) as tap:
        for mtu in (9000, 1500, 68, 65521):
            tap.set_mtu(mtu)
            assert interface(spaces, "vtap")["mtu"] == mtu
        with pytest.raises(EndpointError, match="tap:vtap: cannot set its MTU to 100000: "):
            tap.set_mtu(100_000)


# --- frames ---


@pytest.mark.parametrize("queues", [1, 2])
def test_hosts_reach_each_other_through_rings(spaces: NetnsPair, queues: int) -> None:
    a, b = spaces.names["a"], spaces.names["b"]
    with TapEndpoint("left", queues, a) as left, TapEndpoint("right", queues, b) as right, guest_of(left, right):
        spaces.ip("a", "address add 10.9.9.1/24 dev left")
        spaces.ip("b", "address add 10.9.9.2/24 dev right")
        spaces.run("a", ["ping", "-c", "10", "-i", "0.01", "-w", "30", "10.9.9.2"])
        spaces.run("b", ["ping", "-c", "3", "-i", "0.01", "-s", "20000", "-w", "30", "10.9.9.1"])
        assert left.counters()["dropped_error"] == right.counters()["dropped_error"] == 0


def test_an_interface_that_is_down_costs_frames_only(spaces: NetnsPair) -> None:
    a, b = spaces.names["a"], spaces.names["b"]
    with TapEndpoint("left", 1, a) as left, TapEndpoint("right", 1, b) as right, guest_of(left, right):
        spaces.ip("a", "address add 10.9.9.1/24 dev left")
        spaces.ip("b", "address add 10.9.9.2/24 dev right")
        spaces.ip("a", "link set dev left down")
        spaces.ip("b", "neighbour replace 10.9.9.1 lladdr 02:00:00:00:00:01 dev right nud permanent")
        subprocess.run(
            ["ip", "netns", "exec", b, "ping", "-c", "2", "-i", "0.01", "-w", "1", "10.9.9.1"], capture_output=True
        )
        wait_for(lambda: left.counters()["dropped_error"] > 0, "frames are dropped")
        spaces.ip("a", "link set dev left up")
        spaces.ip("b", "neighbour delete 10.9.9.1 dev right")
        spaces.run("b", ["ping", "-c", "2", "-i", "0.01", "-w", "30", "10.9.9.1"])


# --- namespaces ---


def test_the_callers_namespace_never_changes(spaces: NetnsPair) -> None:
    def where() -> str:
        return str(Path("/proc/thread-self/ns/net").readlink())

    before = where()
    inside = run_in(spaces.names["a"], where)
    assert where() == before != inside
    assert run_in(f"/run/netns/{spaces.names['a']}", where) == inside
    assert run_in(spaces.names["b"], lambda: run_in(spaces.names["a"], where)) == inside
    with pytest.raises(ZeroDivisionError):
        run_in(spaces.names["a"], lambda: 1 // 0)
    assert where() == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("netns")]


def test_namespaces_that_are_none(tmp_path: Path) -> None:
    plain = tmp_path / "file"
    plain.write_text("")
    with no_descriptor_leaks():
        with pytest.raises(EndpointError) as raised:
            TapEndpoint("vtap", netns="no-such-ns")
        assert str(raised.value) == "no network namespace no-such-ns: make it with: sudo ip netns add no-such-ns"
        with pytest.raises(EndpointError, match=f"cannot enter network namespace {plain}: "):
            run_in(str(plain), lambda: None)


# --- names change, and the interface stays ---


def test_one_that_is_renamed_is_still_known(spaces: NetnsPair) -> None:
    a = spaces.names["a"]
    spaces.add_tap("a", "vtap")
    spaces.ip("a", "link set dev vtap mtu 1400")
    with TapEndpoint("vtap", netns=a) as tap:
        spaces.ip("a", "link set dev vtap down")
        spaces.ip("a", "link set dev vtap name other")
        spaces.add_tap("a", "vtap")  # a stranger takes the name
        assert tap.mtu == 1400
        tap.set_mtu(9000)
        assert tap.longest_frame == 9018
        assert (interface(spaces, "other")["mtu"], interface(spaces, "vtap")["mtu"]) == (9000, 1500)
    assert (interface(spaces, "other")["mtu"], interface(spaces, "vtap")["mtu"]) == (1400, 1500)


@pytest.mark.parametrize("netns", [False, True])
def test_one_that_is_moved_to_another_namespace_is_still_known(spaces: NetnsPair, netns: bool) -> None:
    a, b = spaces.names["a"], spaces.names["b"]

    def move() -> None:
        with TapEndpoint("vtap", netns=a if netns else None) as tap:
            spaces.move("vtap", "a", "b", "moved")
            spaces.add_tap("a", "moved")
            assert tap.mtu == 1500
            tap.set_mtu(9000)
            assert tap.mtu == interface(spaces, "moved", "b")["mtu"] == 9000
            assert interface(spaces, "moved")["mtu"] == 1500

    if netns:
        move()
    else:
        run_in(a, move)
    assert not spaces.has_interface("b", "moved")
    assert run_in(b, lambda: [name for _, name in socket.if_nameindex()]) == ["lo"]


def test_a_namespace_may_lose_its_name_to_another(spaces: NetnsPair) -> None:  # noqa: ARG001 - or skips
    with NetnsPair(extra=("third",)) as pair:
        third = pair.names["third"]
        with TapEndpoint("vtap", netns=third) as tap, MailboxEndpoint() as box, guest_of(tap, box):
            subprocess.run(["ip", "netns", "delete", third], check=True)
            assert tap.mtu == 1500
            tap.set_mtu(1400)
            subprocess.run(["ip", "netns", "add", third], check=True)
            pair.add_tap("third", "vtap")
            assert tap.mtu == 1400
            tap.set_mtu(9000)
            assert (tap.mtu, interface(pair, "vtap", "third")["mtu"]) == (9000, 1500)


def test_one_that_is_closed_says_so(spaces: NetnsPair) -> None:
    tap = TapEndpoint("vtap", netns=spaces.names["a"])
    tap.close()
    assert tap.mtu is None
    tap.set_queue_active(0, False)
    tap.send_to_wire(bytes(60))
    uses: list[Callable[[], None]] = [
        lambda: tap.set_mtu(1400),
        lambda: tap.set_offloads(1),
        lambda: tap.start_polling(0, tap),
    ]
    for use in uses:
        with pytest.raises(EndpointError, match="tap:vtap: the endpoint is closed"):
            use()


# --- what cannot be ---


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "a:b", "a\tb", "x" * 16, "é" * 8, "a\udcff"])
def test_a_name_that_no_interface_has(name: str) -> None:
    with no_descriptor_leaks(), pytest.raises(EndpointError) as raised:
        TapEndpoint(name)
    assert str(raised.value) == f"tap: {name!r} is no interface name: 1 to 15 bytes of UTF-8, without / : or blanks"


def test_what_is_there_already_is_said(spaces: NetnsPair) -> None:
    a = spaces.names["a"]
    spaces.add_tap("a", "single")
    spaces.add_tap("a", "several", multi_queue=True)
    spaces.ip("a", "tuntap add dev vtun mode tun")
    with TapEndpoint("single", netns=a), TapEndpoint("several", queues=255, netns=a), no_descriptor_leaks():
        cases = [
            ("lo", 1, "it exists and is no TAP: take another name"),
            ("lo", 2, "it exists and is no TAP with several queues: take another name"),
            ("vtun", 1, "it exists and is no TAP: take another name"),
            ("single", 2, "it exists and is no TAP with several queues: take another name"),
            ("single", 1, "another program has it open: end that program, or take another name"),
            (
                "several",
                2,
                "more than 256 queues, with those of other programs: take fewer queue pairs, or another name",
            ),
        ]
        for name, queues, says in cases:
            with pytest.raises(EndpointError) as raised:
                TapEndpoint(name, queues, a)
            assert str(raised.value).startswith(f"tap:{name}: {says}"), (name, queues)
            assert "\n" not in str(raised.value)
    assert spaces.has_interface("a", "single")


def test_a_user_needs_no_more_than_a_tap_of_his_own(spaces: NetnsPair) -> None:
    spaces.ip("a", "tuntap add dev mine mode tap user 65534")
    spaces.ip("a", "tuntap add dev theirs mode tap user 65533")
    code = """
import os
from vnetdp.endpoints.tap import TapEndpoint
from vnetdp.errors import EndpointError
import concurrent.futures.thread
os.setgroups([]); os.setgid(65534); os.setuid(65534)
with TapEndpoint("mine") as tap:
    tap.set_offloads(15)
    tap.set_mtu(1500)
    for what in (lambda: tap.set_mtu(9000), lambda: TapEndpoint("theirs"), lambda: TapEndpoint("other", queues=2),
                 lambda: TapEndpoint("vtap", netns="/proc/self/ns/net")):
        try:
            what()
        except EndpointError as e:
            print(e)
"""
    add = "no right to create or open it: run as root (with CAP_NET_ADMIN) or: sudo ip tuntap add dev"
    assert python(spaces, code).splitlines() == [
        "tap:mine: cannot set its MTU to 9000: run as root or: sudo ip link set dev mine mtu 9000",
        f"tap:theirs: {add} theirs mode tap user $USER && sudo ip link set theirs up",
        f"tap:other: {add} other mode tap user $USER multi_queue && sudo ip link set other up",
        "cannot enter network namespace /proc/self/ns/net: run as root",
    ]
    assert spaces.has_interface("a", "mine")


@pytest.mark.parametrize(
    ("hide", "says"),
    [
        ("mount -t tmpfs none /dev/net", "no /dev/net/tun: load it with: sudo modprobe tun"),
        ("chmod 600 $T && mount --bind $T /dev/net/tun", "no right to open /dev/net/tun: run as root or: sudo chmod"),
    ],
)
def test_a_machine_without_tun_says_so(spaces: NetnsPair, hide: str, says: str, tmp_path: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("the unshare command (util-linux) isn't installed")
    node = tmp_path / "tun"
    os.mknod(node, 0o20600, os.makedev(10, 200))
    code = """
import os
from vnetdp.endpoints.tap import TapEndpoint
from vnetdp.errors import EndpointError
os.setgid(65534); os.setuid(65534)
try:
    TapEndpoint("vtap")
except EndpointError as e:
    print(e)
"""
    shell = ["unshare", "--mount", "sh", "-c", f'T={node}; {hide} && exec "$@"', "sh"]
    assert python(spaces, code, *shell).startswith(f"tap:vtap: {says}")


# --- after all ---


def test_one_that_is_deleted_under_us_can_be_closed(spaces: NetnsPair) -> None:
    with TapEndpoint("vtap", netns=spaces.names["a"]) as tap:
        spaces.ip("a", "link delete vtap")
        with pytest.raises(EndpointError, match="tap:vtap was deleted"):
            tap.set_mtu(1400)
        with pytest.raises(EndpointError, match="tap:vtap was deleted"):
            tap.set_offloads(1)


def test_a_guest_can_reset_its_device_once_the_interface_is_deleted(spaces: NetnsPair) -> None:
    a, b = spaces.names["a"], spaces.names["b"]
    with TapEndpoint("left", 1, a) as left, TapEndpoint("right", 1, b) as right, guest_of(left, right) as driver:
        spaces.ip("a", "link delete left")
        driver.stop()
        for _ in range(2):
            driver.device.set_status(0)
            assert driver.device.status == 0
        driver.device.set_queue(0, 64, 0, 0x1000, 0x2000)
        assert left.counters()["errors"] > 0


def test_nothing_is_left_open(spaces: NetnsPair) -> None:
    def once() -> None:
        with TapEndpoint("vtap", 3, spaces.names["a"]) as tap:
            pass
        tap.close()
        assert tap.fds.tolist() == [-1, -1, -1]

    once()
    with no_descriptor_leaks():
        once()


def test_a_header_whose_hint_can_not_be_goes_out_all_the_same(spaces: NetnsPair) -> None:
    """The kernel refuses a hdr_len shorter than an Ethernet header, or longer than the frame."""
    rig = Rig(16, device=r.KIND_TAP)
    with TapEndpoint("vtap", netns=spaces.names["a"]) as tap:
        rig.device.fds[0] = tap.fds[0]
        for head, hdr_len in enumerate((0, 1, 13, 61, 0xFFFF)):
            put(rig.tx, head, [72], struct.pack("<BBHHHHH", 0, 0, hdr_len, 9, 0xFFFF, 0xFFFF, 7) + pattern(head))
        assert rig.serve()[1] == 5
        assert rig.device.eps[0, [r.EP_TO_WIRE, r.EP_DROP_ERROR, r.EP_LAST_ERRNO]].tolist() == [5, 0, 0]
