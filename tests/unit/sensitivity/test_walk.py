"""Walks through networks: the answers of whole networks, one block's weights at a time, and no way to hang."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.errors import BitmillError, InvalidCheckpoint, UnsupportedArchitecture
from core.evaluation.text import Windows
from core.networks import load_network, next_token_logits
from core.sensitivity import walk as walk_module
from core.sensitivity.walk import Block, BlockWalk
from core.tensors.reader import read_tensor
from tests.unit.networks.conftest import GATED, KINDS, opened, saved

MORE: dict[str, dict[str, Any]] = {
    # The last layers use keys and values of earlier ones, which travel in a dict beside the hidden states.
    "gemma4_text": GATED
    | {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 64,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 48, "vocab_size": 64}
    | {"word_embed_proj_dim": 16, "max_position_embeddings": 64, "pad_token_id": None},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 4, "pad_token_id": None},
}


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert not [left for left in set(threading.enumerate()) - before if left.name.endswith("(_travel)")]


def windows(sequences: int = 5, length: int = 12) -> Windows:
    ids = torch.randint(64, (sequences, length), generator=torch.Generator().manual_seed(1))
    return Windows.of(ids, sequences * length)


def walk_through(folder: Path, **more: Any) -> BlockWalk:
    index, text = more.pop("index", opened(folder)), more.pop("text", windows())
    return BlockWalk(index, text, device="cpu", dtype=torch.float32, **more)


def answers(walk: BlockWalk, also: Any = lambda block: None) -> Tensor:
    """The logits at the end of a walk; `also(block)` may run blocks before."""
    logits: dict[int, Tensor] = {}
    with walk:
        for block in walk:
            also(block)
            if walk.is_head(block.module):
                block.run(after=logits.__setitem__)
    return torch.cat([logits[batch] for batch in sorted(logits)])


def expected(folder: Path, text: Windows | None = None) -> Tensor:
    network = load_network(opened(folder), device="cpu", dtype=torch.float32)
    with torch.no_grad():
        return next_token_logits(network, (text or windows()).ids)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    saved(tmp_path / "llama", "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize("kind", [*KINDS, *MORE])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_head_answers_what_the_head_of_the_whole_network_answers(
    kind: str, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.unit.networks.conftest.KINDS", KINDS | MORE)
    saved(tmp_path, kind)
    walk = walk_through(tmp_path, batch=batch)
    assert walk.batches == -(-5 // batch)
    # Matrices of other sizes are multiplied in another order.
    assert torch.allclose(answers(walk), expected(tmp_path), rtol=1e-5, atol=1e-6)


def test_blocks_may_be_run_several_times_and_hand_on_what_the_last_run_answered(llama: Path) -> None:
    def twice(block: Block) -> None:
        block.run()
        block.run()

    assert torch.equal(answers(walk_through(llama), twice), answers(walk_through(llama)))


def test_a_run_that_is_the_last_hands_its_answers_on_at_once(llama: Path) -> None:
    def once(block: Block) -> None:
        block.run(last=True)
        with pytest.raises(BitmillError, match="gone on"):
            block.run()

    with walk_through(llama) as walk:
        for block in walk:
            if not walk.is_head(block.module):
                once(block)
            else:
                last = [block.call(batch).args[0] for batch in range(walk.batches)]
    network: Any = load_network(opened(llama), device="cpu", dtype=torch.float32)
    with torch.no_grad():
        wanted = network.model(windows().ids, use_cache=False).last_hidden_state
    assert torch.allclose(torch.cat(last), wanted, rtol=1e-5, atol=1e-6)


def test_a_block_that_is_given_other_values_answers_by_them_from_its_next_run(llama: Path) -> None:
    name, index = "model.layers.0.mlp.down_proj.weight", opened(llama)

    def replaced(asked: str) -> Tensor:
        return torch.zeros(32, 48) if asked == name else read_tensor(index, asked)

    def load(block: Block) -> None:
        block.run()
        if name in block.names:
            block.load({name: torch.zeros(32, 48)})
            block.run()

    assert torch.equal(answers(walk_through(llama), load), answers(walk_through(llama, weights=replaced)))


def test_two_walks_can_go_in_lockstep(llama: Path) -> None:
    with walk_through(llama) as one, walk_through(llama) as other:
        for first, second in zip(one, other, strict=True):
            assert first.name == second.name
            assert all(torch.equal(first.call(at).args[0], second.call(at).args[0]) for at in range(one.batches))


def test_the_logits_of_a_batch_are_what_the_network_makes_of_its_heads_answer(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    found: list[Tensor] = []
    with walk_through(tmp_path, batch=1) as walk:
        walk.split(torch.split(windows().ids, 2))
        assert walk.batches == 3
        outer: Any = walk.network
        forward = outer.forward
        outer.forward = lambda **more: _doubled(forward(**more))
        for block in walk:
            if walk.is_head(block.module):
                found += [walk.conclude(at, walk.run_call(block.call(at))[0]) for at in range(walk.batches)]
    assert torch.allclose(torch.cat(found), 2 * expected(tmp_path), rtol=1e-5, atol=1e-6)


def _doubled(answered: Any) -> Any:
    answered.logits = 2 * answered.logits
    return answered


def test_hooks_see_the_runs_of_the_caller_and_nothing_else(llama: Path) -> None:
    with walk_through(llama, batch=2) as walk:
        for block in walk:
            seen: list[Any] = []
            handle = block.module.register_forward_hook(lambda _module, given, _output, seen=seen: seen.append(given))
            batches: list[int] = []
            block.run(before=batches.append)
            block.run()
            assert batches == [0, 1, 2]
            assert [len(given[0]) for given in seen] == [2, 2, 1] * 2
            block.finish()
            assert len(seen) == 6
            handle.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_no_more_than_one_block_has_weights(kind: str, tmp_path: Path) -> None:
    saved(tmp_path, kind)
    most = 0
    with walk_through(tmp_path) as walk:
        for block in walk:
            live = {id(one): one.numel() for one in walk.network.parameters() if not one.is_meta}
            mine = {id(one): one.numel() for one in block.module.parameters()}
            others = {at: count for at, count in live.items() if at not in mine}
            assert sum(others.values()) <= 2 * 32  # a norm before the head
            most = max(most, sum(live.values()))
        assert all(one.is_meta for one in walk.network.parameters())
    assert most < sum(one.numel() for one in walk.network.parameters())


def test_each_tensor_is_read_once_however_many_batches_there_are(llama: Path) -> None:
    index, asked = opened(llama), list[str]()

    def listed(name: str) -> Tensor:
        asked.append(name)
        return read_tensor(index, name)

    with walk_through(llama, batch=1, weights=listed) as walk:
        names = [block.name for block in walk]
    assert names == ["model.layers.0", "model.layers.1", "lm_head"]
    assert sorted(asked) == sorted({*asked})
    assert set(asked) == set(index.names)


def test_the_blocks_are_the_list_with_most_parameters_and_the_head_comes_last(llama: Path) -> None:
    whole: Any = load_network(opened(llama), device="cpu", dtype=torch.float32)
    whole.extra = nn.ModuleList([nn.Linear(2, 2)])
    found, head = walk_module.blocks_of(whole)
    assert [*found] == [*whole.model.layers, whole.lm_head]
    assert head is whole.lm_head
    assert walk_module.blocks_of(plain := nn.Sequential(nn.Linear(2, 2))) == ({plain: None}, None)


def test_a_network_without_a_list_of_blocks_is_one_block(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk_module, "blocks_of", lambda network: ({network: None}, None))
    found: list[Tensor] = []
    with walk_through(llama) as walk:
        for block in walk:
            assert block.names == opened(llama).names
            block.run(after=lambda _batch, output: found.append(output.logits))
    assert torch.equal(torch.cat(found), expected(llama))


def test_without_a_head_a_walk_ends_when_its_batches_do(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk_module, "head_of", lambda _network: None)
    with walk_through(llama) as walk:
        assert [block.name for block in walk] == ["model.layers.0", "model.layers.1"]


def test_what_a_batch_raises_is_raised_by_the_walk(llama: Path) -> None:
    with walk_through(llama, batch=1) as walk:
        real, calls = walk.network.get_submodule("model.norm"), list[int]()

        def broken(_module: nn.Module, _args: Any) -> None:
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("no such kernel")

        real.register_forward_pre_hook(broken)
        with pytest.raises(UnsupportedArchitecture, match="no such kernel"):
            list(walk)


def test_what_weights_raise_is_raised_as_it_is(llama: Path) -> None:
    index = opened(llama)

    def gone(name: str) -> Tensor:
        if name == "model.layers.1.mlp.up_proj.weight":
            raise OSError("the disk is gone")
        return read_tensor(index, name)

    with walk_through(llama, weights=gone) as walk, pytest.raises(OSError, match="the disk is gone"):
        list(walk)


class Stopped(Exception):
    """What someone asked for."""


def test_a_walk_that_is_left_early_leaves_nothing_behind(llama: Path) -> None:
    def leave(batch: int) -> None:
        if batch == 1:
            raise Stopped

    with walk_through(llama, batch=2) as walk:
        blocks = iter(walk)
        block = next(blocks)
        with pytest.raises(Stopped):
            block.run(before=leave, last=True)
    assert all(one.is_meta for one in walk.network.parameters())


def test_an_encoder_is_refused_before_the_second_block(tmp_path: Path) -> None:
    saved(tmp_path, "bert")
    visited = []
    with walk_through(tmp_path) as walk, pytest.raises(UnsupportedArchitecture, match="later tokens"):
        visited += [block.name for block in walk]
    assert not visited


def test_tokens_beyond_the_vocabulary_are_refused(llama: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match="token 64"):
        walk_through(llama, text=Windows.of(torch.full((1, 4), 64), 4))


def test_batches_that_call_blocks_in_different_orders_are_refused(llama: Path) -> None:
    with walk_through(llama, batch=1) as walk:
        layers: Any = walk.network.get_submodule("model.layers")
        passing = walk._passing

        def other_way(ids: Tensor) -> Tensor:
            if torch.equal(ids, windows().ids[2:3]):
                layers[1](torch.zeros(1, 12, 32))
            return passing(ids)

        walk._passing = other_way  # type: ignore[method-assign]
        with pytest.raises(UnsupportedArchitecture, match="order that depends on the text"):
            list(walk)


def test_the_callers_number_of_threads_is_as_it_was(llama: Path) -> None:
    before, found = torch.get_num_threads(), list[int]()
    with walk_through(llama) as walk:
        list(walk)
    other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert [torch.get_num_threads(), *found] == [before, before]


def test_a_network_that_puts_its_inputs_where_its_weights_lie_is_refused(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a walk they lie nowhere until they are asked for, and what comes of such inputs would be anything."""
    from transformers.models.llama.modeling_llama import LlamaModel

    whole: Any = LlamaModel.forward

    def moved(self: Any, input_ids: Tensor, **more: Any) -> Any:
        return whole(self, input_ids=input_ids.to(self.embed_tokens.weight.device), **more)

    monkeypatch.setattr(LlamaModel, "forward", moved)
    with pytest.raises(UnsupportedArchitecture, match="where its weights lie"), walk_through(llama) as walk:
        list(walk)
