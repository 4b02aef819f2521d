"""Muon: momentum whose update of each matrix is orthogonalised by a Newton-Schulz iteration.

For the two-dimensional weights of hidden layers; embeddings, heads and norms belong with AdamW.
Matrices of one shape are updated together, as one batch. See Keller Jordan's description of 2024.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return (batch, rows, columns) with all singular values moved near one."""
    a, b, c = COEFFICIENTS
    x: Tensor
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; decoupled weight decay."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Update all parameters from their gradients."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is not None:
                    wide = (min(param.shape), max(param.shape))
                    by_shape[wide].append(param)
            for params in by_shape.values():
                self._step_together(params, group)

    def _step_together(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        updates = [self._momentum(param, group["momentum"]) for param in params]
        wide = torch.stack([u.mT if u.shape[0] > u.shape[1] else u for u in updates])
        for param, update in zip(params, orthogonalise(wide), strict=True):
            rows, columns = param.shape
            scale = max(1.0, rows / columns) ** 0.5
            param.mul_(1 - group["lr"] * group["weight_decay"])
            param.add_(update.mT if rows > columns else update, alpha=-group["lr"] * scale)

    def _momentum(self, param: nn.Parameter, momentum: float) -> Tensor:
        gradient: Tensor = param.grad  # type: ignore[assignment]
        state = self.state[param]
        if not state:
            state["momentum"] = torch.zeros_like(param)
        buffer: Tensor = state["momentum"]
        buffer.lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum)
