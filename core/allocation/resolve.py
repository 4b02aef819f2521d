"""Formats of single tensors where the data decide sizes: what was found in a tensor stands in its format.

Allocation plans bytes before anything is stored. How many outliers a rule such as `opq0.95` finds, only the weights
tell, and they are the same for every width; how many bytes an entropy code such as `+rans` takes, only the codes tell,
so the tensor is encoded as quantising will encode it.
"""

from __future__ import annotations

from collections.abc import Callable

from core.errors import BitmillError
from core.recipe.tensor_format import TensorFormat, parse
from core.storage.checkpoint import CheckpointIndex
from core.tensors.encoded import EncodedTensor
from core.tensors.nearest import outliers_in
from core.tensors.reader import read_tensor

Encode = Callable[[str, TensorFormat], EncodedTensor]  # a tensor as it will be stored


class Resolved:
    """(tensor, format) -> the format with what only the tensor tells; `check` is called before a tensor is read.

    `stored`: the format in which the rounding method stores what is asked for in another.
    """

    def __init__(
        self,
        index: CheckpointIndex,
        device: str,
        check: Callable[[], None],
        encode: Encode,
        stored: Callable[[TensorFormat], TensorFormat] = lambda fmt: fmt,
    ) -> None:
        self._index, self._device, self._check, self._encode, self._stored = index, device, check, encode, stored
        self._outliers: dict[tuple[str, str | int, tuple[str, float]], int] = {}
        self._coded: dict[tuple[str, str], int] = {}

    def __call__(self, name: str, text: str) -> str:
        try:
            return self._found(name, self._stored(parse(text)))
        except BitmillError as error:
            raise error.at(name) from None

    def _found(self, name: str, fmt: TensorFormat) -> str:
        rule = fmt.outlier_rule
        if rule is not None and rule[0] != "outliers" and fmt.outliers_found is None:
            fmt = fmt.with_outliers_found(self._count(name, fmt, rule))
        if fmt.entropy_code is not None and not fmt.is_grid and fmt.coded_bytes is None:
            fmt = fmt.with_coded_bytes(self._coded_bytes(name, fmt))
        return str(fmt)

    def _count(self, name: str, fmt: TensorFormat, rule: tuple[str, float]) -> int:
        key = (name, fmt.granularity, rule)
        if key not in self._outliers:
            self._check()
            self._outliers[key] = outliers_in(read_tensor(self._index, name).to(self._device), fmt)
        return self._outliers[key]

    def _coded_bytes(self, name: str, fmt: TensorFormat) -> int:
        key = (name, str(fmt))
        if key not in self._coded:
            self._check()
            self._coded[key] = self._encode(name, fmt).codes.numel()
        return self._coded[key]
