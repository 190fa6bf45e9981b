"""The messages' bytes: sizes and offsets as a C compiler has them, round trips, and what is refused."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vnetdp.errors import RemoteProtocolError
from vnetdp.vhost_user.message import (
    BACKEND_RULES,
    HEADER,
    MAX_CONFIG,
    MAX_FDS,
    MAX_PAYLOAD,
    RULES,
    U64,
    BackendRequest,
    Config,
    DeviceStateTransfer,
    Empty,
    Header,
    Inflight,
    Log,
    MemoryRegion,
    MemoryTable,
    Payload,
    ProtocolFeature,
    Request,
    SingleRegion,
    VringAddr,
    VringState,
)

# The structures as the protocol's text declares them, for a compiler to lay out.
_C = r"""
#include <linux/vhost_types.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
struct header { uint32_t request, flags, size; };
struct region { uint64_t gpa, size, uva, mmap_offset; };
struct table { uint32_t n, pad; struct region regions[8]; };
struct single { uint64_t pad; struct region region; };
struct log { uint64_t size, offset; };
struct inflight { uint64_t size, offset; uint16_t num_queues, queue_size; };
struct config { uint32_t offset, size, flags; uint8_t data[]; };
struct device_state { uint32_t direction, phase; };
#define SIZE(name, type) printf("%s %zu\n", name, sizeof(type))
#define AT(type, field) printf(#type "." #field " %zu\n", offsetof(struct type, field))
int main(void)
{
    SIZE("header", struct header); SIZE("VringState", struct vhost_vring_state);
    SIZE("VringAddr", struct vhost_vring_addr); SIZE("MemoryRegion", struct region);
    SIZE("SingleRegion", struct single); SIZE("Log", struct log); SIZE("Inflight", struct inflight);
    SIZE("config", struct config); SIZE("DeviceStateTransfer", struct device_state); SIZE("U64", uint64_t);
    AT(vhost_vring_addr, index); AT(vhost_vring_addr, flags); AT(vhost_vring_addr, desc_user_addr);
    AT(vhost_vring_addr, used_user_addr); AT(vhost_vring_addr, avail_user_addr); AT(vhost_vring_addr, log_guest_addr);
    AT(inflight, size); AT(inflight, offset); AT(inflight, num_queues); AT(inflight, queue_size);
    AT(table, n); AT(table, regions); AT(single, region); AT(region, uva); AT(region, mmap_offset);
    AT(config, size); AT(config, flags); AT(config, data); AT(device_state, phase); AT(log, offset);
    return 0;
}
"""

_REGION = MemoryRegion(0x1111, 0x2222, 0x3333, 0x4444)
_SAMPLES: list[Payload] = [
    Empty(),
    U64(0x1122334455667788),
    VringState(0x11, 0x22),
    VringAddr(0x11, 0x22, 0x33, 0x44, 0x55, 0x66),
    _REGION,
    SingleRegion(_REGION),
    Log(0x11, 0x22),
    Inflight(0x11, 0x22, 0x33, 0x44),
    DeviceStateTransfer(1, 0),
    Config(1, 2, 3, b"\x04\x05"),
    MemoryTable((_REGION, MemoryRegion(5, 6, 7, 8))),
]


@pytest.fixture(scope="module")
def c(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Sizes and offsets, by the name of the structure or of its field."""
    compiler = shutil.which("cc")
    if compiler is None or not Path("/usr/include/linux/vhost_types.h").exists():
        pytest.skip("there is no C compiler with the kernel's headers")
    folder = tmp_path_factory.mktemp("c")
    (folder / "sizes.c").write_text(_C)
    subprocess.run([compiler, "-o", folder / "sizes", folder / "sizes.c"], check=True)
    out = subprocess.run([folder / "sizes"], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in (line.split() for line in out.splitlines())}


def test_sizes_are_those_of_the_c_structures(c: dict[str, int]) -> None:
    assert HEADER.size == c["header"] == 12
    for payload in _SAMPLES:
        name = type(payload).__name__
        if name in c:
            assert len(payload.encode()) == c[name], name
    assert (c["Inflight"], c["VringAddr"], c["SingleRegion"], c["VringState"]) == (24, 40, 40, 8)


def test_fields_lie_where_a_compiler_puts_them(c: dict[str, int]) -> None:
    def at(payload: Payload, place: str, fmt: str) -> int:
        return int(struct.unpack_from(fmt, payload.encode(), c[place])[0])

    addr = _SAMPLES[3]
    fields = ("index", "flags", "desc_user_addr", "used_user_addr", "avail_user_addr", "log_guest_addr")
    found = [at(addr, f"vhost_vring_addr.{name}", "=I" if name in fields[:2] else "=Q") for name in fields]
    assert found == [0x11, 0x22, 0x33, 0x44, 0x55, 0x66]
    area = _SAMPLES[7]
    found = [at(area, f"inflight.{name}", "=Q" if name in ("size", "offset") else "=H") for name in _inflight_fields()]
    assert found == [0x11, 0x22, 0x33, 0x44]
    assert at(SingleRegion(_REGION), "single.region", "=Q") == 0x1111
    assert at(_REGION, "region.uva", "=Q") == 0x3333
    assert at(_REGION, "region.mmap_offset", "=Q") == 0x4444
    table = MemoryTable((_REGION,))
    assert at(table, "table.n", "=I") == 1
    assert at(table, "table.regions", "=Q") == 0x1111
    config = Config(1, 2, 3, b"\x04\x05")
    assert (at(config, "config.size", "=I"), at(config, "config.flags", "=I")) == (2, 3)
    assert config.encode()[c["config.data"] :] == b"\x04\x05"
    assert at(DeviceStateTransfer(1, 7), "device_state.phase", "=I") == 7
    assert at(Log(1, 7), "log.offset", "=Q") == 7


def _inflight_fields() -> tuple[str, ...]:
    return ("size", "offset", "num_queues", "queue_size")


def test_numbers_are_the_protocols() -> None:
    by_name = {
        1: "GET_FEATURES", 2: "SET_FEATURES", 3: "SET_OWNER", 4: "RESET_OWNER", 5: "SET_MEM_TABLE", 6: "SET_LOG_BASE",
        7: "SET_LOG_FD", 8: "SET_VRING_NUM", 9: "SET_VRING_ADDR", 10: "SET_VRING_BASE", 11: "GET_VRING_BASE",
        12: "SET_VRING_KICK", 13: "SET_VRING_CALL", 14: "SET_VRING_ERR", 15: "GET_PROTOCOL_FEATURES",
        16: "SET_PROTOCOL_FEATURES", 17: "GET_QUEUE_NUM", 18: "SET_VRING_ENABLE", 19: "SEND_RARP", 20: "NET_SET_MTU",
        21: "SET_BACKEND_REQ_FD", 24: "GET_CONFIG", 25: "SET_CONFIG", 31: "GET_INFLIGHT_FD", 32: "SET_INFLIGHT_FD",
        34: "RESET_DEVICE", 35: "VRING_KICK", 36: "GET_MAX_MEM_SLOTS", 37: "ADD_MEM_REG", 38: "REM_MEM_REG",
        39: "SET_STATUS", 40: "GET_STATUS", 42: "SET_DEVICE_STATE_FD", 43: "CHECK_DEVICE_STATE",
    }  # fmt: skip
    assert {r.value: r.name for r in Request} == by_name
    assert {r.value: r.name for r in BackendRequest} == {2: "CONFIG_CHANGE_MSG", 4: "VRING_CALL", 5: "VRING_ERR"}
    bits = {0: "MQ", 1: "LOG_SHMFD", 2: "RARP", 3: "REPLY_ACK", 4: "MTU", 5: "BACKEND_REQ", 9: "CONFIG",
            12: "INFLIGHT_SHMFD", 13: "RESET_DEVICE", 14: "INBAND_NOTIFICATIONS", 15: "CONFIGURE_MEM_SLOTS",
            16: "STATUS", 19: "DEVICE_STATE"}  # fmt: skip
    assert {f.value.bit_length() - 1: f.name for f in ProtocolFeature} == bits
    assert set(RULES) == set(Request)
    assert set(BACKEND_RULES) == set(BackendRequest)


@pytest.mark.parametrize("payload", _SAMPLES, ids=lambda p: type(p).__name__)
def test_there_and_back(payload: Payload) -> None:
    assert type(payload).decode(payload.encode()) == payload


_u16, _u32, _u64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
_regions = st.builds(MemoryRegion, _u64, _u64, _u64, _u64)
PAYLOADS: dict[type[Any], st.SearchStrategy[Any]] = {
    Empty: st.just(Empty()),
    U64: st.builds(U64, _u64),
    VringState: st.builds(VringState, _u32, _u32),
    VringAddr: st.builds(VringAddr, _u32, _u32, _u64, _u64, _u64, _u64),
    MemoryRegion: _regions,
    SingleRegion: st.builds(SingleRegion, _regions),
    MemoryTable: st.builds(MemoryTable, st.lists(_regions, max_size=MAX_FDS).map(tuple)),
    Log: st.builds(Log, _u64, _u64),
    Inflight: st.builds(Inflight, _u64, _u64, _u16, _u16),
    DeviceStateTransfer: st.builds(DeviceStateTransfer, _u32, _u32),
    Config: st.builds(Config, _u32, _u32, _u32, st.binary(max_size=MAX_CONFIG)),
}


@given(st.one_of(*PAYLOADS.values()))
def test_whatever_the_values_there_and_back(payload: Payload) -> None:
    assert type(payload).decode(payload.encode()) == payload


@given(st.sampled_from(sorted(PAYLOADS, key=lambda kind: kind.__name__)), st.binary(max_size=400))
def test_any_bytes_decode_or_are_refused(kind: type[Payload], data: bytes) -> None:
    try:
        payload = kind.decode(data)
    except RemoteProtocolError as e:
        assert str(e)
    else:
        assert payload.encode() == data or isinstance(payload, MemoryTable | SingleRegion | Inflight)


@given(st.binary(min_size=12, max_size=12))
def test_any_twelve_bytes_are_a_header_or_are_refused(data: bytes) -> None:
    try:
        header = Header.decode(data)
    except RemoteProtocolError as e:
        assert str(e)
    else:
        assert header.encode() == data
        assert header.size <= MAX_PAYLOAD
        assert header.flags & 3 == 1


@pytest.mark.parametrize(
    "kind", [kind for kind in PAYLOADS if kind not in (Config, MemoryTable)], ids=lambda k: k.__name__
)
def test_a_byte_more_or_less_is_refused(kind: type[Payload]) -> None:
    whole = next(p for p in _SAMPLES if type(p) is kind).encode()
    for data in (whole + b"\0", whole[:-1] if whole else b"\0\0"):
        with pytest.raises(RemoteProtocolError, match=r"\d+ bytes"):
            kind.decode(data)


@pytest.mark.parametrize("n", [9, 0x10000, 2**32 - 1])
def test_a_memory_table_of_too_many_regions_is_refused(n: int) -> None:
    with pytest.raises(RemoteProtocolError, match="regions"):
        MemoryTable.decode(struct.pack("=II", n, 0) + bytes(32 * min(n, 100)))


def test_a_memory_table_may_have_room_for_more_than_it_holds() -> None:
    one = MemoryTable((_REGION,))
    assert MemoryTable.decode(one.encode() + bytes(64)) == one
    for data in (one.encode() + bytes(8), one.encode()[:-8], one.encode()[:8], b"", bytes(7)):
        with pytest.raises(RemoteProtocolError):
            MemoryTable.decode(data)


def test_padding_is_zeros_and_ignored() -> None:
    assert Inflight(1, 2, 3, 4).encode()[20:] == bytes(4)
    assert SingleRegion(_REGION).encode()[:8] == bytes(8)
    assert Inflight.decode(Inflight(1, 2, 3, 4).encode()[:20] + b"\xff" * 4) == Inflight(1, 2, 3, 4)
    assert SingleRegion.decode(b"\xff" * 8 + _REGION.encode()) == SingleRegion(_REGION)
