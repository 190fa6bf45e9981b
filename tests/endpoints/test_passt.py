"""passt at the other end of a stream: a guest by hand gets an address, and speaks TCP with a server on the host."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

import pytest
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet

from tests.endpoints.joined import guest_of
from tests.support.by_hand import PATIENCE, wait_for
from tests.support.passt import GUEST, HOST, passt, why_no_passt
from vnetdp.endpoints.sock import StreamEndpoint
from vnetdp.guest.driver import Driver

MAC = "02:00:00:00:00:02"
EVERYBODY = "ff:ff:ff:ff:ff:ff"


class Guest:
    """A guest without a network stack: packets that it sends, and the next packet of a kind that it waits for."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._came: list[Packet] = []

    def send(self, packet: Packet) -> None:
        wait_for(lambda: self._driver.send(bytes(packet)), "room to send")

    def wait(self, wanted: Callable[[Packet], bool], what: str) -> Packet:
        """Return the oldest packet that is *wanted*; packets before it are dropped."""
        found: list[Packet] = []

        def came() -> bool:
            self._came += [Ether(frame) for frame in self._driver.receive()]
            while self._came and not found:
                packet = self._came.pop(0)
                found.extend([packet] if wanted(packet) else [])
            return bool(found)

        wait_for(came, what)
        return found[0]


def lease(guest: Guest) -> str:
    """Ask for an address by DHCP, and return it."""
    ask = Ether(src=MAC, dst=EVERYBODY) / IP(src="0.0.0.0", dst="255.255.255.255") / UDP(sport=68, dport=67)
    for kind, answer in (("discover", 2), ("request", 5)):
        options = [("message-type", kind), ("requested_addr", GUEST), "end"]
        guest.send(ask / BOOTP(chaddr=bytes.fromhex(MAC.replace(":", "")), xid=7) / DHCP(options=options))
        told = guest.wait(lambda p: DHCP in p and p[BOOTP].xid == 7, f"an answer to DHCP {kind}")
        assert ("message-type", answer) in told[DHCP].options
    return str(told[BOOTP].yiaddr)


def payload(packet: Packet) -> bytes:
    """Return the bytes of a TCP segment, without the padding of its frame."""
    length = packet[IP].len - 4 * packet[IP].ihl - 4 * packet[TCP].dataofs
    return bytes(packet[TCP].payload)[:length]


def talk(guest: Guest, mac: str, port: int, request: bytes, expected: int) -> bytes:
    """Open a connection, send *request*, and return the *expected* bytes that come back."""
    ours, theirs = 1000, 0

    def segment(flags: str, data: bytes = b"") -> Packet:
        tcp = TCP(sport=40000, dport=port, flags=flags, seq=ours, ack=theirs, window=65535)
        return Ether(src=MAC, dst=mac) / IP(src=GUEST, dst=HOST) / tcp / data

    def ours_alone(packet: Packet) -> bool:
        return TCP in packet and packet[TCP].sport == port

    guest.send(segment("S"))
    answer = guest.wait(lambda p: ours_alone(p) and p[TCP].flags == "SA", "the connection is accepted")
    ours, theirs = answer[TCP].ack, answer[TCP].seq + 1
    guest.send(segment("A"))  # passt takes no data with it
    guest.send(segment("PA", request))
    ours += len(request)
    got = b""
    while len(got) < expected:
        packet = guest.wait(lambda p: ours_alone(p) and bool(payload(p)), "bytes of the answer")
        if packet[TCP].seq == theirs:
            got += payload(packet)
            theirs += len(payload(packet))
        guest.send(segment("A"))
    return got


@pytest.mark.skipif(why_no_passt() is not None, reason=why_no_passt() or "")
def test_a_guest_reaches_a_server_on_the_host() -> None:
    answer = bytes(range(256)) * 256
    heard: list[bytes] = []

    def serve(server: socket.socket) -> None:
        with server.accept()[0] as connection:
            connection.settimeout(PATIENCE)
            heard.append(connection.recv(4096))
            connection.sendall(answer)

    with passt() as path, StreamEndpoint(str(path)) as endpoint, guest_of(endpoint) as driver:
        guest = Guest(driver)
        assert lease(guest) == GUEST
        guest.send(Ether(src=MAC, dst=EVERYBODY) / ARP(hwsrc=MAC, psrc=GUEST, pdst=HOST))
        mac = guest.wait(lambda p: ARP in p and p[ARP].op == 2 and p[ARP].psrc == HOST, "ARP's answer")[ARP].hwsrc
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(PATIENCE)
            thread = threading.Thread(target=serve, args=(server,))
            thread.start()
            assert talk(guest, mac, server.getsockname()[1], b"hello", len(answer)) == answer
            thread.join()
        assert heard == [b"hello"]
        assert endpoint.counters()["dropped_error"] == 0
