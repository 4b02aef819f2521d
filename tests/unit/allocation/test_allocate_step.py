"""The allocate step: from a recipe and a finished calibration to the plan that later steps follow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.errors import InfeasibleTarget, Interrupted
from core.evaluation.divergence import evaluate
from core.exports.layout import KEEP, layout_bytes
from core.jobs.steps import StepInput, StepKind, StepOutput, StepRequest, recipe_params
from core.pipeline.allocate import allocate
from core.pipeline.context import StepContext
from core.pipeline.fetch import open_checkpoint
from core.pipeline.forward import network_of, windows_of
from core.pipeline.local import run_steps
from core.pipeline.plan_file import PLAN_FILE, Plan, read_plan
from core.recipe.recipe import Recipe, load_recipe
from core.recipe.tensor_format import parse
from core.storage.checkpoint import CheckpointIndex
from core.storage.local_store import LocalStore
from core.tensors.nearest import encode_nearest
from core.tensors.reader import read_tensor
from models import BUNDLED
from tests.unit.pipeline.conftest import write_llama

TEXT = {"text": "builtin", "sequences": 4, "sequence_length": 64}
RECIPE: dict[str, Any] = {
    "version": 1,
    "target": {"bits_per_param": 4.5},
    "format": "t7_4@32:signmax",
    "calibration": TEXT,
    "evaluation": False,
}


class Bench:
    """A checkpoint, fetched and calibrated."""

    def __init__(self, source: Path, work: Path) -> None:
        (work / "scratch").mkdir(parents=True)
        self.ctx = StepContext(store=LocalStore(work / "store"), scratch=work / "scratch")
        kinds: tuple[StepKind, ...] = ("fetch", "calibrate")
        done = run_steps(source, self.recipe(), self.ctx, kinds)
        self.fetched, self.calibrated = done["fetch"][0], done["calibrate"][0]
        self.index: CheckpointIndex = open_checkpoint(self.ctx, self.fetched)

    @staticmethod
    def recipe(**changes: Any) -> Recipe:
        return load_recipe(RECIPE | changes)

    def request(self, *, calibrated: StepOutput | None = None, **changes: Any) -> StepRequest:
        canonical = self.recipe(**changes).canonical()
        inputs = [StepInput(kind="fetch", output=self.fetched)]
        if canonical["calibration"]:
            inputs.append(StepInput(kind="calibrate", output=calibrated or self.calibrated))
        params = recipe_params("allocate", canonical)
        return StepRequest(kind="allocate", input_hash="a" * 64, params=params, inputs=tuple(inputs))

    def plan(self, **changes: Any) -> Plan:
        return read_plan(self.ctx, allocate(self.request(**changes), self.ctx))

    def measured(self, plan: Plan) -> float:
        """KL of a plan on the calibration text, by other means than the step's."""

        def weights(name: str) -> Any:
            weight, text = read_tensor(self.index, name), plan.choice[name]
            return weight if text == KEEP else encode_nearest(weight, parse(text)).decode().to(weight.dtype)

        windows = windows_of(self.index, self.recipe().canonical()["calibration"], "calibration")
        networks = network_of(self.index, "cpu"), network_of(self.index, "cpu", weights)
        return evaluate(*networks, windows, lambda _fraction, _what: None).kl_mean


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    work = tmp_path_factory.mktemp("allocate")
    return Bench(write_llama(work / "llama"), work / "bench")


def test_the_plan_lists_every_tensor_once_with_what_it_takes(bench: Bench) -> None:
    output = allocate(bench.request(), bench.ctx)
    plan = read_plan(bench.ctx, output)
    assert [tensor.name for tensor in plan.tensors] == list(bench.index.names)
    assert plan.predicted_bytes == layout_bytes(bench.index, plan.choice)
    assert 4.4 < plan.predicted_bits_per_param <= 4.5
    for tensor in plan.tensors:
        assert (tensor.format == KEEP) == ("norm" in tensor.name)
        assert tensor.bits == pytest.approx(
            8 * tensor.stored_bytes / bench.index.tensors[tensor.name].elements, rel=1e-5
        )
    assert output.values["predicted_bytes"] == plan.predicted_bytes
    assert output.values["predicted_kl"] == plan.predicted_kl
    assert list(output.files) == [PLAN_FILE]


def test_the_predicted_kl_is_the_sum_over_the_tensors(bench: Bench) -> None:
    plan = bench.plan()
    total = sum(tensor.predicted_kl or 0.0 for tensor in plan.tensors)
    assert plan.predicted_kl == pytest.approx(total, rel=1e-5)
    assert all(tensor.fisher_mean for tensor in plan.tensors if tensor.format != KEEP)


def test_fused_tensors_have_one_format(bench: Bench) -> None:
    choice = bench.plan().choice
    for layer in range(2):
        at = f"model.layers.{layer}"
        assert len({choice[f"{at}.self_attn.{role}_proj.weight"] for role in "qkv"}) == 1
        assert choice[f"{at}.mlp.gate_proj.weight"] == choice[f"{at}.mlp.up_proj.weight"]


def test_the_same_request_gives_the_same_bytes(bench: Bench) -> None:
    first, second = (allocate(bench.request(), bench.ctx) for _ in range(2))
    assert first == second
    assert Plan.from_bytes(read_plan(bench.ctx, first).to_bytes()) == read_plan(bench.ctx, first)


def test_a_size_in_bytes_is_met(bench: Bench) -> None:
    plan = bench.plan(target={"size_bytes": 60_000})
    assert 59_500 < plan.predicted_bytes <= 60_000


def test_without_calibration_there_is_a_plan_and_no_prediction(bench: Bench) -> None:
    plan = bench.plan(allocation="uniform", calibration=False)
    assert plan.predicted_kl is None
    assert all(tensor.predicted_kl is None and tensor.fisher_mean is None for tensor in plan.tensors)
    assert len(set(plan.choice.values()) - {KEEP}) == 1


@pytest.mark.parametrize("name", ["uniform", "heuristic"])
def test_fisher_predicts_less_than_a_baseline_of_the_same_size(bench: Bench, name: str) -> None:
    baseline = bench.plan(allocation=name)
    fisher = bench.plan(target={"size_bytes": baseline.predicted_bytes})
    assert fisher.predicted_bytes <= baseline.predicted_bytes
    assert (fisher.predicted_kl or 0) < 0.9 * (baseline.predicted_kl or 0)


def test_the_prediction_is_near_the_measurement(bench: Bench) -> None:
    plan = bench.plan(target={"bits_per_param": 6.0})
    # 252 positions of a random network: the quadratic form and the sampled labels leave a factor of two at most.
    assert 0.5 < bench.measured(plan) / (plan.predicted_kl or 0) < 2


@pytest.mark.parametrize("name", ["fisher", "uniform"])
def test_a_kl_target_is_met_as_measured_with_few_bits_to_spare(bench: Bench, name: str) -> None:
    plan = bench.plan(target={"kl": 0.02}, allocation=name)
    assert bench.measured(plan) <= 0.02 * (1 + 1e-6)
    reached = [one for one in plan.rounds if one["bits_per_param"] == plan.predicted_bits_per_param]
    assert reached[0]["kl"] == pytest.approx(bench.measured(plan), rel=1e-4)
    assert reached[0]["kl"] > 0.01
    assert 1 <= len(plan.rounds) <= 8


def test_a_kl_that_no_width_reaches_is_refused_with_the_smallest_measured(bench: Bench) -> None:
    with pytest.raises(InfeasibleTarget, match=r"smallest measured is .* bits per parameter") as refused:
        bench.plan(target={"kl": 1e-9})
    assert refused.value.where == "target.kl"


def test_a_target_below_the_smallest_size_is_refused_in_its_unit(bench: Bench) -> None:
    with pytest.raises(InfeasibleTarget, match=r"smallest that can is \d\.\d{4}"):
        bench.plan(target={"bits_per_param": 2.0})


def test_tensors_that_calibration_did_not_reach_are_listed_and_not_starved(bench: Bench) -> None:
    missed = "model.layers.1.mlp.down_proj.weight"
    tensors = {name: one for name, one in bench.calibrated.values["tensors"].items() if name != missed}
    calibrated = bench.calibrated.model_copy(update={"values": bench.calibrated.values | {"tensors": tensors}})
    plan = bench.plan(calibrated=calibrated)
    flat = bench.plan(allocation="uniform")
    assert parse(plan.choice[missed]).codes >= parse(flat.choice[missed]).codes
    assert any("no Fisher information of 1 tensors" in text and missed in text for text in plan.warnings)
    assert plan.by_name()[missed].fisher_mean is None
    assert plan.by_name()[missed].predicted_kl is None


def test_clamped_weights_and_a_short_text_are_warned_of(bench: Bench) -> None:
    said = " ".join(bench.plan(target={"bits_per_param": 3.7}).warnings)
    assert "smallest width" in said
    assert "halves of the calibration text" in said
    assert any("largest width" in text for text in bench.plan(target={"bits_per_param": 12.0}).warnings)
    assert bench.plan(allocation="uniform").warnings == ()


def test_progress_rises_and_the_step_can_be_stopped(bench: Bench) -> None:
    seen: list[float] = []
    ctx = replace(bench.ctx, progress=lambda fraction, _what: seen.append(fraction))
    allocate(bench.request(target={"kl": 0.02}), ctx)
    assert seen == sorted(seen)
    assert 0 <= seen[0] < seen[-1] <= 1

    def stop() -> None:
        raise Interrupted("asked to stop")

    with pytest.raises(Interrupted):
        allocate(bench.request(), replace(bench.ctx, check=stop))


def test_the_bundled_model_at_three_and_a_half_bits(tmp_path: Path) -> None:
    bench = Bench(BUNDLED, tmp_path / "bench")
    plan = bench.plan(format="t7_4@64:signmax", target={"bits_per_param": 3.5})
    assert 3.45 < 8 * plan.predicted_bytes / bench.index.parameters <= 3.5
    flat = bench.plan(format="t7_4@64:signmax", target={"size_bytes": plan.predicted_bytes}, allocation="uniform")
    assert (plan.predicted_kl or 1) < 0.8 * (flat.predicted_kl or 0)
