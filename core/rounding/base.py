"""The door of rounding: a tensor, a format and a method go in, codes come out.

Methods are a closed set, one file each: `round(weight, format, sensitivity, params) -> EncodedTensor`.

On a GPU `gptq` in formats with fixed scales runs where the weight is: factors and products in torch, columns by the
kernels of `core.rounding.gpu_successive`; only a search over several paths has a loop for CPUs alone, and takes its
targets there. Grids (`gptq`, `watersic`), whose step is searched by an entropy coder on the CPU, coordinate descent
(`error_diffusion`, `power_learned`), and tensors that are not one layer's matrix go to the CPU and back as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from core.errors import InvalidCheckpoint, InvalidFormat
from core.formats.stored import matrix_shape
from core.recipe.rounding import RoundingSpec
from core.recipe.tensor_format import TensorFormat
from core.rounding import error_diffusion, gptq, nearest, power_learned, signround, squeezellm, stacked, watersic
from core.tensors.encoded import EncodedTensor

Turn = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Sensitivity:
    """What tells a method how much an error costs; None for what was not gathered.

    `row_weights`: Fisher information of an element of each output row, (out,). `covariance`: E[h h^T] of the layer's
    inputs, fp64 (in, in), over `tokens` of them (None: as good as exact). `cross`: E[x h^T] of the inputs x in the
    reference model, where h are those in a partly quantised one; None where both are the same. `residual`: E[r h^T], r
    (out,) being what else the output should make up for; None for nothing. `missing`: why there is no covariance.
    `transposed`: the tensor's rows are the inputs, its columns the outputs. `experts`: of each expert in a tensor
    (experts, rows, columns), which itself has `row_weights` alone; no covariance for one that no token reached.
    `row_weights` are always those of the tensor's own rows.
    """

    row_weights: torch.Tensor | None = None
    covariance: torch.Tensor | None = None
    tokens: int | None = None
    cross: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    missing: str = ""
    transposed: bool = False
    experts: Sequence[Sensitivity] | None = None

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

    def on(self, device: torch.device) -> Sensitivity:
        """With the statistics of the inputs on a device."""

        def moved(part: torch.Tensor | None) -> torch.Tensor | None:
            return None if part is None else part.to(device)

        return replace(self, covariance=moved(self.covariance), cross=moved(self.cross), residual=moved(self.residual))

    def check_tensor(self, shape: tuple[int, ...]) -> None:
        """What `check` does, for a tensor that need not be a matrix (out, in); experts are checked when read."""
        rows, columns = matrix_shape(shape)
        if self.experts is not None and (len(shape) != 3 or shape[0] != len(self.experts)):
            raise InvalidFormat(f"statistics of {len(self.experts)} experts for a tensor of {list(shape)}")
        self.check(*((columns, rows) if self.transposed else (rows, columns)))

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


_COMPILED = ("gptq", "watersic", "error_diffusion", "power_learned")  # loops over columns, compiled for the CPU
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
    given.check_tensor(tuple(weight.shape))
    if weight.device.type != "cpu" and spec.name in _COMPILED:
        if not _runs_on_gpu(fmt, spec, given):
            encoded = round_tensor(weight.cpu(), fmt, spec, sensitivity=given, seed=seed)
            return replace(encoded, stored={name: part.to(weight.device) for name, part in encoded.stored.items()})
        given = given.on(weight.device)
    if spec.needs_covariance and (given.experts is not None or (given.transposed and given.covariance is not None)):
        parts = stacked.round_parts(weight, fmt, given, spec, seed, _METHODS[spec.name])
        if isinstance(parts, EncodedTensor):
            return parts
        given = Sensitivity(given.row_weights, missing=parts)
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


def _runs_on_gpu(fmt: TensorFormat, spec: RoundingSpec, given: Sensitivity) -> bool:
    """Whether a method with compiled loops has none, but for several paths, that only a CPU can run."""
    return spec.name == "gptq" and not fmt.is_grid and not given.transposed and given.experts is None
