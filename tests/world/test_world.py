"""A saved world is the whole world: after it was loaded, the same steps give the same bytes, in any process."""

from __future__ import annotations

import copy
import pickle
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.by_hand import CAMPAIGN, PATIENCE, no_descriptor_leaks, scaled
from tests.support.zygote import popen
from tests.world.bed import KINDS, STEPS, Bed, Step
from vnetdp import ConfigError, Driver, EchoEndpoint, NetDevice, Owner, World, memory_for
from vnetdp.world.plain import checksum

ROOT = Path(__file__).parents[2]
MANY = settings(max_examples=2000 if CAMPAIGN else scaled(40, 4))


@MANY
@given(st.lists(st.sampled_from(KINDS), min_size=2, max_size=2), STEPS, STEPS, st.booleans())
def test_the_same_steps_give_the_same_bytes_after_a_load(
    kinds: list[str], before: list[Step], after: list[Step], elsewhere: bool
) -> None:
    with Bed(*kinds) as bed:
        bed.do(before)
        saved = bed.world.save()
        first = bed.do(after)
        ended = bed.world.save()
        if elsewhere:
            with Bed(*kinds) as other:
                _goes_on_alike(other, pickle.loads(pickle.dumps(saved)), after, first, ended)
        else:
            _goes_on_alike(bed, saved, after, first, ended)


def _goes_on_alike(bed: Bed, saved: Any, after: list[Step], first: list[object], ended: Any) -> None:
    bed.world.load(saved)
    assert bed.world.save() == saved
    assert bed.do(after) == first
    assert bed.world.save() == ended


TRAFFIC: list[Step] = [
    ("send", 0, 0, 5, 60),
    ("put", 0, 1, 5, 2500),
    ("guest", 0, 64),
    ("vhost", 0, 3),
    ("use", 0, False),
    ("device", 0, 64),
    ("advance", 0, 1_000_000),
    ("guest", 0, 2),
]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_wire_goes_on_where_it_was(kind: str) -> None:
    with no_descriptor_leaks(), Bed(kind) as bed:
        bed.do(TRAFFIC)
        saved = bed.world.save()
        first = bed.do(TRAFFIC * 4)  # more than a ring's length beyond the wrap of its indices
        bed.world.load(saved)
        assert bed.do(TRAFFIC * 4) == first


def test_the_owner_and_what_it_was_told_come_back() -> None:
    with Bed("mailbox") as bed:
        host = bed.hosts[0]
        bed.do(TRAFFIC)
        saved = bed.world.save()
        bed.faults.append("set_backend:always")
        host.device.set_use_vhost(True)
        assert (host.device.owner, host.device.fallbacks) == (Owner.USERSPACE, 1)
        bed.world.load(saved)
        assert (list(bed.faults), host.device.fallbacks, host.device.use_vhost) == ([], 0, False)
        host.device.set_use_vhost(True)
        assert host.device.owner is Owner.VHOST
        saved = bed.world.save()
        host.device.set_use_vhost(False)
        bed.world.load(saved)
        assert host.device.owner is Owner.VHOST
        assert host.wire.polled_by == {0: host.vhost, 1: host.vhost}


def test_a_fault_that_somebody_holds_tells_its_hits_as_they_were() -> None:
    with Bed("mailbox") as bed:
        bed.faults.append("set_vring_num:always")
        fault = bed.faults[0]
        saved = bed.world.save()
        bed.hosts[0].device.set_use_vhost(False)
        bed.hosts[0].device.set_use_vhost(True)
        assert fault.hits == 1
        bed.world.load(saved)
        assert fault.hits == 0
        assert bed.faults[0] is fault
        hostile = copy.deepcopy(saved)
        for part in hostile["parts"]:
            if part[0] == "faults 0":
                part[2] |= {"faults": [part[2]["faults"][0] | {"code": 1}]}
            if part[0] == "driver 0":
                part[2]["features"] = -1
        with pytest.raises(ConfigError, match=r"driver 0: .*nothing was loaded: features -1 is not"):
            bed.world.load({**hostile, "checksum": checksum(hostile["parts"])})
        assert bed.faults[0] is fault


def test_a_driver_that_is_started_after_a_load_finds_the_frames_that_waited() -> None:
    with (
        memory_for(num=16) as memory,
        EchoEndpoint() as wire,
        NetDevice(memory, wire, threaded=False) as device,
        Driver(device, memory, num=16) as guest,
    ):
        world = World(guest)
        frame = bytes(60)
        guest.send(frame)
        guest.step()
        device.step()
        guest.step()
        saved = world.save()
        assert guest.receive() == [frame]
        assert select.select([guest], [], [], 0)[0] == []
        world.load(saved)
        assert select.select([guest], [], [], 0)[0] == [guest]
        assert guest.receive() == [frame]


_ELSEWHERE = """
import pickle, sys
from tests.support.zygote import popen
from tests.world.bed import Bed
from tests.world.test_world import TRAFFIC

with Bed("slow", "lossy") as bed:
    bed.world.load(pickle.load(sys.stdin.buffer))
    pickle.dump((bed.do(TRAFFIC * 2), bed.world.save()), sys.stdout.buffer)
"""


def test_another_process_goes_on_with_the_same_bytes() -> None:
    with Bed("slow", "lossy") as bed:
        bed.do(TRAFFIC * 3)
        saved = bed.world.save()
        command = [sys.executable, "-c", _ELSEWHERE]
        with popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            out, _ = process.communicate(pickle.dumps(saved), timeout=PATIENCE)
        assert process.returncode == 0
        assert pickle.loads(out) == (bed.do(TRAFFIC * 2), bed.world.save())


def test_memory_that_is_not_in_use_is_neither_saved_nor_taken() -> None:
    with Bed("slow") as bed:
        memory = bed.hosts[0].memory
        saved = bed.world.save()
        taken = sum(Path(f"/proc/self/fd/{region.fd}").stat().st_blocks for region in memory.regions)
        bed.world.load(bed.world.save())
        assert len(pickle.dumps(saved)) < 1 << 15
        assert sum(Path(f"/proc/self/fd/{region.fd}").stat().st_blocks for region in memory.regions) == taken
