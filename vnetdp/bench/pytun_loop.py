"""A relay between two TAPs as one writes it today with python-pytun: a peer for `vnetdp link`.

    python -m vnetdp.bench.pytun_loop LEFT RIGHT

It makes both TAPs in the namespace that it runs in, and relays until a signal ends it. They may be moved to
other namespaces while it runs.
"""

import select
import sys

import pytun

_FRAME_MAX = 1514  # bytes: MTU 1500 and the Ethernet header


def relay(left: pytun.TunTapDevice, right: pytun.TunTapDevice) -> None:
    """Pass frames between two TAPs, for ever."""
    other = {left: right, right: left}
    while True:
        for tap in select.select([left, right], [], [])[0]:
            frame = tap.read(_FRAME_MAX)
            try:
                other[tap].write(frame)
            except pytun.Error:
                # The other interface is still down: the frame is lost, as in a cable with a loose end.
                continue


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m vnetdp.bench.pytun_loop LEFT RIGHT")
    relay(*(pytun.TunTapDevice(name, flags=pytun.IFF_TAP | pytun.IFF_NO_PI) for name in sys.argv[1:]))
