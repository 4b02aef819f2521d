"""Sums over whole sequences: unbiased for the squared weight gradient that autograd gives, at little cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from core.sensitivity.collector import Collector
from core.sensitivity.sketch import WIDTH, Sketch, matrix_sum, table_sum

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
        with collector.batch(0, len(x), seeds):
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
