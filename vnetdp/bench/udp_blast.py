"""Small UDP frames, sent as fast as one core can, counted where the other namespace's stack takes them.

    python -m vnetdp.bench.udp_blast NETNS_A NETNS_B INTERFACE SECONDS

INTERFACE has that name on both sides, is up and has its address. Prints one JSON object: the fields of
`Blast`.

A frame is 60 bytes, which is 64 on a wire with its frame check sequence: the smallest Ethernet frame. The
link is overloaded on purpose: excess frames are lost before it (a TAP's queue holds 1000 frames), so
`delivered` is the link's throughput. The sender keeps one core busy.
"""

import ctypes
import dataclasses
import errno
import json
import os
import socket
import struct
import sys
import time
from contextlib import ExitStack
from typing import ClassVar

from vnetdp.bench.netns import ADDRESSES
from vnetdp.endpoints.netns import run_in

FRAME_LEN = 60  # bytes, without the frame check sequence
PORT = 9  # UDP's discard service
_BATCH = 64  # frames in one sendmmsg
_DRAIN = 0.2  # seconds that frames under way may take

_ETH_P_IP = 0x0800
_SOL_PACKET = 263
_PACKET_STATISTICS = 6
_SO_ATTACH_FILTER = 26


@dataclasses.dataclass(frozen=True)
class Blast:
    """Frames *sent* in *seconds*, frames *delivered* in that time, and frames that came *late*, after it."""

    sent: int
    delivered: int
    late: int
    seconds: float

    @property
    def mpps(self) -> float:
        """Million frames per second delivered."""
        return self.delivered / self.seconds / 1e6

    @property
    def sent_mpps(self) -> float:
        """Million frames per second sent."""
        return self.sent / self.seconds / 1e6


class _Iovec(ctypes.Structure):
    _fields_: ClassVar = [("base", ctypes.c_char_p), ("len", ctypes.c_size_t)]


class _Msghdr(ctypes.Structure):
    _fields_: ClassVar = [
        ("name", ctypes.c_void_p),
        ("name_len", ctypes.c_uint32),
        ("iov", ctypes.POINTER(_Iovec)),
        ("iov_len", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_len", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    ]


class _Mmsghdr(ctypes.Structure):
    _fields_: ClassVar = [("msg", _Msghdr), ("sent_len", ctypes.c_uint)]


def blast(namespace_a: str, namespace_b: str, interface: str, seconds: float) -> Blast:
    """Send from *namespace_a* to *namespace_b* for *seconds*."""
    with ExitStack() as sockets:
        counter = sockets.enter_context(run_in(namespace_b, lambda: _counter(interface)))
        sockets.enter_context(run_in(namespace_b, _sink))
        sender = sockets.enter_context(run_in(namespace_a, lambda: _sender(interface)))
        frame = _frame(source=sender.getsockname()[4], target=counter.getsockname()[4])
        _take_count(counter)
        sent, elapsed = _send(sender, frame, seconds)
        delivered = _take_count(counter)
        time.sleep(_DRAIN)
        return Blast(sent, delivered, _take_count(counter), elapsed)


def _sink() -> socket.socket:
    """A socket that is never read. With it the stack drops the frames; without, it answers each: "port unreachable"."""
    sink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    sink.bind((ADDRESSES["b"], PORT))
    return sink


def _sender(interface: str) -> socket.socket:
    sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    sender.bind((interface, 0))
    return sender


def _counter(interface: str) -> socket.socket:
    """A packet socket by which the kernel counts our frames as the stack takes them.

    Unlike the interface's rx_packets it counts nothing else that arrives.
    """
    # No protocol yet: it mustn't see anything before its filter is there.
    counter = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    # It is never read, and a full socket costs least. Frames that it drops are counted too.
    counter.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    program = b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            (0x30, 0, 0, 23),  # A = IP protocol
            (0x15, 0, 3, socket.IPPROTO_UDP),
            (0x28, 0, 0, 36),  # A = UDP destination port (the IP header has no options)
            (0x15, 0, 1, PORT),
            (0x06, 0, 0, FRAME_LEN),  # ours: count it
            (0x06, 0, 0, 0),  # anything else
        )
    )
    instructions = ctypes.create_string_buffer(program)
    fprog = struct.pack("HL", len(program) // 8, ctypes.addressof(instructions))
    counter.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, fprog)
    counter.bind((interface, _ETH_P_IP))
    return counter


def _take_count(counter: socket.socket) -> int:
    """Frames seen since the last call, including frames that didn't fit into the socket's buffer."""
    return int(struct.unpack("II", counter.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))[0])


def _send(sender: socket.socket, frame: bytes, seconds: float) -> tuple[int, float]:
    """Send *frame* over and over; return the frames that the interface took, and the seconds it lasted."""
    libc = ctypes.CDLL(None, use_errno=True)
    iovec = _Iovec(frame, len(frame))
    batch = (_Mmsghdr * _BATCH)()
    for message in batch:
        message.msg.iov = ctypes.pointer(iovec)
        message.msg.iov_len = 1
    fd = sender.fileno()
    sent = 0
    begin = now = time.perf_counter()
    while now - begin < seconds:
        taken = libc.sendmmsg(fd, batch, _BATCH, 0)
        if taken > 0:
            sent += taken
        elif ctypes.get_errno() != errno.ENOBUFS:  # a full queue before the link is meant to be
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "sendmmsg")
        now = time.perf_counter()
    return sent, now - begin


def _frame(source: bytes, target: bytes) -> bytes:
    """A UDP datagram of zeroes in a frame of FRAME_LEN bytes; its UDP checksum is 0, "none"."""
    ip_len = FRAME_LEN - 14
    addresses = socket.inet_aton(ADDRESSES["a"]) + socket.inet_aton(ADDRESSES["b"])
    ip = struct.pack("!BBHHHBBH", 0x45, 0, ip_len, 0, 0, 64, socket.IPPROTO_UDP, 0) + addresses
    # A sum of 16-bit words with end-around carry is the sum modulo 65535.
    checksum = 0xFFFF - sum(struct.unpack("!10H", ip)) % 0xFFFF
    ip = ip[:10] + struct.pack("!H", checksum) + ip[12:]
    udp = struct.pack("!HHHH", PORT, PORT, ip_len - 20, 0)
    return (target + source + struct.pack("!H", _ETH_P_IP) + ip + udp).ljust(FRAME_LEN, b"\0")


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit("usage: python -m vnetdp.bench.udp_blast NETNS_A NETNS_B INTERFACE SECONDS")
    side_a, side_b, name, duration = sys.argv[1:]
    sys.stdout.write(json.dumps(dataclasses.asdict(blast(side_a, side_b, name, float(duration)))) + "\n")
