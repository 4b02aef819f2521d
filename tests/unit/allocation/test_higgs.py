"""Allocation `higgs`: coefficients of the linearity theorem by noise, and the plan that they give.

Oracles: the expected KL of noise on a softmax layer in closed form, numpy's least squares, all combinations.
"""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from core.allocation import higgs
from core.allocation.budget import Option, choose
from core.allocation.forecast import Forecast
from core.errors import Interrupted, InvalidRecipe, NonFiniteWeights
from core.evaluation.divergence import evaluate
from core.evaluation.text import Windows
from core.exports.layout import KEEP
from core.network_tensors import places_of
from core.pipeline.allocate import allocate
from core.pipeline.forward import network_of, windows_of
from core.recipe.calibration import CalibrationSpec
from core.recipe.recipe import load_recipe
from core.recipe.tensor_format import parse
from core.storage.checkpoint import CheckpointIndex
from core.storage.sources import folder_sources
from core.tensors.nearest import encode_nearest
from core.tensors.reader import read_tensor
from models import BUNDLED
from tests.unit.allocation.conftest import space_of
from tests.unit.allocation.test_allocate_step import Bench
from tests.unit.pipeline.conftest import write_llama

VOCABULARY, WIDTH = 48, 24


class OneLayer(nn.Module):
    """Logits W e(token): the smallest language model."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.requires_grad_(False)
        self.head.weight.normal_(std=0.4)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.head(self.table(input_ids)))

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def silent(_fraction: float, _what: str) -> None:
    """Nobody listens."""


def windows(count: int, length: int = 64) -> torch.Tensor:
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))


def measured(network: OneLayer, ids: torch.Tensor, *levels: float, seed: int = 0) -> higgs.Linear:
    found = higgs.measured(network, {"head": network.head.weight}, ids, seed, silent, levels or higgs.LEVELS)
    return found["head"]


@given(increases=st.lists(st.floats(0, 10), min_size=1, max_size=15))
def test_the_fit_through_the_origin_is_the_least_squares_one(increases: list[float]) -> None:
    levels = [0.001 * (at + 1) for at in range(len(increases))]
    expected = np.linalg.lstsq(np.array(levels)[:, None], np.array(increases), rcond=None)[0][0]
    assert higgs.through_origin(levels, increases) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_coefficient_of_a_softmax_layer_is_that_of_its_hessian() -> None:
    network, ids = OneLayer(), windows(200)
    inputs, weight = network.table(ids).double(), network.head.weight.double()
    p = (inputs @ weight.T).softmax(-1)
    # KL of noise of variance s^2 a weight: 1/2 s^2 |x|^2 tr(diag p - p p^T)
    curvature = inputs.square().sum(-1) * (1 - p.square().sum(-1))
    expected = 0.5 * float(curvature.mean()) * float(weight.square().sum()) / weight.numel()
    found = measured(network, ids)
    assert found.coefficient == pytest.approx(expected, rel=0.02)
    assert found.squares == pytest.approx(float(weight.square().sum()), rel=1e-9)


def test_kl_is_linear_in_the_squared_error_up_to_the_largest_level() -> None:
    network, ids = OneLayer(), windows(30)
    smallest = measured(network, ids, 1e-4).coefficient
    for level in higgs.LEVELS:
        assert measured(network, ids, level).coefficient == pytest.approx(smallest, rel=0.02)


def test_noise_follows_from_seed_and_name_and_weights_are_left_as_they_were() -> None:
    network, ids = OneLayer(), windows(6)
    before = {name: one.clone() for name, one in network.state_dict().items()}
    tensors = {"head": network.head.weight, "table": network.table.weight, "none": torch.zeros(3, 4)}
    found = higgs.measured(network, tensors, ids, 0, silent)
    assert sorted(found) == ["head", "table"]
    assert found["head"] == measured(network, ids) != measured(network, ids, seed=1)
    assert all(torch.equal(one, before[name]) for name, one in network.state_dict().items())


def test_a_stop_in_the_middle_leaves_the_weights_too() -> None:
    network, ids, heard = OneLayer(), windows(3), []
    before = network.head.weight.clone()

    def stopping(fraction: float, what: str) -> None:
        heard.append((fraction, what))
        if len(heard) == 4:
            raise Interrupted("enough")

    with pytest.raises(Interrupted):
        higgs.measured(network, {"a": network.head.weight, "b": network.table.weight}, ids, 0, stopping)
    assert [name for _, name in heard] == list("abab")
    assert [fraction for fraction, _ in heard] == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6])
    assert torch.equal(network.head.weight, before)


def test_logits_that_are_not_numbers_are_refused() -> None:
    network = OneLayer()
    network.head.weight[0, 0] = torch.inf
    with pytest.raises(NonFiniteWeights):
        higgs.measured(network, {"table": network.table.weight}, windows(1), 0, silent)


@pytest.mark.parametrize("text", ["int4@32", "nf4@64", "lloyd3-rows@channel", "t7_3@32:signmax"])
def test_the_forecast_of_a_tensor_is_its_coefficient_times_its_relative_squared_error(
    index: CheckpointIndex, text: str
) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    weight = read_tensor(index, name).double()
    linear = higgs.Linear(coefficient=0.37, squares=float(weight.square().sum()))
    forecast = Forecast(index, higgs.evidence({name: linear}, space_of(index).groups))
    error = encode_nearest(read_tensor(index, name), parse(text)).decode().double() - weight
    assert forecast.tensor(name, text) == pytest.approx(0.37 * float(error.square().sum()) / linear.squares, rel=1e-6)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_the_solver_finds_the_best_of_all_combinations(data: st.DataObject) -> None:
    """On sum a_l t^2 under a budget of bits, up to six layers."""
    count = data.draw(st.integers(1, 6))
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=count, max_size=count))
    slopes = data.draw(st.lists(st.floats(0.01, 10), min_size=count, max_size=count))
    errors = {2: 0.1175, 3: 0.0345, 4: 0.0095, 5: 0.0025}
    budget = data.draw(st.integers(2 * sum(sizes), 5 * sum(sizes)))
    groups = {
        str(at): [Option(d * bits, a * t2, str(bits)) for bits, t2 in errors.items()]
        for at, (d, a) in enumerate(zip(sizes, slopes, strict=True))
    }
    found = math.fsum(one.loss for one in choose(groups, budget).values())
    every = [
        math.fsum(one.loss for one in chosen)
        for chosen in itertools.product(*groups.values())
        if sum(one.cost for one in chosen) <= budget
    ]
    assert found == pytest.approx(min(every), rel=1e-5)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    work = tmp_path_factory.mktemp("higgs")
    return Bench(write_llama(work / "llama"), work / "bench")


def test_a_plan_by_noise_costs_less_than_uniform_as_measured(bench: Bench) -> None:
    uniform = bench.plan(allocation="uniform")
    plan = bench.plan(allocation="higgs", target={"size_bytes": uniform.predicted_bytes})
    assert plan.predicted_bytes <= uniform.predicted_bytes
    assert bench.measured(plan) < bench.measured(uniform)
    assert 0.5 < bench.measured(plan) / (plan.predicted_kl or 0) < 2
    assert all((tensor.predicted_kl or 0) > 0 for tensor in plan.tensors if tensor.format != KEEP)


def test_the_same_request_gives_the_same_plan(bench: Bench) -> None:
    assert allocate(bench.request(allocation="higgs"), bench.ctx) == allocate(
        bench.request(allocation="higgs"), bench.ctx
    )


def test_it_needs_calibration_which_is_on_when_nothing_is_said() -> None:
    document = {"target": {"bits_per_param": 4}, "format": "int4@64", "allocation": "higgs"}
    assert load_recipe(document).calibration
    with pytest.raises(InvalidRecipe, match="higgs needs calibration"):
        load_recipe(document | {"calibration": False})


@pytest.mark.slow
def test_coefficients_of_a_trained_model_depend_little_on_the_quantiser() -> None:
    """Errors of formats are not without direction, as noise is: KL is off by at most 60 %, less than half a bit.

    A uniform grid with one step, whose errors are nearly noise, is off by at most 40 %.
    """
    index = CheckpointIndex.from_files(folder_sources(BUNDLED, ()))
    spec = CalibrationSpec().model_dump(mode="json") | {"sequences": 4, "sequence_length": 1024}
    network, ids = network_of(index, "cpu"), windows_of(index, spec, "calibration").ids
    places, state = places_of(index, network), network.state_dict(keep_vars=True)
    names = ["lm_head.weight", "model.layers.1.self_attn.k_proj.weight", "model.layers.2.mlp.up_proj.weight"]
    tensors = {name: places[name].of(state[places[name].target]) for name in names}
    found = higgs.measured(network, tensors, ids, 0, silent)
    for name, weight in tensors.items():
        kept = weight.clone()
        for text, tolerance in (("grid4@tensor", 1.4), ("int4@64", 1.6), ("nf4@64", 1.6), ("int4@64+rotate", 1.6)):
            decoded = encode_nearest(kept, parse(text)).decode()
            predicted = found[name].coefficient * float((decoded - kept).square().sum()) / found[name].squares
            kl = evaluate(network_of(index, "cpu"), with_weight(network, weight, decoded), Windows.of(ids, 0), silent)
            weight.copy_(kept)
            assert 1 / tolerance < kl.kl_mean / predicted < tolerance, (name, text)


def with_weight(network: nn.Module, weight: torch.Tensor, values: torch.Tensor) -> nn.Module:
    """The network with other values in one of its weights."""
    weight.copy_(values)
    return network
