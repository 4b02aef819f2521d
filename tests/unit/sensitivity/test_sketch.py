"""Sums over whole sequences: unbiased for the squared weight gradient that autograd gives, at little cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from core.sensitivity.collector import Collector
from core.sensitivity.sketch import WIDTH, Sketch, matrix_sum, scale_sums, table_scale_sums, table_sum

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "fisher.json").read_text())


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gram(g: torch.Tensor, x: torch.Tensor) -> float:
    """Sum over sequences of the exact identity <G Gᵀ, X Xᵀ>."""
    return float(((g.double() @ g.double().mT) * (x.double() @ x.double().mT)).sum())


def test_the_gram_identity_is_the_squared_weight_gradient_of_the_golden_matrices() -> None:
    golden = GOLDEN["identities"]
    g, x = torch.tensor(golden["g"], dtype=torch.float64), torch.tensor(golden["x"], dtype=torch.float64)
    assert gram(g[None], x[None]) == golden["per_sequence_tensor_sum"] == float((g.T @ x).square().sum())


def test_on_average_a_sketch_is_the_gram_identity() -> None:
    g, x = random(3, 20, 7, seed=1), random(3, 20, 11, seed=2)
    draws = torch.tensor([float(matrix_sum(g, Sketch([at, at + 1000, at + 2000]).project(x))) for at in range(400)])
    standard_error = float(draws.std()) / 20
    assert abs(float(draws.mean()) - gram(g, x)) < 4 * standard_error
    assert standard_error < 0.02 * gram(g, x)


def test_signs_depend_on_the_seed_of_their_sequence_and_not_on_the_batch() -> None:
    x = random(2, 5, 9)
    both, second = Sketch([3, 4]).project(x), Sketch([4]).project(x[1:])
    assert both.shape == (2, 5, WIDTH)
    assert torch.equal(both[1], second[0])


def test_the_sum_of_an_embedding_is_the_squared_weight_gradient() -> None:
    table = nn.Embedding(6, 4)
    ids = torch.tensor([[1, 2, 1, 1], [5, 5, 0, 2]])
    g = random(2, 4, 4, seed=5)
    expected = 0.0
    for one, tokens in zip(g, ids, strict=True):
        table.zero_grad()
        table(tokens).backward(one)
        assert table.weight.grad is not None
        expected += float(table.weight.grad.double().square().sum())
    assert float(table_sum(g, ids)) == pytest.approx(expected, rel=1e-6)


def cross_of(layer: nn.Module, x: torch.Tensor, g: torch.Tensor, seeds: list[int] | None) -> float:
    with Collector(layer) as collector:
        with collector.batch(0, seeds):
            torch.autograd.backward([layer(x)], [g])
        ((_, measured),) = collector.results()
    return measured.cross


def test_tokens_that_all_pull_the_same_way_cost_as_many_times_more_as_there_are_tokens() -> None:
    layer = nn.Linear(32, 8, bias=False)
    x, g = random(4, 1, 32).expand(4, 16, 32).contiguous(), random(4, 1, 8, seed=1).expand(4, 16, 8).contiguous()
    found = cross_of(layer, x, g, [1, 2, 3, 4])
    # one sketch of a matrix of rank 1 has relative deviation sqrt(2/16), the mean of four half of it
    assert found == pytest.approx(16, rel=4 * (2 / WIDTH) ** 0.5 / 2)


def test_tokens_that_pull_at_random_cost_no_more_than_each_alone() -> None:
    layer = nn.Linear(32, 8, bias=False)
    assert cross_of(layer, random(64, 16, 32), random(64, 16, 8, seed=1), list(range(64))) == pytest.approx(1, abs=0.1)


def test_without_seeds_or_where_sequences_cannot_be_told_apart_the_factor_is_one() -> None:
    layer = nn.Linear(6, 3, bias=False)
    assert cross_of(layer, random(2, 5, 6), random(2, 5, 3), None) == 1
    assert cross_of(layer, random(10, 6), random(10, 3), [1, 2]) == 1


def scores_of_scales(x: torch.Tensor, weight: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """By autograd: squared gradients of a factor on each row and on the whole of a weight, summed over sequences."""
    rows, whole = torch.zeros(len(weight)), torch.zeros(())
    for inputs, gradient in zip(x, g, strict=True):
        row = torch.ones(len(weight), requires_grad=True)
        factor = torch.ones((), requires_grad=True)
        torch.autograd.backward([inputs @ (weight * row[:, None] * factor).T], [gradient])
        assert row.grad is not None
        assert factor.grad is not None
        rows, whole = rows + row.grad.square(), whole + factor.grad.square()
    return rows, whole


def test_the_sums_of_scales_are_the_squared_gradients_of_factors() -> None:
    x, weight, g = random(3, 9, 6), random(4, 6, seed=1), random(3, 9, 4, seed=2)
    rows, whole = scale_sums(g, x @ weight.T)
    expected = scores_of_scales(x, weight, g)
    torch.testing.assert_close(rows.float(), expected[0])
    torch.testing.assert_close(whole.float(), expected[1])
    each, together = scale_sums(g, x @ weight.T, alone=True)
    expected = scores_of_scales(x.reshape(-1, 1, 6), weight, g.reshape(-1, 1, 4))
    torch.testing.assert_close(each.float(), expected[0])
    torch.testing.assert_close(together.float(), expected[1])


def test_the_sums_of_an_embeddings_scales_are_the_squared_gradients_of_factors() -> None:
    weight, ids, g = random(5, 3), torch.tensor([[0, 2, 2, 4], [1, 1, 1, 2]]), random(2, 4, 3, seed=3)
    rows, whole = table_scale_sums(g, weight[ids], ids, 5)
    one_hot = torch.nn.functional.one_hot(ids, 5).float()
    # y = one_hot W, so W has the tokens as its rows where a linear layer has its outputs: factors act on the inputs
    scores = torch.einsum("btv,btm,vm->bv", one_hot, g, weight)
    torch.testing.assert_close(rows.float(), scores.square().sum(0))
    torch.testing.assert_close(whole.float(), scores.sum(1).square().sum())


def test_a_bias_is_not_scaled() -> None:
    plain, biased = nn.Linear(6, 4, bias=False).double(), nn.Linear(6, 4).double()
    biased.weight.data.copy_(plain.weight.data)
    x, g = random(2, 5, 6).double(), random(2, 5, 4, seed=1).double()
    found = []
    for layer in (plain, biased):
        with Collector(layer) as collector:
            with collector.batch(0, [1, 2]):
                torch.autograd.backward([layer(x)], [g])
            found.append(dict(collector.results())["weight"])
    torch.testing.assert_close(found[0].row_scales, found[1].row_scales)
    assert found[0].scale == pytest.approx(found[1].scale, rel=1e-5)
