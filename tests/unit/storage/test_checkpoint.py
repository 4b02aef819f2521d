"""A checkpoint as a whole: its index, ties, weights that execute code, links and paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from core.errors import InvalidCheckpoint, MissingFile, PathNotAllowed, PickleRefused
from core.storage.checkpoint import CheckpointIndex, FileEntry, checkpoint_sha, is_weight_file, validate_path
from core.storage.local_store import LocalStore
from core.storage.sources import StoredObject, folder_sources


def write(folder: Path, tensors: dict[str, torch.Tensor], file: str = "model.safetensors", **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / file, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def open_folder(folder: Path) -> CheckpointIndex:
    return CheckpointIndex.from_files(folder_sources(folder))


def sharded(folder: Path, weight_map: dict[str, str] | None = None) -> Path:
    write(folder, {"a": torch.ones(2)}, "model-00001-of-00002.safetensors")
    write(folder, {"b": torch.zeros(3)}, "model-00002-of-00002.safetensors")
    places = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = {"metadata": {}, "weight_map": places if weight_map is None else places | weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_tensors_of_several_files_are_one_checkpoint(tmp_path: Path) -> None:
    index = open_folder(sharded(tmp_path / "c"))
    assert index.names == ("a", "b")
    assert index.parameters == 5
    assert bytes(index.read_tensor_bytes("a")) == torch.ones(2).numpy().tobytes()
    assert bytes(index.read_range("b", 4, 8)) == bytes(8)


@pytest.mark.parametrize(
    ("weight_map", "reason", "error"),
    [
        ({"a": "model-00002-of-00002.safetensors"}, "it is not", InvalidCheckpoint),
        ({"c": "model-00001-of-00002.safetensors"}, "it is not", InvalidCheckpoint),
        ({"a": "model-00003-of-00002.safetensors"}, "not in the checkpoint", MissingFile),
        ({"a": "../model.safetensors"}, "relative path", PathNotAllowed),
        ({"a": "/etc/passwd.safetensors"}, "relative path", PathNotAllowed),
        ({"a": "pytorch_model.bin"}, "not a safetensors file", PickleRefused),
        ({"a": 7}, "not a map", InvalidCheckpoint),
    ],
)
def test_an_index_that_lies_about_its_shards_is_refused(
    tmp_path: Path, weight_map: dict[str, Any], reason: str, error: type[Exception]
) -> None:
    with pytest.raises(error, match=reason):
        open_folder(sharded(tmp_path / "c", weight_map))


def test_a_tensor_that_the_index_does_not_list_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "c")
    save_file({"b": torch.zeros(3), "c": torch.ones(1)}, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(InvalidCheckpoint, match="does not list tensor 'c'"):
        open_folder(folder)


def test_two_files_with_the_same_tensor_are_refused_without_an_index(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", {"a": torch.ones(1)}, "one.safetensors")
    write(folder, {"a": torch.ones(1)}, "two.safetensors")
    with pytest.raises(InvalidCheckpoint, match="also in one"):
        open_folder(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.PTH", "w.pkl", "w.ckpt"])
def test_weights_that_execute_code_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(PickleRefused) as refused:
        open_folder(tmp_path)
    assert refused.value.where == name


def test_a_pickle_beside_safetensors_is_no_weight_of_the_model_and_is_not_copied(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", {"a": torch.ones(1)})
    (folder / "training_args.bin").write_bytes(b"\x80\x04.")
    assert open_folder(folder).names == ("a",)
    assert is_weight_file("training_args.bin")
    assert not is_weight_file("tokenizer.json")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MissingFile, match="no safetensors"):
        open_folder(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{", '{"a": "\xff"}'.encode("latin-1").decode("latin-1") + "x", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    folder = write(tmp_path / "c", {"a": torch.ones(1)})
    (folder / "config.json").write_text(text)
    with pytest.raises(InvalidCheckpoint) as refused:
        open_folder(folder)
    assert refused.value.where == "config.json"


TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
    "table", [TABLE, "transformer.wte.weight", "gpt_neox.embed_in.weight", "backbone.embeddings.weight"]
)
def test_a_language_model_without_a_head_is_tied_whatever_its_table_is_called(table: str, tmp_path: Path) -> None:
    found = open_folder(write(tmp_path / "a", {table: torch.randn(6, 4)}, architectures=["XForCausalLM"]))
    assert found.ties == ((table, HEAD),)


def test_a_tied_head_counts_once_whether_or_not_the_files_hold_a_copy(tmp_path: Path) -> None:
    table = torch.randn(6, 4)
    without = open_folder(write(tmp_path / "a", {TABLE: table}, tie_word_embeddings=True))
    copied = open_folder(write(tmp_path / "b", {TABLE: table, HEAD: table.clone()}, tie_word_embeddings=True))
    assert without.ties == copied.ties == ((TABLE, HEAD),)
    assert without.names == copied.names == (TABLE,)
    assert without.parameters == copied.parameters == 24


def test_a_head_that_differs_is_a_parameter_of_its_own_whatever_the_config_says(tmp_path: Path) -> None:
    tensors = {TABLE: torch.randn(6, 4), HEAD: torch.randn(6, 4)}
    assert open_folder(write(tmp_path / "a", tensors, tie_word_embeddings=True)).parameters == 48


def test_equal_bytes_alone_are_not_a_tie(tmp_path: Path) -> None:
    tensors = {TABLE: torch.zeros(6, 4), HEAD: torch.zeros(6, 4)}
    assert open_folder(write(tmp_path / "a", tensors, tie_word_embeddings=False)).ties == ()


def test_a_language_model_without_a_head_is_tied_even_if_its_config_does_not_say_so(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {TABLE: torch.zeros(6, 4)}, architectures=["GemmaForCausalLM"])
    assert open_folder(folder).ties == ((TABLE, HEAD),)


def test_a_link_that_leaves_the_folder_is_refused_and_one_that_stays_is_followed(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", {"a": torch.ones(1)})
    (folder / "copy.json").symlink_to("config.json")
    assert "copy.json" in folder_sources(folder)
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (folder / "tokenizer.json").symlink_to(secret)
    with pytest.raises(PathNotAllowed, match="leaves"):
        folder_sources(folder)


def test_a_folder_that_is_a_link_and_a_pipe_are_refused(tmp_path: Path) -> None:
    import os

    folder = write(tmp_path / "c", {"a": torch.ones(1)})
    (folder / "loop").symlink_to(".")
    with pytest.raises(PathNotAllowed):
        folder_sources(folder)
    (folder / "loop").unlink()
    os.mkfifo(folder / "pipe")
    with pytest.raises(PathNotAllowed):
        folder_sources(folder)


def test_a_snapshot_of_a_hub_cache_may_link_to_its_blobs(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / "abc"
    blob.parent.mkdir()
    blob.write_text("{}")
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    assert list(folder_sources(snapshot, [blob.parent])) == ["config.json"]


@pytest.mark.parametrize("path", ["a.json", "sub/a.json", "a..b", ".gitattributes", "é.txt"])
def test_ordinary_relative_paths_are_accepted(path: str) -> None:
    assert validate_path(path) == path


@pytest.mark.parametrize(
    "path",
    ["", "/etc/passwd", "../a", "a/../b", "a//b", "a/", "./a", "a\\b", "C:a", "a\0", "a\nb", "x" * 600, "\ud800"],
)
def test_paths_that_could_leave_the_checkpoint_are_refused(path: str) -> None:
    with pytest.raises(PathNotAllowed):
        validate_path(path)


def test_the_checkpoints_name_depends_on_every_file_and_not_on_their_order() -> None:
    files = [FileEntry("a", 1, "0" * 64), FileEntry("b", 2, "1" * 64, "key")]
    assert checkpoint_sha(files) == checkpoint_sha(reversed(files))
    assert checkpoint_sha(files) != checkpoint_sha([files[0], FileEntry("b", 2, "2" * 64)])
    assert checkpoint_sha(files) == checkpoint_sha([files[0], FileEntry("b", 2, "1" * 64, "elsewhere")])


def test_a_checkpoint_reads_the_same_from_the_store_as_from_the_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", {"a": torch.arange(7.0)}, model_type="llama")
    store = LocalStore(tmp_path / "store")
    for path, source in folder_sources(folder).items():
        store.put_bytes(f"checkpoints/x/{path}", bytes(source.read(0, source.size)))
    remote = CheckpointIndex.from_files(
        {key.split("/", 2)[2]: StoredObject(store, key, size) for key, size in store.list("checkpoints/")}
    )
    local = open_folder(folder)
    assert remote.config == local.config
    assert remote.read_tensor_bytes("a") == local.read_tensor_bytes("a")


def test_reading_beyond_a_file_is_refused(tmp_path: Path) -> None:
    index = open_folder(write(tmp_path / "c", {"a": torch.ones(1)}))
    with pytest.raises(InvalidCheckpoint):
        index.files["model.safetensors"].read(0, 10_000)
