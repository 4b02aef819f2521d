"""The KL divergence that a choice of formats is expected to cost, before anything is stored.

Of a tensor in a format: `½ Σ_o F_o d_o` in nats per token, F_o the Fisher information of output row o (summed over its
weights), d_o the mean squared error of the row as the real encoder makes it; of a model the sum over its tensors
(fisher-and-allocation, sections 1 and 8.4). The nearest codes shrink a row's weights together, by m on average and by m
+ r_o in row o: that part of the error is taken out of d_o and costs `½ (m² S + Σ_o r_o² S_o)`, S and S_o being the
Fisher information of a factor on the tensor and on the row. Of the rest, methods that carry errors on leave the share
that is expected of them (`core.rounding.expected`). Holds for KL up to about 0.3 (8.3). Tensors of more than 2^20
weights are measured on evenly spaced rows, but for formats with one scale per tensor (of a grid the rate decides, not
the scale, so rows do). Sums are fp64 and results have nine significant digits, so that the order of a reduction decides
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from core.allocation.space import Group
from core.errors import BitmillError
from core.recipe.tensor_format import parse
from core.storage.checkpoint import CheckpointIndex
from core.tensors.nearest import encode_nearest
from core.tensors.reader import read_tensor

MEASURED_WEIGHTS = 1 << 20
_DIGITS = 9

Floats = npt.NDArray[np.float64]
Share = Callable[[float], float]


def _whole(_bits: float) -> float:
    return 1.0


@dataclass(frozen=True)
class Scales:
    """Fisher information of a factor on a whole tensor, and on each of its rows."""

    whole: float
    rows: Floats


def _no_scales(_name: str) -> Scales | None:
    return None


@dataclass(frozen=True)
class Evidence:
    """Fisher information of the tensors that calibration reached.

    `means`: per weight, by tensor. `rows(name)`: sums over the weights of each output row, None where there are none.
    `scales(name)`: of factors, None where that is not known.
    `pooled`: means of tensors that were not reached but share a format with such as were (section 5, experts).
    `halves_bits`: how far apart two halves of the text are, as RMS over tensors of ½ log2 f̄_A / f̄_B; None unless known.
    """

    means: Mapping[str, float]
    rows: Callable[[str], Floats | None]
    pooled: Mapping[str, float]
    halves_bits: float | None = None
    scales: Callable[[str], Scales | None] = _no_scales

    @classmethod
    def of(
        cls,
        means: Mapping[str, float],
        rows: Callable[[str], Floats | None],
        groups: Iterable[Group],
        halves_bits: float | None = None,
        scales: Callable[[str], Scales | None] = _no_scales,
    ) -> Evidence:
        """Means that are not positive are no evidence."""
        reached = {name: mean for name, mean in means.items() if mean > 0}
        pooled: dict[str, float] = {}
        for group in groups:
            known = [reached[name] for name in group.members if name in reached]
            if known:
                pooled |= {name: sum(known) / len(known) for name in group.members if name not in reached}
        return cls(reached, rows, pooled, halves_bits, scales)

    def mean(self, name: str) -> float:
        """Fisher information per weight, 0 for a tensor about which nothing is known."""
        return self.means.get(name, self.pooled.get(name, 0.0))

    def not_reached(self, groups: Iterable[Group]) -> list[str]:
        """Members without a measurement of their own, sorted."""
        return sorted(name for group in groups for name in group.members if name not in self.means)

    def knows(self, group: Group) -> bool:
        """Whether any member of the group was reached."""
        return any(name in self.means for name in group.members)


class Forecast:
    """Predicted KL by tensor and format, measured when it is first asked for.

    `before_each` is called before a tensor is read. `shares(name)`: by bits, what the rounding is expected to leave of
    the errors of nearest rounding.
    """

    def __init__(
        self,
        index: CheckpointIndex,
        evidence: Evidence,
        device: str = "cpu",
        before_each: Callable[[str], None] = lambda _name: None,
        shares: Callable[[str], Share] = lambda _name: _whole,
    ) -> None:
        self.evidence = evidence
        self._shares = shares
        self._index, self._device, self._before_each = index, device, before_each
        self._known: dict[tuple[str, str], float] = {}

    def tensor(self, name: str, text: str) -> float:
        """Nats per token of one tensor in one format."""
        return self.tensor_in(name, (text,))[0]

    def tensor_in(self, name: str, texts: Sequence[str]) -> list[float]:
        """The same for several formats, with the tensor read once."""
        missing = [text for text in texts if (name, text) not in self._known]
        if missing:
            self._before_each(name)
            mean = self.evidence.mean(name)
            found = self._measured(name, mean, missing) if mean > 0 else [0.0] * len(missing)
            self._known |= {(name, text): kl for text, kl in zip(missing, found, strict=True)}
        return [self._known[name, text] for text in texts]

    def group(self, group: Group) -> list[float]:
        """Nats per token of a group in each of its formats."""
        rows = [self.tensor_in(name, group.formats) for name in group.members]
        return [math.fsum(column) for column in zip(*rows, strict=True)]

    def elements(self, name: str) -> int:
        """How many weights a tensor has."""
        return self._index.tensors[name].elements

    def total(self, choice: Mapping[str, str]) -> float:
        """Nats per token of the whole model; `choice` without the tensors that are kept."""
        return math.fsum(self.tensor(name, text) for name, text in choice.items())

    def _measured(self, name: str, mean: float, texts: Iterable[str]) -> list[float]:
        whole = read_tensor(self._index, name)
        weights = whole.reshape(-1, whole.shape[-1]).to(self._device)
        fisher = _row_weights(self.evidence.rows(name), mean * weights.numel(), len(weights))
        scales = self.evidence.scales(name)
        if scales is not None and len(scales.rows) != len(weights):
            scales = None
        share, rows = self._shares(name), _spaced_rows(len(weights), weights.shape[1])
        part = weights[torch.from_numpy(rows).to(self._device)] if len(rows) < len(weights) else weights
        try:
            return [
                predicted_kl(weights, fisher, np.arange(len(weights)), text, scales, share)
                if parse(text).granularity == "tensor" and not parse(text).is_grid
                else predicted_kl(part, fisher, rows, text, scales, share)
                for text in texts
            ]
        except BitmillError as error:
            raise error.at(name) from None


def predicted_kl(
    weights: torch.Tensor,
    fisher: Floats,
    rows: npt.NDArray[np.int64],
    text: str,
    scales: Scales | None = None,
    share: Share = _whole,
) -> float:
    """The forecast of a tensor, by ratio estimators from `weights` (rows, inputs), the rows `rows` of it.

    `fisher`: (all rows,), sums over the weights of a row. Without `scales` all of the error counts as independent.
    `share`: what is left of it at a number of bits.
    """
    fmt = parse(text)
    encoded = encode_nearest(weights, fmt, row_weights=torch.from_numpy(fisher[rows]))
    errors, shrunk, power = _row_errors(weights, encoded.decode())
    kl = 0.0
    if scales is not None:
        errors = errors - shrunk**2 * power
        common = float(shrunk.mean())
        kl = 0.5 * (common**2 * scales.whole + _total(scales.rows, (shrunk - common) ** 2, rows))
    kl += 0.5 * share(fmt.element_bits) * _total(fisher, errors, rows)
    return float(f"{kl:.{_DIGITS}g}")


def _total(weights: Floats, values: Floats, rows: npt.NDArray[np.int64]) -> float:
    """Σ weights · values over all rows, from the values of some."""
    sampled = weights[rows]
    if sampled.sum() > 0:
        return float(weights.sum()) * float((sampled * values).sum()) / float(sampled.sum())
    return float(weights.sum()) * float(values.mean())


def _row_errors(weights: torch.Tensor, decoded: torch.Tensor) -> tuple[Floats, Floats, Floats]:
    """Of each row, fp64: mean squared error, 1 - <decoded, w>/<w, w>, mean square; worked out in pieces of rows."""
    step = max(1, MEASURED_WEIGHTS // weights.shape[1])
    found: list[torch.Tensor] = []
    for at in range(0, len(weights), step):
        original = weights[at : at + step].double()
        error = decoded[at : at + step].double() - original
        power = original.square().mean(dim=1)
        shrunk = -(error * original).mean(dim=1) / power.clamp(min=torch.finfo(torch.float64).tiny)
        found.append(torch.stack((error.square_().mean(dim=1), shrunk, power)))
    errors, shrinkage, powers = torch.cat(found, dim=1).cpu().numpy()
    return errors, shrinkage, powers


def grouping_cost_bits(forecast: Forecast, groups: Sequence[Group]) -> float:
    """Bits per weight that equal formats within groups cost: ½ log2 of AM/GM of f̄σ²R² (section 7.3), before clamps."""
    bits, elements = 0.0, 0
    for group in groups:
        sizes = [forecast.elements(name) for name in group.members]
        middle = group.formats[len(group.formats) // 2]
        costs = [forecast.tensor(name, middle) / size for name, size in zip(group.members, sizes, strict=True)]
        elements += sum(sizes)
        if len(costs) > 1 and min(costs) > 0:
            share = np.array(sizes) / sum(sizes)
            mean = float(share @ np.log2(costs))
            bits += sum(sizes) * 0.5 * (math.log2(float(share @ np.array(costs))) - mean)
    return bits / max(elements, 1)


def _row_weights(rows: Floats | None, total: float, count: int) -> Floats:
    """Fisher sums of `count` matrix rows; spread evenly where calibration gave them for other rows, or none."""
    if rows is None or not len(rows) or count % len(rows) or rows.sum() <= 0:
        return np.full(count, total / count)
    return np.repeat(rows, count // len(rows)) / (count // len(rows))


def _spaced_rows(count: int, columns: int) -> npt.NDArray[np.int64]:
    """Evenly spaced rows of about `MEASURED_WEIGHTS` weights together, all when the tensor has no more."""
    wanted = min(count, max(1, MEASURED_WEIGHTS // columns))
    return np.arange(wanted) * count // wanted
