"""Input covariances against plain hooks in fp64 on whole networks, and the file that keeps them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from core.errors import BitmillError, InvalidCheckpoint, NonFiniteWeights
from core.evaluation.text import Windows
from core.networks import load_network
from core.sensitivity import products
from core.sensitivity.covariance import Covariances, CovarianceWriter
from core.sensitivity.experts import Experts
from core.sensitivity.inputs import gather_covariances
from core.sensitivity.products import Gram
from core.storage.checkpoint import CheckpointIndex
from core.storage.sources import LocalFile
from tests.unit.networks.conftest import GATED, KINDS, SMALL, opened, saved

GPT_OSS = GATED | {"num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = SMALL | {
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
SEQUENCES, LENGTH = 5, 12
TOKENS = SEQUENCES * LENGTH
EMBEDDING = "an embedding has no input to weigh errors by"


def windows() -> Windows:
    ids = torch.randint(64, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
    return Windows.of(ids, TOKENS)


def unheard(_fraction: float, _what: str) -> None:
    pass


def read(path: Path) -> Covariances:
    return Covariances.from_index(CheckpointIndex.from_files({path.name: LocalFile(path)}))


def gathered(folder: Path, name: str = "covariance", **more: Any) -> Covariances:
    path = folder.parent / f"{name}.safetensors"
    arguments: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "progress": unheard} | more
    gather_covariances(opened(folder), windows(), path, **arguments)
    return read(path)


def rounded(x: Tensor) -> Tensor:
    return x.detach().flatten(0, -2).to(torch.bfloat16).double()


def oracle(folder: Path) -> dict[str, tuple[Tensor, int]]:
    """(Σ x xᵀ / tokens, tokens) of every layer called `weight`, by the name of its parameter."""
    network = load_network(opened(folder), device="cpu", dtype=torch.float32)
    seen: dict[str, list[Tensor]] = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            keep = seen.setdefault(f"{name}.weight", [])
            module.register_forward_pre_hook(lambda _module, args, keep=keep: keep.append(rounded(args[0])))
        if hasattr(module, "gate_up_proj") and hasattr(module, "act_fn") and module.gate_up_proj.ndim == 3:
            module.register_forward_pre_hook(lambda module, args, name=name: route(module, args, name, seen))
    with torch.no_grad():
        network(input_ids=windows().ids, use_cache=False)
    every = {name: torch.cat(parts) for name, parts in seen.items() if parts}
    return {name: (x.T @ x / len(x), len(x)) for name, x in every.items()}


def route(module: Any, args: tuple[Tensor, ...], name: str, seen: dict[str, list[Tensor]]) -> None:
    """Token by token, what an expert of three matrices gets."""
    for token, chosen in zip(args[0], args[1], strict=True):
        for expert in chosen.tolist():
            gate, up = F.linear(token, module.gate_up_proj[expert]).chunk(2)
            seen.setdefault(f"{name}.{expert}.first", []).append(rounded(token[None]))
            seen.setdefault(f"{name}.{expert}.second", []).append(rounded((module.act_fn(gate) * up)[None]))


def oracle_name(name: str) -> str:
    """Under which name the oracle has the input of a checkpoint's tensor."""
    if name in ("embed_out.weight", "model.embed_tokens.weight", "transformer.wte.weight"):
        return "lm_head.weight"
    name = name.replace(".block_sparse_moe.", ".mlp.")
    if ".experts." not in name or ".shared_experts." in name:
        return name
    stem, _, matrix = name.removesuffix(".weight").rpartition(".")
    return f"{stem}.{'second' if matrix in ('w2', 'down_proj') else 'first'}"


def check_against_oracle(folder: Path, found: Covariances, *, rtol: float, atol: float) -> None:
    expected = oracle(folder)
    assert found.uses
    for name in found.uses:
        statistics = found.of(name)
        assert statistics is not None
        wanted, tokens = expected[oracle_name(name)]
        assert statistics.tokens == tokens, name
        assert statistics.covariance.dtype == torch.float64
        assert torch.equal(statistics.covariance, statistics.covariance.T)
        assert torch.allclose(statistics.covariance, wanted, rtol=rtol, atol=atol), name


@pytest.fixture
def more_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"gpt_oss": GPT_OSS, "deepseek_v3": DEEPSEEK}
    monkeypatch.setattr("tests.unit.networks.conftest.KINDS", KINDS | more)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    def made(kind: str) -> Path:
        saved(tmp_path / kind, kind)
        return tmp_path / kind

    return made


@pytest.mark.usefixtures("more_kinds")
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text", "gpt_neox", "mixtral", "qwen3_moe", "deepseek_v3"])
def test_every_matrix_has_the_covariance_that_hooks_on_the_whole_network_see(
    kind: str, folder: Callable[[str], Path]
) -> None:
    source = folder(kind)
    found = gathered(source, batch=2)
    # What differs before rounding to bf16 by an ulp of fp32 may be rounded to another bf16: 2^-8 of one value in many.
    check_against_oracle(source, found, rtol=1e-3, atol=1e-5)
    matrices = {name for name in opened(source).names if len(opened(source).tensors[name].shape) > 1}
    assert set(found.uses) | set(found.reasons) == matrices
    assert not set(found.uses) & set(found.reasons)


def test_a_batch_of_everything_is_exactly_the_oracle_up_to_the_sums(folder: Callable[[str], Path]) -> None:
    source = folder("llama")
    check_against_oracle(source, gathered(source, batch=SEQUENCES), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_how_sequences_are_batched_changes_sums_only(batch: int, folder: Callable[[str], Path]) -> None:
    source = folder("gpt2")
    one, other = gathered(source, batch=SEQUENCES), gathered(source, "other", batch=batch)
    assert one.uses == other.uses
    for name in one.uses:
        first, second = one.of(name), other.of(name)
        assert first is not None
        assert second is not None
        assert torch.allclose(first.covariance, second.covariance, rtol=1e-3, atol=1e-5)


def test_the_same_walk_writes_the_same_bytes(folder: Callable[[str], Path], tmp_path: Path) -> None:
    source = folder("mixtral")
    gathered(source, "a")
    gathered(source, "b")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_layers_that_get_the_same_tensor_share_one_matrix_under_the_first_name(folder: Callable[[str], Path]) -> None:
    found = gathered(folder("llama"))
    keys = {name.removeprefix("model.layers.1."): use.key for name, use in found.uses.items() if ".1." in name}
    at = "model.layers.1."
    assert {name: key.removeprefix(at) for name, key in keys.items()} == {
        "self_attn.q_proj.weight": "self_attn.k_proj.weight",
        "self_attn.k_proj.weight": "self_attn.k_proj.weight",
        "self_attn.v_proj.weight": "self_attn.k_proj.weight",
        "self_attn.o_proj.weight": "self_attn.o_proj.weight",
        "mlp.gate_proj.weight": "mlp.gate_proj.weight",
        "mlp.up_proj.weight": "mlp.gate_proj.weight",
        "mlp.down_proj.weight": "mlp.down_proj.weight",
    }
    assert set(found.index.tensors) == {f"{use.key}.covariance" for use in found.uses.values()}


def test_experts_share_between_gate_and_up_and_with_nobody_else(folder: Callable[[str], Path]) -> None:
    found = gathered(folder("qwen3_moe"))
    at = "model.layers.0.mlp.experts.1."
    assert {name.removeprefix(at): use.key for name, use in found.uses.items() if name.startswith(at)} == {
        "down_proj.weight": f"{at}down_proj.weight",
        "gate_proj.weight": f"{at}gate_proj.weight",
        "up_proj.weight": f"{at}gate_proj.weight",
    }


def test_the_tokens_of_experts_add_up_to_the_routes_taken(folder: Callable[[str], Path]) -> None:
    found = gathered(folder("qwen3_moe"))
    for layer in (0, 1):
        counts = [
            use.tokens
            for name, use in found.uses.items()
            if f"layers.{layer}." in name and "experts" in name and "down_proj" in name
        ]
        assert sum(counts) == 2 * TOKENS


def test_an_expert_without_tokens_has_a_reason(folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "qwen3_moe", KINDS["qwen3_moe"] | {"num_experts": 6})
    source = folder("qwen3_moe")
    tensors = load_file(source / "model.safetensors")
    router = tensors["model.layers.0.mlp.gate.weight"]
    router[1], router[2], router[3], router[4:] = router[0] / 2, -router[0], -router[0] / 2, 0  # two are above zero
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    found = gathered(source)
    silent = {name for name, reason in found.reasons.items() if reason == "no token was routed to its expert"}
    routed = set(oracle(source))
    experts = {name for name in opened(source).names if ".experts." in name}
    assert silent == {name for name in experts if oracle_name(name) not in routed}
    assert {name for name in silent if "layers.0." in name} == {
        name for name in experts if "layers.0." in name and (".experts.4." in name or ".experts.5." in name)
    }


def test_a_transposed_layer_says_so_and_has_its_inputs_in_its_rows(folder: Callable[[str], Path]) -> None:
    source = folder("gpt2")
    found, shapes = gathered(source), opened(source).tensors
    name = "transformer.h.0.mlp.c_fc.weight"
    assert shapes[name].shape == (32, 128)
    assert (found.uses[name].inputs, found.uses[name].transposed) == (32, True)
    assert {name for name, use in found.uses.items() if not use.transposed} == {"transformer.wte.weight"}
    check_against_oracle(source, found, rtol=1e-3, atol=1e-5)


def test_an_embedding_has_a_reason_and_a_tied_one_the_input_of_the_head(folder: Callable[[str], Path]) -> None:
    assert gathered(folder("llama"), "untied").reasons == {"model.embed_tokens.weight": EMBEDDING}
    tied = gathered(folder("qwen2"), "tied")
    assert not tied.reasons
    assert tied.uses["model.embed_tokens.weight"].key == "model.embed_tokens.weight"


@pytest.mark.usefixtures("more_kinds")
def test_what_cannot_be_told_apart_has_a_reason(folder: Callable[[str], Path]) -> None:
    reasons = gathered(folder("gpt_oss")).reasons
    assert reasons["model.layers.0.mlp.experts.down_proj_bias"] == "it is added, and has no input to weigh errors by"
    assert reasons["model.layers.0.mlp.router.weight"] == "GptOssTopKRouter is neither a linear layer nor an embedding"


def stacked_checkpoint(folder: Path, network: nn.Module) -> None:
    """The same weights, with a tensor for all experts of a layer instead of one for each."""
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, folder / "model.safetensors")


def test_experts_in_one_tensor_have_the_statistics_that_they_have_in_tensors_of_their_own(tmp_path: Path) -> None:
    network = saved(tmp_path / "one/model", "qwen3_moe")
    apart = gathered(tmp_path / "one/model")
    stacked_checkpoint(tmp_path / "one/model", network)
    found = gathered(tmp_path / "one/model", "stacked")
    names = {name for name in opened(tmp_path / "one/model").names if ".experts." in name}
    assert set(found.stacked) == names
    assert not names & (set(found.uses) | set(found.reasons))
    for name, use in found.stacked.items():
        matrix = "down_proj" if "down" in name else "up_proj"
        stem = name.rpartition(".")[0]
        assert (len(use.tokens), use.transposed) == (4, False)
        for expert in range(4):
            one, other = found.of_expert(name, expert), apart.of(f"{stem}.{expert}.{matrix}.weight")
            assert one is not None
            assert other is not None
            assert (one.tokens, use.tokens[expert], use.inputs) == (other.tokens, other.tokens, len(other.covariance))
            assert torch.equal(one.covariance, other.covariance)


@pytest.mark.usefixtures("more_kinds")
def test_experts_stacked_with_their_inputs_as_rows_have_what_plain_arithmetic_gives(
    folder: Callable[[str], Path],
) -> None:
    source = folder("gpt_oss")
    found = gathered(source, batch=SEQUENCES)
    network = load_network(opened(source), device="cpu", dtype=torch.float32)
    module: Any = network.get_submodule("model.layers.0.mlp.experts")
    seen: dict[tuple[str, int], list[Tensor]] = {}

    def route_rows(module: Any, args: tuple[Tensor, ...]) -> None:
        for token, chosen in zip(args[0], args[1], strict=True):
            for expert in chosen.tolist():
                both = token @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
                gate, up = both[::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
                inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
                seen.setdefault(("gate_up_proj", expert), []).append(rounded(token[None]))
                seen.setdefault(("down_proj", expert), []).append(rounded(inner[None]))

    module.register_forward_pre_hook(route_rows)
    with torch.no_grad():
        network(input_ids=windows().ids, use_cache=False)
    for (key, expert), parts in seen.items():
        name, x = f"model.layers.0.mlp.experts.{key}", torch.cat(parts)
        statistics = found.of_expert(name, expert)
        assert statistics is not None
        assert found.stacked[name].transposed
        assert statistics.tokens == len(x)
        assert torch.allclose(statistics.covariance, x.T @ x / len(x), rtol=1e-3, atol=1e-6)


def test_experts_in_one_tensor_of_which_some_saw_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "qwen3_moe", KINDS["qwen3_moe"] | {"num_experts": 6})
    network: Any = saved(tmp_path / "model", "qwen3_moe")
    for at, layer in enumerate(network.model.layers):
        router = layer.mlp.gate.weight.data
        router[1], router[2], router[3], router[4:] = router[0] / 2, -router[0], -router[0] / 2, 0
        if at:
            router.zero_()  # ties: the same two experts for every token
    stacked_checkpoint(tmp_path / "model", network)
    found = gathered(tmp_path / "model")
    counts = {name: use.tokens for name, use in found.stacked.items()}
    first = counts["model.layers.0.mlp.experts.down_proj"]
    assert first[4:] == (0, 0)
    assert sum(first) == 2 * TOKENS
    assert found.of_expert("model.layers.0.mlp.experts.down_proj", 4) is None
    second = counts["model.layers.1.mlp.experts.gate_up_proj"]
    assert sorted(second) == [0, 0, 0, 0, TOKENS, TOKENS]
    described = found.describe()["tensors"]["model.layers.1.mlp.experts.gate_up_proj"]
    assert described["experts"] == list(second)
    assert described["tokens"] == 2 * TOKENS


def test_inputs_of_an_expert_that_are_not_numbers_name_its_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Experts, "answers", lambda *_: True)
    network: Any = saved(tmp_path / "model", "qwen3_moe")
    network.model.layers[0].mlp.experts.gate_up_proj.data[:, 0, 0] = torch.nan
    stacked_checkpoint(tmp_path / "model", network)
    with pytest.raises(NonFiniteWeights, match="the inputs of expert 0 are not numbers") as refused:
        gathered(tmp_path / "model")
    assert refused.value.where == "model.layers.0.mlp.experts.down_proj"


def test_many_experts_fit_into_the_header_and_another_shape_is_refused(tmp_path: Path) -> None:
    path, name, count = tmp_path / "c.safetensors", "é" * 60, 3000
    with CovarianceWriter(path, [name], {name: count}) as writer:
        for expert in range(count):
            writer.write_expert(name, expert, 1, iter([torch.full((1, 1), float(expert))]))
        writer.stack(name, [10**9] * count, transposed=True)
    found = read(path)
    last = found.of_expert(name, count - 1)
    assert last is not None
    assert (float(last.covariance), last.tokens, last.transposed) == (count - 1, 10**9, True)
    assert found.of(name) is None
    other = tmp_path / "d.safetensors"
    with CovarianceWriter(other, ["a"], {"a": 2}) as writer:
        for expert in range(2):
            writer.write_expert("a", expert, expert + 1, iter([torch.zeros(expert + 1, expert + 1)]))
        writer.stack("a", [1, 1], transposed=False)
    with pytest.raises(InvalidCheckpoint, match="not a file of covariances"):
        read(other)


def test_experts_that_compute_something_else_are_not_taken_for_known_ones(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.mixtral import modeling_mixtral

    known: Any = modeling_mixtral.MixtralExperts.forward
    monkeypatch.setattr(modeling_mixtral.MixtralExperts, "forward", lambda *args: 1.001 * known(*args))
    reasons = gathered(folder("mixtral")).reasons
    assert {reason for name, reason in reasons.items() if ".experts." in name} == {
        "MixtralExperts is not known to be linear layers"
    }


def test_a_layer_that_shares_an_input_only_at_times_has_a_reason(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    known: Any = modeling_llama.LlamaMLP.forward

    def twice(self: Any, x: Tensor) -> Tensor:
        self.up_proj(x.clone())
        answer: Tensor = known(self, x)
        return answer

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", twice)
    found = gathered(folder("llama"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert found.uses[name].tokens == 2 * TOKENS
    assert found.uses[name].key == name
    assert found.uses["model.layers.0.mlp.gate_proj.weight"].tokens == TOKENS

    def sometimes(self: Any, x: Tensor) -> Tensor:
        answer: Tensor = known(self, x)
        self.up_proj(x.clone())
        return answer

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", sometimes)
    found = gathered(folder("llama"), "sometimes")
    assert "not always the same" in found.reasons["model.layers.0.mlp.gate_proj.weight"]


def test_dead_features_are_zeros(folder: Callable[[str], Path]) -> None:
    source = folder("llama")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][7] = 0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    statistics = gathered(source).of("model.layers.0.mlp.down_proj.weight")
    assert statistics is not None
    assert (statistics.covariance.diagonal() == 0).nonzero().flatten().tolist() == [7]
    assert not statistics.covariance[7].any()


def test_inputs_that_are_not_numbers_name_the_tensor(folder: Callable[[str], Path]) -> None:
    source = folder("llama")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.gate_proj.weight"][0, 0] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteWeights) as refused:
        gathered(source)
    assert refused.value.where == "model.layers.1.mlp.down_proj.weight"


def test_progress_is_told_of_every_batch_of_every_block_in_order(folder: Callable[[str], Path]) -> None:
    told: list[float] = []
    gathered(folder("llama"), batch=2, progress=lambda fraction, _what: told.append(fraction))
    assert told == pytest.approx([at / 9 for at in range(9)])


@settings(max_examples=25)
@given(st.integers(1, 40), st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(0, 99))
def test_sums_of_chunks_and_panels_are_the_product_of_rounded_inputs(size: int, chunks: list[int], seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(chunks), size, generator=chance)
    gram = Gram(size, x.device)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(products, "_PANEL", 7)
        patched.setattr(products, "_CHUNK_TOKENS", 11)
        for part in torch.split(x, chunks):
            gram.add(part)
        found = torch.cat([*gram.panels()])
    exact = x.to(torch.bfloat16).double()
    assert torch.equal(found, found.T)
    assert torch.allclose(found.double(), exact.T @ exact / len(x), rtol=1e-5, atol=1e-6)
    assert gram.tokens == len(x)


def test_small_integers_are_summed_exactly() -> None:
    x = torch.randint(-3, 4, (64, 20), generator=torch.Generator().manual_seed(0)).float()
    gram = Gram(20, x.device)
    gram.add(x)
    assert torch.equal(torch.cat([*gram.panels()]), x.T @ x / 64)


def test_the_file_is_read_by_others_and_tells_what_was_written(tmp_path: Path) -> None:
    path, matrix = tmp_path / "c.safetensors", torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    with CovarianceWriter(path, ["ä", "b", "c", 'quoted "d"']) as writer:
        writer.write("b", 2, iter(torch.split(matrix, 1)), {"b": (7, False), "ä": (7, True)})
        writer.refuse("c", "nobody called it")
        writer.refuse('quoted "d"', "x" * 999)
    assert {name: one.tolist() for name, one in load_file(path).items()} == {"b.covariance": matrix.tolist()}
    found = read(path)
    statistics = found.of("ä")
    assert statistics is not None
    assert torch.equal(statistics.covariance, matrix.double())
    assert (statistics.tokens, statistics.transposed, found.uses["b"].transposed) == (7, True, False)
    assert found.of("c") is None
    assert found.describe()["tensors"] == {
        "b": {"tokens": 7, "inputs": 2, "key": "b"},
        "ä": {"tokens": 7, "inputs": 2, "key": "b"},
    }
    assert found.describe()["not_reached"]["c"] == "nobody called it"


def test_a_matrix_of_another_size_than_promised_is_a_defect(tmp_path: Path) -> None:
    with pytest.raises(BitmillError, match="planned as 3 rows"), CovarianceWriter(tmp_path / "c", ["a"]) as writer:
        writer.write("a", 3, iter([torch.zeros(2, 3)]), {"a": (1, False)})


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(InvalidCheckpoint, match="not a file of covariances"):
        read(path)
