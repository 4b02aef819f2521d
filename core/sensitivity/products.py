"""Sums over tokens of products of two sets of features, such as the inputs of a layer in two networks.

Features are rounded to bf16, whose products fp32 has exactly; sums of a chunk of tokens are fp32, those of all chunks
fp64 (data-aware rounding, section 2.1).
"""

from __future__ import annotations

import torch

_CHUNK_TOKENS = 1 << 16


class Products:
    """Sums of left^T right, fp64 (left, right), on a device."""

    def __init__(self, left: int, right: int, device: torch.device) -> None:
        self._total = torch.zeros(left, right, dtype=torch.float64, device=device)

    def add(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add tokens: (tokens, left) and (tokens, right)."""
        for one, other in zip(torch.split(left, _CHUNK_TOKENS), torch.split(right, _CHUNK_TOKENS), strict=True):
            self._total += _product(one.to(torch.bfloat16).T, other.to(torch.bfloat16))

    def mean(self, tokens: int) -> torch.Tensor:
        """Over that many tokens, on the CPU."""
        return (self._total / tokens).cpu()


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """In fp32, from bf16 on a GPU, whose tensor cores add its exact products in fp32."""
    return torch.mm(left, right, out_dtype=torch.float32) if left.is_cuda else left.float() @ right.float()
