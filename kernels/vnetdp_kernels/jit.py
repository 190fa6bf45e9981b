"""`kernel`: the one place that names a Numba option.

Every kernel is lazily compiled, cached on disk, runs without the GIL, and may not allocate. With NUMBA_DISABLE_JIT=1
the same functions run as plain Python.

The cache is stamped with the content of the *whole* package: Numba by itself stamps a kernel with its own file
only, so an edited helper in another file would leave stale machine code behind.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba.core import caching, config

F = TypeVar("F", bound=Callable[..., Any])

_PACKAGE = Path(__file__).parent


def _digest() -> str:
    sha = hashlib.sha256()
    for path in sorted(_PACKAGE.glob("*.py")):
        sha.update(path.name.encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()


_DIGEST = _digest()


class _PackageStamp:
    """Mixed into Numba's cache locators: one stamp for all kernels, and files of their own for checked builds."""

    _lineno: int

    def get_source_stamp(self) -> str:
        return _DIGEST

    def get_disambiguator(self) -> str:
        # NUMBA_BOUNDSCHECK is not part of Numba's cache key, so checked code gets its own file names.
        return f"{self._lineno}b" if config.BOUNDSCHECK else str(self._lineno)


class UserProvidedLocator(_PackageStamp, caching.UserProvidedCacheLocator):
    """NUMBA_CACHE_DIR, where it is set."""


class InTreeLocator(_PackageStamp, caching.InTreeCacheLocator):
    """`__pycache__` beside the kernels, where that is writable."""


class UserWideLocator(_PackageStamp, caching.UserWideCacheLocator):
    """The user's cache folder."""


_LOCATORS = ",".join(f"{__name__}.{c.__name__}" for c in (UserProvidedLocator, InTreeLocator, UserWideLocator))


def _compile(function: F, forceinline: bool) -> F:
    before = config.CACHE_LOCATOR_CLASSES
    config.CACHE_LOCATOR_CLASSES = _LOCATORS
    try:
        options = {
            "cache": True,
            "nogil": True,
            "_nrt": False,
            "error_model": "numpy",
            "forceinline": forceinline,
        }
        return numba.njit(**options)(function)
    finally:
        config.CACHE_LOCATOR_CLASSES = before


def kernel(function: F) -> F:
    """Compile *function* when it is first called; `_nrt=False` makes any allocation in it a compile error."""
    return _compile(function, False)


def inlined(function: F) -> F:
    """A `kernel` that becomes part of its callers: an array argument is seven words, so a call costs more than it does."""
    return _compile(function, True)


def is_compiled(function: Callable[..., Any]) -> bool:
    """True if *function* needs no compilation in this process: it was loaded, compiled, or the JIT is off."""
    return bool(config.DISABLE_JIT) or bool(getattr(function, "signatures", ()))


def cache_is_warm(function: Callable[..., Any]) -> bool:
    """True if machine code of *function* for this version of the package lies in the cache, or none is needed."""
    if is_compiled(function):
        return True
    cache = getattr(function, "_cache", None)
    impl = getattr(cache, "_impl", None)
    if cache is None or impl is None:
        return False
    return bool(cache._cache_file._load_index())
