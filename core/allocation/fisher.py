"""Allocation `fisher`: the least predicted KL divergence within the budget.

Every group offers the KL that its formats are expected to cost beside the bytes that they take, and the solver of
`core.allocation.budget` chooses. Grids have all rates: between those that are measured, half a bit apart, log2 of the
KL is taken for a line, and what the solver leaves over goes to the largest group that can use it. A group that
calibration never reached would always get its smallest width, so it gets at least what allocation `uniform` would give
it. Source: fisher-and-allocation, sections 7.2, 7.3 and 8.4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from core.allocation.budget import Option
from core.allocation.forecast import Forecast
from core.allocation.sizes import Formats, Sizes, fit
from core.allocation.space import Group, with_least
from core.allocation.uniform import uniform
from core.recipe.tensor_format import TensorFormat, parse

_LEAST_KL = 1e-30


class Fisher:
    """The method on one checkpoint; measured once, solved for any budget."""

    def __init__(self, sizes: Sizes, base: TensorFormat, forecast: Forecast) -> None:
        self.forecast = forecast
        self._sizes, self._base = sizes, base

    def __call__(self, budget: int) -> Formats:
        """Format by group for a budget in bytes."""
        return topped_up(self._sizes, fit(self._sizes, self._known | self._floored(budget), budget), budget)

    @cached_property
    def _known(self) -> dict[str, list[Option]]:
        groups = self._sizes.space.groups
        return {group.name: self._options(group) for group in groups if self.forecast.evidence.knows(group)}

    def _floored(self, budget: int) -> dict[str, list[Option]]:
        """Options of the groups without evidence: the uniform format of that budget and wider ones."""
        unknown = [group for group in self._sizes.space.groups if group.name not in self._known]
        if not unknown:
            return {}
        least = uniform(self._sizes, self._base, budget)
        return {group.name: self._options(with_least(group, least[group.name])) for group in unknown}

    def _options(self, group: Group) -> list[Option]:
        losses = _between(group.widths, self.forecast.group(group), group.rates)
        texts = [group.text(bits) for bits in group.rates]
        return [Option(self._sizes.group(group, text), kl, text) for text, kl in zip(texts, losses, strict=True)]


def _between(widths: Sequence[float], losses: Sequence[float], rates: Sequence[float]) -> list[float]:
    """Losses at `rates`, which contain the widths: log2 of the loss is a line from width to width."""
    if len(rates) == len(widths):
        return list(losses)
    logs = np.log2(np.maximum(losses, _LEAST_KL))
    return [float(kl) for kl in 2.0 ** np.interp(rates, widths, logs)]


def topped_up(sizes: Sizes, formats: Formats, budget: int) -> Formats:
    """The same with the rate of one grid raised by what is left of the budget; the largest whose bounds allow it."""
    grids = [one for one in sizes.space.groups if one.base.is_grid and len(one.widths) > 1]
    for group in sorted(grids, key=lambda one: (-sizes.elements(one), one.name)):
        bits, left = parse(formats[group.name]).bits, budget - sizes.exact(formats)
        while left > 0:
            raised = bits + math.floor(8e4 * left / max(sizes.elements(group), 1)) / 1e4
            trial = formats | {group.name: group.text(min(round(raised, 4), group.widths[-1]))}
            excess = sizes.exact(trial) - budget
            if excess <= 0:
                return trial
            left -= excess  # a longer name of the format lengthens the header
    return formats
