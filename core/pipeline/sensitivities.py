"""What a finished calibrate step knows of single tensors, as rounding takes it: read when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import overload

import torch

from core.errors import BitmillError
from core.formats.stored import matrix_shape
from core.jobs.steps import StepOutput
from core.pipeline.assemble import open_files
from core.pipeline.calibrate import COVARIANCE_FILE, FISHER_FILE
from core.pipeline.context import StepContext
from core.recipe.rounding import RoundingSpec
from core.rounding.base import Sensitivity
from core.sensitivity.covariance import Covariances, StackedUse
from core.storage.checkpoint import CheckpointIndex
from core.tensors.reader import read_tensor


@dataclass(frozen=True)
class Sensitivities:
    """`fisher`: the file of Fisher information; `covariances`: of inputs; None for what was not gathered."""

    fisher: CheckpointIndex | None
    covariances: Covariances | None
    _last: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of_step(cls, ctx: StepContext, calibrated: list[StepOutput], rounding: RoundingSpec) -> Sensitivities:
        """Of the calibrate step, if the job has one, with the covariances if the method needs them."""
        files = calibrated[0].files if calibrated else {}
        fisher = open_files(ctx, {"fisher": files[FISHER_FILE]}) if FISHER_FILE in files else None
        if not rounding.needs_covariance or COVARIANCE_FILE not in files:
            return cls(fisher, None)
        return cls(fisher, Covariances.from_index(open_files(ctx, {"covariance": files[COVARIANCE_FILE]})))

    def of(self, name: str, shape: tuple[int, ...]) -> Sensitivity:
        """Of one tensor; rows that calibration did not reach count alike.

        The last matrix is kept: tensors that share an input follow each other. Those of experts in one tensor are read
        when they are asked for, and not kept.
        """
        key = f"{name}.rows"
        sums = read_tensor(self.fisher, key) if self.fisher is not None and key in self.fisher.tensors else None
        found = Sensitivity.by_rows(sums, matrix_shape(shape)[0])
        if self.covariances is None:
            return found
        use, stack = self.covariances.uses.get(name), self.covariances.stacked.get(name)
        if stack is not None and shape == _stacked_shape(stack, shape):
            return replace(found, experts=_Experts(self.covariances, name), transposed=stack.transposed)
        if use is None and stack is None:
            return replace(found, missing=self.covariances.reasons.get(name, ""))
        if use is None or len(shape) != 2 or use.inputs != shape[0 if use.transposed else 1]:
            return replace(found, missing="calibration saw it in another shape")
        if use.key not in self._last:
            self._last.clear()
            self._last[use.key] = self._covariance(name)
        return replace(found, covariance=self._last[use.key], tokens=use.tokens, transposed=use.transposed)

    def _covariance(self, name: str) -> torch.Tensor:
        inputs = self.covariances.of(name) if self.covariances else None
        if inputs is None:
            raise BitmillError("no covariance in its file", where=name)
        return inputs.covariance


class _Experts(Sequence[Sensitivity]):
    """Of the experts in one tensor, each read when it is asked for."""

    def __init__(self, covariances: Covariances, name: str) -> None:
        self._covariances, self._name, self._use = covariances, name, covariances.stacked[name]

    def __len__(self) -> int:
        return len(self._use.tokens)

    @overload
    def __getitem__(self, at: int) -> Sensitivity: ...

    @overload
    def __getitem__(self, at: slice) -> list[Sensitivity]: ...

    def __getitem__(self, at: int | slice) -> Sensitivity | list[Sensitivity]:
        if isinstance(at, slice):
            return [self[one] for one in range(*at.indices(len(self)))]
        known = self._covariances.of_expert(self._name, range(len(self))[at])
        if known is None:
            return Sensitivity(transposed=self._use.transposed)
        return Sensitivity(covariance=known.covariance, tokens=known.tokens, transposed=known.transposed)


def _stacked_shape(use: StackedUse, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a tensor of these experts has, given its outputs."""
    outputs = shape[-1] if use.transposed else shape[-2] if len(shape) > 1 else 0
    return (len(use.tokens), *((use.inputs, outputs) if use.transposed else (outputs, use.inputs)))
