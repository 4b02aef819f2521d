"""Successive rounding: columns one after another, each one's error taken up by those that are still to come.

One loop serves GPTQ, LDLQ, Babai's nearest plane and WaterSIC, which differ in the grid and the order of columns
(data-aware rounding, sections 4.1 and 9.1). With `paths` more than one the loop keeps so many candidates for every row
and takes the best of them at the end (the M-algorithm), by the squared error plus `price` times the bits of the codes;
one path decides each column for good. The codes do not depend on the size of blocks. Tensors on a GPU are rounded there
where `core.rounding.gpu_successive` takes them; the search of several paths is the CPU's alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from core.rounding.levels import Indices, Levels
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
    (LMMSE, section 4.3). The targets and the factor are both fp64 or both fp32.
    """
    if targets.device.type != "cpu":
        from core.rounding import gpu_successive

        if (numbers := gpu_successive.round_to_steps(targets, factor, steps, scales, gains)) is not None:
            return numbers
        targets, factor = targets.cpu(), factor.cpu()
    from core.rounding.successive_jit import round_numbers

    left, lower = np.ascontiguousarray(targets.numpy()), factor.numpy()
    places, rows = left.shape
    found = Numbers(np.empty((places, rows), np.int32), np.ones(places) if gains is None else gains)
    widths = (steps, scales.values.astype(left.dtype, copy=False), scales.blocks)
    for low, high in _blocks(places):
        taken = np.empty((high - low, rows), left.dtype)
        round_numbers(left, lower, *widths, gains is None, low, high, found.numbers, found.gains, taken)
        _free_above(left, lower, low, high, taken)
    return found


def spread(wanted: torch.Tensor, weights: torch.Tensor, ratios: torch.Tensor, levels: Levels) -> Indices:
    """Places first to last rounded at what is wanted of them, the error of t times ratios[t, s] added to later s.

    Both transposed, (places, rows), fp64; `wanted` is used up, an error is the weight less what is decoded. By the
    covariance over its diagonal it is error diffusion; by its factor over that one's, GPTQ. Indices (places, rows).
    """
    if wanted.device.type != "cpu":
        from core.rounding import gpu_successive

        if (indices := gpu_successive.spread(wanted, weights, ratios, levels)) is not None:
            return indices
        wanted, weights, ratios = wanted.cpu(), weights.cpu(), ratios.cpu()
    from core.rounding.diffusion_jit import spread_block

    places, rows = wanted.shape
    found, errors = np.empty((places, rows), np.int32), np.empty((BLOCK, rows))
    scales, given = np.ascontiguousarray(levels.scales.T), (wanted.numpy(), weights.numpy(), ratios.numpy())
    for low in range(0, places, BLOCK):
        high = min(low + BLOCK, places)
        here = errors[: high - low]
        spread_block(*given, scales, levels.blocks, levels.rule, low, high, found, here)
        if high < places:
            wanted[high:].addmm_(ratios[low:high, high:].T, torch.from_numpy(here))
    return found


@dataclass(frozen=True)
class Search:
    """Several paths: how many, and what a bit costs; `spreads` (places,): standard deviations of whole numbers, by
    which the bits of their code are foretold.
    """

    paths: int
    price: float
    spreads: Doubles


def best_numbers(
    targets: torch.Tensor, factor: torch.Tensor, values: Doubles, scales: Scales, search: Search
) -> Integers:
    """Numbers (places, rows) for `targets` Y^T (places, rows), each decoded as `values` (places,) times its scale."""
    from core.tensors.entropy.matrix import class_costs

    stds, bits = class_costs(_NEARBY)
    classes = np.abs(np.log2(search.spreads)[:, None] - np.log2(stds)).argmin(axis=1).astype(np.int32)
    nothing = np.zeros(0, np.float32)
    coding = (bits.astype(np.float32), classes, search.price)
    return _best(targets, factor, values, scales, coding, (nothing, nothing), search.paths)


def best_indices(targets: torch.Tensor, factor: torch.Tensor, levels: Levels, paths: int) -> Integers:
    """Indices of levels (places, rows) by several paths, for `targets` Y^T (places, rows)."""
    scales = Scales(levels.scales.T.astype(np.float64), levels.blocks)
    places = np.zeros(len(targets), np.int32)
    table = (levels.values, levels.limits.astype(np.float32))
    return _best(
        targets, factor, np.ones(len(targets)), scales, (np.zeros((1, 1), np.float32), places, 0.0), table, paths
    )


def _best(
    targets: torch.Tensor,
    factor: torch.Tensor,
    values: Doubles,
    scales: Scales,
    coding: tuple[NDArray[np.float32], Integers, float],
    table: tuple[NDArray[np.float32], NDArray[np.float32]],
    paths: int,
) -> Integers:
    """By the compiled search, in units of the factor and of the values, so that squares stay within fp32."""
    from core.rounding.paths_jit import best_codes

    root = float(factor.diagonal().mean()) if len(factor) else 1.0
    value = float(np.abs(values).max(initial=0.0) * np.abs(scales.values).max(initial=0.0)) or 1.0
    wanted, lower = _single(targets.T / (root * value)), _single(factor / root)
    bits, classes, price = coding
    costs = (bits, classes, np.float32(price / (root * value) ** 2))
    decoding = (values.astype(np.float32), _single(scales.values.T / value), scales.blocks, lower.diagonal().copy())
    given = (wanted, lower, decoding, costs, table)
    found = np.empty(wanted.shape, np.int32)
    runs = [(at, min(at + _RUN, len(wanted))) for at in range(0, len(wanted), _RUN)]
    cpu.over_pieces(lambda rows: best_codes(*given, paths, rows, found), runs)
    return np.ascontiguousarray(found.T)


def _single(values: torch.Tensor | Doubles) -> NDArray[np.float32]:
    given = values.cpu().numpy() if isinstance(values, torch.Tensor) else values
    return np.ascontiguousarray(given, np.float32)


def _blocks(places: int) -> list[tuple[int, int]]:
    """Places from the last block to the first."""
    return [(max(0, high - BLOCK), high) for high in range(places, 0, -BLOCK)]


def _free_above(left: Doubles, lower: Doubles, low: int, high: int, taken: Doubles) -> None:
    """What a block took, out of all places above it: one product of matrices."""
    if low:
        rest = torch.from_numpy(left[:low])
        rest.addmm_(torch.from_numpy(lower[low:high, :low]).T, torch.from_numpy(taken), alpha=-1)
