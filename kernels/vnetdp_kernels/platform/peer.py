"""Kicks and calls on a peer's descriptors, which no call of ours may wait on.

A peer shares an eventfd or a pipe with us, flags and all: it can make it blocking, and fill or empty it between a poll()
and the call that follows. So each is one system call that never waits. A read and a pipe's write have RWF_NOWAIT. An
eventfd's write has not, but the kernel itself signals an eventfd without waiting when asynchronous I/O is done: here
the I/O is an empty read, which is done, or has failed, at once.

Where a kernel has neither, poll() comes first; a thread caught in between is let out by `interrupt`.
"""

from __future__ import annotations

import ctypes
import os
import platform

import numpy as np

from .atomic import Words, address
from .io import EAGAIN, EOPNOTSUPP, POLLOUT, poll, read, readv_nowait, syscall, write, writev_nowait
from .jit import kernel

_X86_64 = platform.machine() == "x86_64"
_IO_SETUP, _IO_GETEVENTS, _IO_SUBMIT = (206, 208, 209) if _X86_64 else (0, 4, 2)
_EVENTS = 32  # completions that are taken off the context at once
_EVENT_WORDS = 4  # a struct io_event
_FLAG_RESFD = 1

# An array of `tell_words`. The first word is the count that is written, for `io.signal` too.
_CONTEXT = 1  # of asynchronous I/O, 0 = there is none
_IOCB_LIST = 2
_IOCB = 3  # a struct iocb, eight words
_IOVEC = 11
_TOLD = 13  # completions
_WORDS = _TOLD + _EVENTS * _EVENT_WORDS

TAKE_AT = 13  # where in an array of `tell_words` there is room for `take`

_contexts: dict[int, int] = {}  # by process: a child's has no part in its parent's


def _context() -> int:
    """Return this process's context of asynchronous I/O, made once; 0 if the kernel gives none."""
    pid = os.getpid()
    if pid not in _contexts:
        made = ctypes.c_ulong(0)
        failed = syscall(_IO_SETUP, _EVENTS, ctypes.addressof(made), 0, 0, 0)
        _contexts[pid] = 0 if failed else made.value
    return _contexts[pid]


def tell_words() -> Words:
    """Return the array that `tell` needs, never shared between threads."""
    words: Words = np.zeros(_WORDS, np.int64)
    words[0] = 1
    words[_CONTEXT] = _context()
    return words


@kernel
def _submit(fd: int, one: Words) -> int:
    """Have the kernel signal the eventfd *fd* as the end of an empty read; 1, or -errno: -EINVAL if it is no eventfd."""
    one[_IOCB_LIST] = address(one, _IOCB)
    one[_IOCB + 2] = fd << 32  # aio_fildes, IOCB_CMD_PREAD; an eventfd fails a read of no bytes at once
    one[_IOCB + 3] = address(one, _TOLD)
    one[_IOCB + 7] = _FLAG_RESFD | fd << 32
    return syscall(_IO_SUBMIT, one[_CONTEXT], 1, address(one, _IOCB_LIST), 0, 0)


@kernel
def tell(fd: int, one: Words, pollfds: Words) -> int:
    """Add 1 to a peer's eventfd, or write as much into its pipe; never waits: a full one has said enough.

    one: of `tell_words`; pollfds: scratch. Returns 0, or -errno of a descriptor that can't be written to.
    """
    n = -EAGAIN
    if one[_CONTEXT]:
        n = _submit(fd, one)
        if n == -EAGAIN:
            syscall(_IO_GETEVENTS, one[_CONTEXT], 0, _EVENTS, address(one, _TOLD), 0)
            n = _submit(fd, one)
    if n == 1:
        return 0
    one[_IOVEC] = address(one, 0)
    one[_IOVEC + 1] = 8
    n = writev_nowait(fd, one, _IOVEC)
    if n == -EOPNOTSUPP:
        pollfds[0, 0] = fd | POLLOUT << 32
        n = write(fd, one, 0, 8) if poll(pollfds[0], 1, 0) > 0 else -EAGAIN
    return 0 if n >= 0 or n == -EAGAIN else n


@kernel
def take(fd: int, scratch: Words, at: int) -> int:
    """Take the count off a peer's eventfd, or 8 bytes out of its pipe, after poll(); never waits.

    scratch: three words from *at*. Returns the bytes read, 0 where nothing will ever come again, -EAGAIN if another
    reader took it, or another -errno.
    """
    scratch[at + 1] = address(scratch, at)
    scratch[at + 2] = 8
    n = readv_nowait(fd, scratch, at + 1)
    if n == -EOPNOTSUPP:
        n = read(fd, scratch, at, 8)
    return n
