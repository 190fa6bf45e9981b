"""A destination that is sent anything at all refuses it, does nothing meanwhile, and can still be migrated to.

Each input is a recorded stream with things done to it: bits, sections, and payloads whose checksum is made right again, so
that what is behind the checksum is reached. Half of them have a commit at their end, and what the guest's own memory says
is done things to, as well: a machine that runs then touches nothing that it has not. 720 inputs; 200,000 with
VNETDP_CAMPAIGN=1 (`make campaign`).
"""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import signal
import struct
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.migration.fuzz import CUT_OFF, RUNS, Bed, fuzzed, scribbled
from tests.migration.rig import Tape, section_bytes, wire_bytes
from tests.support.by_hand import no_descriptor_leaks
from tests.support.zygote import popen
from vnetdp.errors import VnetdpError
from vnetdp.lab.invariants import resources
from vnetdp.migration.channel import COMMIT, POLICIES
from vnetdp.migration.stream import MAX_PAYLOAD
from vnetdp.migration.target import Target
from vnetdp.system.poll import readable

CAMPAIGN = os.environ.get("VNETDP_CAMPAIGN") == "1"
INPUTS = 200_000 if CAMPAIGN else 720
SHOWN = 20_000
HANG_S = 60

ENDS = (1 << 62, (1 << 63) - 16, (1 << 63) - 4, (1 << 63) - 2, -16)  # addresses near the last that there can be


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Every input costs a warning."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(params=POLICIES)
def bed(request: pytest.FixtureRequest) -> Iterator[Bed]:
    with no_descriptor_leaks():
        bed = Bed(request.param)
        yield bed
        bed.close()


# --- the tests ---


def test_whatever_comes_is_refused(bed: Bed, capsys: pytest.CaptureFixture[str]) -> None:
    errors: Counter[str] = Counter()
    assert bed.feed(b"".join(section_bytes(*part) for part in bed.pool[bed.policy])) == CUT_OFF
    gc.collect()
    before = resources()
    for n in range(INPUTS // 2 // len(POLICIES)):
        data = fuzzed(random.Random(n), bed.pool[bed.policy], bed.pool)
        try:
            errors[bed.feed(data)[:24]] += 1
        except Exception as e:
            raise AssertionError(f"input {n}") from e
        if n % 500 == 0:
            bed.check()
        if n % SHOWN == SHOWN - 1:
            with capsys.disabled():
                print(f"\n{bed.policy}: {n + 1} inputs, {len(errors)} reasons", end="", flush=True)  # noqa: T201
    bed.check()
    gc.collect()
    assert resources() == before
    assert len(errors) > 20  # so many reasons: all of the destination was reached
    assert errors[CUT_OFF] > 10  # as were both ends
    bed.take_a_valid_one()


@pytest.mark.parametrize("policy", POLICIES)
def test_whatever_is_committed_does_no_harm(policy: str) -> None:
    """In a process of its own: one that a signal ends, or that hangs, has told what it was at."""
    count = INPUTS // 2 // len(POLICIES)
    code = f"import faulthandler; from tests.migration.fuzz import main; faulthandler.enable(); main({policy!r}, 0, {count})"
    said = b""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2], **pipes) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        while (hears := readable(child.stdout, HANG_S)) and (data := os.read(child.stdout.fileno(), 1 << 16)):
            said = (said + data)[-(1 << 20) :]
        with suppress(subprocess.TimeoutExpired):
            child.wait(HANG_S if hears else 0)
        if child.returncode is None:
            child.send_signal(signal.SIGABRT)  # has it tell where it hangs
        trace = child.stderr.read().decode()
    last = said.splitlines()[-1].decode()
    assert child.returncode == 0, f"input {last}: exit status {child.returncode}\n{trace}"
    reasons = json.loads(last)
    assert sum(reasons.values()) == count
    assert reasons[RUNS] > count // 20
    assert len(reasons) > 15


def test_noise_is_refused(bed: Bed) -> None:
    rnd = random.Random(1)
    for _ in range(300):
        bed.feed(rnd.randbytes(rnd.randrange(200)))
    for part in bed.pool[bed.policy]:
        for _ in range(20):
            noise = rnd.randbytes(rnd.randrange(300))
            setup = bed.pool[bed.policy][0]
            bed.feed(section_bytes(*setup) + section_bytes(*part[:3], noise))
    bed.check()
    bed.take_a_valid_one()


def test_no_count_makes_it_ask_for_more_memory_than_came(bed: Bed) -> None:
    """Each two and four bytes of the small sections, and of a ram section's start, as large as can be."""
    own = bed.pool[bed.policy]
    whole = sum(len(part[3]) for part in own)
    bed.feed(b"".join(section_bytes(*part) for part in own))
    tracemalloc.start()
    try:
        for at, (name, phase, version, payload) in enumerate(own):
            start = b"".join(section_bytes(*part) for part in own[:at])
            for place in range(0, min(len(payload), 600), 1 if len(payload) < 300 else 7):
                data = payload[:place] + b"\xff" * 4 + payload[place + 4 :]
                data = start + section_bytes(name, phase, version, data)
                tracemalloc.reset_peak()
                held = tracemalloc.get_traced_memory()[0]
                bed.feed(data)
                assert tracemalloc.get_traced_memory()[1] - held < whole + 4 * MAX_PAYLOAD
    finally:
        tracemalloc.stop()


def test_a_ring_at_the_end_of_all_addresses(bed: Bed) -> None:
    """Addresses that are aligned, and that something added to them overflows."""
    own = bed.pool[bed.policy]
    for n, (name, phase, version, payload) in enumerate(own):
        if name not in (b"virtio-net", b"virtio-net-early"):
            continue
        queue = bed.source.device.queues[1]
        for address in (queue.desc, queue.avail, queue.used):
            was = struct.pack("<q", address)
            assert was in payload
            for wrong in (*ENDS, bed.machine.memory.end - 16, bed.machine.memory.end):
                parts = own.copy()
                parts[n] = name, phase, version, payload.replace(was, struct.pack("<q", wrong))
                bed.feed(b"".join(section_bytes(*part) for part in parts))
    bed.check()
    bed.take_a_valid_one()


def test_sections_one_by_one_raise_nothing_else(bed: Bed) -> None:
    """A section that fails leaves a destination that can be sent the next; `load` raises our errors alone."""
    rnd = random.Random(2)
    side = Target(bed.machine, Tape(), bed.policy)
    channel = Tape(wire_bytes(COMMIT))
    with pytest.raises(VnetdpError):
        side.load(channel.receive(POLICIES[bed.policy]))
    for _ in range(200):
        name, phase, version, payload = rnd.choice(bed.pool[bed.policy])
        data = section_bytes(name, phase, version, scribbled(rnd, payload) if rnd.random() < 0.5 else payload)
        try:
            side.load(Tape(data).receive(POLICIES[bed.policy]))
        except VnetdpError:
            continue
    side.give_up()
    bed.check()
