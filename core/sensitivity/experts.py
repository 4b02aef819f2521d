"""Experts in stacked parameters, as the transformers library computes them: what reaches each one's two matrices.

Such a module is called with tokens, the experts chosen for each and their weights. The first matrix of an expert gets
the tokens routed to it, the second what gate and activation make of the first one's answer. Whether a module computes
that is found out by computing its answer for a few tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import nn

_PROBED_TOKENS = 16
_FIRST = ("gate_up_proj", "up_proj")
SECOND = "down_proj"


class Experts:
    """One call of a module of experts: `tokens` (tokens, features), `chosen` and `weights` (tokens, chosen ones)."""

    def __init__(
        self, module: Any, first: str, tokens: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
    ) -> None:
        self._module, self.first = module, first
        self._tokens, self._chosen, self._weights = tokens, chosen, weights

    @classmethod
    def of(cls, module: nn.Module, given: Sequence[Any]) -> Self | None:
        """None for a module with other parameters, or one that is called with other things."""
        held = {key for key, value in module._parameters.items() if value is not None and value.ndim == 3}
        first = next((key for key in _FIRST if held == {key, SECOND}), None)
        if first is None or not all(isinstance(value, torch.Tensor) and value.ndim == 2 for value in given[:3]):
            return None
        if len(given) < 3 or given[1].is_floating_point() or given[1].shape != given[2].shape:
            return None
        return cls(module, first, *given[:3])

    @property
    def count(self) -> int:
        """How many experts the module has."""
        return len(self._module._parameters[SECOND])

    @property
    def transposed(self) -> bool:
        """Whether an expert's matrix is (in, out)."""
        return bool(self._module.is_transposed)

    def routed(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Each expert that got tokens, and these (tokens, features)."""
        for expert in _distinct(self._chosen):
            if 0 <= expert < self.count:
                yield expert, self._tokens[(self._chosen == expert).any(-1)]

    def between(self, expert: int, tokens: torch.Tensor) -> torch.Tensor:
        """What the second matrix multiplies with, for tokens that the first one gets."""
        answered = self._linear(self.first, expert, tokens)
        made: torch.Tensor
        made = self._module._apply_gate(answered) if self.first == _FIRST[0] else self._module.act_fn(answered)
        return made

    @torch.no_grad()
    def answers(self, output: Any) -> bool:
        """Whether this is what the module computes, by the first tokens of its answer."""
        tokens, chosen = self._tokens[:_PROBED_TOKENS], self._chosen[:_PROBED_TOKENS]
        if not isinstance(output, torch.Tensor) or output.shape != self._tokens.shape:
            return False
        wanted = "_apply_gate" if self.first == _FIRST[0] else "act_fn"
        if not (hasattr(self._module, wanted) and hasattr(self._module, "is_transposed")):
            return False
        expected = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
        for expert in _distinct(chosen):
            at, place = (chosen == expert).nonzero(as_tuple=True)
            answered = self._linear(SECOND, expert, self.between(expert, tokens[at]))
            expected.index_add_(0, at, answered.double() * self._weights[at, place, None].double())
        difference = (output[: len(tokens)].double() - expected).abs().amax()
        return bool(difference <= 64 * torch.finfo(output.dtype).eps * expected.abs().amax())

    def _linear(self, key: str, expert: int, tokens: torch.Tensor) -> torch.Tensor:
        weight = self._module._parameters[key][expert]
        bias = self._module._parameters.get(f"{key}_bias")
        answered = tokens @ (weight if self._module.is_transposed else weight.T)
        made: torch.Tensor = answered if bias is None else answered + bias[expert]
        return made


def _distinct(chosen: torch.Tensor) -> list[int]:
    return sorted(set(chosen.flatten().tolist()))
