"""The mutants: the shipped kernels with one order taken away.

Each is a change of a function's text, for one scenario to find.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

_DRIVER = "vnetdp_kernels.virtq.split_driver"
_DEVICE = "vnetdp_kernels.virtq.split_device"
_MEMORY = "vnetdp_kernels.virtq.memory"
_BIND = "vnetdp_kernels.virtq.bind"
_NET = "vnetdp_kernels.net.device"
_INFLIGHT = "vnetdp.vhost_user.inflight"

_FENCE = (("    fence()\n", ""),)
_RELEASE = (("store_u16_release(", "store_u16("),)
_ACQUIRE = (("load_u16_acquire(", "load_u16("),)
_FLUSH = "        mark_noted(vq, log)  # first:"
_PUBLISHED = "    store_u16_release(mem, vq[r.VQ_USED] + spec.VIRTQ_RING_IDX, idx)\n"
_RX = "    if used_rx:\n        _publish_forwarded(dst, rxq, ep, used_rx, frames, size)\n"
_TX = "    if used_tx:\n        ring.publish_used(src.mem, txq, src.log, used_tx)\n"
_JOURNAL = "    if journal and used_rx:\n        _write_journal(src.mem, txq, used_tx, rxq, used_rx)\n"
_JOURNAL_RX = "    store_u16(mem, journal + r.JOURNAL_RECEIVEQ_IDX, rxq[r.VQ_LAST_USED_IDX] + used_rx)\n"
_JOURNAL_TX = "    store_u16(mem, journal + r.JOURNAL_TRANSMITQ_IDX, txq[r.VQ_LAST_USED_IDX] + used_tx)\n"
_JOURNAL_VALID = "    store_u16_release(mem, journal + r.JOURNAL_VALID, 1)\n"
_DESC_NUM = "store_u16(mem, area + spec.INFLIGHT_DESC_NUM, num)\n"
_VERSION = "store_u16_release(mem, area + spec.INFLIGHT_VERSION, _VERSION)\n"


@dataclass(frozen=True)
class Mutant:
    """A change of *function*, in *module*: the text of each of *edits* is replaced, once."""

    says: str
    """The order that is missing, for people."""
    scenario: str
    """The name of the scenario that has to find it."""
    module: str
    function: str
    edits: tuple[tuple[str, str], ...]

    def source(self) -> str:
        """Return the function's text with the change made; ValueError if the text to replace is not there, once."""
        text = inspect.getsource(self._original())
        for old, new in self.edits:
            if text.count(old) != 1:
                raise ValueError(f"{self.module}.{self.function} has {text.count(old)} times, not once: {old.strip()}")
            text = text.replace(old, new)
        return textwrap.dedent(text)

    def _home(self) -> Any:
        home: Any = importlib.import_module(self.module)
        for name in self.function.split(".")[:-1]:
            home = getattr(home, name)
        return home

    def _original(self) -> Any:
        function = getattr(self._home(), self.function.rpartition(".")[2])
        return getattr(function, "py_func", function)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Have the change in place for the block, wherever a module has the function. Kernels have to be plain Python."""
        name = self.function.rpartition(".")[2]
        original = self._original()
        made: dict[str, Any] = {}
        exec(compile(self.source(), f"<{self.module}, changed>", "exec"), original.__globals__, made)
        homes = [self._home(), *(module for key, module in list(sys.modules.items()) if key.startswith("vnetdp"))]
        with ExitStack() as undo:
            for home in homes:
                for key in [key for key, value in vars(home).items() if value is original]:
                    setattr(home, key, made[name])
                    undo.callback(setattr, home, key, original)
            yield


MUTANTS: Final[dict[str, Mutant]] = {
    "A-release": Mutant(
        "barrier A: avail.idx is stored without release", "transmit-weak", _DRIVER, "publish_available", _RELEASE
    ),
    "A-acquire": Mutant(
        "barrier A: avail.idx is loaded without acquire", "transmit-weak", _DEVICE, "available", _ACQUIRE
    ),
    "B-release": Mutant(
        "barrier B: used.idx is stored without release", "receive-weak", _DEVICE, "publish_used", _RELEASE
    ),
    "B-acquire": Mutant(
        "barrier B: used.idx is loaded without acquire", "receive-weak", _DRIVER, "used_ready", _ACQUIRE
    ),
    "C-driver-fence": Mutant("barrier C: needs_kick has no fence", "transmit", _DRIVER, "needs_kick", _FENCE),
    "C-device-fence": Mutant("barrier C: enable_kicks has no fence", "transmit", _DEVICE, "enable_kicks", _FENCE),
    "C-event-idx-driver-fence": Mutant(
        "barrier C, with EVENT_IDX: needs_kick has no fence", "transmit-event-idx", _DRIVER, "needs_kick", _FENCE
    ),
    "C-event-idx-device-fence": Mutant(
        "barrier C, with EVENT_IDX: enable_kicks has no fence", "transmit-event-idx", _DEVICE, "enable_kicks", _FENCE
    ),
    "D-device-fence": Mutant("barrier D: needs_call has no fence", "receive", _DEVICE, "needs_call", _FENCE),
    "D-driver-fence": Mutant("barrier D: enable_calls has no fence", "receive", _DRIVER, "enable_calls", _FENCE),
    "D-event-idx-device-fence": Mutant(
        "barrier D, with EVENT_IDX: needs_call has no fence", "receive-event-idx", _DEVICE, "needs_call", _FENCE
    ),
    "D-event-idx-driver-fence": Mutant(
        "barrier D, with EVENT_IDX: enable_calls has no fence", "receive-event-idx", _DRIVER, "enable_calls", _FENCE
    ),
    "kicks-second-look": Mutant(
        "enable_kicks does not look at avail.idx once more",
        "transmit",
        _DEVICE,
        "enable_kicks",
        (("return load_u16(mem, vq[r.VQ_AVAIL] + spec.VIRTQ_RING_IDX) != vq[r.VQ_AVAIL_IDX]", "return False"),),
    ),
    "calls-second-look": Mutant(
        "enable_calls does not look at used.idx once more",
        "receive",
        _DRIVER,
        "enable_calls",
        (("return load_u16(mem, dvq[r.DVQ_USED] + spec.VIRTQ_RING_IDX) != dvq[r.DVQ_LAST_USED_IDX]", "return False"),),
    ),
    "no-flush": Mutant(
        "publish_used does not set the deferred dirty mark",
        "dirty-log",
        _DEVICE,
        "publish_used",
        ((_FLUSH, "        pass  # "),),
    ),
    "late-flush": Mutant(
        "publish_used sets the deferred dirty mark behind used.idx",
        "dirty-log-killed",
        _DEVICE,
        "publish_used",
        (
            (_FLUSH, "        pass  # "),
            (_PUBLISHED, f"{_PUBLISHED}    if log.size > 0:\n        mark_noted(vq, log)\n"),
        ),
    ),
    "mark-looks-first": Mutant(
        "mark_dirty leaves out a bit that is set already",
        "dirty-log",
        _MEMORY,
        "mark_dirty",
        (("_mark(log, gpa, length, True)", "_mark(log, gpa, length, False)"),),
    ),
    "used-ring-fence": Mutant(
        "publish_used has no fence between used.idx and the dirty marks of the used ring",
        "dirty-log",
        _DEVICE,
        "publish_used",
        (("        fence()\n", ""),),
    ),
    "hand-over-index": Mutant(
        "bind goes on at avail.idx, and not where the owner before stood",
        "hand-over",
        _BIND,
        "bind",
        (
            (
                "vq[r.VQ_LAST_AVAIL_IDX] = bases[k, 1]",
                "vq[r.VQ_LAST_AVAIL_IDX] = load_u16_acquire(mem, vq[r.VQ_AVAIL] + spec.VIRTQ_RING_IDX)",
            ),
            ("vq[r.VQ_AVAIL_IDX] = bases[k, 1]", "vq[r.VQ_AVAIL_IDX] = vq[r.VQ_LAST_AVAIL_IDX]"),
        ),
    ),
    "no-call-due": Mutant(
        "bind does not make the decision about a call that a killed owner left open",
        "receive-killed",
        _BIND,
        "bind",
        (("vq[r.VQ_CALL_DUE] = 1", "vq[r.VQ_CALL_DUE] = 0"),),
    ),
    "inflight-version-first": Mutant(
        "the inflight area's version is stored before its size",
        "recovery-killed",
        _INFLIGHT,
        "InflightArea.recover",
        ((_DESC_NUM, "pass\n"), (_VERSION, f"{_VERSION}            {_DESC_NUM}")),
    ),
    "journal-valid-first": Mutant(
        "the journal is valid before its indices are stored",
        "echo-killed",
        _NET,
        "_write_journal",
        ((_JOURNAL_RX, ""), (_JOURNAL_TX, ""), (_JOURNAL_VALID, _JOURNAL_VALID + _JOURNAL_TX + _JOURNAL_RX)),
    ),
    "journal-late": Mutant(
        "the journal is written behind the publication of the receiveq",
        "echo-killed",
        _NET,
        "forward",
        ((_JOURNAL, ""), (_RX, f"{_RX}        _write_journal(src.mem, txq, used_tx, rxq, 0)\n")),
    ),
    "transmitq-first": Mutant(
        "the transmitq is published before the receiveq", "echo-killed", _NET, "forward", ((_RX, ""), (_TX, _TX + _RX))
    ),
}
