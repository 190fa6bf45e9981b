"""`kernel`: the one place that names a Numba option.

Every kernel is lazily compiled, cached on disk (`cache.py`), runs without the GIL, and may not allocate. With
NUMBA_DISABLE_JIT=1 the same functions run as plain Python.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba.core import config, sigutils
from numba.core.ccallback import CFunc

from .cache import KernelCache

F = TypeVar("F", bound=Callable[..., Any])


def _compile(function: F, forceinline: bool) -> F:
    options = {"nogil": True, "_nrt": False, "error_model": "numpy", "forceinline": forceinline}
    dispatcher = numba.njit(**options)(function)
    if not config.DISABLE_JIT:
        dispatcher._cache = KernelCache(function)
    return dispatcher


def kernel(function: F) -> F:
    """Compile *function* when it is first called; `_nrt=False` makes any allocation in it a compile error."""
    return _compile(function, False)


def inlined(function: F) -> F:
    """A `kernel` that becomes part of its callers: an array argument is seven words, so a call costs more than it does."""
    return _compile(function, True)


def callback(signature: Any) -> Callable[[Callable[..., None]], Any]:
    """Compile a function at once, for C to call it at its `address`."""

    def compiled(function: Callable[..., None]) -> Any:
        made: Any = CFunc(function, sigutils.normalize_signature(signature), {}, {})
        made._cache = KernelCache(function)
        made.compile()
        return made

    return compiled


def is_compiled(function: Callable[..., Any]) -> bool:
    """True if *function* needs no compilation in this process: it was loaded, compiled, or the JIT is off."""
    return bool(config.DISABLE_JIT) or bool(getattr(function, "signatures", ()))


def cache_is_warm(function: Callable[..., Any]) -> bool:
    """True if machine code of *function* for this version of the package lies in the cache, or none is needed."""
    return is_compiled(function) or found(function) is not None


def found(function: Callable[..., Any]) -> Path | None:
    """Return the folder of the cache that has machine code of *function* for this version of the package."""
    cache = getattr(function, "_cache", None)
    return cache.found if isinstance(cache, KernelCache) else None
