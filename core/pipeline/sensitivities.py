"""What a finished calibrate step knows of single tensors, as rounding takes it: read when it is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from core.errors import BitmillError
from core.formats.stored import matrix_shape
from core.jobs.steps import StepOutput
from core.pipeline.assemble import open_files
from core.pipeline.calibrate import COVARIANCE_FILE, FISHER_FILE
from core.pipeline.context import StepContext
from core.recipe.rounding import RoundingSpec
from core.rounding.base import Sensitivity
from core.sensitivity.covariance import Covariances
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

        A matrix that is stored with its inputs as rows, or several in one tensor, has no covariance for its columns.
        The last matrix is kept: tensors that share an input follow each other.
        """
        key = f"{name}.rows"
        sums = read_tensor(self.fisher, key) if self.fisher is not None and key in self.fisher.tensors else None
        found = Sensitivity.by_rows(sums, matrix_shape(shape)[0])
        use = self.covariances.uses.get(name) if self.covariances else None
        if use is None:
            reasons = self.covariances.reasons if self.covariances else {}
            return replace(found, missing=reasons.get(name, ""))
        if use.transposed or len(shape) != 2 or use.inputs != shape[1]:
            return replace(found, missing="it is stored with its inputs as rows")
        if use.key not in self._last:
            self._last.clear()
            self._last[use.key] = self._covariance(name)
        return Sensitivity(found.row_weights, self._last[use.key], use.tokens)

    def _covariance(self, name: str) -> torch.Tensor:
        inputs = self.covariances.of(name) if self.covariances else None
        if inputs is None:
            raise BitmillError("no covariance in its file", where=name)
        return inputs.covariance
