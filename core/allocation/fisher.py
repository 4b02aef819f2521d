"""Allocation `fisher`: the least predicted KL divergence within the budget.

Every group offers the KL that its formats are expected to cost beside the bytes that they take, and the solver of
`core.allocation.budget` chooses. A group that calibration never reached would always get its smallest width, so it gets
at least what allocation `uniform` would give it. Source: fisher-and-allocation, sections 7.2, 7.3 and 8.4.
"""

from __future__ import annotations

from functools import cached_property

from core.allocation.budget import Option
from core.allocation.forecast import Forecast
from core.allocation.sizes import Formats, Sizes, fit
from core.allocation.space import Group, with_least
from core.allocation.uniform import uniform
from core.recipe.tensor_format import TensorFormat


class Fisher:
    """The method on one checkpoint; measured once, solved for any budget."""

    def __init__(self, sizes: Sizes, base: TensorFormat, forecast: Forecast) -> None:
        self.forecast = forecast
        self._sizes, self._base = sizes, base

    def __call__(self, budget: int) -> Formats:
        """Format by group for a budget in bytes."""
        return fit(self._sizes, self._known | self._floored(budget), budget)

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
        return [
            Option(self._sizes.group(group, text), kl, text)
            for text, kl in zip(group.formats, self.forecast.group(group), strict=True)
        ]
