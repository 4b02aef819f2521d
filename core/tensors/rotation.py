"""Rotations of weights before quantisation: Walsh-Hadamard along rows, and random ones of both sides by a seed.

A rotation mixes many weights into each one, so that their distribution comes close to Normal, for which fixed-length
codes are best (optimal formats, sections 2 and 11); it does not change the squared error. Tensors are matrices of their
last dimension, the input dimension of a linear layer; the other side is its output dimension.

Promise: an orthogonal transform and its inverse, exact to rounding (relative error below 1e-6), and the same bits on
every device and for any number of threads: only additions, subtractions and products with constants, in a fixed order,
and signs that are integer arithmetic. Memory besides the fp32 matrix is that of `PIECE` elements or 32 rows or columns;
names that end in an underscore work in place, on a contiguous fp32 tensor. Which tensors are rotated, and with which
seed, is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray

from core.formats.stored import matrix_shape
from core.tensors.blocks import PIECE

_MIXES_WELL = 64  # weights in one sum, from which on blocks of one size are kept
_VOCABULARY = 8  # times the columns: so many rows are tokens, and no output dimension of a layer
_LEAST_WIDTH = 32  # rows or columns that are in work at once
_GAMMA = 0x9E3779B97F4A7C15
_WORD = 1 << 64
_ROWS, _COLUMNS = 1, 2


def hadamard_blocks(size: int) -> tuple[int, ...]:
    """Sizes, powers of two, of the diagonal blocks of the transform of a dimension of `size`; they add up to it.

    The largest power of two that divides the size, repeated, where it is at least 64: each result is then a sum of as
    many weights as any other, and equal blocks are one batch. Otherwise the binary digits of the size, largest first:
    the first block holds more than half of the weights, and only a short tail is mixed less (100 = 64 + 32 + 4).
    """
    divisor = size & -size
    if divisor >= _MIXES_WELL:
        return (divisor,) * (size // divisor)
    return tuple(1 << bit for bit in reversed(range(size.bit_length())) if size >> bit & 1)


def rotate_rows(weight: torch.Tensor) -> torch.Tensor:
    """x H along the last dimension, H block-diagonal with blocks H_n / sqrt(n) (Sylvester's order): a new fp32 tensor.

    H is symmetric and orthogonal, so the same call takes it back.
    """
    return rotate_rows_(_fp32_copy(weight))


def rotate_rows_(weight: torch.Tensor) -> torch.Tensor:
    """`rotate_rows` in place."""
    _along_rows_(_matrix(weight), _hadamard_)
    return weight


@dataclass(frozen=True)
class RandomRotation:
    """Q_out W Q_in with random orthogonal matrices that follow from `seed`, any integer, taken modulo 2^64.

    Q of a dimension that is one Hadamard block: random signs, then the block. Of several blocks: signs and blocks, then
    the results of each block dealt out evenly over the dimension, signs and blocks again; with one round each block
    would keep the variance that its weights have. Two rounds mix as well as a dense random matrix does.
    `both_sides`: False leaves the output dimension alone, such as a vocabulary.
    """

    seed: int
    both_sides: bool = True

    @classmethod
    def of(cls, seed: int, shape: tuple[int, ...]) -> RandomRotation:
        """For a tensor of that shape as a matrix; a vocabulary, 8 times as many rows as columns, is left alone."""
        rows, columns = matrix_shape(shape)
        return cls(seed, both_sides=rows < _VOCABULARY * columns)

    def rotate(self, weight: torch.Tensor) -> torch.Tensor:
        """A new fp32 tensor of the same shape."""
        return self.rotate_(_fp32_copy(weight))

    def restore(self, rotated: torch.Tensor) -> torch.Tensor:
        """The inverse: a new fp32 tensor of the same shape."""
        return self.restore_(_fp32_copy(rotated))

    def rotate_inputs(self, inputs: torch.Tensor) -> torch.Tensor:
        """What has the input dimension as its last, turned as the rows of a weight are: a new fp32 tensor."""
        return self._rotate_inputs_(_fp32_copy(inputs))

    def rotate_outputs(self, outputs: torch.Tensor) -> torch.Tensor:
        """What has the output dimension as its first, turned as the columns of a weight are: a new fp32 tensor."""
        return self._rotate_outputs_(_fp32_copy(outputs))

    def rotate_(self, weight: torch.Tensor) -> torch.Tensor:
        """`rotate` in place."""
        return self._rotate_outputs_(self._rotate_inputs_(weight))

    def _rotate_inputs_(self, values: torch.Tensor) -> torch.Tensor:
        matrix = _matrix(values)
        _along_rows_(matrix, _Mixing.of(self.seed, _COLUMNS, matrix.shape[1], values.device).apply)
        return values

    def _rotate_outputs_(self, values: torch.Tensor) -> torch.Tensor:
        matrix = _matrix(values)
        if self.both_sides:
            _along_columns_(matrix, _Mixing.of(self.seed, _ROWS, matrix.shape[0], values.device).apply)
        return values

    def restore_(self, rotated: torch.Tensor) -> torch.Tensor:
        """`restore` in place."""
        matrix = _matrix(rotated)
        if self.both_sides:
            _along_columns_(matrix, _Mixing.of(self.seed, _ROWS, matrix.shape[0], rotated.device).undo)
        _along_rows_(matrix, _Mixing.of(self.seed, _COLUMNS, matrix.shape[1], rotated.device).undo)
        return rotated


@dataclass(frozen=True)
class _Mixing:
    """The random transform of one dimension: `signs` (size, 1) and Hadamard for each round, `order` between rounds."""

    signs: tuple[torch.Tensor, ...]
    order: torch.Tensor
    inverse_order: torch.Tensor

    @classmethod
    def of(cls, seed: int, side: int, size: int, device: torch.device) -> _Mixing:
        """Stream 2 side + round of the seed gives the signs of a round (0, 1)."""
        rounds = 1 if len(hadamard_blocks(size)) <= 1 else 2
        signs = tuple(_signs(seed, 2 * side + step, size).to(device)[:, None] for step in range(rounds))
        order = _dealt(size).to(device)
        return cls(signs, order, order.argsort())

    def apply(self, vectors: torch.Tensor) -> torch.Tensor:
        """Columns of (size, k), which are used up, transformed."""
        for step, signs in enumerate(self.signs):
            vectors = vectors.index_select(0, self.order) if step else vectors
            vectors = _hadamard_(vectors.mul_(signs))
        return vectors

    def undo(self, vectors: torch.Tensor) -> torch.Tensor:
        """The inverse of `apply`."""
        for step, signs in reversed(tuple(enumerate(self.signs))):
            vectors = _hadamard_(vectors).mul_(signs)
            vectors = vectors.index_select(0, self.inverse_order) if step else vectors
        return vectors


def random_words(seed: int, stream: int, count: int) -> NDArray[np.uint64]:
    """Word i = mix(mix(seed + stream g) + (i + 1) g) modulo 2^64, g = 0x9E3779B97F4A7C15, mix that of splitmix64.

    So a stream is the output of splitmix64 started at mix(seed + stream g): Steele, Lea and Flood, OOPSLA 2014.
    """
    start = _mix(np.array([(seed + stream * _GAMMA) % _WORD], dtype=np.uint64))
    return splitmix64(int(start[0]), count)


def splitmix64(state: int, count: int) -> NDArray[np.uint64]:
    """The first `count` outputs of splitmix64 from `state`; each follows from its number alone."""
    numbers = np.arange(1, count + 1, dtype=np.uint64)
    return _mix(numbers * np.uint64(_GAMMA) + np.uint64(state))


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _dealt(size: int) -> torch.Tensor:
    """The positions of all blocks, int64 (size,), ordered by how far into its block each one is."""
    blocks = hadamard_blocks(size)
    depths = [(torch.arange(length, dtype=torch.float64) + 0.5) / length for length in blocks]
    return torch.cat(depths).argsort(stable=True) if blocks else torch.zeros(0, dtype=torch.int64)


def _signs(seed: int, stream: int, size: int) -> torch.Tensor:
    """fp32 (size,): -1 where the highest bit of the stream's word is 1."""
    highest = (random_words(seed, stream, size) >> np.uint64(63)).astype(np.float32)
    return torch.from_numpy(1 - 2 * highest)


def _hadamard_(vectors: torch.Tensor) -> torch.Tensor:
    """The blocks of the transform applied to columns of (size, k), contiguous fp32, in place."""
    size, width = vectors.shape
    start = 0
    for length, group in groupby(hadamard_blocks(size)):
        count = len(tuple(group))
        part = vectors[start : start + count * length]
        half = 1
        while half < length:
            pairs = part.view(count * length // (2 * half), 2, half * width)
            upper, lower = pairs[:, 0], pairs[:, 1]
            difference = upper - lower
            upper.add_(lower)
            lower.copy_(difference)
            half *= 2
        part.mul_(1 / math.sqrt(length))
        start += count * length
    return vectors


def _along_rows_(matrix: torch.Tensor, transform: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Transform the rows, some at a time and transposed, so that butterflies run over neighbours in memory."""
    rows, columns = matrix.shape
    step = max(_LEAST_WIDTH, PIECE // max(columns, 1))
    for start in range(0, rows if columns else 0, step):
        part = matrix[start : start + step]
        part.copy_(transform(part.t().clone(memory_format=torch.contiguous_format)).t())


def _along_columns_(matrix: torch.Tensor, transform: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Transform the columns, some at a time."""
    rows, columns = matrix.shape
    step = max(_LEAST_WIDTH, PIECE // max(rows, 1))
    for start in range(0, columns if rows else 0, step):
        part = matrix[:, start : start + step]
        part.copy_(transform(part.clone(memory_format=torch.contiguous_format)))


def _fp32_copy(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _matrix(weight: torch.Tensor) -> torch.Tensor:
    """A view of the tensor as rows of its last dimension; the tensor is contiguous."""
    return weight.view(matrix_shape(tuple(weight.shape)))
