"""The calibrate step: what its request asks for, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.errors import Interrupted, UserError
from core.jobs.steps import StepInput, StepOutput, StepRequest, input_hash, recipe_params
from core.pipeline.assemble import open_files
from core.pipeline.calibrate import COVARIANCE_FILE, FISHER_FILE, calibrate
from core.pipeline.context import StepContext
from core.pipeline.local import run_steps
from core.recipe.recipe import load_recipe
from core.sensitivity.covariance import Covariances
from core.storage.local_store import LocalStore
from tests.unit.pipeline.conftest import write_llama

TEXT = {"text": "builtin", "sequences": 3, "sequence_length": 32, "seed": 0}
RECIPE = load_recipe({"version": 1, "target": {"bits_per_param": 4.5}, "format": "int4@32", "calibration": TEXT})


class Bench:
    """A checkpoint that was fetched."""

    def __init__(self, work: Path) -> None:
        (work / "scratch").mkdir(parents=True)
        self.ctx = StepContext(store=LocalStore(work / "store"), scratch=work / "scratch")
        self.fetched = run_steps(write_llama(work / "llama"), RECIPE, self.ctx, ("fetch",))["fetch"][0]

    def calibrate(self, ctx: StepContext | None = None, **params: Any) -> StepOutput:
        inputs = (StepInput(kind="fetch", output=self.fetched),)
        asked = {"calibration": TEXT} | params
        return calibrate(
            StepRequest(kind="calibrate", input_hash="a" * 64, params=asked, inputs=inputs), ctx or self.ctx
        )


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("calibrate") / "bench")


def test_without_a_word_about_it_fisher_information_is_all_that_is_gathered(bench: Bench) -> None:
    output = bench.calibrate()
    assert set(output.files) == {FISHER_FILE}
    assert "covariance" not in output.values
    assert output == bench.calibrate(gather=["fisher"])


def test_both_are_what_each_is_alone(bench: Bench) -> None:
    both = bench.calibrate(gather=["fisher", "covariance"])
    fisher, covariance = bench.calibrate(), bench.calibrate(gather=["covariance"])
    assert both.files == fisher.files | covariance.files
    assert both.values == fisher.values | covariance.values
    assert "tensors" not in covariance.values
    assert covariance.values["text_sha256"] == fisher.values["text_sha256"]


def test_the_values_describe_the_file(bench: Bench) -> None:
    output = bench.calibrate(gather=["covariance"])
    known = Covariances.from_index(open_files(bench.ctx, {"covariance": output.files[COVARIANCE_FILE]}))
    assert output.values["covariance"] == known.describe()
    assert output.values["covariance"]["tensors"]["model.layers.0.mlp.up_proj.weight"] == {
        "tokens": 96,
        "inputs": 64,
        "key": "model.layers.0.mlp.gate_proj.weight",
    }
    assert set(output.values["covariance"]["not_reached"]) == {"model.embed_tokens.weight"}


@pytest.mark.parametrize("wanted", [[], ["hessian"], ["fisher", "hessian"]])
def test_other_things_are_not_gathered(bench: Bench, wanted: list[str]) -> None:
    with pytest.raises(UserError, match="fisher and covariance"):
        bench.calibrate(gather=wanted)


def test_it_can_be_stopped_between_batches_and_reports_what_it_does(bench: Bench) -> None:
    told: list[tuple[float, str]] = []

    def stop() -> None:
        if told and "layers.1" in told[-1][1]:
            raise Interrupted("asked to stop")

    ctx = replace(bench.ctx, progress=lambda fraction, what: told.append((fraction, what)), check=stop)
    with pytest.raises(Interrupted):
        bench.calibrate(ctx, gather=["fisher", "covariance"])
    fractions = [fraction for fraction, _ in told]
    assert fractions == sorted(fractions)
    assert fractions[-1] < 0.9
    assert told[-1][1].startswith("model.layers.1")


def test_a_recipe_asks_for_covariance_only_where_its_rounding_needs_it() -> None:
    canonical = RECIPE.canonical()
    assert recipe_params("calibrate", canonical) == {"calibration": canonical["calibration"]}
    data_aware = canonical | {"rounding": {"name": "gptq"}}
    asked = recipe_params("calibrate", data_aware)
    assert asked == {"calibration": canonical["calibration"], "gather": ["fisher", "covariance"]}
    hashes = {input_hash("calibrate", recipe_params("calibrate", one), [], seed=0) for one in (canonical, data_aware)}
    assert len(hashes) == 2
