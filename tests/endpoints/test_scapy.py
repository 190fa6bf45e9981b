"""Scapy on both sides of real rings: a callable that answers, and sockets that sniff and ask."""

from __future__ import annotations

import logging
import os
import select
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from scapy.ansmachine import AnsweringMachine
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet, Raw
from scapy.sendrecv import AsyncSniffer, sendp, sniff

from tests.endpoints.joined import guest_of, receive_all, send_all
from tests.support.by_hand import PATIENCE, frame, many_descriptors, no_descriptor_leaks, wait_for
from vnetdp.endpoints import scapy as endpoint_module
from vnetdp.endpoints.loopback import NullEndpoint, ReflectEndpoint
from vnetdp.endpoints.scapy import ScapyEndpoint, SocketEndpoint, VnetdpSocket
from vnetdp.errors import ConfigError, EndpointError
from vnetdp.guest.driver import Driver

MAC = "02:00:00:00:00:01"


def datagram(n: int) -> Packet:
    return Ether(src=MAC, dst="02:00:00:00:00:02") / IP(src="10.0.0.1", dst="10.0.0.2") / UDP(dport=n) / Raw(b"x" * 20)


def ping(host: str = "10.0.0.9") -> Packet:
    return Ether(src=MAC, dst="02:02:02:02:02:02") / IP(src="10.0.0.1", dst=host) / ICMP(id=7, seq=3) / Raw(b"hello")


# --- the endpoint ---


def ports(frames: list[bytes]) -> list[int]:
    return [Ether(one)[UDP].dport for one in frames]


def echo(packet: Packet) -> Packet:
    packet[UDP].dport += 1000
    del packet[UDP].chksum
    return packet


def test_a_packet_answers_a_packet() -> None:
    with ScapyEndpoint(echo) as endpoint, guest_of(endpoint) as driver:
        send_all(driver, [bytes(datagram(n)) for n in range(200)])
        assert ports(receive_all(driver, 200)) == list(range(1000, 1200))
        assert endpoint.counters()["to_wire"] == endpoint.counters()["from_wire"] == 200


@pytest.mark.parametrize(
    "answer",
    [
        lambda packet: [packet, bytes(packet)],
        lambda packet: (packet for _ in range(2)),
        lambda packet: (bytes(packet), packet),
    ],
)
def test_several_answers_keep_their_order(answer: Any) -> None:
    with ScapyEndpoint(answer) as endpoint, guest_of(endpoint) as driver:
        send_all(driver, [bytes(datagram(n)) for n in range(50)])
        assert ports(receive_all(driver, 100)) == [n for n in range(50) for _ in range(2)]


def test_no_answer_is_an_answer() -> None:
    seen: list[int] = []
    with ScapyEndpoint(lambda packet: seen.append(packet[UDP].dport)) as endpoint, guest_of(endpoint) as driver:
        send_all(driver, [bytes(datagram(n)) for n in range(50)])
        wait_for(lambda: len(seen) == 50, "all were seen")
        assert seen == list(range(50))
        assert endpoint.counters()["from_wire"] == endpoint.errors == 0


def test_one_that_raises_costs_itself_alone(caplog: pytest.LogCaptureFixture) -> None:
    def touchy(packet: Packet) -> Any:
        match packet[UDP].dport % 4:
            case 1:
                return 1 // 0
            case 2:
                return 17
            case 3:
                return [packet, "text"]
        return packet

    batch = [bytes(12) + bytes(datagram(n)) for n in range(40)]
    with caplog.at_level(logging.WARNING), ScapyEndpoint(touchy) as endpoint:
        endpoint.transmit_frames(0, batch)
        assert ports([one[12:] for one in endpoint.receive_frames(0, 64)]) == list(range(0, 40, 4))
        assert endpoint.errors == endpoint.counters()["dropped_error"] == 30
    raised_at = touchy.__code__.co_firstlineno + 3
    says = f"scapy: ZeroDivisionError: integer division or modulo by zero at {__file__}:{raised_at}"
    assert [r.getMessage() for r in caplog.records] == [f"{says} (logged once; counted from now on)"]


def test_a_batch_is_one_call() -> None:
    calls: list[int] = []

    def batched(packets: list[Packet]) -> list[Packet]:
        calls.append(len(packets))
        return packets[::-1]

    batched.batch = True  # type: ignore[attr-defined]
    batch = [bytes(12) + bytes(datagram(n)) for n in range(40)]
    with ScapyEndpoint(batched) as endpoint:
        endpoint.transmit_frames(0, batch)
        assert ports([one[12:] for one in endpoint.receive_frames(0, 64)]) == list(range(39, -1, -1))
    assert calls == [40]
    with ScapyEndpoint(lambda packet: packet, batch=False) as endpoint:
        endpoint.transmit_frames(0, batch)
        assert len(endpoint.receive_frames(0, 64)) == 40


def test_an_answer_without_an_ethernet_header_says_so(caplog: pytest.LogCaptureFixture) -> None:
    answers: list[Packet] = [IP() / UDP(), IPv6() / UDP()]
    with caplog.at_level(logging.WARNING):
        while answers:
            with ScapyEndpoint(lambda _: answers.pop()) as endpoint:
                endpoint.transmit_frames(0, [bytes(12) + frame(1)])
                assert endpoint.errors == 1
            assert "has no Ethernet header: put Ether()/ before it" in caplog.records[-1].getMessage()


def test_frames_that_are_no_known_protocol_get_there() -> None:
    with ScapyEndpoint(lambda packet: packet) as endpoint, guest_of(endpoint) as driver:
        frames = [frame(n, length) for n, length in enumerate((14, 15, 60, 61, 1514, 2000))]
        send_all(driver, frames)
        assert receive_all(driver, len(frames)) == frames


def test_more_answers_than_anybody_takes_are_dropped_and_counted() -> None:
    with ScapyEndpoint(lambda packet: [packet] * 10, limit=25) as endpoint:
        endpoint.transmit_frames(0, [bytes(12) + frame(n) for n in range(4)])
        assert len(endpoint.receive_frames(0, 64)) == 25
        assert endpoint.counters()["dropped_error"] == 15


def test_frames_come_back_on_their_queue() -> None:
    with ScapyEndpoint(lambda packet: packet, queues=2) as endpoint:
        endpoint.transmit_frames(1, [bytes(12) + frame(1)])
        assert not endpoint.receive_frames(0, 64)
        assert list(endpoint.receive_frames(1, 64)) == [bytes(12) + frame(1)]


# --- the sockets ---


@pytest.fixture(params=["guest", "wire"])
def asking(request: pytest.FixtureRequest) -> Iterator[VnetdpSocket]:
    """A socket on one side, with a host that answers ARP and ping on the other."""
    if request.param == "guest":
        with ReflectEndpoint() as wire, guest_of(wire) as driver, VnetdpSocket(driver) as sock:
            yield sock
    else:
        with SocketEndpoint() as end, ReflectEndpoint() as host, guest_of(end, host), VnetdpSocket(end) as sock:
            yield sock


def test_sr1_gets_the_answer(asking: VnetdpSocket) -> None:
    answer = asking.sr1(ping(), timeout=30, verbose=0)
    assert answer is not None
    assert answer[ICMP].type == 0
    assert (answer[IP].src, answer[IP].dst, answer[Raw].load[:5]) == ("10.0.0.9", "10.0.0.1", b"hello")
    arp = asking.sr1(Ether(src=MAC, dst="ff:ff:ff:ff:ff:ff") / ARP(pdst="10.0.0.77"), timeout=30, verbose=0)
    assert arp is not None
    assert (arp[ARP].psrc, arp[ARP].op) == ("10.0.0.77", 2)


def test_a_socket_of_a_high_descriptor_works_too() -> None:
    """select(), which Scapy's sockets use, knows none above 1,023."""
    with many_descriptors(), ExitStack() as stack:
        for _ in range(1024):
            stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        wire = stack.enter_context(ReflectEndpoint())
        sock = stack.enter_context(VnetdpSocket(stack.enter_context(guest_of(wire))))
        assert sock.fileno() > 1023
        answer = sock.sr1(ping(), timeout=30, verbose=0)
        assert answer is not None
        assert answer[IP].src == "10.0.0.9"
        sniffer = AsyncSniffer(opened_socket=sock, count=5)
        sniffer.start()
        sendp([ping()] * 5, socket=sock, verbose=0)
        sniffer.join(timeout=60)
        assert len(sniffer.results or ()) == 5
        assert len(sniff(opened_socket=sock, timeout=0.01)) == 0


def test_sr_pairs_answers_with_questions(asking: VnetdpSocket) -> None:
    hosts = [f"10.0.1.{n}" for n in range(1, 41)]
    answered, unanswered = asking.sr([ping(host) for host in hosts], timeout=30, verbose=0)
    assert not unanswered
    assert sorted(question[IP].dst for question, _ in answered) == sorted(hosts)
    assert all(question[IP].dst == answer[IP].src for question, answer in answered)


def test_sniff_while_sendp(asking: VnetdpSocket) -> None:
    sniffer = AsyncSniffer(opened_socket=asking, count=30)
    sniffer.start()
    sendp([ping(f"10.0.2.{n}") for n in range(30)], socket=asking, verbose=0)
    sniffer.join(timeout=60)
    assert sniffer.results is not None
    assert [p[IP].src for p in sniffer.results] == [f"10.0.2.{n}" for n in range(30)]
    assert all(p.time > 0 for p in sniffer.results)


def test_a_silent_wire_gives_nothing(asking: VnetdpSocket) -> None:
    assert select.select([asking], [], [], 0)[0] == []
    assert asking.recv() is None
    assert len(sniff(opened_socket=asking, timeout=0.01)) == 0


@pytest.fixture
def both() -> Iterator[tuple[SocketEndpoint, Driver]]:
    with SocketEndpoint() as wire, guest_of(wire) as driver:
        yield wire, driver


def test_select_says_when_a_packet_is_there(both: tuple[SocketEndpoint, Driver]) -> None:
    wire, driver = both
    with VnetdpSocket(wire) as ours, VnetdpSocket(driver) as theirs:
        sendp([datagram(n) for n in range(3)], socket=theirs, verbose=0)
        got: list[int] = []
        while len(got) < 3:
            assert select.select([ours], [], [], PATIENCE)[0]
            packet = ours.recv()
            if packet is not None:
                got.append(packet[UDP].dport)
        assert got == [0, 1, 2]
        assert ours.recv() is None
        assert select.select([ours], [], [], 0)[0] == []


def test_many_packets_cross_both_ways(both: tuple[SocketEndpoint, Driver]) -> None:
    wire, driver = both
    with VnetdpSocket(wire) as ours, VnetdpSocket(driver) as theirs:
        for sender, receiver in ((ours, theirs), (theirs, ours)):
            sniffer = AsyncSniffer(opened_socket=receiver, count=300)
            sniffer.start()
            sendp([datagram(n) for n in range(300)], socket=sender, verbose=0)
            sniffer.join(timeout=60)
            assert sniffer.results is not None
            assert [p[UDP].dport for p in sniffer.results] == list(range(300))


class Upper(AnsweringMachine):  # type: ignore[type-arg]
    """Answers datagrams to port 7, in capitals."""

    function_name = "upper"
    send_function = staticmethod(sendp)

    def is_request(self, req: Packet) -> int:
        return UDP in req and req[UDP].dport == 7

    def make_reply(self, req: Packet, _address: Any = None) -> Packet:
        reply = Ether(src=req.dst, dst=req.src) / IP(src=req[IP].dst, dst=req[IP].src)
        return reply / UDP(sport=7, dport=req[UDP].sport) / Raw(req[Raw].load.upper())


def test_an_answering_machine_on_the_wire(both: tuple[SocketEndpoint, Driver]) -> None:
    wire, driver = both
    with VnetdpSocket(wire) as ours, VnetdpSocket(driver) as theirs:
        machine = ours.am(Upper, verbose=False)
        machine(bg=True)
        answer = theirs.sr1(datagram(7), timeout=30, verbose=0)
        machine.sniffer.stop()
        assert answer is not None
        assert answer[Raw].load == b"X" * 20


def test_bytes_can_be_sent(both: tuple[SocketEndpoint, Driver]) -> None:
    wire, driver = both
    with VnetdpSocket(wire) as ours:
        assert ours.send(frame(3)) == 60
        assert receive_all(driver, 1) == [frame(3)]


def test_a_packet_without_an_ethernet_header_is_refused(both: tuple[SocketEndpoint, Driver]) -> None:
    with VnetdpSocket(both[0]) as ours, pytest.raises(EndpointError, match="put Ether"):
        ours.send(IP() / UDP())


def test_sending_with_nobody_there_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "_SEND_TIMEOUT_S", 0.01)
    with SocketEndpoint(limit=5) as wire, VnetdpSocket(wire) as sock:
        for n in range(5):
            sock.send(datagram(n))
        with pytest.raises(EndpointError, match=r"the ring took no packet for [0-9.]+ s: start the device"):
            sock.send(datagram(5))


def test_nothing_is_left_open() -> None:
    def round_trip() -> None:
        with SocketEndpoint() as wire, guest_of(wire) as driver, VnetdpSocket(wire) as a, VnetdpSocket(driver) as b:
            a.send(frame(1))
            wait_for(lambda: b.recv() is not None, "it crossed")
            a.close()
        with ScapyEndpoint(echo):
            pass
        with NullEndpoint() as null, NullEndpoint() as own, guest_of(null, own) as other:  # noqa: SIM117
            with pytest.raises(ConfigError, match="endpoint of its own"):
                VnetdpSocket(other)

    round_trip()
    with no_descriptor_leaks():
        round_trip()
