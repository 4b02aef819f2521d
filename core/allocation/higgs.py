"""Allocation `higgs`: the least KL divergence that the linearity theorem predicts within the budget.

Near a minimum, and for small errors without a direction, KL grows by sum a_l t_l^2, t_l^2 being the squared error of
tensor l relative to its squared norm, and a_l does not depend on the quantiser (HIGGS, Malinovskii and others, arXiv
2411.17525). So a_l is measured: one tensor at a time gets Normal noise of exactly t^2, a new one for each window of the
calibration text and at levels of the linear range in turn, and the KL is fitted through the origin, a_l = sum KL t^2 /
sum t^4. That is one forward pass for each tensor and window; a few windows do, because what spreads is the noise: where
a few directions of a tensor matter, one draw is 20 % off. The network is changed in place, so there is one in memory,
and KL is exactly 0 without noise; where weights are bf16, rounding them adds about 1e-6 to t^2.

2 a_l / ||W_l||^2 takes the place of the mean Fisher information of a weight, of which it is the measured counterpart
(KL = 1/2 sum F e^2), and everything else is that of allocation `fisher`: t^2 of each format by the real encoder, the
solver, and what happens to tensors about which nothing is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from core.allocation.forecast import Evidence
from core.allocation.space import Group
from core.errors import NonFiniteWeights
from core.evaluation.divergence import float32_head, kl_from_logits
from core.ids import derived_seed
from core.networks import next_token_logits

LEVELS = (0.001, 0.0025, 0.005)  # of t^2
SEQUENCES = 8
_TILE_ELEMENTS = 1 << 20  # of logits worked on at a time
_DIGITS = 9


@dataclass(frozen=True)
class Linear:
    """`coefficient`: nats per token and t^2. `squares`: the tensor's squared norm."""

    coefficient: float
    squares: float


def through_origin(levels: Sequence[float], increases: Sequence[float]) -> float:
    """Slope a of the least squares fit increase = a level."""
    products = (level * increase for level, increase in zip(levels, increases, strict=True))
    return math.fsum(products) / math.fsum(level * level for level in levels)


def measured(
    network: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    ids: torch.Tensor,
    seed: int,
    progress: Callable[[float, str], None],
    levels: Sequence[float] = LEVELS,
) -> dict[str, Linear]:
    """The coefficients of `tensors`, which are views of the network's parameters, on token ids (sequences, length).

    Noise follows from `seed`, the tensor's name and the number of the sequence. Every tensor is left as it was; those
    of zeros are left out. `progress` is called before each pass, and may raise. NonFiniteWeights when logits are not
    numbers.
    """
    squares = {name: float(one.double().square().sum()) for name, one in sorted(tensors.items())}
    increases: dict[str, list[float]] = {name: [] for name, square in squares.items() if square > 0}
    used, device = [levels[at % len(levels)] for at in range(len(ids))], next(network.parameters()).device
    with torch.inference_mode(), float32_head(network):
        for at, (window, level) in enumerate(zip(torch.split(ids.to(device), 1), used, strict=True)):
            reference = next_token_logits(network, window)
            _require_numbers(reference.float().logsumexp(-1))
            for done, (name, found) in enumerate(increases.items()):
                progress((at + done / len(increases)) / len(ids), name)
                with _moved(tensors[name], level * squares[name], derived_seed(seed, f"{name} {at}")):
                    found.append(_mean_kl(reference, next_token_logits(network, window)))
    fitted = {name: through_origin(used, found) for name, found in increases.items()}
    return {name: Linear(float(f"{one:.{_DIGITS}g}"), squares[name]) for name, one in fitted.items()}


def evidence(coefficients: Mapping[str, Linear], groups: Iterable[Group]) -> Evidence:
    """The coefficients as information per weight: the forecast of a tensor with them is a_l t_l^2."""
    means = {name: 2 * one.coefficient / one.squares for name, one in coefficients.items()}
    return Evidence.of(means, lambda _name: None, groups)


@contextmanager
def _moved(weight: torch.Tensor, squares: float, seed: int) -> Iterator[None]:
    """Within it the weights have Normal noise of that squared norm, before it is rounded to their dtype."""
    kept, chance = weight.clone(), torch.Generator(weight.device).manual_seed(seed)
    noise = torch.randn(weight.shape, generator=chance, device=weight.device, dtype=torch.float32)
    noise *= math.sqrt(squares) / noise.norm()
    weight.copy_(noise.add_(kept))
    try:
        yield
    finally:
        weight.copy_(kept)


def _mean_kl(reference: torch.Tensor, answered: torch.Tensor) -> float:
    """Mean over all positions."""
    expected, found = reference.flatten(0, -2), answered.flatten(0, -2)
    rows = max(1, _TILE_ELEMENTS // expected.shape[-1])
    tiles = zip(torch.split(expected, rows), torch.split(found, rows), strict=True)
    return math.fsum(float(_require_numbers(kl_from_logits(p.float(), q.float())).sum()) for p, q in tiles) / len(found)


def _require_numbers(values: torch.Tensor) -> torch.Tensor:
    if not bool(values.isfinite().all()):
        raise NonFiniteWeights("logits that are not numbers", where="KL")
    return values
