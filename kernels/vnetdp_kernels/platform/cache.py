"""Compiled kernels on disk. The cache saves time, and is never in the way: a file that can't be used is made anew.

Not Numba's own cache: that fails for good on a file that was cut short, loads machine code that any user put there,
takes a folder that it can't write to for none, and refuses to make a kernel if there is no folder.

A kernel has a file for each signature, and an index that says which. Each begins with a digest of itself, of the whole
package, and of Numba's version: Numba stamps a kernel with its own file only, so an edited helper in another file would
leave stale machine code behind.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import stat
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core import compiler, config, serialize
from numba.misc.appdirs import AppDirs

_PACKAGE = Path(__file__).parents[1]
_IN_TREE = _PACKAGE / "__pycache__"
_DIGEST_SIZE = hashlib.sha256().digest_size
_READABLE, _SEARCHABLE = 0o644, 0o755  # machine code is no more secret than its source


def _digest() -> bytes:
    sha = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for path in sorted(_PACKAGE.rglob("*.py")):
        sha.update(str(path.relative_to(_PACKAGE)).encode() + b"\0" + path.read_bytes())
    return sha.digest()


_STAMP = _digest()

failures: dict[Path, OSError] = {}  # the folders that took no compiled kernel in this process, and why


class Folder:
    """A folder that may hold compiled kernels."""

    def __init__(self, path: Path, public: bool = True) -> None:
        """*public*: folders that are made for it are readable by every user, with any umask."""
        self.path = path
        self._public = public

    def prepare(self) -> None:
        """Make the folder if need be; OSError if it can't be written to."""
        missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            if self._public:
                path.chmod(_SEARCHABLE)
        status = self.path.stat()
        others = _SEARCHABLE & 0o077
        if self.path == _IN_TREE and status.st_uid == os.geteuid() and status.st_mode & others != others:
            self.path.chmod(stat.S_IMODE(status.st_mode) | others)  # Python made it, and heeded the umask
        if not self._trusts(status):
            raise PermissionError(f"it belongs to user {status.st_uid}, who could put other machine code there")
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise PermissionError("no right to write there")

    def _trusts(self, status: os.stat_result) -> bool:
        """Return whether a file or folder belongs to a trusted user; beside the sources, every user is trusted."""
        owners = {0, os.geteuid(), _PACKAGE.stat().st_uid}
        return self.path == _IN_TREE or status.st_uid in owners

    def read(self, name: str, key: str) -> bytes | None:
        """Return the bytes that `write` wrote; None if they are missing, damaged, not trusted, or out of date."""
        try:
            with open(self.path / name, "rb", opener=_no_wait) as file:
                status = os.fstat(file.fileno())
                others_write = self.path != _IN_TREE and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
                if not stat.S_ISREG(status.st_mode) or others_write or not self._trusts(status):
                    return None
                sealed = file.read()
        except OSError as e:
            if e.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise  # it may well be there: to compile it anew would take long, and run out of the same
            return None
        data = sealed[_DIGEST_SIZE:]
        return data if sealed[:_DIGEST_SIZE] == _seal(key, data) else None

    def write(self, name: str, key: str, data: bytes) -> None:
        """Put a whole file in place, or nothing."""
        fd, temporary = tempfile.mkstemp(prefix=f"{name}.", suffix=".tmp", dir=self.path)
        try:
            with open(fd, "wb") as file:
                os.fchmod(fd, _READABLE)
                file.write(_seal(key, data) + data)
            Path(temporary).replace(self.path / name)
        except BaseException:
            with suppress(OSError):
                Path(temporary).unlink()
            raise


def _no_wait(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _seal(key: str, data: bytes) -> bytes:
    return hashlib.sha256(b"\0".join((_STAMP, key.encode(), data))).digest()


def folders() -> list[Folder]:
    """Return the folders of compiled kernels, best first."""
    return _folders(config.CACHE_DIR)


@cache
def _folders(asked: str) -> list[Folder]:
    """NUMBA_CACHE_DIR alone (*asked*), if it can be written to; or with it those beside the sources, and the user's."""
    # Numba's name for us in a folder that packages share.
    name = f"{_PACKAGE.name}_{hashlib.sha1(str(_PACKAGE.absolute()).encode()).hexdigest()}"
    found = [Folder(_IN_TREE)]
    users = Path(AppDirs("numba", appauthor=False).user_cache_dir)
    if users.is_absolute():  # it is "~/.cache" for a user without a home
        found.append(Folder(users / name, public=False))
    if asked:
        first = Folder(Path(asked).absolute() / name)
        try:
            first.prepare()
        except OSError as e:
            failures[first.path] = e
            found.insert(0, first)
        else:
            return [first]
    return found


def writable() -> Folder | None:
    """Return the first folder that compiled kernels can be written into, made if need be; None if there is none."""
    for folder in folders():
        try:
            folder.prepare()
        except OSError as e:
            failures[folder.path] = e
        else:
            return folder
    return None


def trouble() -> str:
    """Return why compiled kernels are not kept, or not in NUMBA_CACHE_DIR, and the next step; "" if they are."""
    writable()
    found = [folder.path for folder in folders()]
    if all(path in failures for path in found):
        why = "; ".join(f"{path}: {failures[path].strerror or failures[path]}" for path in found)
        fix = "set NUMBA_CACHE_DIR to a writable folder with 10 MB of room"
        return f"compiled kernels can't be kept, so each run compiles them anew; {fix} ({why})"
    return passed_over()


def passed_over(found: Path | None = None) -> str:
    """Return why NUMBA_CACHE_DIR can't be used, and the folder in its place; "" if it can, or is not set.

    *found*: the folder that compiled kernels are loaded from, if there is one.
    """
    first, *others = (folder.path for folder in folders())
    if not config.CACHE_DIR or not others:
        return ""
    why = f"{first}: {failures[first].strerror or failures[first]}"
    kept = next((path for path in others if path not in failures), others[0])
    instead = f"kept in {kept}" if found is None else f"taken from {found}"
    return f"NUMBA_CACHE_DIR can't be used, so compiled kernels are {instead} ({why})"


class KernelCache:
    """The compiled code of one kernel, as its dispatcher asks for it and hands it in (see numba.core.caching._Cache)."""

    def __init__(self, function: Callable[..., Any]) -> None:
        checked = "b" if config.BOUNDSCHECK else ""  # NUMBA_BOUNDSCHECK is no part of Numba's key
        code = function.__code__
        name = function.__module__.removeprefix(f"{_PACKAGE.name}.")
        if name.rpartition(".")[2] != function.__qualname__:  # the kernel that a module is named for is not named twice
            name = f"{name}.{function.__qualname__}"
        python = f"py{sys.version_info[0]}{sys.version_info[1]}{getattr(sys, 'abiflags', '')}"
        self._base = f"{name}-{code.co_firstlineno}{checked}.{python}"
        self._index = f"{self._base}.nbi"

    @property
    def cache_path(self) -> str | None:
        folder = writable()
        return str(folder.path) if folder else None

    def _keys(self, folder: Folder) -> list[str]:
        index = folder.read(self._index, self._index)
        return json.loads(index) if index else []

    @property
    def found(self) -> Path | None:
        """The folder that has machine code of this version of the package, whatever its signature."""
        return next((folder.path for folder in folders() if self._keys(folder)), None)

    def _data_name(self, key: str) -> str:
        return f"{self._base}.{hashlib.sha256(key.encode()).hexdigest()[:12]}.nbc"

    def load_overload(self, signature: Any, context: Any) -> Any:
        context.refresh()
        key = _key(signature, context.codegen())
        for folder in folders():
            if key in self._keys(folder):
                data = folder.read(self._data_name(key), key)
                if data is not None:
                    return compiler.CompileResult._rebuild(context, *pickle.loads(data))
        return None

    def save_overload(self, signature: Any, result: Any) -> None:
        if result.library.has_dynamic_globals:
            return  # addresses of this process
        key = _key(signature, result.library.codegen)
        data = serialize.dumps(result._reduce())
        for folder in folders():
            try:
                folder.prepare()
                folder.write(self._data_name(key), key, data)
                keys = json.dumps(sorted({*self._keys(folder), key}))
                folder.write(self._index, self._index, keys.encode())
            except OSError as e:
                failures[folder.path] = e
            else:
                return

    def flush(self) -> None:
        """Remove the index on disk."""
        for folder in folders():
            with suppress(OSError):
                (folder.path / self._index).unlink(missing_ok=True)


def _key(signature: Any, codegen: Any) -> str:
    return repr((signature, codegen.magic_tuple()))
