"""Fisher information a block at a time: that of the whole network, with one block's weights, and no way to hang."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.errors import Interrupted, InvalidCheckpoint, UnsupportedArchitecture
from core.evaluation.text import Windows
from core.networks import load_network
from core.sensitivity import backward, fisher, shelf
from core.sensitivity.backward import BackwardWalk
from core.sensitivity.fisher import FisherEstimate, estimate_fisher, fisher_of_checkpoint
from core.sensitivity.walk import Call
from core.tensors import reader
from tests.unit.networks.conftest import GATED, KINDS, opened, saved
from tests.unit.sensitivity.test_walk import MORE

ODD: dict[str, dict[str, Any]] = MORE | {
    "gemma2": GATED | {"sliding_window": 8},  # logits go through a cap after the head
    "cohere": GATED,  # and here through a scale
    "mpt": {"d_model": 32, "n_heads": 2, "n_layers": 2, "vocab_size": 64},
    # One block's weights are used by several.
    "zamba2": GATED
    | {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"]}
    | {"mamba_d_state": 8, "mamba_headdim": 16, "n_mamba_heads": 4, "mamba_ngroups": 1},
}


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert not [left for left in set(threading.enumerate()) - before if left.name.endswith("(_travel)")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of a kind of network, written once."""
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("backward") / kind
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("tests.unit.networks.conftest.KINDS", KINDS | ODD)
                saved(made[kind], kind)
        return made[kind]

    return of


def windows(sequences: int = 6, length: int = 12) -> Windows:
    ids = torch.randint(64, (sequences, length), generator=torch.Generator().manual_seed(1))
    return Windows.of(ids, sequences * length)


def unheard(*_told: Any) -> None:
    pass


def never(event: str, fields: dict[str, Any]) -> None:
    raise AssertionError(f"{event}: {fields}")


def by_blocks(source: Path, scratch: Path, text: Windows | None = None, **more: Any) -> FisherEstimate:
    asked: dict[str, Any] = {
        "seed": 3,
        "progress": unheard,
        "log": never,
        "device": "cpu",
        "dtype": torch.float32,
    } | more
    return fisher_of_checkpoint(opened(source), text or windows(), folder=scratch, **asked)


def whole(source: Path, text: Windows | None = None, dtype: torch.dtype = torch.float32, **more: Any) -> FisherEstimate:
    network = load_network(opened(source), device="cpu", dtype=dtype)
    return estimate_fisher(network, text or windows(), seed=3, progress=unheard, **more)


def assert_equal(found: FisherEstimate, expected: FisherEstimate, rel: float = 1e-6) -> None:
    """Matrices of other sizes are multiplied in another order."""
    assert set(found.tensors) == set(expected.tensors)
    assert found.reasons == expected.reasons
    assert found.positions == expected.positions
    assert (found.halves_bits or 0) == pytest.approx(expected.halves_bits or 0, rel=1e-4)
    for name, one in expected.tensors.items():
        other = found.tensors[name]
        for number in ("sum", "cross", "scale"):
            assert getattr(other, number) == pytest.approx(getattr(one, number), rel=rel), name
        for rows in ("rows", "row_scales"):
            a, b = getattr(other, rows), getattr(one, rows)
            assert torch.allclose(a, b, rtol=10 * rel, atol=rel * float(b.abs().max())), name


@pytest.mark.parametrize("kind", [*KINDS, *ODD])
def test_it_is_the_estimate_of_the_whole_network(kind: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    assert_equal(by_blocks(folder(kind), tmp_path), whole(folder(kind)))


@pytest.mark.parametrize("batch", [1, 2])
def test_however_sequences_are_batched(batch: int, folder: Callable[[str], Path], tmp_path: Path) -> None:
    assert_equal(by_blocks(folder("llama"), tmp_path, batch=batch), whole(folder("llama"), batch=batch))


@pytest.mark.parametrize("kind", ["llama", "gemma4_text"])
def test_with_the_inputs_of_blocks_in_a_file(
    kind: str, folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fisher, "Shelf", lambda scratch: shelf.Shelf(scratch, 0))
    found = by_blocks(folder(kind), tmp_path)
    assert_equal(found, whole(folder(kind)))
    assert list(tmp_path.iterdir()) == []


def test_in_bf16_it_is_that_of_the_whole_network_in_bf16(folder: Callable[[str], Path], tmp_path: Path) -> None:
    found = by_blocks(folder("llama"), tmp_path, dtype=torch.bfloat16)
    assert_equal(found, whole(folder("llama"), dtype=torch.bfloat16))


def test_a_tied_table_has_what_both_of_its_uses_have(folder: Callable[[str], Path], tmp_path: Path) -> None:
    found = by_blocks(folder("qwen2"), tmp_path)
    rows = found.tensors["model.embed_tokens.weight"].rows
    assert "lm_head.weight" not in found.tensors
    assert (rows > 0).all()
    used = sorted(set(windows().ids[:, :-1].flatten().tolist()))
    assert float(rows[used].mean()) != pytest.approx(float(rows.mean()))


def test_a_single_sequence_and_a_short_one(folder: Callable[[str], Path], tmp_path: Path) -> None:
    assert_equal(by_blocks(folder("llama"), tmp_path, windows(1, 2)), whole(folder("llama"), windows(1, 2)))


def test_no_more_than_one_block_has_weights_on_either_way(
    folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []
    repeat = BackwardWalk._repeat

    def watched(walk: BackwardWalk, *args: Any) -> Any:
        held = [name for name, one in walk.network.named_parameters() if not one.is_meta]
        seen.append({name.rpartition(".layers.")[2][:1] for name in held})
        return repeat(walk, *args)

    monkeypatch.setattr(BackwardWalk, "_repeat", watched)
    by_blocks(folder("llama"), tmp_path)
    assert all(len(held & {"0", "1"}) <= 1 for held in seen)
    assert seen[-1] == {"m"}  # the table of embeddings, and nothing else


def test_each_tensor_is_read_once_on_either_way(
    folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    read = reader.read_tensor

    def listed(index: Any, name: str) -> Tensor:
        asked.append(name)
        return read(index, name)

    monkeypatch.setattr("core.hollow.read_tensor", listed)
    by_blocks(folder("llama"), tmp_path, batch=1)
    assert {name: asked.count(name) for name in asked} == {
        name: 1 if name.startswith("lm_head") else 2 for name in opened(folder("llama")).names
    }


def test_progress_only_grows_and_names_blocks(folder: Callable[[str], Path], tmp_path: Path) -> None:
    heard: list[tuple[float, str]] = []
    by_blocks(folder("zamba2"), tmp_path, batch=2, progress=lambda share, name: heard.append((share, name)))
    shares = [share for share, _ in heard]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[-1] < 1
    assert heard[-1][1].startswith("model.layers.0, batch 4 of 4")


@pytest.mark.parametrize("stop_at", [0, 3, 5, 9])
def test_it_can_be_stopped_anywhere_and_leaves_nothing_behind(
    stop_at: int, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    heard: list[float] = []

    def stop(share: float, _name: str) -> None:
        heard.append(share)
        if len(heard) > stop_at:
            raise Interrupted("asked to stop")

    with pytest.raises(Interrupted):
        by_blocks(folder("llama"), tmp_path, progress=stop)
    assert len(heard) == stop_at + 1
    assert list(tmp_path.iterdir()) == []


def test_tokens_beyond_the_vocabulary_are_refused(folder: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match="token 64"):
        by_blocks(folder("llama"), tmp_path, Windows.of(torch.full((1, 4), 64), 4))


def test_a_network_that_is_not_causal_is_refused_whichever_way(folder: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedArchitecture, match="later tokens"):
        by_blocks(folder("bert"), tmp_path, log=unheard)


def fallen_back(source: Path, scratch: Path) -> str:
    """The reason that is told, when the estimate is that of the whole network all the same."""
    told: list[tuple[str, dict[str, Any]]] = []
    found = by_blocks(source, scratch, log=lambda event, fields: told.append((event, fields)))
    assert_equal(found, whole(source))
    ((event, fields),) = told
    assert event == "fisher.whole_network"
    return str(fields["reason"])


def changed_layer(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any, Tensor, Any], Any]) -> None:
    """Let llama's layers do something else with what they are called with."""
    from transformers.models.llama import modeling_llama

    layer: Any = modeling_llama.LlamaDecoderLayer
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda self, x, **more: change(self, x, lambda y: forward(self, y, **more)))


def test_what_a_layer_hides_in_an_attribute_is_noticed(
    folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hide(layer: Any, x: Tensor, go: Callable[[Tensor], Tensor]) -> Tensor:
        layer.__dict__["hidden"] = y = go(x)
        return y

    changed_layer(monkeypatch, hide)
    assert "keeps what it computes" in fallen_back(folder("llama"), tmp_path)


def test_a_network_that_does_not_name_its_head_is_loaded_whole(
    folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backward, "blocks_of", lambda network: ({network: None}, None))
    assert "which layer answers logits" in fallen_back(folder("llama"), tmp_path)


def test_an_object_among_the_arguments_is_refused() -> None:
    walk: Any = None
    with pytest.raises(UnsupportedArchitecture, match="share a SimpleNamespace"):
        BackwardWalk._put_aside(walk, Call(nn.Identity(), (SimpleNamespace(),), {}))


def test_a_layer_that_writes_over_its_input_still_has_the_right_gradients(
    folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed_layer(monkeypatch, lambda _layer, x, go: go(x.mul_(2.0)))
    assert_equal(by_blocks(folder("llama"), tmp_path), whole(folder("llama")))
