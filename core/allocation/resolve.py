"""Formats of single tensors where the data decide sizes: how many outliers a rule finds stands in the format.

Allocation plans bytes before anything is encoded. A rule such as `opq0.95` has to look at the weights for that: each
tensor is read once, whatever its width will be.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from core.errors import BitmillError
from core.recipe.tensor_format import parse
from core.storage.checkpoint import CheckpointIndex
from core.tensors.nearest import outliers_in
from core.tensors.reader import read_tensor


class Resolved:
    """(tensor, format) -> the format with what only the tensor tells; `check` is called before a tensor is read."""

    def __init__(self, index: CheckpointIndex, device: str, check: Callable[[], None]) -> None:
        self._index, self._device, self._check = index, device, check
        self._counts: dict[tuple[str, str | int, tuple[str, float]], int] = {}

    def __call__(self, name: str, text: str) -> str:
        fmt = _parsed(text)
        if fmt.outlier_rule is None or fmt.outlier_rule[0] == "outliers" or fmt.outliers_found is not None:
            return text
        key = (name, fmt.granularity, fmt.outlier_rule)
        if key not in self._counts:
            self._check()
            try:
                self._counts[key] = outliers_in(read_tensor(self._index, name).to(self._device), fmt)
            except BitmillError as error:
                raise error.at(name) from None
        return str(fmt.with_outliers_found(self._counts[key]))


_parsed = lru_cache(maxsize=4096)(parse)
