"""Tensors out of a checkpoint, one at a time and without a second copy.

A tensor is read into one buffer with pread and viewed in place; when it is let go its memory is free again. So a reader
of any checkpoint needs memory for the tensors that its caller holds, not for the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from core.errors import InvalidCheckpoint
from core.storage.checkpoint import CheckpointIndex
from core.tensors.dtypes import TORCH_DTYPES


def tensor_from_bytes(data: bytearray, dtype: str, shape: tuple[int, ...], where: str = "") -> torch.Tensor:
    """The buffer itself as a tensor of that dtype; InvalidCheckpoint for one that torch does not have."""
    if dtype not in TORCH_DTYPES:
        raise InvalidCheckpoint(f"dtype {dtype} cannot be computed with", where=where)
    if not data:
        return torch.empty(shape, dtype=TORCH_DTYPES[dtype])
    return torch.frombuffer(data, dtype=TORCH_DTYPES[dtype]).reshape(shape)


def read_tensor(index: CheckpointIndex, name: str) -> torch.Tensor:
    """The tensor in its stored dtype and shape, on the CPU."""
    entry = index.tensors[name]
    return tensor_from_bytes(index.read_tensor_bytes(name), entry.dtype, entry.shape, name)


def iter_tensors(index: CheckpointIndex, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The named tensors in that order, each read when it is asked for."""
    return ((name, read_tensor(index, name)) for name in names)
