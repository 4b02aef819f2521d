"""What allocation by Fisher information gains on the bundled model, at exactly equal stored bytes.

At every target `uniform` is planned first; `fisher` and `heuristic` then get the bytes that it stores as their budget.
All share one calibration. Prints a JSON line per plan: stored bits per parameter, predicted and measured KL (nats per
token, on the evaluation part of the built-in text). Last line: whether fisher is below uniform wherever there was a
choice to make, and measured over predicted KL of fisher at 4 bits. (The model has four layers, all of them outer ones,
so `heuristic` gives every tensor the same here, like `uniform`, and has fewer widths to choose from.)

    python benchmarks/allocation_table.py [--sequences 64] [--bits 3.0 3.5 4.0 4.5] [--format t7_4@64:signmax ...]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core.jobs.steps import StepKind, StepOutput
    from core.pipeline.context import StepContext
    from core.pipeline.plan_file import Plan

ROOT = Path(__file__).parents[1]
FORMATS = ("t7_4@32:signmax-search:e4m3", "t7_4@64:signmax", "grid3@tensor")
BITS = (3.0, 3.5, 4.0, 4.5)
METHODS = ("uniform", "fisher", "heuristic")
FORECAST_AT = 4.0
EVALUATION = {"text": "builtin", "sequences": 32, "sequence_length": 512}


class Bench:
    """One checkpoint, calibrated once."""

    def __init__(self, source: Path, ctx: StepContext, sequences: int) -> None:
        from core.pipeline.fetch import open_checkpoint
        from core.pipeline.forward import network_of, windows_of
        from core.pipeline.local import run_steps

        self.ctx, self.sequences = ctx, sequences
        recipe = self._recipe("fisher", FORMATS[0], {"bits_per_param": 4.0})
        kinds: tuple[StepKind, ...] = ("fetch", "calibrate")
        self.done: dict[StepKind, list[StepOutput]] = run_steps(source, recipe, ctx, kinds)
        self.index = open_checkpoint(ctx, self.done["fetch"][0])
        self.windows = windows_of(self.index, EVALUATION, "evaluation")
        self.reference = network_of(self.index, "cpu")

    def plan(self, method: str, text: str, target: dict[str, float]) -> Plan:
        """What the allocate step plans."""
        from core.jobs.steps import StepInput, StepRequest, recipe_params
        from core.pipeline.allocate import allocate
        from core.pipeline.plan_file import read_plan

        canonical = self._recipe(method, text, target).canonical()
        inputs = tuple(StepInput(kind=kind, output=outputs[0]) for kind, outputs in self.done.items())
        params = recipe_params("allocate", canonical)
        request = StepRequest(kind="allocate", input_hash="bench", params=params, inputs=inputs)
        return read_plan(self.ctx, allocate(request, self.ctx))

    def measured(self, plan: Plan) -> float:
        """KL of the planned model in nats per token."""
        import torch

        from core.evaluation.divergence import evaluate
        from core.pipeline.forward import network_of
        from core.recipe.tensor_format import parse
        from core.tensors.nearest import encode_nearest
        from core.tensors.reader import read_tensor

        def weights(name: str) -> torch.Tensor:
            weight, text = read_tensor(self.index, name), plan.choice[name]
            return weight if text == "keep" else encode_nearest(weight, parse(text)).decode().to(weight.dtype)

        candidate = network_of(self.index, "cpu", weights)
        return evaluate(self.reference, candidate, self.windows, lambda _fraction, _what: None).kl_mean

    def _recipe(self, method: str, text: str, target: dict[str, float]) -> Any:
        from core.recipe.recipe import load_recipe

        calibration = {"text": "builtin", "sequences": self.sequences, "sequence_length": 512}
        recipe = {"format": text, "target": target, "allocation": method, "calibration": calibration}
        return load_recipe({"version": 1, "evaluation": False, **recipe})


def rows(bench: Bench, text: str, bits: float) -> Iterator[dict[str, Any]]:
    """A line per method at one target, all at the bytes that uniform stores."""
    from core.errors import InfeasibleTarget

    target: dict[str, float] = {"bits_per_param": bits}
    first: dict[str, str] = {}
    for method in METHODS:
        line: dict[str, Any] = {"benchmark": "allocation_table", "format": text, "target": bits, "method": method}
        try:
            plan = bench.plan(method, text, target)
        except InfeasibleTarget as error:
            yield line | {"infeasible": error.detail}
            return
        target = {"size_bytes": plan.predicted_bytes} if method == "uniform" else target
        first = first or plan.choice
        yield line | {
            "stored_bytes": plan.predicted_bytes,
            "bits_per_param": plan.predicted_bits_per_param,
            "predicted_kl": plan.predicted_kl,
            "measured_kl": round(bench.measured(plan), 6),
            "same_as_uniform": plan.choice == first,
            "warnings": list(plan.warnings),
        }


def verdict(lines: list[dict[str, Any]], ratio: float | None) -> dict[str, Any]:
    """Whether fisher is below uniform at every target where it could choose otherwise, and by how much."""
    measured = {(one["format"], one["target"], one["method"]): one for one in lines if "measured_kl" in one}
    gains = {}
    for (text, bits, method), one in measured.items():
        if method == "fisher" and not one["same_as_uniform"]:
            gains[f"{text} {bits}"] = round(one["measured_kl"] / measured[text, bits, "uniform"]["measured_kl"], 4)
    return {
        "benchmark": "allocation_table",
        "fisher_over_uniform": gains,
        "fisher_below_uniform": bool(gains) and all(gain < 1 for gain in gains.values()),
        "measured_over_predicted_at_4_bits": ratio,
    }


def forecast_ratio(bench: Bench, text: str) -> float:
    """Measured over predicted KL of fisher at 4 bits per parameter."""
    plan = bench.plan("fisher", text, {"bits_per_param": FORECAST_AT})
    return round(bench.measured(plan) / (plan.predicted_kl or 1.0), 4)


def main() -> None:
    """Calibrate, then plan and measure everything."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    arguments.add_argument("--sequences", type=int, default=64)
    arguments.add_argument("--bits", type=float, nargs="+", default=list(BITS))
    arguments.add_argument("--format", nargs="+", default=list(FORMATS))
    given = arguments.parse_args()

    from core.pipeline.context import StepContext
    from core.storage.local_store import LocalStore
    from models import BUNDLED

    with tempfile.TemporaryDirectory() as work:
        scratch = Path(work) / "scratch"
        scratch.mkdir()
        bench = Bench(BUNDLED, StepContext(store=LocalStore(Path(work) / "store"), scratch=scratch), given.sequences)
        lines = []
        for text in given.format:
            for bits in given.bits:
                for line in rows(bench, text, bits):
                    print(json.dumps(line), flush=True)
                    lines.append(line)
        print(json.dumps(verdict(lines, forecast_ratio(bench, given.format[0]))))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
