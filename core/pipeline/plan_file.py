"""The plan that allocation writes and the later steps read: a format for every tensor, and what it was decided from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from core.ids import canonical_json
from core.jobs.steps import StepOutput
from core.pipeline.context import StepContext

PLAN_FILE = "allocation.json"


@dataclass(frozen=True)
class PlannedTensor:
    """What is known of a tensor before it is encoded; `predicted_kl` in nats per token, None without Fisher."""

    name: str
    format: str
    bits: float
    stored_bytes: int
    fisher_mean: float | None = None
    predicted_kl: float | None = None


@dataclass(frozen=True)
class Plan:
    """The choice for every tensor of a checkpoint. `predicted_bytes` is the exact size of the weight files."""

    tensors: tuple[PlannedTensor, ...]
    predicted_bytes: int
    predicted_bits_per_param: float
    predicted_kl: float | None
    warnings: tuple[str, ...] = ()
    rounds: tuple[dict[str, float], ...] = field(default=())

    @property
    def choice(self) -> dict[str, str]:
        """Format by tensor, "keep" for those stored as they are."""
        return {tensor.name: tensor.format for tensor in self.tensors}

    def by_name(self) -> dict[str, PlannedTensor]:
        """The tensors by name."""
        return {tensor.name: tensor for tensor in self.tensors}

    def to_bytes(self) -> bytes:
        """The plan as canonical JSON."""
        return canonical_json(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Plan:
        """The plan that `to_bytes` wrote."""
        fields = json.loads(data)
        tensors = tuple(PlannedTensor(**row) for row in fields.pop("tensors"))
        warnings, rounds = tuple(fields.pop("warnings")), tuple(fields.pop("rounds"))
        return cls(tensors=tensors, warnings=warnings, rounds=rounds, **fields)


def read_plan(ctx: StepContext, allocated: StepOutput) -> Plan:
    """The plan of a finished allocate step."""
    file = allocated.files[PLAN_FILE]
    return Plan.from_bytes(ctx.store.read(file.key))
