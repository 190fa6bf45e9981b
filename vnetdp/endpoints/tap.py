"""TapEndpoint: a TAP interface of this machine, with virtio_net_hdr and offloads passed through untouched.

python-pytun opens the queues; this module sets the rest, which it can't: header length and offloads.
Frames are read and written by kernels.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import select
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeVar

import pytun

from vnetdp_kernels import rows as r
from vnetdp_kernels import spec

from ..errors import EndpointError
from .base import Endpoint, frame_len
from .netns import run_in, run_inside

T = TypeVar("T")

_log = logging.getLogger("vnetdp.tap")

MAX_QUEUES: Final = 256  # MAX_TAP_QUEUES of the kernel
_NAME_LEN: Final = 15  # IFNAMSIZ - 1

# linux/if_tun.h
_TUNSETOFFLOAD: Final = 0x400454D0  # the mask itself is the argument, not its address
_TUNGETIFF: Final = 0x800454D2
_TUNGETVNETHDRSZ: Final = 0x800454D7
_TUNSETVNETHDRSZ: Final = 0x400454D8
_TUNGETDEVNETNS: Final = 0x54E3
_SIOCGIFFLAGS: Final = 0x8913
_SIOCGIFMTU: Final = 0x8921
_SIOCSIFMTU: Final = 0x8922
_IFF_UP: Final = 1
_IFREQ_NAME: Final = "16s24x"
_IFREQ_INT: Final = "16si20x"


class TapEndpoint(Endpoint):
    """A TAP interface of this machine. It is attached to if it exists, else created and set up; addresses are the user's.

    - `name`: of the interface, 1 to 15 bytes.
    - `queues`: 1 to 256; more than one makes it a multi-queue TAP.
    - `netns`: the network namespace, by name or path; None is that of the calling thread.
    - `persist`: True leaves an interface that was created here when it is closed.

    Creating one takes CAP_NET_ADMIN; attaching to one that belongs to this user takes no right. An interface that stays
    gets its MTU, and its length of virtio_net_hdr, back on `close`. It may be renamed or moved to another namespace
    while it is in use. EndpointError, with the next step, if it can't be had.
    """

    kind = r.KIND_TAP
    vnet_hdr = True

    def __init__(self, name: str, queues: int = 1, netns: str | None = None, persist: bool = False) -> None:
        length = len(name.encode(errors="surrogateescape"))  # bytes that are no UTF-8, from a command line
        if not 0 < length <= _NAME_LEN or re.search(r"[/:\s\udc80-\udcff]", name) or name in (".", ".."):
            raise EndpointError(f"tap: {name!r} is no interface name: 1 to 15 bytes of UTF-8, without / : or blanks")
        if queues > MAX_QUEUES:
            raise EndpointError(f"tap:{name}: {queues} queues: a TAP has at most {MAX_QUEUES}")
        super().__init__(queues)
        self._begin(f"tap:{name}")
        try:
            if netns is None:
                self._open(name, persist, "")
            else:
                run_in(netns, lambda: self._open(name, persist, "" if "/" in netns else f"-n {netns} "))
        except BaseException:
            self.close()
            raise

    def _begin(self, name: str) -> None:
        self.name = name
        self._devices: list[pytun.TunTapDevice] = []
        self._found_header_len = 0  # 0: as it was found
        self._found_mtu = 0
        self._failures: list[str] = []

    def _open(self, name: str, persist: bool, where: str) -> None:
        existed = name in (existing for _, existing in socket.if_nameindex())
        flags = pytun.IFF_TAP | pytun.IFF_NO_PI | pytun.IFF_VNET_HDR
        if self.queues > 1:
            flags |= pytun.IFF_MULTI_QUEUE
        try:
            while len(self._devices) < self.queues:
                try:
                    device = pytun.TunTapDevice(name, flags)
                except pytun.Error as e:
                    if e.errno != errno.EINVAL or flags & pytun.IFF_MULTI_QUEUE:
                        raise
                    # It may have several queues, of which we want one.
                    flags |= pytun.IFF_MULTI_QUEUE
                    continue
                self._devices.append(device)
                fd = device.fileno()
                os.set_inheritable(fd, False)
                os.set_blocking(fd, False)
                self.fds[len(self._devices) - 1] = fd
            self._set_up()
            if persist:
                self._devices[0].persist(True)
            if not existed:
                self._devices[0].up()
            elif not _is_up(name):
                # The user decides when it is up. A user who forgot that would see frames go lost, and not why.
                _log.warning("%s is down, and passes no frame: sudo ip %slink set %s up", self.name, where, name)
        except OSError as e:
            raise EndpointError(f"{self.name}: {_advice(name, self.queues, e)}") from e

    def _set_up(self) -> None:
        """Have an open TAP pass our virtio_net_hdr, and no offloads yet."""
        found = fcntl.ioctl(self._devices[0].fileno(), _TUNGETVNETHDRSZ, bytes(4))
        self._set_header_len(spec.NET_HDR_LEN)
        (self._found_header_len,) = struct.unpack("i", found)
        self.set_offloads(0)

    def _ask(self, function: Callable[[socket.socket, str], T]) -> T:
        """Return *function*'s result for a socket in the interface's namespace, and the interface's name there.

        Both are asked of the descriptor: a name may have changed since, and be another interface's now. OSError or
        EndpointError if there is no interface any more, or no right to look.
        """
        fd = self._first()

        def there() -> T:
            named = fcntl.ioctl(fd, _TUNGETIFF, struct.pack(_IFREQ_NAME, b""))
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
                return function(any_socket, os.fsdecode(struct.unpack(_IFREQ_NAME, named)[0].rstrip(b"\0")))

        try:
            netns = fcntl.ioctl(fd, _TUNGETDEVNETNS)
        except PermissionError:
            return there()  # with no right to ask, it was opened where we are
        try:
            if os.path.samestat(os.fstat(netns), Path("/proc/thread-self/ns/net").stat()):
                return there()
            return run_inside(netns, f"of {self.name}", there)
        finally:
            os.close(netns)

    def _first(self) -> int:
        if not self._devices:
            raise EndpointError(f"{self.name}: the endpoint is closed")
        return int(self._devices[0].fileno())

    def _set_header_len(self, length: int) -> None:
        fcntl.ioctl(self._devices[0].fileno(), _TUNSETVNETHDRSZ, struct.pack("i", length))

    def set_offloads(self, mask: int) -> None:
        """Have the kernel send frames with the offloads of *mask* left to do: the bits of TUNSETOFFLOAD."""
        fd = self._first()
        wanted = _dependable(mask)
        for try_mask in (wanted, wanted & ~(spec.OFFLOAD_USO4 | spec.OFFLOAD_USO6)):
            try:
                fcntl.ioctl(fd, _TUNSETOFFLOAD, try_mask)
                return
            except OSError as e:
                failed = e  # EINVAL: a kernel before 6.2 knows no USO
        if self.gone:
            raise EndpointError(self._failures[0])
        raise EndpointError(f"{self.name}: cannot set offloads {wanted:#x}: {failed.strerror}")

    def set_queue_active(self, queue: int, active: bool) -> None:
        """Attach or detach a queue (TUNSETQUEUE). The kernel spreads flows over attached queues; an only queue stays."""
        if self.queues > 1 and self._devices:
            device = self._devices[queue]
            with suppress(OSError):  # it is so already
                device.mq_attach(active)
            self.rows[queue, r.EP_GONE] = 0

    def send_to_wire(self, frame: bytes) -> None:
        with suppress(OSError):  # an interface that is down takes nothing
            os.write(int(self.fds[0]), bytes(spec.NET_HDR_LEN) + frame)

    @property
    def mtu(self) -> int | None:
        try:
            return self._ask(_mtu)
        except (OSError, EndpointError):
            return None  # it was deleted, or moved to a namespace that we may not enter

    def set_mtu(self, mtu: int) -> None:
        """Set the MTU of the interface, in bytes. EndpointError if the kernel refuses."""

        name = ""

        def change(any_socket: socket.socket, named: str) -> None:
            nonlocal name
            name = named
            before = _mtu(any_socket, name)
            if before != mtu:
                fcntl.ioctl(any_socket, _SIOCSIFMTU, struct.pack(_IFREQ_INT, os.fsencode(name), mtu))
                self._found_mtu = self._found_mtu or before

        try:
            self._ask(change)
        except OSError as e:
            if self.gone:
                raise EndpointError(self._failures[0]) from e
            hint = e.strerror
            if e.errno == errno.EPERM:
                hint = f"run as root or: sudo ip link set dev {name} mtu {mtu}"
            raise EndpointError(f"{self.name}: cannot set its MTU to {mtu}: {hint}") from e

    @property
    def longest_frame(self) -> int:
        mtu = self.mtu
        return super().longest_frame if mtu is None else frame_len(mtu)

    @property
    def gone(self) -> bool:
        """True once the interface was deleted, or its namespace was. The first look that finds that logs it."""
        if not self._failures and self._devices and _broke(self._first()):
            self._failures.append(f"{self.name} was deleted: start the command again, for a new interface")
            _log.error("%s", self._failures[0])
        return bool(self._failures)

    @property
    def failures(self) -> Sequence[str]:
        return self._failures if self.gone else ()

    def close(self) -> None:
        if self._devices:
            # A persistent TAP is left as the next program expects it: as found, and without frames longer than its MTU.
            # A TAP that was deleted has nothing to be reset.
            with suppress(EndpointError, OSError):
                self.set_offloads(0)
                if self._found_header_len:
                    self._set_header_len(self._found_header_len)
                if self._found_mtu:
                    self.set_mtu(self._found_mtu)
        super().close()

    def leave_to_parent(self) -> None:
        """Give up the queues: an interface stays, and a queue is taken, as long as a child has them. @private"""
        for device in self._devices:
            device.close()
        self._devices = []
        self.fds[:] = -1
        super().leave_to_parent()


def _broke(fd: int) -> bool:
    """Return whether the interface of the queue *fd* was deleted."""
    poll = select.poll()
    poll.register(fd, 0)  # POLLERR comes unasked
    if not poll.poll(0):
        return False
    try:
        fcntl.ioctl(fd, _TUNGETIFF, bytes(struct.calcsize(_IFREQ_NAME)))
    except OSError as e:
        return e.errno == errno.EBADFD
    return False


def _is_up(name: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        flags = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, struct.pack(_IFREQ_NAME, os.fsencode(name)))
    return bool(struct.unpack_from("H", flags, 16)[0] & _IFF_UP)


def _mtu(any_socket: socket.socket, name: str) -> int:
    found = fcntl.ioctl(any_socket, _SIOCGIFMTU, struct.pack(_IFREQ_NAME, os.fsencode(name)))
    return int(struct.unpack(_IFREQ_INT, found)[1])


def _dependable(mask: int) -> int:
    """Return *mask* less offloads that the kernel refuses: all without CSUM, ECN without TSO, one of the two USO."""
    tso = spec.OFFLOAD_TSO4 | spec.OFFLOAD_TSO6
    uso = spec.OFFLOAD_USO4 | spec.OFFLOAD_USO6
    if not mask & spec.OFFLOAD_CSUM:
        return 0
    if not mask & tso:
        mask &= ~spec.OFFLOAD_ECN
    if mask & uso != uso:
        mask &= ~uso
    return mask


def _advice(name: str, queues: int, error: OSError) -> str:
    """Return why a TAP can't be opened, and the next step, in one line."""
    multi_queue = " multi_queue" if queues > 1 else ""
    match error.errno:
        case errno.ENOENT | errno.ENXIO | errno.ENODEV:
            return "no /dev/net/tun: load it with: sudo modprobe tun (into a container: --device /dev/net/tun)"
        case errno.EACCES:
            return "no right to open /dev/net/tun: run as root or: sudo chmod 666 /dev/net/tun"
        case errno.EPERM:
            add = f"sudo ip tuntap add dev {name} mode tap user $USER{multi_queue}"
            up = f"sudo ip link set {name} up"
            return f"no right to create or open it: run as root (with CAP_NET_ADMIN) or: {add} && {up}"
        case errno.EBUSY:
            return "another program has it open: end that program, or take another name"
        case errno.EINVAL:
            kind = "TAP with several queues" if queues > 1 else "TAP"
            return f"it exists and is no {kind}: take another name"
        case errno.E2BIG:
            return (
                f"more than {MAX_QUEUES} queues, with those of other programs: take fewer queue pairs, or another name"
            )
        case _:
            return error.strerror or str(error)
