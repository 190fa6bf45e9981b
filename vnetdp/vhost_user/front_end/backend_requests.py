"""The back end's own requests, on the socket of SET_BACKEND_REQ_FD."""

from __future__ import annotations

import socket
from contextlib import suppress

from ...errors import RemoteProtocolError
from ...system.owned import Owned
from ..message import BACKEND_RULES, NEED_REPLY, REPLY, U64, VERSION, BackendRequest, Header, Payload
from ..transport import Transport, close_fds

_MESSAGE_TIMEOUT_S = 1.0  # for the rest of a message that has begun


class BackendRequests(Owned):
    """The front end's end of that socket; *theirs* is for the back end."""

    def __init__(self) -> None:
        mine, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        mine.settimeout(_MESSAGE_TIMEOUT_S)
        self._transport = Transport(mine)

    def fileno(self) -> int:
        return self._transport.fileno()

    def take(self) -> tuple[BackendRequest, Payload] | None:
        """Return the back end's next request, acknowledged if it asks for that; None if it is not known here.

        EOFError if there will be no more requests, RemoteProtocolError if it is no message.
        """
        try:
            got = self._transport.receive()
        except TimeoutError as e:
            raise RemoteProtocolError(f"a request of the back end: {e}") from e
        except OSError:
            got = None
        if got is None:
            raise EOFError("the back end closed the socket for its requests")
        header, data, fds = got
        close_fds(fds)
        asked: tuple[BackendRequest, Payload] | None = None
        with suppress(ValueError):  # a request that is not known is refused, if it wants an answer
            request = BackendRequest(header.request)
            asked = request, BACKEND_RULES[request].payload.decode(data)
        if header.flags & NEED_REPLY:
            answer = U64(0 if asked else 1).encode()
            with suppress(OSError):
                self._transport.send(Header(header.request, VERSION | REPLY, len(answer)).encode() + answer)
        return asked

    def close(self) -> None:
        self.theirs.close()
        self._transport.close()
