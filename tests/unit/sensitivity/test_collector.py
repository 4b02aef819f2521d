"""What hooks sum up: the identities in exact integers, and autograd itself as the oracle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core.evaluation.divergence import kl_from_logits
from core.sensitivity.collector import Collector

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "fisher.json").read_text())


def tensor(values: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def collected(network: nn.Module, forward: Callable[[], Tensor], gradient: Tensor) -> dict[str, Tensor]:
    """Row sums by parameter after one pass whose output has that gradient."""
    with Collector(network) as collector:
        with collector.batch(0):
            torch.autograd.backward([forward()], [gradient])
        return {name: one.rows.sum(0) for name, one in collector.results()}


def linear_sums(x: Tensor, g: Tensor) -> Tensor:
    layer = nn.Linear(x.shape[-1], g.shape[-1], bias=False, dtype=x.dtype)
    return collected(layer, lambda: layer(x), g)["weight"]


def test_row_and_tensor_sums_of_the_golden_matrices_are_exact() -> None:
    golden = GOLDEN["identities"]
    rows = linear_sums(tensor(golden["x"]), tensor(golden["g"]))
    assert rows.tolist() == golden["row_sums"]
    assert float(rows.sum()) == golden["tensor_sum"]


@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 30), st.integers(0, 999))
def test_sums_in_fp32_are_those_of_all_elements(tokens: int, outputs: int, inputs: int, seed: int) -> None:
    x = random(2, tokens, inputs, seed=seed, dtype=torch.float32)
    g = random(2, tokens, outputs, seed=seed + 1, dtype=torch.float32)
    elements = g.double().square().flatten(0, 1).T @ x.double().square().flatten(0, 1)
    assert torch.allclose(linear_sums(x, g), elements.sum(1), rtol=1e-6)


def test_a_transposed_layer_has_its_sums_by_the_first_dimension_of_what_is_stored() -> None:
    from transformers.pytorch_utils import Conv1D

    make: Any = Conv1D
    layer = make(5, 3)
    x, g = random(1, 7, 3, dtype=torch.float32), random(1, 7, 5, seed=1, dtype=torch.float32)
    elements = x[0].double().square().T @ g[0].double().square()
    assert torch.allclose(collected(layer, lambda: layer(x), g)["weight"], elements.sum(1), rtol=1e-6)


def test_an_embedding_row_has_the_gradients_of_its_token_also_where_it_is_looked_up_twice() -> None:
    golden = GOLDEN["embedding"]
    table = nn.Embedding(golden["vocab"], 2, dtype=torch.float64)
    ids = torch.tensor([golden["token_ids"]])
    rows = collected(table, lambda: table(ids), tensor(golden["g"])[None])["weight"]
    assert rows.tolist() == [sum(row) for row in golden["elementwise_sum"]]
    assert float(rows.sum()) == golden["tensor_sum"]


class Scaled(nn.Embedding):
    """An embedding whose answer is a multiple of the table's rows, as Gemma's is."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        return super().forward(input) * 11.3137


def test_a_scaled_embedding_is_measured_with_respect_to_its_table() -> None:
    plain, scaled = nn.Embedding(9, 4, dtype=torch.float64), Scaled(9, 4, dtype=torch.float64)
    ids, g = torch.tensor([[3, 1, 3, 8]]), random(1, 4, 4)
    one = collected(plain, lambda: plain(ids), g)["weight"]
    other = collected(scaled, lambda: scaled(ids), g)["weight"]
    assert torch.allclose(other, 11.3137**2 * one, rtol=1e-9)


class Tied(nn.Module):
    """Table, a layer that is used twice, and a head; in fp64."""

    def __init__(self, tied: bool, checkpointed: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 6, dtype=torch.float64)
        self.middle = nn.Linear(6, 6, dtype=torch.float64)
        self.head = nn.Linear(6, 12, bias=False, dtype=torch.float64)
        self.checkpointed = checkpointed
        with torch.no_grad():
            for at, parameter in enumerate(self.parameters()):
                parameter.copy_(random(*parameter.shape, seed=at))
            self.head.weight.copy_(self.table.weight)
        if tied:
            self.head.weight = self.table.weight

    def twice(self, x: Tensor) -> Tensor:
        answered: Tensor = self.middle(torch.tanh(self.middle(x)))
        return answered

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = checkpoint(self.twice, x, use_reentrant=False) if self.checkpointed else self.twice(x)
        answered: Tensor = self.head(x)
        return answered


IDS = torch.tensor([[1, 5, 5, 11], [0, 2, 3, 1]])
LOGIT_GRADIENT = random(2, 4, 12, seed=99)


def test_a_tied_parameter_has_the_sum_of_its_uses() -> None:
    tied, apart = Tied(True), Tied(False)
    one = collected(tied, lambda: tied(IDS), LOGIT_GRADIENT)
    other = collected(apart, lambda: apart(IDS), LOGIT_GRADIENT)
    assert torch.allclose(one["table.weight"], other["table.weight"] + other["head.weight"], rtol=1e-12)
    assert set(one) == {"table.weight", "middle.weight"}


def test_a_layer_that_is_called_twice_pairs_each_call_with_its_own_gradient() -> None:
    network = Tied(False)
    found = collected(network, lambda: network(IDS), LOGIT_GRADIENT)["middle.weight"]
    weight, bias = network.middle.weight.detach(), network.middle.bias.detach()
    first = network.table(IDS).detach()
    second = torch.tanh(F.linear(first, weight, bias))
    inner = LOGIT_GRADIENT @ network.head.weight.detach()
    outer = (inner @ weight) * (1 - second**2)
    calls = ((inner, second), (outer, first))
    expected = torch.stack([(g.square() * x.square().sum(-1, keepdim=True)).sum((0, 1)) for g, x in calls]).sum(0)
    assert torch.allclose(found, expected, rtol=1e-9)


def test_activation_checkpointing_changes_nothing() -> None:
    plain, saving = Tied(True), Tied(True, checkpointed=True)
    one = collected(plain, lambda: plain(IDS), LOGIT_GRADIENT)
    other = collected(saving, lambda: saving(IDS), LOGIT_GRADIENT)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_padding_changes_nothing() -> None:
    network = Tied(False)
    padded_ids = torch.cat((IDS, torch.full((2, 3), 7)), dim=1)
    padded_gradient = torch.cat((LOGIT_GRADIENT, torch.zeros(2, 3, 12, dtype=torch.float64)), dim=1)
    one = collected(network, lambda: network(IDS), LOGIT_GRADIENT)
    other = collected(network, lambda: network(padded_ids), padded_gradient)
    assert all(torch.allclose(one[name], other[name], rtol=1e-12) for name in one)


def test_two_experts_that_share_the_tokens_have_sums_that_add_up_to_the_whole() -> None:
    x, g = random(1, 10, 4), random(1, 10, 3, seed=1)
    halves = [linear_sums(x[:, parity::2], g[:, parity::2]) for parity in (0, 1)]
    assert torch.allclose(halves[0] + halves[1], linear_sums(x, g), rtol=1e-12)


def test_afterwards_no_hook_is_left_weights_are_bitwise_the_same_and_wanted_gradients_are_wanted_again() -> None:
    network = Tied(False)
    network.middle.bias.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    wanted = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    collected(network, lambda: network(IDS), LOGIT_GRADIENT)
    assert all(torch.equal(parameter, before[name]) for name, parameter in network.named_parameters())
    assert {name: parameter.requires_grad for name, parameter in network.named_parameters()} == wanted
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())


def test_hooks_are_gone_also_after_an_error() -> None:
    network = Tied(False)
    with pytest.raises(IndexError), Collector(network) as collector, collector.batch(0):
        network(torch.tensor([[99]]))
    assert not any(module._forward_hooks for module in network.modules())


class Odd(nn.Module):
    """Multiplies with the square of its matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(random(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight**2)


class Neighbours(nn.Module):
    """A layer that is measured beside matrices that cannot be."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(6, 6, dtype=torch.float64)
        self.odd = Odd()
        self.idle = nn.Linear(6, 6, dtype=torch.float64)
        self.stacked = nn.Parameter(random(2, 6, 6))
        self.norm = nn.LayerNorm(6, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        answered: Tensor = self.odd(self.norm(self.plain(x))) @ self.stacked[0]
        return answered


def test_a_matrix_that_cannot_be_measured_is_named_with_the_reason() -> None:
    network = Neighbours()
    with Collector(network) as collector:
        with collector.batch(0):
            network(random(1, 3, 6)).sum().backward()
        measured = [name for name, _ in collector.results()]
    assert measured == ["plain.weight"]
    assert set(collector.reasons) == {"odd.weight", "idle.weight", "stacked"}
    assert "Odd" in collector.reasons["odd.weight"]
    assert "called" in collector.reasons["idle.weight"]
    assert "3 dimensions" in collector.reasons["stacked"]


def softmax_regression_fisher(weight: Tensor, x: Tensor) -> Tensor:
    """The full Fisher matrix of softmax regression, square in classes x inputs: mean of (diag p - ppᵀ) ⊗ xxᵀ."""
    p = (x @ weight.T).softmax(-1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    full = torch.einsum("tab,ti,tj->aibj", inner, x, x) / len(x)
    return full.reshape(weight.numel(), weight.numel())


def test_the_expectation_over_labels_is_the_closed_form_of_softmax_regression() -> None:
    golden = GOLDEN["softmax_regression"]
    weight, x = tensor(golden["W"]), tensor(golden["x"])
    p = (x @ weight.T).softmax(-1)
    every_label = (p[:, None, :] - torch.eye(3, dtype=torch.float64)) * p.sqrt()[:, :, None]  # √p_y (p - 1_y)
    rows = linear_sums(x.repeat_interleave(3, dim=0)[None], every_label.flatten(0, 1)[None]) / len(x)
    assert torch.allclose(rows, tensor(golden["fisher_diag"]).sum(1), atol=1e-9, rtol=0)
    assert float(rows.sum()) == pytest.approx(golden["tensor_sum"], abs=2e-9)


def test_half_a_squared_step_in_the_fisher_metric_is_the_divergence_it_causes() -> None:
    golden = GOLDEN["softmax_regression"]
    weight, x, delta = (tensor(golden[name]) for name in ("W", "x", "delta"))
    full = softmax_regression_fisher(weight, x)
    assert torch.allclose(full.diagonal(), tensor(golden["fisher_diag"]).flatten(), atol=1e-9, rtol=0)
    half = float(delta.flatten() @ full @ delta.flatten() / 2)
    assert half == pytest.approx(golden["half_delta_F_delta_full"], abs=1e-9)
    for eps, expected in golden["kl_over_eps2"].items():
        step = float(eps) * delta
        measured = float(kl_from_logits(x @ weight.T, x @ (weight + step).T).mean()) / float(eps) ** 2
        assert measured == pytest.approx(expected, abs=1e-8)
    assert golden["kl_over_eps2"]["0.01"] == pytest.approx(half, rel=0.002)
    assert golden["half_delta_F_delta_diagonal"] != pytest.approx(half, rel=0.1)


def test_the_diagonal_predicts_the_divergence_of_uncorrelated_noise_on_average() -> None:
    """Theory: 1.00 up to σ/RMS 0.3; 2000 draws that each scatter by 11 % leave 0.25 %, fourth orders about 1 %."""
    weight = (torch.rand(10, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5) / 2
    x = random(64, 16)
    predicted = float(softmax_regression_fisher(weight, x).diagonal().sum()) / 2
    sigma = 0.3 * float(weight.square().mean().sqrt())
    logits = x @ weight.T
    steps = sigma * random(2000, 10, 16, seed=1)
    measured = kl_from_logits(logits.expand(2000, -1, -1), logits + torch.einsum("ti,dki->dtk", x, steps)).mean()
    assert float(measured) / (sigma**2 * predicted) == pytest.approx(1, abs=0.02)
