"""Comparing checkpoints that are never held whole: the metrics of whole networks, block by block."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.errors import Interrupted, InvalidCheckpoint, NonFiniteWeights, UnsupportedArchitecture
from core.evaluation import by_blocks
from core.evaluation.by_blocks import Side, evaluate_checkpoints
from core.evaluation.divergence import Metrics, evaluate
from core.evaluation.text import Windows
from core.networks import load_network
from core.sensitivity import walk as walk_module
from core.tensors.reader import read_tensor
from tests.unit.networks.conftest import GATED, KINDS, opened, saved
from tests.unit.sensitivity.test_walk import MORE

ODD: dict[str, dict[str, Any]] = MORE | {"gemma2": GATED | {"sliding_window": 8}, "cohere": GATED}


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
            made[kind] = tmp_path_factory.mktemp("by_blocks") / kind
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("tests.unit.networks.conftest.KINDS", KINDS | ODD)
                saved(made[kind], kind)
        return made[kind]

    return of


def windows(sequences: int = 5, length: int = 12) -> Windows:
    ids = torch.randint(64, (sequences, length), generator=torch.Generator().manual_seed(1))
    return Windows.of(ids, sequences * length)


def noisy(source: Path) -> Side:
    """The checkpoint with a few per cent of noise in its matrices."""
    index = opened(source)

    def weights(name: str) -> Tensor:
        values = read_tensor(index, name).float()
        chance = torch.Generator().manual_seed(len(name))
        return values + 0.05 * values.std() * torch.randn(values.shape, generator=chance) if values.ndim > 1 else values

    return Side(index, weights)


def unheard(*_told: Any) -> None:
    pass


def never(event: str, fields: dict[str, Any]) -> None:
    raise AssertionError(f"{event}: {fields}")


def compared(reference: Side, candidate: Side, **more: Any) -> Metrics:
    asked: dict[str, Any] = {
        "windows": windows(),
        "progress": unheard,
        "log": never,
        "device": "cpu",
        "dtype": torch.float32,
    } | more
    return evaluate_checkpoints(reference, candidate, **asked)


def whole(reference: Side, candidate: Side, dtype: torch.dtype = torch.float32) -> Metrics:
    networks = [
        load_network(one.index, device="cpu", dtype=dtype, weights=one.weights) for one in (reference, candidate)
    ]
    return evaluate(networks[0], networks[1], windows(), unheard)


def assert_equal(found: Metrics, expected: Metrics, rel: float = 1e-4) -> None:
    for name, value in asdict(expected).items():
        assert asdict(found)[name] == pytest.approx(value, rel=rel, abs=1e-9), name


@pytest.mark.parametrize("kind", [*KINDS, *ODD])
def test_metrics_are_those_of_whole_networks(kind: str, folder: Callable[[str], Path]) -> None:
    sides = Side(opened(folder(kind))), noisy(folder(kind))
    found = compared(*sides)
    assert found.kl_mean > 0
    assert_equal(found, whole(*sides))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_how_sequences_are_batched_changes_nothing(batch: int, folder: Callable[[str], Path]) -> None:
    sides = Side(opened(folder("llama"))), noisy(folder("llama"))
    assert_equal(compared(*sides, batch=batch), compared(*sides))


def test_identical_weights_give_exactly_nothing(folder: Callable[[str], Path]) -> None:
    side = Side(opened(folder("llama")))
    found = compared(side, side)
    assert (found.kl_mean, found.kl_p99, found.top1_agreement) == (0, 0, 1)
    assert found.perplexity == found.reference_perplexity


def test_in_bf16_logits_are_still_made_in_fp32(folder: Callable[[str], Path]) -> None:
    sides = Side(opened(folder("llama"))), noisy(folder("llama"))
    assert_equal(compared(*sides, dtype=torch.bfloat16), whole(*sides, dtype=torch.bfloat16), rel=1e-3)


def test_both_sides_may_have_weights_of_their_own(folder: Callable[[str], Path]) -> None:
    one, other = noisy(folder("llama")), Side(opened(folder("llama")))
    assert_equal(compared(one, other), whole(one, other))


def test_candidates_of_another_architecture_are_compared_too(folder: Callable[[str], Path]) -> None:
    sides = Side(opened(folder("llama"))), Side(opened(folder("gpt_neox")))
    assert_equal(compared(*sides), whole(*sides))


def test_no_more_than_a_block_and_both_heads_have_weights(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    walks: list[walk_module.BlockWalk] = []
    held: list[set[str]] = []
    real = walk_module.BlockWalk.run_call

    def watched(walk: walk_module.BlockWalk, call: Any) -> Any:
        walks.append(walk)
        names = (name for one in set(walks) for name, value in one.network.named_parameters() if not value.is_meta)
        held.append({name.rpartition(".layers.")[2][:1] for name in names})
        return real(walk, call)

    monkeypatch.setattr(walk_module.BlockWalk, "run_call", watched)
    compared(Side(opened(folder("llama"))), noisy(folder("llama")))
    assert {"0", "l"} in held  # the candidate's first block, while the reference's head waits
    assert all(len(names & {"0", "1"}) <= 1 for names in held)


def test_progress_only_grows(folder: Callable[[str], Path]) -> None:
    heard: list[float] = []
    side = Side(opened(folder("llama")))
    compared(side, side, progress=lambda share, _what: heard.append(share), batch=2)
    assert heard == sorted(heard)
    assert heard[0] == 0
    assert heard[-1] < 1
    assert len(heard) == 3 * (2 + 2 + 1)


def test_it_can_be_stopped_anywhere(folder: Callable[[str], Path]) -> None:
    side = Side(opened(folder("llama")))
    for stop_at in range(5):
        heard: list[str] = []

        def stop(_share: float, what: str, heard: list[str] = heard, stop_at: int = stop_at) -> None:
            heard.append(what)
            if len(heard) > stop_at:
                raise Interrupted("asked to stop")

        with pytest.raises(Interrupted):
            compared(side, side, progress=stop)


def test_networks_of_different_vocabularies_are_not_compared(
    folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KINDS, "llama", KINDS["llama"] | {"vocab_size": 70})
    saved(tmp_path, "llama")
    with pytest.raises(InvalidCheckpoint, match="64 and 70"):
        compared(Side(opened(folder("llama"))), Side(opened(tmp_path)))


@pytest.mark.parametrize("broken", [0, 1])
def test_logits_that_are_no_numbers_are_an_error_on_either_side(broken: int, folder: Callable[[str], Path]) -> None:
    index = opened(folder("llama"))

    def weights(name: str) -> Tensor:
        values = read_tensor(index, name)
        return values.fill_(math.nan) if name == "model.norm.weight" else values

    sides = [Side(index), Side(index)]
    sides[broken] = Side(index, weights)
    with pytest.raises(NonFiniteWeights):
        compared(*sides)


def test_a_network_that_does_not_name_its_head_is_loaded_whole_and_the_reason_told(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk_module, "blocks_of", lambda network: ({network: None}, None))
    told: list[tuple[str, dict[str, Any]]] = []
    sides = Side(opened(folder("llama"))), noisy(folder("llama"))
    found = compared(*sides, log=lambda event, fields: told.append((event, fields)))
    assert asdict(found) == asdict(whole(*sides))
    ((event, fields),) = told
    assert event == "evaluate.whole_network"
    assert "which layer answers logits" in fields["reason"]


def test_a_network_that_is_not_causal_is_refused_whichever_way(folder: Callable[[str], Path]) -> None:
    side = Side(opened(folder("bert")))
    with pytest.raises(UnsupportedArchitecture, match="later tokens"):
        compared(side, side, log=unheard)


def test_a_batch_has_as_many_logits_as_fit(folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_blocks, "_BATCH_ELEMENTS_CPU", 2 * 12 * 64)
    heard: list[str] = []
    side = Side(opened(folder("llama")))
    compared(side, side, progress=lambda _share, what: heard.append(what))
    assert heard[-1] == "logits, batch 3 of 3"
