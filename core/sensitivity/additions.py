"""What is added to the outputs of layers: the residual stream at the point where a layer writes to it.

Found by watching torch's functions while a part of a network runs, not by the names of an architecture: the other
operand of a sum that a layer's output goes into unchanged, and of sums that go into sums. What comes between, such as a
norm or a factor, ends it: such a layer writes nothing to the stream as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_ADDS, _ADDS_IN_PLACE = ("add", "__add__", "__radd__"), ("add_", "__iadd__")


class Additions(TorchFunctionMode):
    """A context manager. `watch` an output as soon as it is there; `found`: the sum of all that is added to it.

    Outputs are told apart by the key that they are watched under. What is found is in fp32, in the output's shape.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, torch.Tensor] = {}
        self._watched: dict[int, tuple[frozenset[str], torch.Tensor]] = {}

    def watch(self, key: str, output: torch.Tensor) -> None:
        """From now on, until the end of the context or until something else is made of it."""
        self._hold(frozenset({key}), output)

    def _hold(self, keys: frozenset[str], output: torch.Tensor) -> None:
        before = self._watched.get(id(output), (frozenset[str](), output))[0]
        self._watched[id(output)] = before | keys, output  # kept, so that no other tensor gets its id

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the function, and see what it does to what is watched."""
        name = getattr(func, "__name__", "")
        given = [one for one in args if isinstance(one, torch.Tensor)]
        is_sum = name in _ADDS + _ADDS_IN_PLACE and (kwargs or {}).get("alpha", 1) == 1
        sums = self._sums(given) if is_sum else {}
        result = func(*args, **(kwargs or {}))
        if sums and isinstance(result, torch.Tensor):
            self._note(sums, result, given)
        else:
            self._follow(given, result)
        return result

    def _sums(self, given: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """By key of what is watched: a copy of the other operand, before a sum in place changes it."""
        if len(given) != 2 or given[0].shape != given[1].shape:
            return {}
        pairs = zip(given, reversed(given), strict=True)
        found: dict[str, torch.Tensor] = {}
        for one, other in pairs:
            for key in self._watched.get(id(one), (frozenset[str](), one))[0]:
                found[key] = other.float().clone()
        return found

    def _note(self, sums: Mapping[str, torch.Tensor], result: torch.Tensor, given: list[torch.Tensor]) -> None:
        for one in given:
            self._watched.pop(id(one), None)
        for key, other in sums.items():
            self.found[key] = self.found[key] + other if key in self.found else other
        self._hold(frozenset(sums), result)

    def _follow(self, given: list[torch.Tensor], result: Any) -> None:
        """Keep to a tensor that is only seen in another shape; let go of one of which something else is made."""
        parts = result if isinstance(result, tuple | list) else (result,)
        if not any(isinstance(part, torch.Tensor) for part in parts):
            return  # a shape, a dtype
        for one in given:
            if id(one) not in self._watched or result is one:
                continue
            keys, _ = self._watched.pop(id(one))
            if isinstance(result, torch.Tensor) and _is_same(one, result):
                self._hold(keys, result)


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the other is the same numbers in the same order."""
    return (
        one.data_ptr() == other.data_ptr()
        and one.numel() == other.numel()
        and one.dtype == other.dtype
        and one.is_contiguous()
        and other.is_contiguous()
    )
