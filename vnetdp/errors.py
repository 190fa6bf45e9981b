"""Every exception, and the one table from a kernel's status to words."""

from __future__ import annotations

import errno
import os
import sysconfig
import traceback
from pathlib import Path

from vnetdp_kernels import rows as r

_NOT_THE_USERS = (Path(__file__).parent, *(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")))
STATUS_TEXT: dict[int, str] = {
    r.E_ADDRESS: "a buffer or table lies outside guest memory",
    r.E_HEAD: "avail.ring holds a descriptor index outside the table",
    r.E_NEXT: "desc.next points outside the table",
    r.E_LOOP: "a descriptor chain is longer than its table (a loop)",
    r.E_ORDER: "a device-readable descriptor follows a device-writable one",
    r.E_ZERO_LEN: "a descriptor has length 0",
    r.E_TOTAL_LEN: "a descriptor chain holds more than 2^32 bytes",
    r.E_INDIRECT_FEATURE: "an indirect descriptor without VIRTIO_RING_F_INDIRECT_DESC",
    r.E_INDIRECT_LEN: "an indirect table whose length is 0, not a multiple of 16, or too long",
    r.E_INDIRECT_NESTED: "an indirect descriptor inside an indirect table",
    r.E_INDIRECT_NEXT: "a descriptor with both INDIRECT and NEXT",
    r.E_AVAIL_IDX: "avail.idx moved by more than the queue's size",
    r.E_DIRECTION: "a chain without a buffer in its queue's direction",
    r.E_USED_ID: "the device used a chain that is not in flight",
    r.E_USED_IDX: "used.idx ran ahead of the chains in flight",
    r.E_USED_LEN: "the device claims more bytes than the chain can hold",
    r.E_NUM_BUFFERS: "num_buffers does not match the buffers used",
}


class VnetdpError(Exception):
    """The base of all errors that vnetdp raises on purpose."""


def reason(error: BaseException) -> str:
    """Return the text of *error*, with its class unless vnetdp raised it on purpose."""
    return str(error) if isinstance(error, VnetdpError) else f"{type(error).__name__}: {error}"


def place(error: BaseException) -> str:
    """Return ` at FILE:LINE`, the innermost line that *error* came from in code that is neither ours nor a library's."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not any(Path(frame.filename).is_relative_to(folder) for folder in _NOT_THE_USERS):
            return f" at {frame.filename}:{frame.lineno}"
    return ""


class ConfigError(VnetdpError):
    """An invalid argument, or a call at a wrong moment. The text gives the value, the limit and the next step."""


class MachineError(VnetdpError, OSError):
    """The machine has no more descriptors, memory, threads or processes. The text gives the limit and the next step."""

    def __str__(self) -> str:
        return str(self.strerror)


class WorkError(VnetdpError):
    """Work that was begun can't be done: the exit status is 1."""


class OutputError(VnetdpError):
    """The work is done, and its report can't be written."""


class GuestError(VnetdpError):
    """The driver broke the specification on a queue, which stops; seen from a `Driver`, the device did."""

    def __init__(self, queue: int, status: int) -> None:
        self.queue = queue
        """The number of the queue: receiveq 2i, transmitq 2i + 1."""
        self.status = status
        """A code of the reason, which the text of the error tells; its numbers may change in any version."""
        super().__init__(f"queue {queue}: {STATUS_TEXT.get(status, f'status {status}')}")


class BackendError(VnetdpError):
    """A vhost verb failed."""

    def __init__(self, verb: str, code: int, index: int | None = None, detail: str = "") -> None:
        self.verb = verb
        """The name of the verb, or of the vhost-user request."""
        self.errno = code
        """The errno, as the kernel's vhost has it: EBUSY, EINVAL, EFAULT, ESRCH (the back end is gone), …"""
        self.index = index
        """The vring of the queue pair, 0 or 1; None if the verb concerns none."""
        self.detail = detail or os.strerror(code)
        """The reason in words."""
        where = "" if index is None else f" (vring {index})"
        name = errno.errorcode.get(code, str(code))
        super().__init__(f"{verb}{where}: {name}: {self.detail}")


class UnbindError(BackendError):
    """A ring can't be unbound: a remote back end that hangs may still use it, so no other owner may have it."""


class EndpointError(VnetdpError):
    """An endpoint can't be opened or used. The text gives the reason and the next step."""


class ProtocolError(VnetdpError):
    """A vhost-user message that breaks the protocol."""


class LocalProtocolError(ProtocolError):
    """Our own side asked for a message that may not be sent now."""


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol: the connection ends."""


class RequestRefused(ProtocolError):  # noqa: N818 - it is an answer, not a fault of ours
    """A well-formed request that can't be granted: the peer is told, if it asked to be."""
