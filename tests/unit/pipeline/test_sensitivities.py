"""What calibration knows of single tensors as rounding takes it, and jobs on checkpoints of other shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from core.exports.artefact import Artefact
from core.pipeline.local import run_recipe
from core.pipeline.sensitivities import Sensitivities
from core.recipe.recipe import load_recipe
from core.sensitivity.covariance import Covariances, CovarianceWriter
from core.storage.checkpoint import CheckpointIndex
from core.storage.sources import LocalFile, folder_sources
from tests.unit.networks.conftest import GATED, KINDS, saved
from tests.unit.pipeline.conftest import byte_tokenizer


def diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float32))


@pytest.fixture
def known(tmp_path: Path) -> Sensitivities:
    path = tmp_path / "covariance.safetensors"
    with CovarianceWriter(path, ["plain", "turned", "experts", "rows", "none"], {"experts": 3, "rows": 2}) as writer:
        writer.write("plain", 2, iter([diagonal(1, 2)]), {"plain": (7, False), "turned": (9, True)})
        for expert in (0, 2):
            writer.write_expert("experts", expert, 2, iter([diagonal(expert + 1, 5)]))
        writer.stack("experts", (4, 0, 6), transposed=False)
        writer.write_expert("rows", 1, 2, iter([diagonal(3, 5)]))
        writer.stack("rows", (0, 8), transposed=True)
        writer.refuse("none", "nobody called it")
    return Sensitivities(None, Covariances.from_index(CheckpointIndex.from_files({path.name: LocalFile(path)})))


def test_a_matrix_has_its_covariance_in_its_own_orientation(known: Sensitivities) -> None:
    plain, turned = known.of("plain", (3, 2)), known.of("turned", (2, 3))
    assert (plain.transposed, plain.tokens, turned.transposed, turned.tokens) == (False, 7, True, 9)
    assert plain.covariance is turned.covariance
    assert plain.row_weights is not None
    assert turned.row_weights is not None
    assert (len(plain.row_weights), len(turned.row_weights)) == (3, 2)


def test_experts_in_one_tensor_are_read_one_by_one(known: Sensitivities) -> None:
    found = known.of("experts", (3, 4, 2))
    assert found.experts is not None
    assert (len(found.experts), found.covariance, found.transposed, found.missing) == (3, None, False, "")
    assert found.row_weights is not None
    assert len(found.row_weights) == 12
    first, silent, last = found.experts
    assert (first.tokens, silent.tokens, silent.covariance, last.tokens) == (4, None, None, 6)
    assert last.covariance is not None
    assert torch.equal(last.covariance, diagonal(3, 5).double())
    assert [one.tokens for one in found.experts[1:]] == [None, 6]
    assert found.experts[-1].tokens == 6
    with pytest.raises(IndexError):
        found.experts[3]


def test_experts_whose_rows_are_inputs_say_so(known: Sensitivities) -> None:
    found = known.of("rows", (2, 2, 5))
    assert found.experts is not None
    assert (found.transposed, [one.transposed for one in found.experts]) == (True, [True, True])


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("none", (3, 2), "nobody called it"),
        ("unheard of", (3, 2), ""),
        ("plain", (2, 3), "calibration saw it in another shape"),
        ("turned", (3, 2), "calibration saw it in another shape"),
        ("plain", (3, 2, 1), "calibration saw it in another shape"),
        ("experts", (2, 4, 2), "calibration saw it in another shape"),
        ("experts", (3, 2, 4), "calibration saw it in another shape"),
        ("experts", (12, 2), "calibration saw it in another shape"),
        ("rows", (2, 5, 2), "calibration saw it in another shape"),
    ],
)
def test_what_does_not_fit_has_a_reason(known: Sensitivities, name: str, shape: tuple[int, ...], reason: str) -> None:
    found = known.of(name, shape)
    assert (found.covariance, found.experts, found.missing) == (None, None, reason)
    assert found.row_weights is not None


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A checkpoint of a kind, with a byte tokenizer; stacked: with a tensor for all experts of a layer."""

    def made(kind: str, *, stacked: bool = False, **more: Any) -> Path:
        base = KINDS.get(kind, GATED | {"num_local_experts": 4, "num_experts_per_tok": 2})
        monkeypatch.setitem(KINDS, kind, base | {"vocab_size": 256} | more)
        network, folder = saved(tmp_path / kind, kind), tmp_path / kind
        if stacked:
            weights = {name: value.contiguous() for name, value in network.state_dict().items()}
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
        (folder / "tokenizer.json").write_text(byte_tokenizer())
        return folder

    return made


def job(source: Path, out: Path, rounding: Any, text: str) -> dict[str, dict[str, Any]]:
    """The manifest's rows by tensor."""
    recipe = {
        "target": {"bits_per_param": 7.5},
        "format": text,
        "rounding": rounding,
        "allocation": "uniform",
        "calibration": {"text": "builtin", "sequences": 8, "sequence_length": 64},
        "evaluation": {"text": "builtin", "sequences": 2, "sequence_length": 32},
    }
    run_recipe(source, load_recipe(recipe), out, device="cpu", threads=1)
    rows = json.loads((out / "manifest.json").read_bytes())["tensors"]
    artefact = Artefact.open(CheckpointIndex.from_files(folder_sources(out)))
    assert all(artefact.decode(row["name"]).isfinite().all() for row in rows)
    return {row["name"]: row for row in rows}


@pytest.mark.parametrize(("rounding", "text"), [("gptq", "int4@32"), ("watersic", "grid4@tensor")])
def test_a_job_on_layers_that_are_stored_with_their_inputs_as_rows(
    checkpoint: Any, tmp_path: Path, rounding: str, text: str
) -> None:
    rows = job(checkpoint("gpt2", n_positions=128), tmp_path / "out", rounding, text)
    matrices = [
        row for name, row in rows.items() if name.endswith((".c_fc.weight", ".c_proj.weight", ".c_attn.weight"))
    ]
    assert len(matrices) == 8
    assert not any("no statistics" in note for row in matrices for note in row.get("notes") or ())


@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_moe"])
def test_a_job_on_experts_in_one_tensor(checkpoint: Any, tmp_path: Path, kind: str) -> None:
    source = checkpoint(kind, stacked=kind == "qwen3_moe")
    rows = job(source, tmp_path / "out", {"name": "gptq", "diagonal": 0.0}, "int4@16")
    experts = [row for name, row in rows.items() if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert [len(row["shape"]) for row in experts] == [3] * 4
    for row in experts:
        assert not any("no statistics" in note for note in row.get("notes") or ())


def test_an_expert_without_tokens_stands_in_the_manifest(checkpoint: Any, tmp_path: Path) -> None:
    source = checkpoint("gpt_oss", num_local_experts=64, num_experts_per_tok=1)
    rows = job(source, tmp_path / "out", "gptq", "int4@16")
    notes = rows["model.layers.0.mlp.experts.down_proj"]["notes"]
    assert any("of 64 experts: no token was routed to it, all of its inputs count alike" in note for note in notes)


def test_warnings_tell_what_is_not_known_of_experts_and_not_that_nothing_is(checkpoint: Any, tmp_path: Path) -> None:
    rows = job(checkpoint("mixtral"), tmp_path / "out", "gptq", "int4@16")
    expert = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    assert not any("no statistics" in note for note in rows[expert].get("notes") or ())
    warnings = json.loads((tmp_path / "out/manifest.json").read_bytes())["warnings"]
    about = next(warning for warning in warnings if expert in warning)
    assert about.startswith("no Fisher information of ")
    assert "did not reach" not in about
