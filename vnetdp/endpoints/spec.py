"""An endpoint as a command line spells it: KIND, or KIND:WHAT. One table has every kind."""

from __future__ import annotations

import importlib
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from inspect import isroutine
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NoReturn

from ..errors import ConfigError
from .base import Endpoint
from .loopback import EchoEndpoint, GenerateEndpoint, MacswapEndpoint, NullEndpoint, ReflectEndpoint
from .names import KNOWN, VHOST_USER

_SHOWN: Final = 8  # functions of a module, in an error
_SUFFIXES: Final = {"": 1, "k": 1_000, "m": 1_000_000, "g": 1_000_000_000}


@dataclass(frozen=True)
class Opener:
    """Opens an endpoint when it is called. tap: the interface, and the namespace, that it will have; None if none."""

    open: Callable[[], Endpoint]
    tap: tuple[str, object] | None = None

    def __call__(self) -> Endpoint:
        return self.open()


def parse_endpoint(text: str, queues: int = 1) -> Endpoint:
    """Return the endpoint that *text* names as a command line does, such as `tap:eth0,netns=lab`, with *queues* queues.

    It is open, and the caller closes it. ConfigError if *text* names none; EndpointError if it can't be opened.
    """
    endpoint = endpoint_opener(text, queues)()
    try:
        endpoint.open_sink()
    except BaseException:
        endpoint.close()
        raise
    return endpoint


def endpoint_opener(text: str, queues: int = 1) -> Opener:
    """Return the `Opener` of the endpoint that *text* names; ConfigError or EndpointError if there is none.

    The file that the endpoint writes to is left alone until `Endpoint.open_sink`.
    """
    kind, _, rest = text.partition(":")
    if kind not in _KINDS:
        raise ConfigError(f"unknown endpoint {text!r}; known are {KNOWN}")
    return _KINDS[kind](rest, queues)


def _plain(endpoint: type[Endpoint]) -> Callable[[str, int], Opener]:
    def make(rest: str, queues: int) -> Opener:
        if rest:
            raise ConfigError(f"{endpoint.name} takes no options, but got {rest!r}")
        return Opener(partial(endpoint, queues))

    return make


def _generate(rest: str, queues: int) -> Opener:
    options = _options("generate", _parts(rest), {"size": _whole, "rate": _number, "count": _whole})
    GenerateEndpoint.check(**options)
    return Opener(partial(GenerateEndpoint, queues, **options))


def _tap(rest: str, queues: int) -> Opener:
    from .netns import identity
    from .tap import TapEndpoint

    name, *options = _parts(rest)
    if not name:
        raise ConfigError("tap: no interface is named: write tap:NAME[,netns=NS]")
    found = _options("tap", options, {"netns": str})
    return Opener(partial(TapEndpoint, name, queues, **found), (name, identity(**found)))


def _stream(rest: str, queues: int) -> Opener:
    from .sock import StreamEndpoint

    path, *options = _parts(rest)
    if not path:
        raise ConfigError("stream: no socket is named: write stream:PATH[,listen][,reconnect=1]")
    listens = "listen" in options
    if listens:
        options.remove("listen")
    found = _options("stream", options, {"reconnect": _number})
    return Opener(partial(StreamEndpoint, path, listens, queues=queues, **found))


def _dgram(rest: str, queues: int) -> Opener:
    from .sock import DgramEndpoint

    path, *options = _parts(rest)
    if not path:
        raise ConfigError("dgram: no socket is named: write dgram:PATH[,remote=PATH][,reconnect=1]")
    found = _options("dgram", options, {"remote": str, "reconnect": _number})
    return Opener(partial(DgramEndpoint, path, queues=queues, **found))


def _fd(rest: str, queues: int) -> Opener:
    from .fd import FdEndpoint

    if not re.fullmatch(r"\d{1,9}", rest, re.ASCII):
        raise ConfigError(f"fd: {rest!r} is not the number of a descriptor: write fd:3")
    return Opener(partial(FdEndpoint, int(rest), queues))


def _pcap(rest: str, queues: int) -> Opener:
    from .pcap import PcapEndpoint

    source, *sinks = _parts(rest)
    if not rest or len(sinks) > 1:
        raise ConfigError(
            f"pcap: {rest!r} is not pcap:IN[,OUT] (pcap:,OUT only writes; a comma in a file's name is written twice)"
        )
    # A user who forgot that a comma separates must not lose the file that the rest of the name happens to be.
    if any(sinks) and os.path.lexists(rest):
        raise ConfigError(
            f"pcap: {rest} is a file: pcap:{rest.replace(',', ',,')} names it; to overwrite {sinks[0]}, name that "
            f"./{sinks[0]}"
        )
    return Opener(partial(PcapEndpoint, source or None, "".join(sinks) or None, queues, sink_later=True))


def _scapy(rest: str, queues: int) -> Opener:
    module, _, name = rest.partition(":")
    if not module or not name:
        raise ConfigError(f"scapy: {rest!r} is not scapy:MODULE:CALLABLE")
    if module.endswith(".py"):
        raise ConfigError(f"scapy: a module is named without .py: scapy:{module.removesuffix('.py')}:{name}")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does
    from .scapy import ScapyEndpoint

    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as e:
        where = f" (looked for in {here} and PYTHONPATH)" if isinstance(e, ModuleNotFoundError) else ""
        raise ConfigError(f"scapy: cannot import {module}: {type(e).__name__}: {e}{where}") from e
    try:
        function = reduce(getattr, name.split("."), found)
    except AttributeError as e:
        raise ConfigError(f"scapy: module {module} has no {name}; {_callables(found)}") from e
    if not callable(function):
        kind = type(function).__name__
        raise ConfigError(f"scapy: {module}:{name} is no callable, but of type {kind}; {_callables(found)}")

    def make() -> Endpoint:
        endpoint = ScapyEndpoint(function, queues)
        endpoint.name = f"scapy:{rest}"
        return endpoint

    return Opener(make)


def _callables(module: ModuleType) -> str:
    """Return the names of the functions of *module*, and its file: another module may have the name."""
    own = sorted(
        name
        for name, value in vars(module).items()
        if isroutine(value) and not name.startswith("_") and value.__module__ == module.__name__
    )
    where = getattr(module, "__file__", None) or module.__name__
    more = f" and {len(own) - _SHOWN} more" if len(own) > _SHOWN else ""
    return f"the functions of {where} are {', '.join(own[:_SHOWN]) or 'none'}{more}"


def _fault(rest: str, queues: int) -> Opener:
    from .fault import FaultEndpoint, FrameFaults

    options, colon, inner_text = rest.partition(":")
    if not colon:
        raise ConfigError("fault: no endpoint is named: write fault:drop=0.1:ENDPOINT")
    probability = dict.fromkeys(("drop", "corrupt", "eio", "eagain"), _number)
    faults = _options("fault", _parts(options), {**probability, "delay_ms": _number, "seed": _whole})
    FrameFaults(**faults)
    open_inner = endpoint_opener(inner_text, queues)

    def make() -> Endpoint:
        inner = open_inner()
        try:
            return FaultEndpoint(inner, **faults)
        except BaseException:
            inner.close()
            raise

    return Opener(make, open_inner.tap)


def _vhost_user(rest: str, _queues: int) -> NoReturn:
    raise ConfigError(
        f"{VHOST_USER}:SOCKET is an endpoint of link, on both sides; to serve one guest: vnetdp serve ENDPOINT --socket "
        f"{rest or 'SOCKET'}"
    )


_KINDS: Final[dict[str, Callable[[str, int], Opener]]] = {
    "null": _plain(NullEndpoint),
    "echo": _plain(EchoEndpoint),
    "macswap": _plain(MacswapEndpoint),
    "reflect": _plain(ReflectEndpoint),
    "generate": _generate,
    "tap": _tap,
    "stream": _stream,
    "dgram": _dgram,
    "fd": _fd,
    "pcap": _pcap,
    "scapy": _scapy,
    "fault": _fault,
    VHOST_USER: _vhost_user,
}


def _parts(text: str) -> list[str]:
    """Return the parts between commas; a comma within a part is written twice, as QEMU has it."""
    return [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]


def _options(kind: str, parts: Sequence[str], known: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    """Return key=value pairs; *known* has the function that reads a key's value."""
    found: dict[str, Any] = {}
    for part in () if parts == [""] else parts:
        key, equals, value = part.partition("=")
        if key not in known or not equals:
            names = ", ".join(f"{name}=" for name in known)
            raise ConfigError(f"{kind}: unknown option {part!r}; known are {names}")
        if key in found:
            raise ConfigError(f"{kind}: {key} is given twice")
        try:
            found[key] = known[key](value)
        except ValueError as e:
            raise ConfigError(f"{kind}: {key}={value} is not {e}") from e
    return found


def _number(text: str) -> float:
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)([kmg]?)", text, re.IGNORECASE | re.ASCII)
    if match is None:
        raise ValueError("a number (k, M and G may follow it)")
    number = float(match[1]) * _SUFFIXES[match[2].lower()]
    if math.isinf(number):
        raise ValueError("a finite number")
    return number


def _whole(text: str) -> int:
    number = _number(text)
    if number != int(number):
        raise ValueError("a whole number")
    return int(number)
