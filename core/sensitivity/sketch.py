"""What the tokens of a sequence do to a weight together, which a sum over single tokens leaves out.

The Fisher diagonal of a matrix that is used at every position sums up to E‖Σ_t g_t x_tᵀ‖² over whole sequences (with
sampled labels; Optimal Formats for Weight Quantisation, arXiv 2505.12988, takes the per-token sum Σ_t ‖g_t‖² ‖x_t‖²,
which drops the products of different positions). Where attention averages over positions these add up: a value
projection can cost several times what single tokens say. The whole sum is estimated without a weight-sized product: for
random signs Ω (inputs, WIDTH), the mean of ‖Σ_t g_t (x_tᵀ Ω)‖² / WIDTH is ‖Σ_t g_t x_tᵀ‖².

The same pass tells what it costs to scale a row, or the whole matrix: codes that are nearest shrink weights by a few
per cent, and such an error is not independent between the weights of a row. With y = W x, scaling row o by 1 + ε has
the score ε Σ_t g_to y_to, so its Fisher information is the mean of that squared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from core.ids import derived_seed

WIDTH = 16


class Sketch:
    """Random projections for one batch; the signs of a sequence depend on its seed and the width of the input only."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._seeds = list(seeds)
        self._signs: dict[tuple[int, torch.device, torch.dtype], torch.Tensor] = {}

    def fits(self, values: torch.Tensor) -> bool:
        """Whether the first dimension of a layer's input tells the sequences apart."""
        return values.ndim == 3 and values.shape[0] == len(self._seeds)

    def project(self, given: torch.Tensor) -> torch.Tensor:
        """(sequences, tokens, inputs) -> (sequences, tokens, WIDTH)."""
        key = given.shape[-1], given.device, given.dtype
        if key not in self._signs:
            drawn = [_signs(derived_seed(seed, f"signs {key[0]}"), key[0]) for seed in self._seeds]
            self._signs[key] = torch.stack(drawn).to(given.device, given.dtype)
        return torch.bmm(given, self._signs[key])


def matrix_sum(gradient: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """An estimate of the sum over sequences of ‖Σ_t g_t x_tᵀ‖², fp64; (sequences, tokens, outputs or WIDTH)."""
    together = torch.bmm(gradient.to(projection.dtype).transpose(1, 2), projection)
    return together.double().square().sum() / WIDTH


def table_sum(gradient: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The exact sum for an embedding, fp64: gradients of equal tokens of a sequence are added, then squared."""
    total = torch.zeros((), dtype=torch.float64, device=gradient.device)
    for one, ids in zip(gradient, tokens, strict=True):
        _, places = torch.unique(ids, return_inverse=True)
        sums = torch.zeros(int(places.max()) + 1, one.shape[-1], dtype=torch.float64, device=one.device)
        total += sums.index_add_(0, places, one.double()).square().sum()
    return total


def scale_sums(
    gradient: torch.Tensor, answered: torch.Tensor, *, alone: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared scores of scaling each output row (outputs,) and all of them together (), summed over sequences, fp64.

    `gradient`, `answered`: (sequences, tokens, outputs). `alone`: scores of different tokens are independent with zero
    mean, and are squared one by one.
    """
    scores = gradient * answered
    scores = scores.flatten(0, 1) if alone else scores.sum(dim=1)
    whole = scores.sum(dim=1).double().square().sum()
    return scores.square_().sum(dim=0).double(), whole


def table_scale_sums(
    gradient: torch.Tensor, answered: torch.Tensor, tokens: torch.Tensor, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for the rows of an embedding with that many."""
    scores = torch.linalg.vecdot(gradient, answered).double()
    total = torch.zeros(rows, dtype=torch.float64, device=gradient.device)
    for one, ids in zip(scores, tokens, strict=True):
        met, places = torch.unique(ids, return_inverse=True)
        sums = torch.zeros(len(met), dtype=torch.float64, device=one.device).index_add_(0, places, one)
        total.index_add_(0, met, sums.square())
    return total, scores.sum(dim=1).square().sum()


def _signs(seed: int, inputs: int) -> torch.Tensor:
    """(inputs, WIDTH) of -1 and 1, drawn on the CPU so that every device has the same."""
    drawn = torch.randint(2, (inputs, WIDTH), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    return drawn * 2 - 1
