"""The door of rounding: a tensor, a format and a method go in, codes come out.

Methods are a closed set, one file each: `round(weight, format, sensitivity, params) -> EncodedTensor`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from core.errors import InvalidCheckpoint, InvalidFormat
from core.formats.stored import matrix_shape
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
    (out,) being what else the output should make up for; None for nothing. `missing`: why there is no covariance.
    """

    row_weights: torch.Tensor | None = None
    covariance: torch.Tensor | None = None
    tokens: int | None = None
    cross: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    missing: str = ""

    @classmethod
    def by_rows(cls, sums: torch.Tensor | None, rows: int) -> Sensitivity:
        """For a matrix of that many rows from sums over rows of the tensor, each of which may be several of the matrix.

        Rows of a tensor that calibration did not reach, or reached in another shape, count alike.
        """
        if sums is None or not sums.numel() or rows % sums.numel():
            return cls(row_weights=torch.ones(rows, dtype=torch.float64))
        return cls(row_weights=sums.double().repeat_interleave(rows // sums.numel()))

    def in_units(self, weight: float, covariance: float) -> Sensitivity:
        """For a weight that is divided by one unit, with inputs' products divided by another."""

        def over(part: torch.Tensor | None, unit: float) -> torch.Tensor | None:
            return None if part is None else part.double() / unit

        cross, residual = over(self.cross, covariance), over(self.residual, covariance * weight)
        return replace(self, covariance=over(self.covariance, covariance), cross=cross, residual=residual)

    def check(self, rows: int, columns: int) -> None:
        """InvalidFormat for statistics of another matrix than (rows, columns), InvalidCheckpoint for NaN in them."""
        shapes = {"covariance": (columns, columns), "cross": (columns, columns), "residual": (rows, columns)}
        for name, shape in shapes.items():
            part: torch.Tensor | None = getattr(self, name)
            if part is not None and tuple(part.shape) != shape:
                raise InvalidFormat(f"a {name} of {list(part.shape)} for a weight that asks for {list(shape)}")
            if part is not None and not bool(torch.isfinite(part).all()):
                raise InvalidCheckpoint(f"the {name} of the inputs holds NaN or infinity")

    def turned(self, inputs: Turn, outputs: Turn) -> Sensitivity:
        """In another basis: `inputs` turns the last dimension of statistics of inputs, `outputs` rows of outputs."""

        def both(statistic: torch.Tensor | None) -> torch.Tensor | None:
            return None if statistic is None else inputs(inputs(statistic).T).T.to(statistic)

        residual = None if self.residual is None else inputs(outputs(self.residual)).to(self.residual)
        return replace(self, covariance=both(self.covariance), cross=both(self.cross), residual=residual)


_COMPILED = ("gptq", "watersic", "error_diffusion", "power_learned")  # loops over columns, for the CPU
_LIKE_NEAREST = ("gptq", "error_diffusion", "squeezellm")  # where inputs are independent and alike, but on grids
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
    given.check(*matrix_shape(tuple(weight.shape)))
    if weight.device.type != "cpu" and spec.name in _COMPILED:
        encoded = round_tensor(weight.cpu(), fmt, spec, sensitivity=given, seed=seed)
        return replace(encoded, stored={name: part.to(weight.device) for name, part in encoded.stored.items()})
    if not spec.needs_covariance or given.covariance is not None:
        return _METHODS[spec.name](weight, fmt, given, spec, seed)
    if spec.name in _LIKE_NEAREST and not fmt.is_grid:
        encoded = nearest.round_tensor(weight, fmt, given, spec, seed)
    else:
        columns = weight.shape[-1] if weight.ndim else 1
        plain = replace(given, covariance=torch.eye(columns, dtype=torch.float64))
        encoded = _METHODS[spec.name](weight, fmt, plain, spec.for_plain_inputs, seed)
    why = f" ({given.missing})" if given.missing else ""
    return encoded.with_notes((f"no statistics of its inputs{why}: all of them count alike",))
