"""The protocol without sockets: bytes and descriptors in, messages out, and back. Both roles, from the one table.

`BackEndConnection` decodes requests and encodes their answers; `FrontEndConnection` the reverse. Neither keeps a
descriptor: the descriptors of a message belong to the caller that takes it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import LocalProtocolError, RemoteProtocolError
from ..virtio import features as f
from .message import NEED_REPLY, REPLY, RULES, U64, VERSION, Empty, Header, Payload, ProtocolFeature, Request


@dataclass(frozen=True)
class Message:
    """A request, as it came in: its payload, its descriptors, and whether it wants an acknowledgement."""

    request: Request
    payload: Payload
    fds: tuple[int, ...]
    need_reply: bool


class _Connection:
    """The features that were offered and taken, which both ends remember."""

    def __init__(self) -> None:
        self.offered_features = 0
        self.features = 0
        self.protocol_features = ProtocolFeature(0)

    def has(self, feature: ProtocolFeature) -> bool:
        return bool(self.protocol_features & feature)


class BackEndConnection(_Connection):
    """The back end's end."""

    def receive(self, header: Header, data: bytes, fds: tuple[int, ...]) -> Message:
        """Return the request; RemoteProtocolError if it may not be sent, or not now, or not like this."""
        try:
            request = Request(header.request)
        except ValueError:
            raise RemoteProtocolError(f"unknown request {header.request}") from None
        rule = RULES[request]
        if header.flags & REPLY:
            raise RemoteProtocolError(f"{request.name}: a reply without a request")
        if rule.gate is not None and not self.has(rule.gate):
            raise RemoteProtocolError(f"{request.name}: {rule.gate.name} was not negotiated")
        low, high = rule.fds
        if not low <= len(fds) <= high:
            raise RemoteProtocolError(f"{request.name}: {len(fds)} descriptors, not {low} to {high}")
        try:
            payload = rule.payload.decode(data)
        except RemoteProtocolError as e:
            raise RemoteProtocolError(f"{request.name}: {e}") from None
        agreed = self.protocol_features
        if request is Request.SET_PROTOCOL_FEATURES and isinstance(payload, U64):
            agreed |= payload.value  # Linux wants the very message acknowledged that takes REPLY_ACK
        need_reply = bool(header.flags & NEED_REPLY and agreed & ProtocolFeature.REPLY_ACK) and rule.reply is None
        return Message(request, payload, fds, need_reply)

    def reply(self, request: Request, payload: Payload) -> bytes:
        """Return the bytes of an answer. DPDK wants the flags to be exactly version and REPLY."""
        data = payload.encode()
        return Header(request, VERSION | REPLY, len(data)).encode() + data

    def acknowledge(self, request: Request, ok: bool) -> bytes:
        """Return the bytes of an acknowledgement (REPLY_ACK)."""
        return self.reply(request, U64(0 if ok else 1))


class FrontEndConnection(_Connection):
    """The front end's end."""

    def send(self, request: Request, payload: Payload | None = None, n_fds: int = 0) -> tuple[bytes, bool]:
        """Return the bytes of a request, and whether an answer or an acknowledgement will come."""
        rule = RULES[request]
        payload = Empty() if payload is None else payload
        if not isinstance(payload, rule.payload):
            raise LocalProtocolError(f"{request.name} carries {rule.payload.__name__}, not {type(payload).__name__}")
        if rule.gate is not None and not self.has(rule.gate):
            raise LocalProtocolError(f"{request.name}: the back end has not taken {rule.gate.name}")
        if not rule.fds[0] <= n_fds <= rule.fds[1]:
            raise LocalProtocolError(f"{request.name}: {n_fds} descriptors, not {rule.fds[0]} to {rule.fds[1]}")
        if request in (Request.GET_PROTOCOL_FEATURES, Request.SET_PROTOCOL_FEATURES) and not (
            self.offered_features & f.VHOST_USER_F_PROTOCOL_FEATURES
        ):
            raise LocalProtocolError(f"{request.name}: the back end does not offer VHOST_USER_F_PROTOCOL_FEATURES")
        acked = rule.reply is None and self.has(ProtocolFeature.REPLY_ACK)
        data = payload.encode()
        flags = VERSION | (NEED_REPLY if acked else 0)
        return Header(request, flags, len(data)).encode() + data, rule.reply is not None or acked

    def receive(self, request: Request, header: Header, data: bytes) -> Payload:
        """Return the answer to *request*; RemoteProtocolError if it answers something else, or not as the table says."""
        if header.request != request or not header.flags & REPLY:
            raise RemoteProtocolError(f"{request.name}: answered by request {header.request}, flags {header.flags:#x}")
        rule = RULES[request]
        if request == Request.SET_LOG_BASE:
            return Empty()  # back ends answer with 0, 8 or 16 bytes, all meaning yes
        try:
            return (rule.reply or U64).decode(data)
        except RemoteProtocolError as e:
            raise RemoteProtocolError(f"{request.name}: {e}") from None
