"""Budgets in bytes and the exact sizes that they are held against.

A size here is that of all weight files with headers, alignment and kept tensors, `core.exports.layout`; what a solver
adds up are the bytes of the parts. The difference, the overhead, is nearly constant: `fit` corrects for it until the
exact size meets the budget, so a result is never above it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import cached_property

from core.allocation.budget import Option, choose
from core.allocation.space import Group, Space
from core.errors import BitmillError, InfeasibleTarget
from core.exports.layout import KEEP, layout_bytes, stored_tensor
from core.recipe.target import Target
from core.storage.checkpoint import CheckpointIndex

Formats = dict[str, str]
Resolve = Callable[[str, str], str]  # (tensor, format of its group) -> the format in which it is stored


def _as_it_is(_name: str, text: str) -> str:
    return text


class Sizes:
    """Exact sizes of the choices in a space; formats are given by group."""

    def __init__(self, index: CheckpointIndex, space: Space, resolve: Resolve = _as_it_is) -> None:
        self.index, self.space, self.resolve = index, space, resolve
        self._costs: dict[tuple[str, str], int] = {}

    def exact(self, formats: Mapping[str, str]) -> int:
        """Bytes of the weight files."""
        return layout_bytes(self.index, self.choice(formats))

    def choice(self, formats: Mapping[str, str]) -> dict[str, str]:
        """Format by tensor as it will be stored, from the format by group."""
        chosen = self.space.choice(formats)
        return {name: text if text == KEEP else self.resolve(name, text) for name, text in chosen.items()}

    def tensor(self, name: str, text: str) -> int:
        """Bytes of the parts of one tensor."""
        key = (name, text)
        if key not in self._costs:
            self._costs[key] = stored_tensor(self.index.tensors[name], self.resolve(name, text)).nbytes
        return self._costs[key]

    def group(self, group: Group, text: str) -> int:
        """Bytes of a group's parts, and of its format's name in the header, which differs in length."""
        return sum(self.tensor(name, text) + len(text) for name in group.members)

    def elements(self, group: Group) -> int:
        """Weights of a group."""
        return sum(self.index.tensors[name].elements for name in group.members)

    @cached_property
    def least(self) -> int:
        """The smallest size in the space."""
        return self.exact({group.name: self._narrowest(group) for group in self.space.groups})

    @cached_property
    def most(self) -> int:
        """The size with every group at its widest."""
        return self.exact({group.name: group.formats[-1] for group in self.space.groups})

    def bits(self, size: int) -> float:
        """Bits per parameter of a size."""
        return 8 * size / max(self.index.parameters, 1)

    def budget(self, bits: float) -> int:
        """The most bytes that are no more than `bits` per parameter."""
        return math.floor(Fraction(bits) * self.index.parameters / 8)

    def target_bytes(self, target: Target) -> int:
        """The budget of a target in bits or bytes; InfeasibleTarget names the smallest that can be met, in its unit."""
        budget = self.budget(target.bits_per_param) if target.bits_per_param is not None else target.size_bytes
        if budget is None:
            raise BitmillError("a KL target is no number of bytes", where=f"target.{target.kind}")
        if budget < self.least:
            raise InfeasibleTarget(
                f"{target.value:g} {_UNITS[target.kind]} cannot be met, the smallest that can is {self._least(target)}",
                where=f"target.{target.kind}",
                hint="raise the target, or allow smaller widths, larger blocks or fewer kept tensors",
            )
        return budget

    def _narrowest(self, group: Group) -> str:
        return min(group.formats, key=lambda text: self.group(group, text))

    def _least(self, target: Target) -> str:
        if target.kind == "size_bytes":
            return f"{self.least}"
        return f"{math.ceil(self.bits(self.least) * 1e4) / 1e4:.4f}"


_UNITS = {"bits_per_param": "bits per parameter", "size_bytes": "bytes"}


def fit(sizes: Sizes, options: Mapping[str, Sequence[Option]], budget: int) -> Formats:
    """The solver's choice for that many bytes of weight files; InfeasibleTarget when there is none."""
    cheapest = {name: min(row, key=lambda one: (one.cost, one.loss, one.label)) for name, row in options.items()}
    least = sum(one.cost for one in cheapest.values())
    overhead = sizes.exact(_labels(cheapest)) - least
    while budget - overhead >= least:
        formats = _labels(choose(options, budget - overhead))
        excess = sizes.exact(formats) - budget
        if excess <= 0:
            return formats
        overhead += excess
    if sizes.exact(_labels(cheapest)) <= budget:
        return _labels(cheapest)
    raise InfeasibleTarget(f"{budget} bytes cannot be met, the smallest size that can is {least + overhead}")


def widest(sizes: Sizes, rungs: Sequence[float], formats_at: Callable[[float], Formats], budget: int) -> Formats:
    """What `formats_at` gives for the highest rung that fits, rungs ascending; InfeasibleTarget when none does."""
    fitting = bisect_right(rungs, budget, key=lambda rung: sizes.exact(formats_at(rung)))
    if not fitting:
        least = sizes.exact(formats_at(rungs[0]))
        raise InfeasibleTarget(f"{budget} bytes cannot be met, the smallest size that can is {least}")
    return formats_at(rungs[fitting - 1])


def _labels(options: Mapping[str, Option]) -> Formats:
    return {name: option.label for name, option in options.items()}
