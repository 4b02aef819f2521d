"""KL divergence to the last digit, and what a comparison of two networks promises."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from core.errors import InvalidCheckpoint, NonFiniteWeights
from core.evaluation import divergence
from core.evaluation.divergence import evaluate, float32_head, kl_from_difference, kl_from_logits, top_k_kl
from core.evaluation.text import Windows

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "kl.json").read_text())
REFERENCE, MODEL, DIFFERENCE = (
    torch.tensor(GOLDEN[name], dtype=torch.float64) for name in ("ref_logits", "model_logits", "difference")
)


def random_logits(rows: int, vocabulary: int, seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """The definition, in fp64, by torch."""
    log_p, log_q = p_logits.double().log_softmax(-1), q_logits.double().log_softmax(-1)
    return nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


@pytest.mark.parametrize("case", GOLDEN["scaled"], ids=lambda case: f"eps={case['eps']}")
def test_differences_down_to_ten_to_the_minus_ten_are_measured_in_fp64_from_logits(case: dict[str, Any]) -> None:
    expected = float(case["kl"])
    assert float(kl_from_logits(REFERENCE, REFERENCE + float(case["eps"]) * DIFFERENCE)) == pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.parametrize("case", GOLDEN["scaled"], ids=lambda case: f"eps={case['eps']}")
def test_and_in_fp32_from_the_difference_where_the_definition_fails(case: dict[str, Any]) -> None:
    p, difference = REFERENCE.float(), (float(case["eps"]) * DIFFERENCE).float()
    expected = float(case["kl"])
    assert float(kl_from_difference(p, difference)) == pytest.approx(expected, rel=1e-6)
    naive = float((p.softmax(-1) * (p.log_softmax(-1) - (p + difference).log_softmax(-1))).sum())
    if expected < 1e-6:
        assert abs(naive / expected - 1) > 0.01


@pytest.mark.parametrize(("k", "expected"), GOLDEN["top_k"].items())
def test_the_top_k_divergence_with_its_tail(k: str, expected: float) -> None:
    assert float(top_k_kl(REFERENCE, MODEL, int(k))) == pytest.approx(expected, abs=1e-9)


@given(st.integers(0, 10_000), st.integers(2, 40))
def test_the_top_k_divergence_grows_with_k_up_to_the_whole(seed: int, vocabulary: int) -> None:
    p, q = random_logits(3, vocabulary, seed), random_logits(3, vocabulary, seed + 1)
    steps = torch.stack([top_k_kl(p, q, k) for k in range(1, vocabulary + 1)])
    assert (steps.diff(dim=0) >= -1e-12).all()
    assert torch.allclose(steps[-1], plain_kl(p, q), rtol=1e-9, atol=1e-12)
    top = p.argmax(-1, keepdim=True)
    a, b = p.softmax(-1).gather(-1, top)[:, 0], q.softmax(-1).gather(-1, top)[:, 0]
    binary = a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log()
    assert torch.allclose(steps[0], binary, rtol=1e-6, atol=1e-9)


@given(st.integers(0, 10_000), st.integers(1, 300), st.floats(0.01, 30))
def test_it_is_the_definition(seed: int, vocabulary: int, scale: float) -> None:
    p, q = random_logits(4, vocabulary, seed, scale), random_logits(4, vocabulary, seed + 1, scale)
    assert torch.allclose(kl_from_logits(p, q), plain_kl(p, q), rtol=1e-9, atol=1e-12)
    assert torch.allclose(kl_from_logits(p.float(), q.float()), plain_kl(p, q), rtol=2e-5, atol=1e-6)


def test_identical_logits_are_exactly_alike_and_a_constant_per_row_changes_nothing() -> None:
    p = random_logits(50, 1000, 0).float()
    assert not kl_from_logits(p, p.clone()).any()
    q = p + 0.01 * random_logits(50, 1000, 1).float()
    shifted = kl_from_difference(p, (q - p) + torch.linspace(-3, 3, 50)[:, None])
    assert torch.allclose(shifted, kl_from_difference(p, q - p), rtol=1e-4, atol=1e-7)


def test_tokens_that_are_excluded_by_both_count_nothing_and_by_the_candidate_alone_everything() -> None:
    p, q = random_logits(2, 10, 3), random_logits(2, 10, 4)
    p[:, 4] = q[:, 4] = -math.inf
    keep = [at for at in range(10) if at != 4]
    assert torch.allclose(kl_from_logits(p, q), plain_kl(p[:, keep], q[:, keep]))
    q[0, 0] = -math.inf
    assert kl_from_logits(p, q).tolist()[0] == math.inf


def test_differences_beyond_what_fp32_can_exponentiate_are_right() -> None:
    p = torch.tensor([[0.0, 1.0, 2.0]])
    q = torch.tensor([[300.0, 1.0, -200.0]])
    assert torch.allclose(kl_from_logits(p, q), plain_kl(p, q))


class Bigram(nn.Module):
    """A network whose next token depends on this one only: its logits are a table's rows times a head."""

    def __init__(self, vocabulary: int, width: int, seed: int, noise: float = 0.0) -> None:
        super().__init__()
        chance = torch.Generator().manual_seed(seed)
        self.table = nn.Embedding(vocabulary, width, _weight=torch.randn(vocabulary, width, generator=chance))
        self.head = nn.Linear(width, vocabulary, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(vocabulary, width, generator=chance))
            self.head.weight += noise * torch.randn(vocabulary, width, generator=chance)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.table

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.table(input_ids)))


def windows(sequences: int, length: int, vocabulary: int, seed: int = 0) -> Windows:
    chance = torch.Generator().manual_seed(seed)
    return Windows.of(torch.randint(vocabulary, (sequences, length), generator=chance), sequences * length)


def unheard(_fraction: float, _what: str) -> None:
    pass


def test_identical_weights_give_exactly_nothing() -> None:
    metrics = evaluate(Bigram(50, 8, 0), Bigram(50, 8, 0), windows(3, 20, 50), unheard)
    assert (metrics.kl_mean, metrics.kl_stderr, metrics.kl_p99, metrics.top1_agreement) == (0, 0, 0, 1)
    assert metrics.perplexity == metrics.reference_perplexity
    assert (metrics.sequences, metrics.tokens, metrics.sequence_length) == (3, 60, 20)


def test_every_number_is_what_its_definition_gives() -> None:
    reference, candidate, text = Bigram(40, 8, 0), Bigram(40, 8, 0, noise=0.3), windows(5, 33, 40)
    metrics = evaluate(reference, candidate, text, unheard)
    with torch.no_grad():
        p, q = (one(text.ids, use_cache=False).logits.double() for one in (reference, candidate))
    kl = plain_kl(p, q)
    assert metrics.per_sequence == pytest.approx(kl.mean(1).tolist(), rel=1e-5)
    assert metrics.kl_mean == pytest.approx(float(kl.mean()), rel=1e-5)
    assert metrics.kl_stderr == pytest.approx(float(kl.mean(1).std() / 5**0.5), rel=1e-4)
    ordered = kl.flatten().sort().values
    assert metrics.kl_median == pytest.approx(float(ordered[82]), rel=1e-4)
    assert metrics.kl_p99 == pytest.approx(float(ordered[math.ceil(0.99 * 165) - 1]), rel=1e-4)
    assert metrics.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    for logits, measured in ((p, metrics.reference_perplexity), (q, metrics.perplexity)):
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), text.ids[:, 1:].flatten())
        assert measured == pytest.approx(float(loss.exp()), rel=1e-5)


@pytest.mark.parametrize(("tile", "batch"), [(1, 1), (100, 2), (1 << 20, 5)])
def test_neither_tiles_nor_batches_change_the_result(tile: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    networks, text = (Bigram(40, 8, 0), Bigram(40, 8, 0, noise=0.1)), windows(5, 20, 40)
    whole = evaluate(*networks, text, unheard, batch=5)
    monkeypatch.setattr(divergence, "_TILE_ELEMENTS", tile)
    assert evaluate(*networks, text, unheard, batch=batch).per_sequence == pytest.approx(whole.per_sequence, rel=1e-6)


def test_progress_counts_sequences() -> None:
    heard: list[float] = []
    evaluate(Bigram(9, 4, 0), Bigram(9, 4, 1), windows(4, 5, 9), lambda fraction, _: heard.append(fraction), batch=2)
    assert heard == [0, 0.5]


def test_a_bf16_head_answers_in_fp32_and_is_itself_again_afterwards() -> None:
    network = Bigram(70, 8, 0).to(torch.bfloat16)
    ids = torch.arange(10)[None]
    before = network(ids, use_cache=False).logits
    with float32_head(network), torch.no_grad():
        inside = network(ids, use_cache=False).logits
    exact = network.table(ids).double() @ network.head.weight.double().T
    assert inside.dtype == torch.float32
    assert torch.allclose(inside.double(), exact, rtol=1e-5, atol=1e-5)  # fp32 sums of 8 products
    assert not torch.allclose(before.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(network(ids, use_cache=False).logits, before)


def test_networks_of_different_vocabularies_are_not_compared() -> None:
    with pytest.raises(InvalidCheckpoint, match="50 and 60"):
        evaluate(Bigram(50, 8, 0), Bigram(60, 8, 0), windows(1, 8, 50), unheard)


def test_tokens_beyond_the_vocabulary_are_refused() -> None:
    with pytest.raises(InvalidCheckpoint, match="the network has 50"):
        evaluate(Bigram(50, 8, 0), Bigram(50, 8, 0), Windows.of(torch.tensor([[1, 50]]), 2), unheard)


def test_a_candidate_that_answers_no_numbers_is_an_error_not_a_result() -> None:
    broken = Bigram(50, 8, 0)
    with torch.no_grad():
        broken.head.weight[3, 2] = math.nan
    with pytest.raises(NonFiniteWeights):
        evaluate(Bigram(50, 8, 0), broken, windows(1, 8, 50), unheard)


def test_a_reference_that_answers_no_numbers_is_an_error_too() -> None:
    p, q = random_logits(3, 10, 0), random_logits(3, 10, 1)
    p[1, 4] = math.nan
    assert kl_from_logits(p, q).isnan().tolist() == [False, True, False]
    assert kl_from_logits(p.float(), q.float()).isnan().tolist() == [False, True, False]
    broken = Bigram(50, 8, 0)
    with torch.no_grad():
        broken.head.weight[3, 2] = math.nan
    with pytest.raises(NonFiniteWeights):
        evaluate(broken, Bigram(50, 8, 0), windows(1, 8, 50), unheard)


def test_a_perplexity_beyond_the_numbers_of_fp64_is_the_largest_that_can_be_written() -> None:
    assert math.isfinite(divergence._perplexity(torch.full((4,), 1e6, dtype=torch.float64)))
    assert divergence._perplexity(torch.full((4,), 2.0, dtype=torch.float64)) == pytest.approx(math.exp(2))
