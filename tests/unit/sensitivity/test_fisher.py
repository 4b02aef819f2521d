"""The estimate of a whole network: labels, normalisation, independence of batches, and the file that keeps it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from core.errors import InvalidCheckpoint, NonFiniteWeights
from core.evaluation.text import Windows
from core.ids import derived_seed
from core.networks import load_network
from core.sensitivity import fisher
from core.sensitivity.collector import Collector
from core.sensitivity.fisher import (
    FisherEstimate,
    describe,
    estimate_fisher,
    inverse_cdf,
    sampled_label_gradient,
)
from core.storage.checkpoint import CheckpointIndex
from core.storage.sources import folder_sources
from tests.unit.pipeline.conftest import write_llama


def unheard(_fraction: float, _what: str) -> None:
    pass


def network_in(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    return load_network(CheckpointIndex.from_files(folder_sources(folder)), device="cpu", dtype=dtype)


def windows(sequences: int, length: int, seed: int = 0) -> Windows:
    chance = torch.Generator().manual_seed(seed)
    return Windows.of(torch.randint(256, (sequences, length), generator=chance), sequences * length)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("fisher") / "llama")


@pytest.fixture
def llama(folder: Path) -> nn.Module:
    return network_in(folder)


@pytest.fixture(scope="module")
def estimate(folder: Path) -> FisherEstimate:
    return estimate_fisher(network_in(folder), windows(4, 24), seed=3, progress=unheard)


def per_token_oracle(network: nn.Module, ids: Tensor, seed: int) -> dict[str, Tensor]:
    """Σ_t (∂/∂W_t)² by autograd, where each token has a copy of every weight; all elements, one sequence."""
    copies: dict[str, Tensor] = {}

    def unrolled(name: str, layer: nn.Linear) -> Any:
        def forward(x: Tensor) -> Tensor:
            copies[name] = layer.weight.detach().expand(x.shape[1], -1, -1).clone().requires_grad_()
            return torch.einsum("btm,tnm->btn", x, copies[name])

        return forward

    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            module.forward = unrolled(f"{name}.weight", module)  # type: ignore[method-assign]
    known: Any = network
    logits = known(input_ids=ids[None, :-1], use_cache=False).logits
    gradient = torch.empty_like(logits)
    with torch.no_grad():
        sampled_label_gradient(logits[0], seed, gradient[0])
    torch.autograd.backward([logits], [gradient])
    return {name: copy.grad.double().square().sum(0) for name, copy in copies.items() if copy.grad is not None}


def test_every_layer_has_what_autograd_says_of_a_copy_of_its_weight_per_token(folder: Path) -> None:
    text = windows(1, 12)
    found = estimate_fisher(network_in(folder), text, seed=5, progress=unheard)
    expected = per_token_oracle(network_in(folder), text.ids[0], derived_seed(5, "sequence 0"))
    assert set(found.tensors) == {*expected, "model.embed_tokens.weight"}
    for name, elements in expected.items():
        assert torch.allclose(found.tensors[name].rows.double(), elements.sum(1) / 11, rtol=1e-4)
        assert found.tensors[name].sum == pytest.approx(float(elements.sum()) / 11, rel=1e-5)


def test_the_labels_are_drawn_from_the_networks_own_distribution() -> None:
    p = torch.tensor([0.5, 0.2, 0.0, 0.25, 0.05])
    logits = p.log().expand(40_000, 5)
    gradient = torch.empty(40_000, 5)
    sampled_label_gradient(logits, 1, gradient)
    labels = (gradient - p).argmin(-1)
    shares = labels.bincount(minlength=5) / 40_000
    assert torch.allclose(shares, p, atol=5 * 0.0025)  # five standard deviations of the commonest
    assert torch.allclose(gradient, p - F.one_hot(labels, 5), atol=1e-6)


@pytest.mark.parametrize("vocabulary", [1, 63, 64, 65, 300])
def test_a_share_of_the_cumulated_probability_gives_the_label_that_a_plain_sum_gives(vocabulary: int) -> None:
    chance = torch.Generator().manual_seed(vocabulary)
    p = (3 * torch.randn(500, vocabulary, generator=chance)).softmax(-1)
    share = torch.rand(500, 1, dtype=torch.float64, generator=chance)
    cumulated = p.double().cumsum(-1)
    plain = (cumulated <= share * cumulated[:, -1:]).sum(-1, keepdim=True)
    assert torch.equal(inverse_cdf(p, share), plain)
    last = torch.full((500, 1), 1 - 2.0**-53, dtype=torch.float64)
    assert (inverse_cdf(p, last) < vocabulary).all()


def test_softmax_regression_of_a_quarter_million_samples_meets_its_closed_form() -> None:
    """Observed 0.01 % for the tensor; a row of 2^18 samples scatters by about 0.3 %, empirical."""
    chance = torch.Generator().manual_seed(0)
    layer = nn.Linear(16, 10, bias=False)
    with torch.no_grad():
        layer.weight.copy_((torch.rand(10, 16, generator=chance) - 0.5) / 2)
    x = torch.randn(1, 1 << 18, 16, generator=chance)
    with Collector(layer) as collector, collector.batch(0):
        logits = layer(x)
        gradient = torch.empty_like(logits)
        with torch.no_grad():
            sampled_label_gradient(logits[0], 7, gradient[0])
        torch.autograd.backward([logits], [gradient])
        ((_, measured),) = collector.results()
    p = logits[0].detach().double().softmax(-1)
    expected = ((p * (1 - p)).T @ x[0].double().square()).sum(1)
    assert float(measured.rows.sum()) == pytest.approx(float(expected.sum()), rel=0.01)
    assert torch.allclose(measured.rows[0], expected, rtol=0.02)


def test_it_is_normalised_by_the_exact_number_of_predicted_positions(estimate: FisherEstimate) -> None:
    assert estimate.positions == 4 * 23


def test_every_matrix_is_measured_and_nothing_else(estimate: FisherEstimate, llama: nn.Module) -> None:
    assert set(estimate.tensors) == {name for name, one in llama.named_parameters() if one.ndim == 2}
    assert estimate.not_reached == ()
    for name, parameter in llama.named_parameters():
        if parameter.ndim == 2:
            one = estimate.tensors[name]
            assert one.rows.shape == parameter.shape[:1]
            assert one.sum == pytest.approx(float(one.rows.double().sum()), rel=1e-6)
            assert one.mean == one.sum / parameter.numel()


def test_a_token_that_never_occurs_leaves_its_row_of_the_table_at_nothing(folder: Path) -> None:
    text = windows(2, 10)
    rows = estimate_fisher(network_in(folder), text, seed=0, progress=unheard).tensors["model.embed_tokens.weight"].rows
    assert set(rows.nonzero().flatten().tolist()) == set(text.ids[:, :-1].flatten().tolist())


def test_the_same_request_gives_the_same_bytes(folder: Path, estimate: FisherEstimate, tmp_path: Path) -> None:
    again = estimate_fisher(network_in(folder), windows(4, 24), seed=3, progress=unheard)
    for name, one in {"one": estimate, "other": again}.items():
        one.save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_how_sequences_are_batched_changes_nothing_but_the_last_digits(
    folder: Path, estimate: FisherEstimate, batch: int
) -> None:
    other = estimate_fisher(network_in(folder), windows(4, 24), seed=3, progress=unheard, batch=batch)
    for name, one in estimate.tensors.items():
        assert other.tensors[name].sum == pytest.approx(one.sum, rel=1e-4)
    assert other.halves_bits == pytest.approx(estimate.halves_bits, rel=1e-3)


def test_another_seed_draws_other_labels(folder: Path, estimate: FisherEstimate) -> None:
    other = estimate_fisher(network_in(folder), windows(4, 24), seed=4, progress=unheard)
    assert other.tensors["lm_head.weight"].sum != estimate.tensors["lm_head.weight"].sum


def test_learned_positions_are_not_mixed_across_the_sequences_of_a_batch(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    library: Any = AutoModelForCausalLM
    config = AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2, vocab_size=256, n_positions=32)
    library.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    one, other = (
        estimate_fisher(network_in(tmp_path), windows(4, 12), seed=0, progress=unheard, batch=batch)
        for batch in (None, 1)
    )
    positions = next(name for name in one.tensors if "wpe" in name)
    assert torch.equal(one.tensors[positions].rows, other.tensors[positions].rows)
    assert (one.tensors[positions].rows[:11] > 0).all()
    assert any("c_attn" in name for name in one.tensors)
    assert one.not_reached == ()


def test_experts_in_one_stacked_parameter_are_named_as_not_reached(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    library: Any = AutoModelForCausalLM
    config = AutoConfig.for_model(
        "mixtral",
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=256,
        num_local_experts=2,
    )
    library.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    found = estimate_fisher(network_in(tmp_path), windows(2, 8), seed=0, progress=unheard)
    stacked = {name for name, reason in found.reasons.items() if "3 dimensions" in reason}
    assert stacked == {
        f"model.layers.0.block_sparse_moe.experts.{expert}.{part}.weight"
        for expert in (0, 1)
        for part in ("w1", "w2", "w3")
    }
    assert "Router" in found.reasons["model.layers.0.block_sparse_moe.gate.weight"]
    assert set(found.not_reached) == set(found.reasons)


def test_a_matrix_without_gradient_is_named_never_given_a_zero(folder: Path) -> None:
    network: Any = network_in(folder)
    with torch.no_grad():
        network.model.layers[1].mlp.down_proj.weight.zero_()
    found = estimate_fisher(network, windows(1, 8), seed=0, progress=unheard)
    assert set(found.not_reached) == {"model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"}
    assert not set(found.not_reached) & set(found.tensors)


def test_a_tied_table_stands_once_under_the_name_that_is_kept(tmp_path: Path) -> None:
    network = network_in(write_llama(tmp_path / "tied", tied=True))
    found = estimate_fisher(network, windows(1, 8), seed=0, progress=unheard)
    assert "lm_head.weight" not in found.tensors
    assert (found.tensors["model.embed_tokens.weight"].rows > 0).all()


def test_halves_that_agree_differ_by_no_bits_and_one_sequence_has_no_halves(llama: nn.Module) -> None:
    ids = windows(1, 16).ids
    found = estimate_fisher(llama, Windows.of(ids.repeat(2, 1), 32), seed=0, progress=unheard, batch=1)
    assert found.halves_bits is not None
    assert 0 < found.halves_bits < 1  # the same text, but other labels
    assert estimate_fisher(llama, Windows.of(ids, 16), seed=0, progress=unheard).halves_bits is None


def test_bf16_networks_are_summed_in_wider_numbers(folder: Path) -> None:
    wide = estimate_fisher(network_in(folder), windows(4, 24), seed=3, progress=unheard)
    narrow = estimate_fisher(network_in(folder, torch.bfloat16), windows(4, 24), seed=3, progress=unheard)
    total = [sum(one.sum for one in found.tensors.values()) for found in (wide, narrow)]
    assert total[1] == pytest.approx(total[0], rel=0.2)  # empirical, a few labels differ


def test_progress_counts_sequences(llama: nn.Module) -> None:
    heard: list[float] = []
    estimate_fisher(llama, windows(4, 8), seed=0, progress=lambda fraction, _: heard.append(fraction), batch=1)
    assert heard == [0, 0.25, 0.5, 0.75]


def test_a_network_with_a_weight_that_is_no_number_names_a_tensor(folder: Path) -> None:
    network: Any = network_in(folder)
    with torch.no_grad():
        network.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteWeights) as refused:
        estimate_fisher(network, windows(1, 8), seed=0, progress=unheard)
    assert refused.value.where.endswith(".weight")


def test_tokens_beyond_the_vocabulary_are_refused(llama: nn.Module) -> None:
    with pytest.raises(InvalidCheckpoint, match="256"):
        estimate_fisher(llama, Windows.of(torch.tensor([[0, 256, 1]]), 3), seed=0, progress=unheard)


def test_the_file_gives_back_what_was_saved(estimate: FisherEstimate, tmp_path: Path) -> None:
    estimate.save(tmp_path / "fisher.safetensors")
    loaded = FisherEstimate.load(tmp_path / "fisher.safetensors")
    assert describe(loaded) == describe(estimate)
    for name, one in load_file(tmp_path / "fisher.safetensors").items():
        tensor, _, kind = name.rpartition(".")
        assert torch.equal(one, getattr(estimate.tensors[tensor], kind))
        assert torch.equal(one, getattr(loaded.tensors[tensor], kind))


def test_a_description_is_json_with_the_numbers_of_every_tensor(estimate: FisherEstimate) -> None:
    about = json.loads(json.dumps(describe(estimate), allow_nan=False))
    assert set(about) == {"positions", "estimator", "halves_bits", "tensors", "not_reached"}
    assert about["tensors"]["lm_head.weight"] == {
        "sum": estimate.tensors["lm_head.weight"].sum,
        "mean": estimate.tensors["lm_head.weight"].mean,
        "elements": 256 * 64,
        "cross": estimate.tensors["lm_head.weight"].cross,
        "scale": estimate.tensors["lm_head.weight"].scale,
    }


@pytest.mark.parametrize("metadata", [{}, {"bitmill_fisher": "{"}, {"bitmill_fisher": '{"version": 9}'}])
def test_a_file_that_is_no_estimate_is_refused(metadata: dict[str, str], tmp_path: Path) -> None:
    save_file({"a.rows": torch.ones(3)}, tmp_path / "x.safetensors", metadata)
    with pytest.raises(InvalidCheckpoint):
        FisherEstimate.load(tmp_path / "x.safetensors")


def test_determinism_asked_for_elsewhere_is_left_as_it_was() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with fisher.deterministic():
        pass
    assert torch.are_deterministic_algorithms_enabled() == before
