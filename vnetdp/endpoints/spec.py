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
from inspect import isroutine, signature
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NoReturn

from ..errors import ConfigError, EndpointError, VnetdpError, place
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
    function = _imported("scapy", rest, "CALLABLE", callable)
    from .scapy import ScapyEndpoint

    def make() -> Endpoint:
        endpoint = ScapyEndpoint(function, queues)
        endpoint.name = f"scapy:{rest}"
        return endpoint

    return Opener(make)


def _python(rest: str, queues: int) -> Opener:
    named, *parts = _parts(rest)
    made = _imported("python", named, "CLASS", _is_endpoint)
    parameters = [*signature(made.__init__).parameters.values()][2:]  # behind self and queues
    known = dict.fromkeys((p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)), _literal)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        known |= {key: _literal for key in (part.partition("=")[0] for part in parts) if key.isidentifier()}
    options = _options("python", parts, known)

    def make() -> Endpoint:
        try:
            endpoint = made(queues, **options)
        except VnetdpError:
            raise
        except (Exception, SystemExit) as e:
            raise EndpointError(f"python: cannot make {named}: {_one_line(e)}{place(e)}") from e
        if not (isinstance(endpoint, Endpoint) and hasattr(endpoint, "wire")):
            raise EndpointError(
                f"python: {named} is no endpoint yet: its __init__ has to call super().__init__(queues)"
            )
        if endpoint.name == Endpoint.name:
            endpoint.name = f"python:{named}"
        return endpoint

    return Opener(make)


def _is_endpoint(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, Endpoint)


def _imported(kind: str, text: str, what: str, fits: Callable[[object], bool]) -> Any:
    """Return the object that MODULE:NAME names; ConfigError if there is none, or it is not *what*, as *fits* tells.

    MODULE is imported, from the current folder, too.
    """
    module, _, name = text.partition(":")
    if not module or not name:
        raise ConfigError(f"{kind}: {text!r} is not {kind}:MODULE:{what}")
    if module.endswith(".py"):
        raise ConfigError(f"{kind}: a module is named without .py: {kind}:{module.removesuffix('.py')}:{name}")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does
    try:
        imported = importlib.import_module(module)
    except (Exception, SystemExit) as e:
        where = f" (looked for in {here} and PYTHONPATH)" if isinstance(e, ModuleNotFoundError) else ""
        raise ConfigError(f"{kind}: cannot import {module}: {_one_line(e)}{where}") from e
    try:
        found = reduce(getattr, name.split("."), imported)
    except AttributeError as e:
        raise ConfigError(f"{kind}: module {module} has no {name}; {_choices(imported, fits)}") from e
    if not fits(found):
        wanted = "callable" if fits is callable else "class of endpoints"
        but = "another class" if isinstance(found, type) else f"of type {type(found).__name__}"
        raise ConfigError(f"{kind}: {module}:{name} is no {wanted}, but {but}; {_choices(imported, fits)}")
    return found


def _choices(module: ModuleType, fits: Callable[[object], bool]) -> str:
    """Return the names of the functions or endpoints of *module*, and its file: another module may have the name."""
    functions = fits is callable
    own = sorted(
        name
        for name, value in vars(module).items()
        if (isroutine(value) if functions else fits(value))
        and not name.startswith("_")
        and value.__module__ == module.__name__
    )
    where = getattr(module, "__file__", None) or module.__name__
    more = f" and {len(own) - _SHOWN} more" if len(own) > _SHOWN else ""
    return f"the {'functions' if functions else 'endpoints'} of {where} are {', '.join(own[:_SHOWN]) or 'none'}{more}"


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _fault(rest: str, queues: int) -> Opener:
    from .fault import FaultEndpoint, FrameFaults

    options, colon, inner_text = rest.partition(":")
    if not colon:
        raise ConfigError("fault: no endpoint is named: write fault:drop=0.1:ENDPOINT")
    faults = _options("fault", _parts(options), _FAULTS)
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


def _burst(text: str) -> tuple[float, ...]:
    try:
        return tuple(_number(part) for part in text.split("/"))
    except ValueError as e:
        raise ValueError("2 to 4 probabilities with / between them, such as 0.01/0.3") from e


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
    "python": _python,
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
            names = ", ".join(f"{name}=" for name in known) or "none"
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


def _literal(text: str) -> int | float | str:
    """Return the number that *text* reads as, as Python has it, else *text*."""
    if re.fullmatch(r"[+-]?\d+", text, re.ASCII):
        return int(text)
    number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.IGNORECASE | re.ASCII)
    return float(text) if number else text


def _whole(text: str) -> int:
    number = _number(text)
    if number != int(number):
        raise ValueError("a whole number")
    return int(number)


_FAULTS: Final[dict[str, Callable[[str], Any]]] = {
    **dict.fromkeys(
        ("drop", "corrupt", "eio", "eagain", "duplicate", "reorder", "delay_ms", "jitter_ms", "rate"), _number
    ),
    "burst": _burst,
    "at": _whole,
    "seed": _whole,
}
