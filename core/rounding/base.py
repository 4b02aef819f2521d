"""The door of rounding: a tensor, a format and a method go in, codes come out.

Methods are a closed set, one file each: `round(weight, format, sensitivity, params) -> EncodedTensor`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from core.recipe.rounding import RoundingSpec
from core.recipe.tensor_format import TensorFormat
from core.rounding import error_diffusion, gptq, nearest, power_learned, signround, squeezellm, watersic
from core.tensors.encoded import EncodedTensor

Turn = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Sensitivity:
    """What tells a method how much an error costs; None for what was not gathered.

    `row_weights`: Fisher information of an element of each output row, (out,). `covariance`: E[h h^T] of the layer's
    inputs, fp64 (in, in), over `tokens` of them (None: as good as exact). `cross`: E[x h^T] of the inputs x in the
    reference model, where h are those in a partly quantised one; None where both are the same. `residual`: E[r h^T], r
    (out,) being what else the output should make up for; None for nothing.
    """

    row_weights: torch.Tensor | None = None
    covariance: torch.Tensor | None = None
    tokens: int | None = None
    cross: torch.Tensor | None = None
    residual: torch.Tensor | None = None

    @classmethod
    def by_rows(cls, sums: torch.Tensor | None, rows: int) -> Sensitivity:
        """For a matrix of that many rows from sums over rows of the tensor, each of which may be several of the matrix.

        Rows of a tensor that calibration did not reach, or reached in another shape, count alike.
        """
        if sums is None or not sums.numel() or rows % sums.numel():
            return cls(row_weights=torch.ones(rows, dtype=torch.float64))
        return cls(row_weights=sums.double().repeat_interleave(rows // sums.numel()))

    def on(self, device: str) -> Sensitivity:
        """The same on a device."""

        def moved(part: torch.Tensor | None) -> torch.Tensor | None:
            return None if part is None else part.to(device)

        return replace(
            self,
            row_weights=moved(self.row_weights),
            covariance=moved(self.covariance),
            cross=moved(self.cross),
            residual=moved(self.residual),
        )

    def turned(self, inputs: Turn, outputs: Turn) -> Sensitivity:
        """In another basis: `inputs` turns the last dimension of statistics of inputs, `outputs` rows of outputs."""

        def both(statistic: torch.Tensor | None) -> torch.Tensor | None:
            return None if statistic is None else inputs(inputs(statistic).T).T.to(statistic)

        residual = None if self.residual is None else inputs(outputs(self.residual)).to(self.residual)
        return replace(self, covariance=both(self.covariance), cross=both(self.cross), residual=residual)


Method = Callable[[torch.Tensor, TensorFormat, Sensitivity, RoundingSpec, int], EncodedTensor]
_METHODS: dict[str, Method] = {
    "nearest": nearest.round_tensor,
    "gptq": gptq.round_tensor,
    "watersic": watersic.round_tensor,
    "error_diffusion": error_diffusion.round_tensor,
    "power_learned": power_learned.round_tensor,
    "squeezellm": squeezellm.round_tensor,
    "signround": signround.round_tensor,
}


def round_tensor(
    weight: torch.Tensor, fmt: TensorFormat, spec: RoundingSpec, *, sensitivity: Sensitivity | None, seed: int
) -> EncodedTensor:
    """Encode `weight` (any shape, floating) by the method that `spec` names. `seed` is the tensor's own.

    The result has the format `spec.stored_format(fmt)`. Without statistics of the inputs a method that needs them
    takes all inputs for equal and independent, which its notes say.
    """
    given, fmt = sensitivity or Sensitivity(), spec.stored_format(fmt)
    if weight.device.type != "cpu" and spec.needs_covariance:  # their loops over columns are compiled for the CPU
        encoded = round_tensor(weight.cpu(), fmt, spec, sensitivity=given.on("cpu"), seed=seed)
        return replace(encoded, stored={name: part.to(weight.device) for name, part in encoded.stored.items()})
    if not spec.needs_covariance or given.covariance is not None:
        return _METHODS[spec.name](weight, fmt, given, spec, seed)
    columns = weight.shape[-1] if weight.ndim else 1
    plain = replace(given, covariance=torch.eye(columns, dtype=torch.float64, device=weight.device))
    encoded = _METHODS[spec.name](weight, fmt, plain, spec.for_plain_inputs, seed)
    return encoded.with_notes(("no statistics of its inputs: all of them count alike",))
