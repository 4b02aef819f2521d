"""Attention in a network: where it is computed, and how much of it tokens receive, a weight for what their inputs lose.

p_j = sum over heads and later tokens of A_hij / (heads (T - j)), A being the probabilities of an attention layer's
softmax as the network itself answers them, rotary embedding and norms of q and k included (data-aware rounding, section
4.9).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_NOISE = 0.02  # of sums of probabilities in bf16


class AttentionCalls(TorchFunctionMode):
    """A context manager that tells whenever queries attend to keys: torch's own function, or a softmax of (T, T).

    With a sink beside the keys it is (T, T + 1).
    """

    def __init__(self, tell: Callable[[], None]) -> None:
        super().__init__()
        self._tell = tell

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the function, and tell."""
        result, name = func(*args, **(kwargs or {})), getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention" or (name == "softmax" and _is_square(result)):
            self._tell()
        return result


def attention_received(output: Any) -> torch.Tensor | None:
    """Weights (sequences * T,) with a mean of 1 in each sequence, from what an attention layer answers; None if it
    answers no probabilities."""
    for one in _tensors(output):
        if _is_square(one) and _are_probabilities(one):
            length = one.shape[-2]
            later = torch.arange(length, 0, -1, device=one.device)
            received = one[..., :length].float().tril().mean(dim=1).sum(dim=1) / later
            return (received / received.mean(dim=1, keepdim=True)).flatten()
    return None


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    for one in output if isinstance(output, tuple | list) else (output,):
        if isinstance(one, torch.Tensor):
            yield one


def _is_square(one: Any) -> bool:
    return isinstance(one, torch.Tensor) and one.ndim == 4 and one.shape[-1] - one.shape[-2] in (0, 1)


def _are_probabilities(one: torch.Tensor) -> bool:
    """Sums of 1, or less where a sink that is not answered takes its part."""
    sums = one.float().sum(dim=-1)
    return bool((one >= 0).all()) and bool((sums <= 1 + _NOISE).all()) and bool(sums.max() > 0)
