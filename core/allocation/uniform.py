"""Allocation `uniform`: one width for every tensor, the largest that fits the budget. Needs no data.

Codebooks may have any even number of codes from 4 to 256, so the ladder is finer than whole bits; a group whose bounds
exclude the width gets the nearest that they allow.
"""

from __future__ import annotations

from core.allocation.sizes import Formats, Sizes, widest
from core.allocation.space import ladder
from core.recipe.tensor_format import TensorFormat


def uniform(sizes: Sizes, base: TensorFormat, budget: int) -> Formats:
    """Format by group for a budget in bytes."""
    return widest(sizes, ladder(base), lambda bits: {one.name: one.at(bits) for one in sizes.space.groups}, budget)
