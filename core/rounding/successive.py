"""Successive rounding: columns one after another, each one's error taken up by those that are still to come.

One loop serves GPTQ, LDLQ, Babai's nearest plane and WaterSIC, which differ in the grid and the order of columns
(data-aware rounding, sections 4.1 and 9.1). With `paths` more than one the loop keeps so many candidates for every row
and takes the best of them at the end (the M-algorithm), by the squared error plus `price` times the bits of the codes;
one path decides each column for good. The codes do not depend on the size of blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from core.formats.elements import ElementTable
from core.tensors.kernels import cpu

BLOCK = 32
_RUN = 64  # rows that a thread takes at a time
_NEARBY = 63  # numbers farther out cost as much as this one
Doubles = NDArray[np.float64]
Integers = NDArray[np.int32]


@dataclass(frozen=True)
class Numbers:
    """`numbers`: int32 (places, rows). `gains` (places,): what a number's step is multiplied with when decoded."""

    numbers: Integers
    gains: Doubles


@dataclass(frozen=True)
class Scales:
    """`values` fp64 (blocks, rows), `blocks` (places,): the block of each place."""

    values: Doubles
    blocks: NDArray[np.int64]

    @classmethod
    def ones(cls, rows: int, places: int) -> Scales:
        """Of weights without scales of their own."""
        return cls(np.ones((1, rows)), np.zeros(places, np.int64))

    def of_rows(self, first: int, last: int) -> Scales:
        """Those of some rows."""
        return Scales(np.ascontiguousarray(self.values[:, first:last]), self.blocks)


def round_to_steps(
    targets: torch.Tensor, factor: torch.Tensor, steps: Doubles, scales: Scales, gains: Doubles | None = None
) -> Numbers:
    """Unbounded numbers of `steps` (places,) times scales, for `targets` Y^T (places, rows), which are used up.

    They are decoded `gains` (places,) times as large; None: at the least squares of what a column was rounded from
    (LMMSE, section 4.3).
    """
    from core.rounding.successive_jit import round_numbers

    left, lower = np.ascontiguousarray(targets.numpy()), factor.numpy()
    places, rows = left.shape
    found = Numbers(np.empty((places, rows), np.int32), np.ones(places) if gains is None else gains)
    for low, high in _blocks(places):
        taken = np.empty((high - low, rows))
        widths = (steps, scales.values, scales.blocks)
        round_numbers(left, lower, *widths, gains is None, low, high, found.numbers, found.gains, taken)
        _free_above(left, lower, low, high, taken)
    return found


@dataclass(frozen=True)
class Table:
    """Values for scale 1, ascending, their limits, and which of these belong to the upper value."""

    values: NDArray[np.float32]
    limits: Doubles
    upper_on_tie: NDArray[np.bool_]

    @classmethod
    def of(cls, table: ElementTable) -> Table:
        """That of a format's element."""
        return cls(
            np.array(table.values, np.float32), np.array(table.limits, np.float64), np.array(table.upper_on_tie, bool)
        )


def round_to_table(targets: torch.Tensor, factor: torch.Tensor, table: Table, scales: Scales) -> Integers:
    """Indices into a table (places, rows), for `targets` Y^T (places, rows), which are used up."""
    from core.rounding import successive_jit

    left, lower = np.ascontiguousarray(targets.numpy()), factor.numpy()
    places, rows = left.shape
    found = np.empty((places, rows), np.int32)
    given = (table.values, table.limits, table.upper_on_tie)
    for low, high in _blocks(places):
        taken = np.empty((high - low, rows))
        successive_jit.round_to_table(left, lower, given, scales.values, scales.blocks, low, high, found, taken)
        _free_above(left, lower, low, high, taken)
    return found


def best_paths(
    targets: torch.Tensor,
    factor: torch.Tensor,
    values: Doubles,
    scales: Scales,
    spreads: Doubles,
    price: float,
    paths: int,
) -> Integers:
    """Numbers (places, rows) for `targets` Y^T (places, rows), each decoded as `values` (places,) times its scale.

    `spreads` (places,): standard deviations of the numbers, by which the bits of their code are foretold.
    """
    from core.rounding.paths_jit import best_numbers
    from core.tensors.entropy.matrix import class_costs

    stds, costs = class_costs(_NEARBY)
    classes = np.abs(np.log2(spreads)[:, None] - np.log2(stds)).argmin(axis=1).astype(np.int32)
    wanted, lower = _single(targets.T), _single(factor)
    bits = (costs.astype(np.float32), classes, np.float32(price))
    given = (wanted, lower, values.astype(np.float32), _single(scales.values.T), scales.blocks, bits, paths, BLOCK)
    return _by_rows(lambda rows, found: best_numbers(*given, rows, found), wanted.shape)


def best_indices(targets: torch.Tensor, factor: torch.Tensor, table: Table, scales: Scales, paths: int) -> Integers:
    """Indices into a table (places, rows) by several paths, for `targets` Y^T (places, rows)."""
    from core.rounding import paths_jit

    wanted, lower, limits = _single(targets.T), _single(factor), table.limits.astype(np.float32)
    given = (wanted, lower, table.values, limits, _single(scales.values.T), scales.blocks, paths, BLOCK)
    return _by_rows(lambda rows, found: paths_jit.best_indices(*given, rows, found), wanted.shape)


def _by_rows(work: Callable[[tuple[int, int], Integers], None], shape: tuple[int, ...]) -> Integers:
    """What a loop over rows finds, (places, rows), in runs of rows on all threads."""
    found = np.empty(shape, np.int32)
    cpu.over_pieces(lambda rows: work(rows, found), [(at, min(at + _RUN, shape[0])) for at in range(0, shape[0], _RUN)])
    return np.ascontiguousarray(found.T)


def _single(values: torch.Tensor | Doubles) -> NDArray[np.float32]:
    given = values.numpy() if isinstance(values, torch.Tensor) else values
    return np.ascontiguousarray(given, np.float32)


def _blocks(places: int) -> list[tuple[int, int]]:
    """Places from the last block to the first."""
    return [(max(0, high - BLOCK), high) for high in range(places, 0, -BLOCK)]


def _free_above(left: Doubles, lower: Doubles, low: int, high: int, taken: Doubles) -> None:
    """What a block took, out of all places above it: one product of matrices."""
    if low:
        rest = torch.from_numpy(left[:low])
        rest.addmm_(torch.from_numpy(lower[low:high, :low]).T, torch.from_numpy(taken), alpha=-1)
