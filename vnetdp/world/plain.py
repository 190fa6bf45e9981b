"""Plain data: the content of a saved world, its checksum, and the checks of values from outside."""

from __future__ import annotations

import marshal
import zlib
from typing import Any, Final

from ..errors import BackendError, ConfigError, EndpointError, GuestError, UnbindError, VnetdpError

MOST: Final = 1 << 62
_SCALARS: Final = (type(None), bool, int, float, str, bytes)


def copied(value: Any, name: str) -> Any:
    """Return a copy of plain data: None, numbers, str, bytes, and lists, tuples and dicts of them. ConfigError otherwise."""
    if type(value) in _SCALARS:
        return value
    if type(value) in (list, tuple):
        return type(value)(copied(each, name) for each in value)
    if type(value) is dict:
        return {copied(key, name): copied(each, name) for key, each in value.items()}
    raise ConfigError(
        f"{name}: a {type(value).__name__} is no plain data: save None, numbers, str, bytes, lists, tuples and dicts"
    )


def checksum(value: Any) -> int:
    """Return the CRC-32 of plain data; ValueError if it is none."""
    return zlib.crc32(marshal.dumps(value, 0))  # version 0 alone writes equal data always alike


def number(value: Any, name: str, low: int = 0, high: int = MOST) -> int:
    """Return *value*; ConfigError unless it is an int from *low* to *high*. name: for the error."""
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(f"{name} {value!r} is not a number from {low} to {high}")
    return int(value)


def flag(value: Any, name: str) -> bool:
    """Return *value*; ConfigError unless it is a bool. name: for the error."""
    if type(value) is not bool:
        raise ConfigError(f"{name} {value!r} is neither True nor False")
    return value


def frames(data: Any, most: int) -> list[bytes]:
    """Return a list of frames, at most so *many*; ConfigError if it is none."""
    if type(data) is not list or len(data) > most or not all(type(frame) is bytes for frame in data):
        raise ConfigError(f"{str(data)[:40]} is no list of at most {most} frames")
    return list(data)


class _RestoredError(VnetdpError):
    """An error of another class, from a saved world: its text, and the name of its class."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name = name


_OF_BACKEND: Final = {"BackendError": BackendError, "UnbindError": UnbindError}
_OF_TEXT: Final = {"ConfigError": ConfigError, "EndpointError": EndpointError}


def of_error(error: BaseException | None) -> list[Any] | None:
    """Return an error as plain data."""
    if error is None:
        return None
    name = type(error).__name__
    if isinstance(error, BackendError):
        return [name, error.verb, error.errno, error.index, error.detail]
    if isinstance(error, GuestError):
        return [name, error.queue, error.status]
    return [error.name if isinstance(error, _RestoredError) else name, str(error)]


def to_error(data: Any) -> Exception | None:
    """Return the error that *data* tells of. One whose class is not known here is a VnetdpError with the same text."""
    if data is None:
        return None
    name, *values = copied(data, "an error")
    if name in _OF_BACKEND:
        verb, code, index, detail = values
        return _OF_BACKEND[name](str(verb), int(code), index, str(detail))
    if name == "GuestError":
        queue, status = values
        return GuestError(int(queue), int(status))
    (text,) = values
    return _OF_TEXT[name](str(text)) if name in _OF_TEXT else _RestoredError(str(name), str(text))


def no_difference(name: str, saved: Any, here: dict[str, Any]) -> None:
    """Raise ConfigError, with the first difference, unless a part of a saved world has the same shape as it has here."""
    for key, value in here.items():
        if (found := saved.get(key)) != value:
            raise ConfigError(
                f"{name}: {key} is {found!r:.80} in the saved world and {value!r} in this one: make both worlds alike"
            )
