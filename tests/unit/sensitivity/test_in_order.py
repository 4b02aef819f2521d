"""Statistics behind quantised layers, against plain hooks on two whole networks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from core.errors import UnsupportedArchitecture
from core.evaluation.text import Windows
from core.networks import load_network, next_token_logits
from core.sensitivity.covariance import Covariances
from core.sensitivity.drift import DriftStatistics, Mixing
from core.sensitivity.in_order import Decode, encode_in_order
from core.sensitivity.inputs import gather_covariances
from core.storage.checkpoint import CheckpointIndex
from core.storage.sources import LocalFile
from core.tensors.reader import read_tensor
from tests.unit.networks.conftest import GATED, KINDS, opened, saved

LLAMA_STAGES = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
SEQUENCES, LENGTH = 5, 12


def windows() -> Windows:
    ids = torch.randint(64, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
    return Windows.of(ids, SEQUENCES * LENGTH)


def matrices(index: CheckpointIndex) -> list[str]:
    return [name for name in index.names if len(index.tensors[name].shape) > 1]


@dataclass
class Encoded:
    """A tensor that was encoded: what was known about its inputs, and what had been encoded before its stage."""

    name: str
    found: DriftStatistics | None
    before: dict[str, Tensor]


def encoded_in_order(folder: Path, noise: float, **mixing: Any) -> list[Encoded]:
    """All matrices in the order in which they come, each stored with relative noise."""
    index, calls, now = opened(folder), list[Encoded](), dict[str, Tensor]()
    chance = torch.Generator().manual_seed(0)

    def encode(name: str, found: DriftStatistics | None) -> Decode:
        same_stage = calls and found is not None and calls[-1].found is found
        calls.append(Encoded(name, found, calls[-1].before if same_stage else dict(now)))
        weight = read_tensor(index, name)
        now[name] = weight + noise * weight.std() * torch.randn(weight.shape, generator=chance)
        return lambda: now[name]

    encode_in_order(
        index,
        windows(),
        matrices(index),
        encode,
        device="cpu",
        dtype=torch.float32,
        mixing=Mixing(**mixing),
        progress=lambda _fraction, _what: None,
    )
    return calls


@dataclass
class Pass:
    """Inputs and outputs of every linear layer of a whole network, and of its blocks: (tokens, features)."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    attention: dict[str, Tensor]


def passed(folder: Path, changed: dict[str, Tensor], *, attention: bool = False) -> Pass:
    index = opened(folder)

    def weights(name: str) -> Tensor:
        return changed[name] if name in changed else read_tensor(index, name)

    network: Any = load_network(index, device="cpu", dtype=torch.float32, weights=weights)
    if attention:
        network.set_attn_implementation("eager")
    seen = Pass({}, {}, {})

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        if isinstance(output, tuple):
            if attention and len(output) > 1 and output[1] is not None:
                seen.attention[name] = output[1]
            output = output[0]
        seen.inputs[name], seen.outputs[name] = given.flatten(0, -2), output.flatten(0, -2)

    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) or name.endswith("self_attn") or name.rpartition(".")[0].endswith("layers"):
            hook: Any = lambda m, a, k, o, name=name: keep(m, a, k, o, name)  # noqa: E731  binds the name
            module.register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        next_token_logits(network, windows().ids)
    return seen


def products(left: Tensor, right: Tensor) -> Tensor:
    return left.bfloat16().double().T @ right.bfloat16().double() / len(left)


def close(found: Tensor, wanted: Tensor) -> None:
    # Activations of the whole network differ in the last bit, which may round to another bf16.
    assert torch.allclose(found, wanted, rtol=0, atol=2e-4 * float(wanted.abs().max()))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    saved(tmp_path / "llama", "llama")
    return tmp_path / "llama"


def test_layers_come_in_the_order_of_the_network_those_with_the_same_input_together(llama: Path) -> None:
    calls = encoded_in_order(llama, 0.1)
    assert sorted(call.name for call in calls) == sorted(matrices(opened(llama)))
    assert calls[0].name == "model.embed_tokens.weight"
    assert calls[0].found is None
    stages: dict[int, list[str]] = {}
    for call in calls[1:]:
        stages.setdefault(id(call.found), []).append(call.name.split(".")[-2])
    blocks = opened(llama).config["num_hidden_layers"]
    assert list(stages.values()) == LLAMA_STAGES * blocks + [["lm_head"]]


def test_statistics_are_those_of_inputs_through_what_was_encoded_before(llama: Path) -> None:
    reference = passed(llama, {})
    for call in encoded_in_order(llama, 0.2):
        if call.found is None:
            continue
        layer = call.name.removesuffix(".weight")
        now = passed(llama, call.before)
        x, h = reference.inputs[layer], now.inputs[layer]
        assert call.found.tokens == SEQUENCES * LENGTH
        close(call.found.covariance, products(h, h))
        assert call.found.cross is not None
        close(call.found.cross, products(x, h))
        block = ".".join(layer.split(".")[:3])
        if layer.endswith("o_proj"):
            owed = reference.inputs[block] - now.inputs[block]
        elif layer.endswith("down_proj"):
            owed = (reference.outputs[block] - reference.outputs[layer]) - (now.outputs[block] - now.outputs[layer])
        else:
            assert call.found.residuals == {}
            continue
        assert list(call.found.residuals) == [call.name]
        close(call.found.residuals[call.name], products(owed, h))


@pytest.mark.parametrize("kind", KINDS)
def test_where_nothing_is_lost_statistics_are_those_of_the_reference(kind: str, tmp_path: Path) -> None:
    saved(tmp_path / kind, kind)
    index, path = opened(tmp_path / kind), tmp_path / "covariance.safetensors"
    gather_covariances(
        index, windows(), path, device="cpu", dtype=torch.float32, progress=lambda _fraction, _what: None
    )
    known = Covariances.from_index(CheckpointIndex.from_files({path.name: LocalFile(path)}))
    calls = encoded_in_order(tmp_path / kind, 0.0)
    assert sorted(call.name for call in calls) == sorted(matrices(index))
    for call in calls:
        if call.found is None:
            continue
        wanted = known.of(call.name)
        assert wanted is not None
        assert torch.equal(call.found.covariance, wanted.covariance)
        assert call.found.transposed == wanted.transposed == (kind == "gpt2" and "c_" in call.name)
        assert call.found.cross is None
        assert not any(bool(one.any()) for one in call.found.residuals.values())


def test_what_writes_nothing_to_the_stream_as_it_is_has_no_residual(tmp_path: Path) -> None:
    saved(tmp_path / "gemma", "gemma3_text")  # norms its layers' outputs before they are added
    assert all(call.found is None or call.found.residuals == {} for call in encoded_in_order(tmp_path / "gemma", 0.1))


def test_residuals_can_be_left_out(llama: Path) -> None:
    assert all(call.found is None or not call.found.residuals for call in encoded_in_order(llama, 0.1, residual=False))


@pytest.mark.parametrize("drift", [0.0, 0.25])
def test_layers_before_attention_may_keep_to_the_reference(llama: Path, drift: float) -> None:
    reference = passed(llama, {})
    for call in encoded_in_order(llama, 0.2, drift=drift):
        if call.found is None:
            continue
        layer = call.name.removesuffix(".weight")
        x, h = reference.inputs[layer], passed(llama, call.before).inputs[layer]
        share = drift if layer[-6:] in ("q_proj", "k_proj", "v_proj") else 1.0
        close(call.found.covariance, share * products(h, h) + (1 - share) * products(x, x))
        assert call.found.cross is not None
        close(call.found.cross, share * products(x, h) + (1 - share) * products(x, x))


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_layers_before_attention_may_weigh_tokens_by_what_they_receive_of_it(llama: Path, share: float) -> None:
    reference = passed(llama, {}, attention=True)
    for call in encoded_in_order(llama, 0.2, attention=share):
        if call.found is None or call.found.cross is None:
            continue
        layer = call.name.removesuffix(".weight")
        x, h = reference.inputs[layer], passed(llama, call.before).inputs[layer]
        if layer[-6:] in ("q_proj", "k_proj", "v_proj"):
            probabilities = reference.attention[layer.rpartition(".")[0]]
            received = torch.stack(
                [probabilities[:, :, j:, j].mean(dim=1).sum(dim=1) / (LENGTH - j) for j in range(LENGTH)], dim=1
            )
            weights = share * (received / received.mean(dim=1, keepdim=True)).flatten() + (1 - share)
            x, h = weights.sqrt()[:, None] * x, weights.sqrt()[:, None] * h
        close(call.found.cross, products(x, h))
        assert call.found.notes == ()


def test_attention_that_the_network_does_not_tell_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.sensitivity.drift.attention_received", lambda _output: None)
    saved(tmp_path / "llama", "llama")
    calls = encoded_in_order(tmp_path / "llama", 0.0, attention=1.0)
    noted = {call.name.split(".")[-2] for call in calls if call.found and call.found.notes}
    assert noted == {"q_proj", "k_proj", "v_proj"}


def test_a_tied_table_is_encoded_before_anything_uses_it_and_the_head_takes_it_from_there(tmp_path: Path) -> None:
    saved(tmp_path / "tied", "qwen2")
    calls = encoded_in_order(tmp_path / "tied", 0.1)
    assert [call.name for call in calls if call.found is None] == ["model.embed_tokens.weight"]
    first = next(call for call in calls if call.found is not None)
    assert first.found is not None
    assert first.found.cross is not None


def test_what_the_architecture_has_no_use_for_is_encoded_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    extra = "model.layers.9.extra.weight"
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"layers\.9\."])
    saved(tmp_path / "llama", "llama")
    file = tmp_path / "llama/model.safetensors"
    save_file(load_file(file) | {extra: torch.ones(4, 4)}, file, {"format": "pt"})
    calls = encoded_in_order(tmp_path / "llama", 0.1)
    assert [call.found for call in calls if call.name == extra] == [None]
    assert len(calls) == len(matrices(opened(tmp_path / "llama")))


def test_layers_before_attention_with_sinks_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sinks = GATED | {"num_local_experts": 4, "num_experts_per_tok": 2}
    monkeypatch.setitem(KINDS, "gpt_oss", sinks)
    saved(tmp_path / "sinks", "gpt_oss")
    plain, mixed = (encoded_in_order(tmp_path / "sinks", 0.2, **given) for given in ({}, {"drift": 0.0}))
    changed = {
        one.name.split(".")[-2]
        for one, other in zip(plain, mixed, strict=True)
        if one.found and other.found and not torch.equal(one.found.covariance, other.found.covariance)
    }
    assert changed == {"q_proj", "k_proj", "v_proj"}


def test_a_network_that_calls_a_block_twice_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    single: Any = nn.ModuleList.__getitem__

    def twice(self: nn.ModuleList, at: Any) -> Any:
        return [*single(self, at), *single(self, at)] if isinstance(at, slice) else single(self, at)

    monkeypatch.setattr(nn.ModuleList, "__getitem__", twice)
    with pytest.raises(UnsupportedArchitecture, match="more than once"):
        encoded_in_order(llama, 0.1)
