"""Allocation `heuristic`: two more bits for the embedding, the head, the first two and the last two layers.

A baseline that many toolkits ship; usually worse than uniform at equal stored bytes (fisher-and-allocation, section
7.5). The extra bits are taken from all other tensors, so the budget holds. Needs no data.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from core.allocation.sizes import Formats, Sizes, widest
from core.allocation.space import Group, ladder
from core.recipe.tensor_format import TensorFormat

EXTRA_BITS = 2
_OUTER_LAYERS = 2
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
_ENDS = re.compile(r"(?:^|\.)(?:embed_tokens|wte|embed_in|word_embeddings|lm_head|embed_out|output)\.weight$")


def heuristic(sizes: Sizes, base: TensorFormat, budget: int) -> Formats:
    """Format by group for a budget in bytes."""
    outer = outer_groups(sizes.space.groups)
    rungs = ladder(base)
    lower = [bits - EXTRA_BITS for bits in rungs if bits - EXTRA_BITS < rungs[0]]

    def formats_at(bits: float) -> Formats:
        return {one.name: one.at(bits + EXTRA_BITS * (one.name in outer)) for one in sizes.space.groups}

    return widest(sizes, (*lower, *rungs), formats_at, budget)


def outer_groups(groups: Iterable[Group]) -> set[str]:
    """Names of the groups that get more: those with a member among the outer layers, embedding or head."""
    groups = list(groups)
    numbers = sorted({at for group in groups for name in group.members if (at := _layer(name)) is not None})
    outer = {*numbers[:_OUTER_LAYERS], *numbers[-_OUTER_LAYERS:]}
    return {
        group.name for group in groups if any(_ENDS.search(name) or _layer(name) in outer for name in group.members)
    }


def _layer(name: str) -> int | None:
    found = _LAYER.search(name)
    return int(found[1]) if found else None
