"""Both ends of the protocol against each other, without a socket: every request there, every answer back, every gate."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vhost_user.test_message import PAYLOADS
from vnetdp.errors import LocalProtocolError, RemoteProtocolError
from vnetdp.vhost_user.connection import BackEndConnection, FrontEndConnection
from vnetdp.vhost_user.message import (
    NEED_REPLY,
    RULES,
    U64,
    Config,
    Empty,
    Header,
    Inflight,
    Log,
    MemoryRegion,
    MemoryTable,
    Payload,
    ProtocolFeature,
    Request,
    Rule,
    SingleRegion,
    VringAddr,
    VringState,
)

_PROTOCOL_FEATURES = 1 << 30
_REGION = MemoryRegion(0, 4096, 1 << 40, 0)
_SAMPLES: dict[type[Payload], Payload] = {
    Empty: Empty(),
    U64: U64(3),
    VringState: VringState(1, 2),
    VringAddr: VringAddr(1, 0, 2, 3, 4, 5),
    MemoryTable: MemoryTable((_REGION,)),
    SingleRegion: SingleRegion(_REGION),
    Log: Log(4096, 0),
    Inflight: Inflight(4096, 0, 2, 256),
    Config: Config(0, 4, 0, b"abcd"),
}
_EVERY = ProtocolFeature(sum(ProtocolFeature))


class Pair:
    """A front end's connection and a back end's, that both know what was negotiated."""

    def __init__(self, taken: ProtocolFeature = _EVERY, offered: int = _PROTOCOL_FEATURES) -> None:
        self.front, self.back = FrontEndConnection(), BackEndConnection()
        for end in (self.front, self.back):
            end.protocol_features = taken
            end.offered_features = offered


def sample(kind: type[Payload]) -> Payload:
    found = _SAMPLES.get(kind)
    return found if found is not None else kind.decode(bytes(8))


def split(data: bytes) -> tuple[Header, bytes]:
    header = Header.decode(data[:12])
    assert header.size == len(data) - 12
    return header, data[12:]


requests = pytest.mark.parametrize("request_", Request, ids=lambda r: r.name)


@requests
def test_every_request_arrives_as_it_was_sent_and_its_answer_too(request_: Request) -> None:
    rule = RULES[request_]
    pair = Pair()
    for n_fds in range(rule.fds[0], rule.fds[1] + 1):
        payload = sample(rule.payload)
        data, answered = pair.front.send(request_, payload, n_fds)
        message = pair.back.receive(*split(data), tuple(range(n_fds)))
        assert (message.request, message.payload, message.fds) == (request_, payload, tuple(range(n_fds)))
        assert answered
        assert message.need_reply == (rule.reply is None)
        if rule.reply is None:
            for ok in (True, False):
                reply = pair.back.acknowledge(request_, ok)
                assert reply == struct.pack("=IIIQ", request_, 0x5, 8, 0 if ok else 1)
                assert pair.front.receive(request_, *split(reply)) == U64(0 if ok else 1)
        else:
            answer = sample(rule.reply)
            reply = pair.back.reply(request_, answer)
            header, content = split(reply)
            assert header.flags == 0x5  # version 1, REPLY, and not NEED_REPLY: DPDK compares all 32 bits
            assert pair.front.receive(request_, header, content) == answer


@requests
def test_without_reply_ack_only_those_with_an_answer_of_their_own_are_answered(request_: Request) -> None:
    rule = RULES[request_]
    pair = Pair(_EVERY & ~ProtocolFeature.REPLY_ACK)
    data, answered = pair.front.send(request_, sample(rule.payload), rule.fds[0])
    header, content = split(data)
    assert header.flags == 1
    assert answered == (rule.reply is not None)
    assert not pair.back.receive(header, content, (0,) * rule.fds[0]).need_reply
    if request_ is not Request.SET_PROTOCOL_FEATURES:  # which may take REPLY_ACK, and be the first to use it
        eager = Header(request_, 1 | NEED_REPLY, len(content))
        assert not pair.back.receive(eager, content, (0,) * rule.fds[0]).need_reply


def test_the_message_that_takes_reply_ack_is_acknowledged_if_it_asks_to_be() -> None:
    back = BackEndConnection()
    for taken, expected in ((ProtocolFeature.REPLY_ACK, True), (ProtocolFeature.MQ, False)):
        header = Header(Request.SET_PROTOCOL_FEATURES, 1 | NEED_REPLY, 8)
        assert back.receive(header, U64(int(taken)).encode(), ()).need_reply == expected


@pytest.mark.parametrize("request_", [r for r in Request if RULES[r].gate is not None], ids=lambda r: r.name)
def test_a_gate_is_shut_on_both_sides_until_it_is_negotiated(request_: Request) -> None:
    rule = RULES[request_]
    assert rule.gate is not None
    pair = Pair(_EVERY & ~rule.gate)
    payload = sample(rule.payload)
    with pytest.raises(LocalProtocolError, match=str(rule.gate.name)):
        pair.front.send(request_, payload, rule.fds[0])
    content = payload.encode()
    with pytest.raises(RemoteProtocolError, match=f"{rule.gate.name} was not negotiated"):
        pair.back.receive(Header(request_, 1, len(content)), content, (0,) * rule.fds[0])


def test_the_gates_are_the_protocols() -> None:
    p = ProtocolFeature
    gated = {
        p.MQ: {17}, p.LOG_SHMFD: {6}, p.RARP: {19}, p.MTU: {20}, p.BACKEND_REQ: {21}, p.CONFIG: {24, 25},
        p.INFLIGHT_SHMFD: {31, 32}, p.RESET_DEVICE: {34}, p.INBAND_NOTIFICATIONS: {35},
        p.CONFIGURE_MEM_SLOTS: {36, 37, 38}, p.STATUS: {39, 40}, p.DEVICE_STATE: {42, 43},
    }  # fmt: skip
    found: dict[ProtocolFeature, set[int]] = {}
    for request, rule in RULES.items():
        if rule.gate is not None:
            found.setdefault(rule.gate, set()).add(int(request))
    assert found == gated
    answered = {int(request) for request, rule in RULES.items() if rule.reply is not None}
    assert answered == {1, 6, 11, 15, 17, 24, 31, 36, 40, 42, 43}


@pytest.mark.parametrize(
    "request_", [Request.GET_PROTOCOL_FEATURES, Request.SET_PROTOCOL_FEATURES], ids=lambda r: r.name
)
def test_protocol_features_are_not_asked_for_where_they_are_not_offered(request_: Request) -> None:
    pair = Pair(offered=0)
    with pytest.raises(LocalProtocolError, match="VHOST_USER_F_PROTOCOL_FEATURES"):
        pair.front.send(request_, sample(RULES[request_].payload))


@requests
def test_another_number_of_descriptors_is_refused_on_both_sides(request_: Request) -> None:
    rule = RULES[request_]
    pair = Pair()
    payload = sample(rule.payload)
    content = payload.encode()
    for n in (rule.fds[0] - 1, rule.fds[1] + 1):
        if n < 0:
            continue
        with pytest.raises(LocalProtocolError, match="descriptors"):
            pair.front.send(request_, payload, n)
        with pytest.raises(RemoteProtocolError, match="descriptors"):
            pair.back.receive(Header(request_, 1, len(content)), content, (0,) * n)


@requests
def test_a_payload_of_another_kind_is_not_sent(request_: Request) -> None:
    rule: Rule = RULES[request_]
    other = VringState(0, 0) if rule.payload is not VringState else U64(0)
    with pytest.raises(LocalProtocolError, match="carries"):
        Pair().front.send(request_, other, rule.fds[0])


def test_a_request_that_is_a_reply_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="a reply without a request"):
        Pair().back.receive(Header(Request.GET_FEATURES, 5, 0), b"", ())


@pytest.mark.parametrize(
    "header",
    [
        Header(Request.GET_FEATURES, 1, 8),
        Header(Request.GET_PROTOCOL_FEATURES, 5, 8),
        Header(0, 5, 8),
        Header(2**32 - 1, 5, 8),
    ],
)
def test_an_answer_to_something_else_is_refused(header: Header) -> None:
    with pytest.raises(RemoteProtocolError, match="answered by request"):
        Pair().front.receive(Request.GET_FEATURES, header, bytes(8))


@pytest.mark.parametrize("length", [0, 8, 16])
def test_a_log_is_acknowledged_in_any_of_the_sizes_that_back_ends_use(length: int) -> None:
    header = Header(Request.SET_LOG_BASE, 5, length)
    assert Pair().front.receive(Request.SET_LOG_BASE, header, bytes(length)) == Empty()


headers = st.builds(
    Header,
    st.one_of(st.sampled_from([int(r) for r in Request]), st.integers(0, 2**32 - 1)),
    st.one_of(st.sampled_from([1, 5, 9, 13]), st.integers(0, 2**32 - 1)),
    st.integers(0, 4096),
)
contents = st.one_of(st.binary(max_size=300), st.one_of(*PAYLOADS.values()).map(lambda payload: payload.encode()))
features = st.integers(0, 2**20 - 1).map(ProtocolFeature)


@given(headers, contents, st.integers(0, 9), features)
def test_a_back_end_takes_or_refuses_whatever_comes(
    header: Header, data: bytes, n_fds: int, taken: ProtocolFeature
) -> None:
    try:
        message = Pair(taken).back.receive(header, data, tuple(range(n_fds)))
    except RemoteProtocolError as e:
        assert str(e)
    else:
        rule = RULES[message.request]
        assert rule.fds[0] <= n_fds <= rule.fds[1]
        assert rule.gate is None or taken & rule.gate
        assert isinstance(message.payload, rule.payload)


@given(st.sampled_from(Request), headers, contents)
def test_a_front_end_takes_or_refuses_whatever_answers(request: Request, header: Header, data: bytes) -> None:
    try:
        answer = Pair().front.receive(request, header, data)
    except RemoteProtocolError as e:
        assert str(e)
    else:
        assert header.request == request
        assert isinstance(answer, RULES[request].reply or U64)
