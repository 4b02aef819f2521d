"""Tensors put aside until a backward pass comes for them: in memory up to a limit, in a file beyond it.

Promise: what is taken is what was put, bit by bit; a tensor that was written to meanwhile is refused. The file has no
name and is gone with its shelf. It is written and read, not mapped: what lies in it takes no memory of the process.
"""

from __future__ import annotations

import errno
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from core.errors import BitmillError, OutOfDisk, UnsupportedArchitecture

MEMORY_BYTES = 128 << 20


@dataclass
class Kept:
    """A tensor on a shelf: itself, and the version it had, or its place in the file."""

    tensor: torch.Tensor | None
    version: int
    shape: torch.Size
    dtype: torch.dtype
    place: int = 0


class Shelf:
    """A context manager. `folder`: where its file may lie; `limit`: bytes in memory."""

    def __init__(self, folder: Path, limit: int = MEMORY_BYTES) -> None:
        self._folder, self._free, self._end = folder, limit, 0
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._file = self._stack.enter_context(tempfile.TemporaryFile(dir=self._folder, buffering=0))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def put(self, tensor: torch.Tensor) -> Kept:
        """Keep a tensor of the CPU, without its history. OutOfDisk when the file cannot grow."""
        kept = Kept(tensor.detach(), tensor._version, tensor.shape, tensor.dtype)
        if tensor.nbytes <= self._free:
            self._free -= tensor.nbytes
            return kept
        kept.tensor, kept.place = None, self._end
        self._write(_bytes_of(tensor.detach().contiguous()))
        return kept

    def take(self, kept: Kept) -> torch.Tensor:
        """The tensor, which the shelf lets go of; UnsupportedArchitecture when somebody has written to it."""
        if (tensor := kept.tensor) is not None:
            if tensor._version != kept.version:
                raise UnsupportedArchitecture("the network overwrites what it has called a block with")
            self._free += tensor.nbytes
            kept.tensor = None
            return tensor
        tensor = torch.empty(kept.shape, dtype=kept.dtype)
        self._file.seek(kept.place)
        data = _bytes_of(tensor)
        while len(data):  # the system reads at most 2 GiB at once
            if not (read := self._file.readinto(data)):
                raise BitmillError("a file of activations ends early", where=str(self._folder))
            data = data[read:]
        return tensor

    def _write(self, data: memoryview) -> None:
        try:
            self._file.seek(self._end)
            while len(data):
                written = self._file.write(data)
                self._end, data = self._end + written, data[written:]
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OutOfDisk("no room for the activations of a backward pass", where=str(self._folder)) from error
            raise


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data
