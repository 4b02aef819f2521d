"""The layers that a stored tensor holds: one whose rows are its inputs, or experts on top of each other.

Promise: layers come one at a time, each with the statistics of its own inputs, so that no more than one of them takes
memory. It rounds nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from core.formats.stored import matrix_shape

if TYPE_CHECKING:
    from core.rounding.base import Sensitivity

Notes = tuple[str, ...]
SILENT = "no token was routed to it, all of its inputs count alike"


@dataclass(frozen=True)
class View:
    """Rows `first` to `last` - 1 of the stored matrix: one layer, `sensitivity` that of its matrix (out, in)."""

    first: int
    last: int
    transposed: bool
    sensitivity: Sensitivity
    notes: Notes = ()

    def layer(self, matrix: torch.Tensor) -> torch.Tensor:
        """The layer's matrix (out, in) in the stored one; a view."""
        rows = matrix[self.first : self.last]
        return rows.T if self.transposed else rows


def views(shape: tuple[int, ...], sensitivity: Sensitivity) -> Iterator[View]:
    """The layers in a tensor of that shape, in its order; those whose inputs are not known have independent ones."""
    experts = [sensitivity] if sensitivity.experts is None else sensitivity.experts
    height = matrix_shape(shape)[0] // max(len(experts), 1)
    for at, known in enumerate(experts):
        inputs = height if sensitivity.transposed else shape[-1]
        notes, layer = Notes(), replace(known, transposed=False)
        if known.covariance is None:
            notes, plain = (SILENT,), torch.eye(inputs, dtype=torch.float64)
            layer = replace(layer, covariance=plain, tokens=None)
        yield View(at * height, (at + 1) * height, sensitivity.transposed, layer, notes)


def of_experts(notes: Sequence[Notes]) -> Notes:
    """The notes of layers in few words: of how many each is true, and the first one's; of one layer as they are."""
    if len(notes) == 1:
        return notes[0]
    said: dict[str, list[tuple[int, str]]] = {}
    for expert, lines in enumerate(notes):
        for line in lines:
            said.setdefault(re.sub(r"\d+", "", line), []).append((expert, line))
    return tuple(f"{len(who)} of {len(notes)} experts: {who[0][1]} (expert {who[0][0]})" for who in said.values())
