"""Captures that were damaged: whatever their bytes are, frames come or an error does, and no kernel reads past the end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.rig import scaled
from tests.support.capture_cases import CASES
from vnetdp.endpoints.capture_reader import CaptureReader
from vnetdp.errors import EndpointError
from vnetdp_kernels.wire import capture as cap


@settings(max_examples=scaled(200, 50), deadline=None)
@given(data=st.data())
def test_any_damage_leaves_a_reader_that_ends(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Bytes are changed, cut out and put in; each frame that is found lies inside the file."""
    names = sorted(CASES)
    content = bytearray(CASES[data.draw(st.sampled_from(names))][0] + CASES[data.draw(st.sampled_from(names))][0])
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(content) - 1))
        change = data.draw(st.sampled_from((b"\0", b"\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\1\0\0\0", b"")))
        content[at : at + data.draw(st.integers(0, 4))] = change
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(content)
    try:
        reader = CaptureReader(path, 8)
    except EndpointError:
        return
    try:
        while not reader.ended:
            for row in range(reader.read()):
                at, length = (int(value) for value in reader.index[row])
                assert 0 <= at <= at + length <= len(content)
    except EndpointError as e:
        assert "\n" not in str(e)
    finally:
        reader.close()
    assert reader.state[cap.PACKETS] <= len(content) // cap.BLOCK_MIN
