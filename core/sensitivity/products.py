"""Sums over tokens of products of features: the inputs of a layer with themselves, or with those in another network.

Features are rounded to bf16, whose products fp32 has exactly; sums of a chunk of tokens are fp32, those of all chunks
fp64 (data-aware rounding, section 2.1).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

_CHUNK_TOKENS = 1 << 16
_PANEL = 1024


class Gram:
    """Σ x xᵀ over tokens, fp64 (size, size); only the upper triangle is right until it is read."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.tokens = size, 0
        self._total = torch.zeros(size, size, dtype=torch.float64, device=device)

    def add(self, x: torch.Tensor) -> None:
        """Add tokens (tokens, size)."""
        self.tokens += len(x)
        for chunk in torch.split(x, _CHUNK_TOKENS):
            narrow = _narrow(chunk)
            for start in range(0, self.size, _PANEL):
                stop = min(start + _PANEL, self.size)
                self._total[start:stop, start:] += _product(narrow[:, start:stop].T, narrow[:, start:])

    def panels(self) -> Iterator[torch.Tensor]:
        """The mean over tokens, symmetric, as panels of rows in fp32 on the CPU."""
        for start in range(0, self.size, _PANEL):
            stop = min(start + _PANEL, self.size)
            corner = self._total[start:stop, start:stop]
            corner.copy_((corner + corner.T) / 2)
            self._total[stop:, start:stop] = self._total[start:stop, stop:].T
            yield (self._total[start:stop] / self.tokens).to(torch.float32).cpu()

    @property
    def finite(self) -> bool:
        return bool(self._total.diagonal().isfinite().all())


class Products:
    """Sums of left^T right, fp64 (left, right), on a device."""

    def __init__(self, left: int, right: int, device: torch.device) -> None:
        self._total = torch.zeros(left, right, dtype=torch.float64, device=device)

    def add(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add tokens: (tokens, left) and (tokens, right)."""
        for one, other in zip(torch.split(left, _CHUNK_TOKENS), torch.split(right, _CHUNK_TOKENS), strict=True):
            self._total += _product(_narrow(one).T, _narrow(other))

    def mean(self, tokens: int) -> torch.Tensor:
        """Over that many tokens, on the CPU."""
        return (self._total / tokens).cpu()


def _narrow(features: torch.Tensor) -> torch.Tensor:
    """Rounded to bf16; on a CPU, which multiplies those slowly, held in fp32."""
    exact = features.to(torch.bfloat16)
    return exact if exact.is_cuda else exact.float()


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """In fp32, from bf16 on a GPU, whose tensor cores add its exact products in fp32."""
    return torch.mm(left, right, out_dtype=torch.float32) if left.is_cuda else left @ right
