"""Faults for tests of storage: an `os` for tensorwire.storage that fails on demand and keeps a record."""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from tensorwire.storage import atomic, output, parts

CALLS = ("open", "stat", "pwrite", "preadv", "fsync", "close", "replace", "posix_fadvise")


def replace_os(patch: pytest.MonkeyPatch, fake: Any) -> None:
    """Let the modules of tensorwire.storage use `fake` for `os`."""
    for module in (atomic, output, parts):
        patch.setattr(module, "os", fake)


class FaultyOs:
    """`os`, whose `call` fails: the `first`-th time, or with `lasting` from then on.

    `short`: most bytes of one write or read.
    """

    def __init__(
        self,
        call: str = "",
        first: int = 0,
        error: int = errno.ENOSPC,
        *,
        lasting: bool = False,
        short: int | None = None,
    ) -> None:
        self._call, self._first, self._error, self._lasting, self._short = call, first, error, lasting, short
        self.count = 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return self._wrapped(name, real) if name in CALLS else real

    @property
    def struck(self) -> bool:
        """Whether the fault has come."""
        return self.count >= self._first > 0

    def _wrapped(self, name: str, real: Callable) -> Callable:
        def call(*arguments: Any, **options: Any) -> Any:
            if name == self._call:
                self.count += 1
                if self.count == self._first or (self._lasting and self.count > self._first):
                    if name == "close":  # Linux: the descriptor is gone, whatever close says
                        real(*arguments)
                    raise OSError(self._error, os.strerror(self._error))
            if self._short and name == "pwrite":
                arguments = (arguments[0], arguments[1][: self._short], *arguments[2:])
            if self._short and name == "preadv":
                arguments = (arguments[0], [arguments[1][0][: self._short]], *arguments[2:])
            return real(*arguments, **options)

        return call


@dataclass(frozen=True)
class Op:
    """One change to the disk. Files are numbered as they are made.

    `write` (file, offset, data), `sync` (file), `create` (file, name), `rename` (name, to), `unlink` (name), `sync
    folder`.
    """

    kind: str
    arguments: tuple = ()


@dataclass
class RecordingOs:
    """`os`, with a record of all that would be lost in a crash and of what keeps it from that."""

    ops: list[Op] = field(default_factory=list)
    _files: dict[int, int] = field(default_factory=dict)
    _made: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        fd = os.open(path, flags, mode, dir_fd=dir_fd)
        if flags & os.O_CREAT:
            self._files[fd], self._made = self._made, self._made + 1
            self.ops.append(Op("create", (self._files[fd], path)))
        return fd

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        size = os.pwrite(fd, data, offset)
        self.ops.append(Op("write", (self._files[fd], offset, bytes(data[:size]))))
        return size

    def fsync(self, fd: int) -> None:
        os.fsync(fd)
        self.ops.append(Op("sync", (self._files[fd],)) if fd in self._files else Op("sync folder"))

    def close(self, fd: int) -> None:
        os.close(fd)
        self._files.pop(fd, None)

    def replace(self, name: str, to: str, **fds: int) -> None:
        os.replace(name, to, **fds)
        self.ops.append(Op("rename", (name, to)))

    def unlink(self, name: str, **fds: int) -> None:
        os.unlink(name, **fds)
        self.ops.append(Op("unlink", (name,)))
