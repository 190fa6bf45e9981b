"""Captures of every kind, and the frames that they hold."""

from __future__ import annotations

import struct

from tests.support.captures import block, enhanced, frames, interface, obsolete, pcap, pcapng, section, simple

A, B, C = frames(1, 2, 3)
FCS = b"\xde\xad\xbe\xef"
FCS_4 = (13, b"\x04")  # if_fcslen
FLAGS_FCS_4 = (2, struct.pack("<I", 4 << 5))  # epb_flags
COOKED = bytes(60)
ODD = struct.pack("<II", 6, 93) + struct.pack("<IIIII", 0, 0, 1, 61, 61) + B[:61] + bytes(3) + struct.pack("<I", 93)

# name: (content, frames)
CASES: dict[str, tuple[bytes, list[bytes]]] = {
    "pcap": (pcap([A, B, C]), [A, B, C]),
    "pcap, big-endian": (pcap([A, B, C], ">"), [A, B, C]),
    "pcap, nanoseconds": (pcap([A, B], magic=0xA1B23C4D), [A, B]),
    "pcap, nanoseconds, big-endian": (pcap([A, B], ">", magic=0xA1B23C4D), [A, B]),
    "pcap, modified": (pcap([A, B, C], magic=0xA1B2CD34, extra=bytes([1, 0, 0, 0, 8, 0, 0, 0])), [A, B, C]),
    "pcap, modified, big-endian": (pcap([A, B, C], ">", magic=0xA1B2CD34, extra=bytes(8)), [A, B, C]),
    "pcap, Ixia's": (pcap([A, B], magic=0x1C0001AC, behind_header=struct.pack("<I", 200)), [A, B]),
    "pcap, Ixia's other": (pcap([A, B], ">", magic=0x1C0001AB, behind_header=bytes(4)), [A, B]),
    "pcap 2.3, lengths exchanged": (
        pcap([], version=(2, 3)) + b"".join(struct.pack("<IIII", 1, n, 1514, len(x)) + x for n, x in enumerate((A, B))),
        [A, B],
    ),
    "pcap, a frame without bytes": (pcap([b"", B]), [b"", B]),
    "pcap, captured in part": (pcap([(A, 1514), B]), [A, B]),
    "pcap, captured more than there was": (pcap([(A, 10), B]), [A, B]),
    "pcap with FCS": (pcap([A + FCS, B + FCS], network=0x24000001), [A, B]),
    "pcap with FCS, big-endian": (pcap([A + FCS], ">", network=0x24000001), [A]),
    "pcap, length of the FCS not given": (pcap([A], network=0x20000001), [A]),
    "pcapng": (pcapng([A, B, C]), [A, B, C]),
    "pcapng, big-endian": (pcapng([A, B, C], ">"), [A, B, C]),
    "pcapng 1.2": (section(version=(1, 2)) + interface() + enhanced(A), [A]),
    "two sections, of either byte order": (pcapng([A, B], ">") + pcapng([C]), [A, B, C]),
    "a section of another link type, and one of Ethernet": (section() + interface("<", 113) + pcapng([C]), [C]),
    "interfaces of other link types": (
        section() + interface() + interface("<", 113) + interface("<", 101)
        + enhanced(A) + enhanced(COOKED, "<", 1) + enhanced(b"E" * 40, "<", 2) + enhanced(C),
        [A, C],
    ),
    "more interfaces than there is room for at first": (
        section() + b"".join(interface() for _ in range(90)) + enhanced(A, "<", 89) + enhanced(B, "<", 0), [A, B]
    ),
    "simple packets": (section() + interface() + simple(A) + simple(B), [A, B]),
    "simple packets, big-endian": (section(">") + interface(">") + simple(A, None, ">"), [A]),
    "simple packets, cut to the SnapLen": (section() + interface("<", 1, 48) + simple(A[:48], 1514), [A[:48]]),
    "simple packets of a SnapLen that is no multiple of 4": (
        section() + interface("<", 1, 61) + simple(B[:61], 1514) + simple(A[:33]), [B[:61], A[:33]]
    ),
    "simple packets, each section's own SnapLen": (
        section() + interface("<", 1, 40) + section() + interface("<", 1, 400) + simple(A), [A]
    ),
    "obsolete packet blocks": (section() + interface() + interface() + obsolete(A) + obsolete(B, "<", 1), [A, B]),
    "obsolete packet blocks, big-endian": (section(">") + interface(">") + obsolete(A, ">"), [A]),
    "blocks without packets": (
        section() + block("<", 5, bytes(12)) + interface() + block("<", 4, bytes(4)) + enhanced(A)
        + block("<", 0x80001234, b"of our own") + block("<", 10, struct.pack("<II", 0x544C534B, 4) + b"key\n") + enhanced(B),
        [A, B],
    ),
    "lengths without the padding": (section() + interface() + ODD + enhanced(C), [B[:61], C]),
    "FCS by interface": (
        section() + interface("<", 1, 0, FCS_4) + interface() + enhanced(A + FCS) + enhanced(B, "<", 1), [A, B]
    ),
    "FCS in bits": (section() + interface("<", 1, 0, (13, b"\x20")) + enhanced(A + FCS), [A]),
    "FCS by packet": (
        section() + interface() + enhanced(A + FCS, "<", 0, (1, b"a comment"), FLAGS_FCS_4) + enhanced(B)
        + obsolete(C + FCS, "<", 0, FLAGS_FCS_4),
        [A, B, C],
    ),
    "FCS of simple packets": (section() + interface("<", 1, 0, FCS_4) + simple(A + FCS), [A]),
    "time resolutions": (
        section() + interface("<", 1, 0, (9, b"\x09")) + interface("<", 1, 0, (9, b"\xff")) + enhanced(A)
        + enhanced(B, "<", 1),
        [A, B],
    ),
    "options of all kinds": (
        section() + interface("<", 1, 0, (2, b"eth0"), (3, b"x" * 301), FCS_4)
        + enhanced(A + FCS, "<", 0, (1, b"c" * 77), (5, bytes(8))),
        [A],
    ),
}  # fmt: skip
# tshark shows custom blocks as packets, takes no half FCS off, and refuses or guesses at the rest.
MORE_CASES: dict[str, tuple[bytes, list[bytes]]] = {
    "custom blocks": (
        section() + interface() + block("<", 0xBAD, struct.pack("<I", 32473) + b"abcd")
        + enhanced(A) + block("<", 0x40000BAD, struct.pack("<I", 32473) + b"abcd"),
        [A],
    ),
    "a simple packet shorter than it says": (section() + interface("<", 1, 65535) + simple(A[:60], 1514), [A[:60]]),
    "pcap, FCS behind what was captured": (pcap([(A, 1518), (B + FCS[:2], len(B) + 4)], network=0x24000001), [A, B]),
    "reserved bits in the link type": (pcap([A], network=0x00FF0001), [A]),
    "options that end behind their block": (
        section() + block("<", 1, struct.pack("<HHIHH", 1, 0, 0, 9, 400)) + enhanced(A), [A]
    ),
    "a packet's options that end behind their block": (
        section() + interface()
        + block("<", 6, struct.pack("<IIIII", 0, 0, 1, 60, 60) + A[:60] + struct.pack("<HHI", 77, 60000, 0)) + enhanced(B),
        [A[:60], B],
    ),
    "a long record": (pcap([A, bytes(66_000), (bytes(262_144), 400_000), B]), [A, B]),
    "a record of 20 MB": (pcap([A, bytes(20_000_000), B]), [A, B]),
    "a long packet": (pcapng([A, bytes(66_000), bytes(262_144), B]), [A, B]),
    "a packet of 20 MB": (pcapng([A, bytes(20_000_000), B]), [A, B]),
    "a block of 20 MB": (pcapng([A]) + block("<", 0x1234, bytes(20_000_000)) + enhanced(B), [A, B]),
}  # fmt: skip
