"""A device's state through a descriptor, as VHOST_USER_SET_DEVICE_STATE_FD moves it from one back end to another."""

from __future__ import annotations

import json
import logging
import os
import stat

from ...errors import RequestRefused

_log = logging.getLogger("vnetdp.session")

_MAGIC = "vnetdp-net"
_LONGEST = 1 << 16


def save(fd: int, mac: bytes, mtu: int | None) -> bool:
    """Write the state to *fd*; False if it does not take all of it at once."""
    state = json.dumps({"magic": _MAGIC, "mac": mac.hex(), "mtu": mtu}).encode()
    try:
        return os.pwritev(fd, [state], -1, _no_wait(fd)) == len(state)
    except OSError as e:
        _log.warning("the device state can't be saved: %s", e)
        return False


def load(fd: int) -> tuple[bytes, int | None]:
    """Read the state that `save` wrote, up to its end, and close *fd*; RequestRefused if it makes no sense."""
    try:
        data = _read(fd)
    except OSError as e:
        raise RequestRefused(f"the device state can't be read: {e}") from e
    finally:
        os.close(fd)
    try:
        state = json.loads(data)
        mac, mtu = bytes.fromhex(state["mac"]), state["mtu"]
        if state["magic"] != _MAGIC or len(mac) != 6 or not isinstance(mtu, int | None):
            raise ValueError("not the state of a network device")
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise RequestRefused(str(e)) from e
    return mac, mtu


def _read(fd: int) -> bytes:
    data = b""
    try:
        while len(data) <= _LONGEST:
            part = bytearray(_LONGEST)
            n = os.preadv(fd, [part], -1, _no_wait(fd))
            if n == 0:
                break
            data += part[:n]
    except BlockingIOError:
        pass  # all that was sent is read
    return data


def _no_wait(fd: int) -> int:
    """Return the flags of a read or write that never waits, even if the peer makes its end blocking. Files never wait."""
    return 0 if stat.S_ISREG(os.fstat(fd).st_mode) else os.RWF_NOWAIT
