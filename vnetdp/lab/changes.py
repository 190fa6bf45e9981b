"""Changes by a guest, or its host, while a migration is under way, by name: each has to arrive, and to lose nothing.

A change that takes a queue down waits first until nothing is in flight on it, as a driver does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np

from vnetdp_kernels import rows as r
from vnetdp_kernels import spec

from ..device import vhost_net
from ..errors import VnetdpError
from ..migration.machine import Machine
from ..shared.memory import Words
from ..system.limits import start
from ..virtio import features as f
from ..virtio.queue import is_receiveq, pair_of, ring_len, vring_of
from ..virtio.state import VIRTIO_NET_S_ANNOUNCE, VLAN_BYTES, Control

_WAIT_S = 10.0
LEFT = 3  # frames a queue that a stop leaves, or that go past on order


def _mac(machine: Machine, n: int) -> None:
    machine.device.set_control(mac=bytes((0x52, 0x54, 0, 1, n >> 8 & 0xFF, n & 0xFF)))


def _mac_table(machine: Machine, n: int) -> None:
    table = tuple(bytes((0x02, 0, 0, 0, n & 0xFF, k)) for k in range(1 + n % 63))
    machine.device.set_control(mac_table=table, mac_first_multi=len(table) // 2, mac_overflow=n & 3)


def _vlans(machine: Machine, n: int) -> None:
    vlans = bytearray(VLAN_BYTES)
    vlans[n % VLAN_BYTES] = 1 << n % 8
    machine.device.set_control(vlans=bytes(vlans))


def _rx_mode(machine: Machine, n: int) -> None:
    machine.device.set_control(rx_mode=(machine.device.control.rx_mode + 1 + n) & 0x3F)


def _queue_pairs(machine: Machine, n: int) -> None:
    machine.device.set_control(curr_queue_pairs=1 + n % machine.config.queue_pairs)


def _mtu(machine: Machine, n: int) -> None:
    machine.device.set_control(mtu=1400 + n % 100)


def _offloads(machine: Machine, n: int) -> None:
    negotiated = f.guest_offload_mask(machine.device.driver_features)
    machine.device.set_control(guest_offloads=machine.device.control.guest_offloads ^ (1 + n % 15) & negotiated)


def _rss(machine: Machine, n: int) -> None:
    pairs = machine.config.queue_pairs
    table = tuple((n + k) % pairs for k in range(128))
    machine.device.set_control(rss_enabled=True, rss_hash_types=0x3F, rss_table=table, rss_key=bytes([n & 0xFF]) * 40)


def _announce(machine: Machine, _n: int) -> None:
    machine.device.set_control(net_status=machine.device.control.net_status ^ VIRTIO_NET_S_ANNOUNCE)


def _link(machine: Machine, _n: int) -> None:
    machine.device.set_link(not machine.device.control.link_up)


def _queue_reset(machine: Machine, n: int) -> None:
    """Reset a queue, and enable it again where it was: the same addresses, but its index begins at 0."""
    index = n % len(machine.device.queues)
    driver = machine.driver
    assert driver is not None
    _set_up_again(machine, index, driver.place_of(index)[0])


def _ring_setup(machine: Machine, n: int) -> None:
    """Reset a queue, and enable it again at addresses of its own."""
    index = n % len(machine.device.queues)
    driver = machine.driver
    assert driver is not None
    _set_up_again(machine, index, _free_place(machine, driver.place_of(index)[1]))


def _free_place(machine: Machine, length: int) -> int:
    """Return the lowest guest address from which *length* bytes belong to no queue; VnetdpError if there is none."""
    driver = machine.driver
    assert driver is not None
    at = driver.start_at
    for first, taken in sorted(map(driver.place_of, range(len(machine.device.queues)))):
        if at + length <= first:
            return at
        at = spec.align_up(first + taken, spec.PAGE_SIZE)
    if at + length > machine.memory.regions[0].length:
        raise VnetdpError("there is no room in guest memory for the queue to move to")
    return at


def _queue_off(machine: Machine, _n: int) -> None:
    """Reset the first transmitq, and leave it so."""
    _set_up_again(machine, 1, None)


def _queue_on(machine: Machine, _n: int) -> None:
    """Enable again the transmitq that `queue_off` reset."""
    index = 1
    assert machine.driver is not None
    machine.driver.stop()
    machine.driver.lay_out(index, machine.driver.place_of(index)[0])
    _guest_wrote(machine, index)
    machine.allow(True)
    machine.driver.start()


def _frames(machine: Machine, _n: int) -> None:
    """Have LEFT frames go each way on each queue, so that every index moves; then none for a machine without traffic."""
    ways = (r.EP_TO_WIRE, r.EP_FROM_WIRE)
    enough = machine.wire.rows[:, ways] + LEFT
    for rows in (machine.wire.rows, machine.guest.rows):
        _more(machine, rows)
    _wait(lambda: bool((machine.wire.rows[:, ways] >= enough).all()))


def _log_elsewhere(machine: Machine, _n: int) -> None:
    """Have vhost log its used rings under an address that is not theirs (log_guest_addr)."""
    for n, queue in enumerate(machine.device.queues):
        backend = (machine.device.vhost or ())[pair_of(n)]
        backend.set_vring_addr(vring_of(n), queue.desc, queue.avail, queue.used, queue.desc)


def _features(machine: Machine, _n: int) -> None:
    """Reset the device, and bring it up with other features."""
    driver = machine.driver
    assert driver is not None
    if not machine.drain():
        raise VnetdpError("frames are still in flight: the device is not reset")
    driver.reset(driver.features ^ f.VIRTIO_RING_F_EVENT_IDX | f.VIRTIO_F_VERSION_1)
    for index in range(len(machine.device.queues)):
        _guest_wrote(machine, index)
    machine.allow(True)


CHANGES: Final[dict[str, Callable[[Machine, int], None]]] = {
    "mac": _mac,
    "mac_table": _mac_table,
    "vlans": _vlans,
    "rx_mode": _rx_mode,
    "queue_pairs": _queue_pairs,
    "mtu": _mtu,
    "offloads": _offloads,
    "rss": _rss,
    "announce": _announce,
    "link": _link,
    "queue_reset": _queue_reset,
    "ring_setup": _ring_setup,
    "features": _features,
}
# No change of state by itself: halves of a change, between which the guest has a queue less; frames; and a mistake.
EVENTS: Final[dict[str, Callable[[Machine, int], None]]] = {
    "queue_off": _queue_off,
    "queue_on": _queue_on,
    "frames": _frames,
    "log_elsewhere": _log_elsewhere,
}


@dataclass(frozen=True)
class Before:
    """A machine's state before anything was changed. places: guest address of each queue's rings."""

    control: Control
    places: list[int]

    @classmethod
    def of(cls, machine: Machine) -> Before:
        assert machine.driver is not None
        places = [machine.driver.place_of(index)[0] for index in range(len(machine.device.queues))]
        return cls(machine.device.control, places)


def change_back(machine: Machine, name: str, n: int, before: Before) -> None:
    """Undo change *n*: a queue goes back to where it was, and begins at 0 again."""
    if name == "ring_setup":
        index = n % len(before.places)
        _set_up_again(machine, index, before.places[index])
    elif name in ("queue_reset", "features"):
        CHANGES[name](machine, n)
    else:
        machine.device.set_control(**vars(before.control))


def _set_up_again(machine: Machine, index: int, at: int | None) -> None:
    driver = machine.driver
    assert driver is not None
    pair = pair_of(index)
    limit = int(machine.guest.rows[pair, r.EP_LIMIT])
    driver.stop()  # before anything is looked at: a driver that runs may have a frame in hand, which no index shows
    if not is_receiveq(index):
        machine.guest.rows[pair, r.EP_LIMIT] = machine.guest.rows[pair, r.EP_SEQ]
        try:
            _wait(lambda: _all_used(machine, index))
        except VnetdpError:
            machine.guest.rows[pair, r.EP_LIMIT] = limit
            driver.start()
            raise
    machine.device.reset_queue(index)
    driver.run(-1, 0, 0)  # takes the chains that were used before the reset
    if at is not None:
        driver.lay_out(index, at)
        machine.guest.rows[pair, r.EP_LIMIT] = limit
        _guest_wrote(machine, index)
    driver.start()


def _all_used(machine: Machine, index: int) -> bool:
    """Return whether the device has used all that the driver, which is stopped, has made available."""
    assert machine.driver is not None
    used = vhost_net.used_idx(machine.memory, machine.device.queues[index])
    return used == int(machine.driver.dvqs[index, r.DVQ_PUBLISHED_IDX])


def _wait(done: Callable[[], bool]) -> None:
    until = time.monotonic() + _WAIT_S
    while not done():
        if time.monotonic() > until:
            raise VnetdpError("frames are still in flight: the queue is not reset")
        time.sleep(0.0002)


def _guest_wrote(machine: Machine, index: int) -> None:
    """Tell the migration, if there is one, that the guest itself wrote a queue's rings."""
    ram = machine.ram  # the migration may end meanwhile
    if ram is None or machine.driver is None:
        return
    ram.add_private(machine.driver.private_ranges())
    at, _ = machine.driver.place_of(index)
    length = sum(spec.align_up(part, spec.PAGE_SIZE) for part in ring_len(machine.config.num))
    ram.wrote(range(at // spec.PAGE_SIZE, (at + length) // spec.PAGE_SIZE))


@contextmanager
def leaving(machine: Machine, what: str) -> Iterator[None]:
    """Stop the machine in this block, and LEFT frames of each queue pair are left for the next owner of its rings.

    `sent`: frames that the guest has sent, and its device has not come to. `kick`: the same, and none comes after them,
    so that there is no other kick. `call`: frames that the guest was called for when it did not look any more, and none
    comes after them.
    """
    if what == "call":
        _receive_unseen(machine)
        yield
        return
    rows = machine.guest.rows
    with machine.device.paused():
        _more(machine, rows)
        if what == "kick":
            machine.allow(False)
        yield


def _receive_unseen(machine: Machine) -> None:
    assert machine.driver is not None
    if not machine.drain():
        raise VnetdpError("frames are still in flight: there is no last one")
    machine.driver.stop()
    receiveqs = machine.device.queues[::2]
    before = [vhost_net.used_idx(machine.memory, queue) for queue in receiveqs]
    _more(machine, machine.wire.rows)
    machine.allow(False)
    _wait(
        lambda: all(
            (vhost_net.used_idx(machine.memory, queue) - idx) & 0xFFFF >= LEFT
            for queue, idx in zip(receiveqs, before, strict=True)
        )
    )


def _more(machine: Machine, rows: Words) -> None:
    """Have one end, the guest's or the wire's, make LEFT frames more on each queue, allowed to or not."""
    assert machine.driver is not None
    enough = rows[:, r.EP_SEQ] + LEFT
    limits = rows[:, r.EP_LIMIT]
    rows[:, r.EP_LIMIT] = np.where(limits < 0, limits, enough)
    for bell in (machine.driver.bell, *machine.device.kicks):
        bell.signal()  # a thread that sleeps does not know of a new limit
    _wait(lambda: bool((rows[:, r.EP_SEQ] >= enough).all()))


@contextmanager
def churning(machine: Machine, name: str, every_s: float) -> Iterator[None]:
    """Make a change again and again, from a thread, for the length of the block."""
    end = threading.Event()

    def churn() -> None:
        n = 0
        while not end.wait(every_s):
            CHANGES[name](machine, n)
            n += 1

    thread = threading.Thread(target=churn, name="churn", daemon=True)
    start(thread)
    try:
        yield
    finally:
        end.set()
        thread.join()
