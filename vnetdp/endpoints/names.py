"""The endpoints that a command line knows: the one list of them, for errors and --help, without NumPy."""

from __future__ import annotations

from textwrap import wrap
from typing import Final

_WIDTH: Final = 90

# kind: its syntax, and the lines that --help has about it.
ENDPOINTS: Final = {
    "null": ("null", "takes every frame, gives none"),
    "echo": ("echo", "sends every frame back"),
    "macswap": ("macswap", "sends every frame back with its addresses exchanged"),
    "reflect": ("reflect", "a host with every IPv4 address: answers ARP and ICMP echo"),
    "generate": (
        "generate[:size=64,rate=1M,count=100]",
        (
            "numbered frames, checked at the other end; size: bytes of a frame (default: 64); rate: frames a second and "
            "queue pair, 0 is as many as the ring takes (default: 0); count: frames a queue pair, 0 is none "
            "(default: no end)"
        ),
    ),
    "tap": ("tap:NAME[,netns=NS]", "a TAP interface, made if it is not there"),
    "stream": (
        "stream:PATH[,listen,reconnect=1]",
        (
            "a UNIX stream socket, as of QEMU's -netdev stream or passt; listen: another program connects; reconnect: "
            "seconds between two tries, 0 takes one peer (default: 1)"
        ),
    ),
    "dgram": (
        "dgram:PATH[,remote=PATH,reconnect=1]",
        "a UNIX datagram socket, as of QEMU's -netdev dgram; without remote the first sender is the peer",
    ),
    "fd": ("fd:N", "an open descriptor: a stream or datagram socket, or a TAP"),
    "pcap": ("pcap:IN[,OUT]", "frames from one capture file, and into another"),
    "scapy": ("scapy:MODULE:CALLABLE", "a Python function on Scapy packets"),
    "python": (
        "python:MODULE:CLASS[,KEY=VALUE,...]",
        (
            "an endpoint of your own, a subclass of FrameEndpoint or Endpoint: CLASS(queues, KEY=VALUE, ...); VALUE is a "
            "number if it reads as one, else text"
        ),
    ),
    "fault": (
        (
            "fault:drop=P,corrupt=P,duplicate=P,reorder=P,burst=P/P,eio=P,eagain=P,"
            "delay_ms=N,jitter_ms=N,rate=N,at=N,seed=N:ENDPOINT"
        ),
        (
            "another endpoint, with faults: P is a probability from 0 to 1 for each frame (default: 0); reorder: the next "
            "frame overtakes it; burst: P of going into a burst of losses and P of leaving it; eio (the frame is lost) and "
            "eagain (it is sent 1 ms later) on the way to the wire alone; delay_ms, jitter_ms: N ms, give or take N ms "
            "(default: 0); rate: N bits a second (default: no limit); at: faults strike frame N alone (default: any frame)"
        ),
    ),
    "vhost-user": ("vhost-user:SOCKET", "in link, on both sides: two guests; each frame is copied once"),
}

VHOST_USER: Final = "vhost-user"
KNOWN: Final = ", ".join(syntax for syntax, _ in ENDPOINTS.values())


def explained() -> str:
    """Return the list as --help has it."""
    lines = ["endpoints:"]
    for syntax, text in ENDPOINTS.values():
        first, *rest = wrap(text, _WIDTH)
        lines += [f"  {syntax:<27} {first}"] if len(syntax) < 28 else [f"  {syntax}", f"{'':<30}{first}"]
        lines += [f"{'':<30}{line}" for line in rest]
    return "\n".join(lines) + "\n"
