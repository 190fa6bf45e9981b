"""Indices of all rings against guest memory, ring by ring as virtio_load holds them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.rig import HIGH_GPA, Memory, Rig, pages_of
from vnetdp_kernels import rows as r
from vnetdp_kernels import spec
from vnetdp_kernels.platform.atomic import Words
from vnetdp_kernels.virtq.bind import RING_APART, RING_MOVED, RING_OUTSIDE, bind, check_rings

NUM = 8
RINGS = 3
PAGE = spec.PAGE_SIZE


def rings(memory: Memory, last: int = 5, used: int = 5, avail: int = 5) -> Words:
    """Rings a part a page, indices in order."""
    table = []
    for n in range(RINGS):
        at = HIGH_GPA + 3 * n * PAGE
        for address, index in ((at + PAGE, avail), (at + 2 * PAGE, used)):
            memory.write(address + spec.VIRTQ_RING_IDX, (index & 0xFFFF).to_bytes(2, "little"))
        table.append((1, NUM, at, at + PAGE, at + 2 * PAGE, last & 0xFFFF))
    return np.array(table, np.int64)


def check(memory: Memory, table: Words) -> tuple[int, int]:
    return check_rings(memory.mem, memory.regions, table)


@pytest.mark.parametrize("at", [0, 5, 0x7FFF, 0xFFFC, 0xFFFF])
@pytest.mark.parametrize("behind", range(-1, NUM + 2))
@pytest.mark.parametrize("ahead", range(-1, NUM + 2))
def test_how_far_apart_indices_may_be(at: int, behind: int, ahead: int) -> None:
    """used.idx at most a ring behind the next index, avail.idx at most a ring ahead, also across the end of 16 bits."""
    memory = Memory()
    wanted = 0
    if not 0 <= ahead <= NUM:
        wanted = RING_MOVED
    if not 0 <= behind <= NUM:
        wanted = RING_APART
    assert check(memory, rings(memory, at, at - behind, at + ahead)) == (wanted, 0)


@pytest.mark.parametrize("part", [2, 3, 4])
@pytest.mark.parametrize("ring", range(RINGS))
def test_each_part_to_its_last_byte(part: int, ring: int) -> None:
    memory = Memory()
    table = rings(memory)
    length = (16 * NUM, 6 + 2 * NUM, 6 + 8 * NUM)[part - 2]
    table[ring, part] = memory.high_end - length
    memory.write(table[ring, part] + spec.VIRTQ_RING_IDX, (5).to_bytes(2, "little"))
    assert check(memory, table) == (0, 0)
    table[ring, part] += 1
    assert check(memory, table) == (RING_OUTSIDE, ring)
    table[ring, 0] = 0
    assert check(memory, table) == (0, 0)


def test_one_that_cannot_be_comes_before_one_that_was_moved() -> None:
    memory = Memory()
    table = rings(memory, avail=5 + NUM + 1)
    assert check(memory, table) == (RING_MOVED, 0)
    table[2, 5] = 4
    assert check(memory, table) == (RING_APART, 2)
    table[1, 4] = -1
    assert check(memory, table) == (RING_OUTSIDE, 1)
    assert check(memory, table[:0]) == (0, 0)


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("num", [8, 1024])
def test_a_used_ring_that_is_taken_over_is_sent_again(event_idx: bool, num: int) -> None:
    """Whoever had it before may have been killed after it published, and before it marked that."""
    rig = Rig(num, event_idx=event_idx)
    memory = rig.memory
    memory.log_on()
    bases = np.array([(0, 0), (1, 0)])
    bind(memory.mem, rig.vqs, rig.device.eps, memory.log, bases)
    assert memory.dirty() == pages_of(rig.rx.used_gpa, 6 + 8 * num) | pages_of(rig.tx.used_gpa, 6 + 8 * num)
    memory.log[:] = 0
    rig.vqs[:, r.VQ_LOG_USED] = -1
    bind(memory.mem, rig.vqs, rig.device.eps, memory.log, bases)
    assert memory.dirty() == set()
