"""Disk, text and places that the pipeline may not exceed: refused with what is missing, and nothing is left behind."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from core.config import Settings
from core.errors import (
    BitmillError,
    EmptyText,
    ErrorClass,
    InfeasibleTarget,
    InvalidCheckpoint,
    MissingFile,
    OutOfDisk,
    PathNotAllowed,
    PickleRefused,
    StoreUnavailable,
    UserError,
)
from core.jobs.steps import StepOutput, StepRequest
from core.pipeline import forward, local
from core.pipeline.context import StepContext, require_disk
from core.pipeline.estimate import required_scratch_bytes
from core.pipeline.fetch import fetch
from core.pipeline.steps import run_step
from core.recipe.recipe import load_recipe
from core.storage.keys import checkpoint_key
from core.storage.local_store import LocalStore
from tests.unit.pipeline.conftest import write_llama

DATA_FREE: dict[str, Any] = {
    "version": 1,
    "target": {"bits_per_param": 6.5},
    "format": "int4@32",
    "allocation": "uniform",
    "calibration": False,
    "evaluation": False,
}
TEXT = {"text": "builtin", "sequences": 2, "sequence_length": 64}
MEASURED = DATA_FREE | {"allocation": "fisher", "calibration": TEXT, "evaluation": TEXT}
RESERVE = 16 << 20


class _Usage(NamedTuple):
    total: int
    used: int
    free: int


def disk_with(free: int) -> Callable[[Path], _Usage]:
    return lambda _folder: _Usage(1 << 40, (1 << 40) - free, free)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.fixture
def ctx(tmp_path: Path) -> StepContext:
    """The surroundings of a step of a service whose only allowed root is `sources`."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    store = LocalStore(tmp_path / "store")
    return StepContext(
        store, scratch, allowed_roots=(tmp_path / "sources",), settings=Settings(store_url="s3://ours/prefix")
    )


def fetch_of(**params: Any) -> StepRequest:
    return StepRequest(kind="fetch", input_hash="0" * 64, params=params)


class TestDisk:
    def test_a_recipe_that_needs_more_than_there_is_begins_nothing(
        self, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", disk_with(RESERVE))
        monkeypatch.setattr(local, "run_steps", None)  # so that a step would fail in another way
        before = names(tmp_path)
        with pytest.raises(OutOfDisk, match=r"needs \d+ MiB, 16 MiB are free") as refused:
            local.run_recipe(llama, load_recipe(DATA_FREE), tmp_path / "out", device="cpu")
        assert refused.value.kind is ErrorClass.CAPACITY
        assert Path(refused.value.where).is_relative_to(tmp_path)
        assert "BITMILL_SCRATCH_DIR" in refused.value.hint
        assert names(tmp_path) == before

    def test_a_disk_that_fills_up_meanwhile_leaves_nothing_behind(
        self, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[Path] = []

        def filling(folder: Path) -> _Usage:
            asked.append(folder)
            return disk_with(1 << 40 if len(asked) < 3 else 0)(folder)

        monkeypatch.setattr(shutil, "disk_usage", filling)
        before = names(tmp_path)
        with pytest.raises(OutOfDisk, match="assembling"):
            local.run_recipe(llama, load_recipe(DATA_FREE), tmp_path / "out", device="cpu")
        assert names(tmp_path) == before

    @pytest.mark.parametrize(
        "spec",
        [
            DATA_FREE,
            DATA_FREE | {"target": {"size_bytes": 95_000}},
            DATA_FREE | {"target": {"bits_per_param": 15.0}},
            DATA_FREE | {"target": {"kl": 0.05}, "calibration": TEXT},
            MEASURED,
        ],
    )
    def test_what_is_asked_for_is_enough(
        self, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: dict[str, Any]
    ) -> None:
        """Measured at the worst moments: when a file is in the store and still in the scratch folder.

        The Fisher estimate is the reserve's: its size goes with the rows of the matrices, not with their elements.
        """
        real, taken = LocalStore.put_file, []

        def measured(self: LocalStore, key: str, path: Path, sha256: str | None = None) -> int:
            size = real(self, key, path, sha256)
            (work,) = tmp_path.glob(".bitmill-*")
            taken.append(
                sum(one.stat().st_size for one in work.rglob("*") if one.is_file() and "fisher" not in one.name)
            )
            return size

        monkeypatch.setattr(LocalStore, "put_file", measured)
        recipe = load_recipe(spec)
        local.run_recipe(llama, recipe, tmp_path / "out", device="cpu")
        assert len(taken) >= 2
        assert max(taken) <= required_scratch_bytes(local.open_folder(llama), recipe)

    def test_a_byte_less_than_needed_is_too_little(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", disk_with(RESERVE + 1000))
        require_disk(tmp_path, 1000, "this")
        with pytest.raises(OutOfDisk, match="this"):
            require_disk(tmp_path, 1001, "this")

    def test_a_repository_that_does_not_fit_is_not_downloaded(
        self, ctx: StepContext, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import huggingface_hub

        sizes = {"model.safetensors": 1 << 40, "config.json": 100, "pytorch_model.bin": 1 << 50}
        siblings = [SimpleNamespace(rfilename=path, size=size) for path, size in sizes.items()]
        info = SimpleNamespace(sha="a" * 40, siblings=siblings)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_given, **_named: info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
        monkeypatch.setattr(shutil, "disk_usage", disk_with(1 << 40))
        with pytest.raises(OutOfDisk, match=f"hf:org/name@main needs {1 << 20} MiB"):
            fetch(fetch_of(source={"kind": "hf", "repo": "org/name"}), ctx)


class TestPlaces:
    def test_a_folder_outside_the_allowed_roots_is_not_read(self, ctx: StepContext, tmp_path: Path) -> None:
        outside = write_llama(tmp_path / "outside")
        (tmp_path / "sources").mkdir()
        (tmp_path / "sources" / "link").symlink_to(outside)
        for path in (outside, tmp_path / "sources" / ".." / "outside", tmp_path / "sources" / "link"):
            with pytest.raises(PathNotAllowed) as refused:
                fetch(fetch_of(source={"kind": "path", "path": str(path)}), ctx)
            assert refused.value.where == str(path)
            assert "BITMILL_ALLOWED_ROOTS" in refused.value.hint
        assert list(ctx.store.list("")) == []

    def test_a_link_that_leads_out_of_the_folder_is_not_followed(self, ctx: StepContext, tmp_path: Path) -> None:
        source = write_llama(tmp_path / "sources" / "model")
        (tmp_path / "secret").write_text("secret")
        (source / "notes.txt").symlink_to(tmp_path / "secret")
        with pytest.raises(PathNotAllowed) as refused:
            fetch(fetch_of(source={"kind": "path", "path": str(source)}), ctx)
        assert refused.value.where == "notes.txt"
        assert list(ctx.store.list("")) == []

    def test_the_services_own_bucket_is_no_source(self, ctx: StepContext) -> None:
        with pytest.raises(PathNotAllowed) as refused:
            fetch(fetch_of(source={"kind": "s3", "url": "s3://ours/checkpoints/of/others"}), ctx)
        assert refused.value.where == "s3://ours/checkpoints/of/others"

    def test_a_kind_of_source_that_there_is_not_is_refused(self, ctx: StepContext) -> None:
        with pytest.raises(UserError, match="ftp"):
            fetch(fetch_of(source={"kind": "ftp", "url": "ftp://x"}), ctx)

    def test_weights_of_other_formats_stay_where_they_are(self, ctx: StepContext, tmp_path: Path) -> None:
        source = write_llama(tmp_path / "sources" / "model")
        (source / "pytorch_model.bin").write_bytes(b"\x80")
        fetched = fetch(fetch_of(source={"kind": "path", "path": str(source)}), ctx)
        assert {entry["path"] for entry in fetched.values["files"]} == names(source) - {"pytorch_model.bin"}
        for entry in fetched.values["files"]:
            assert ctx.store.read(entry["key"]) == (source / entry["path"]).read_bytes()

    def test_an_uploaded_file_that_the_store_has_lost_is_told_before_it_is_needed(
        self, ctx: StepContext, llama: Path
    ) -> None:
        files = [
            {"path": path.name, "size": path.stat().st_size, "sha256": "0" * 64, "key": checkpoint_key("a", path.name)}
            for path in sorted(llama.iterdir())
        ]
        for file in files[1:]:
            ctx.store.put_file(str(file["key"]), llama / str(file["path"]))
        with pytest.raises(StoreUnavailable) as refused:
            fetch(fetch_of(files=files), ctx)
        assert refused.value.where == files[0]["path"]


class TestText:
    def test_a_file_of_the_checkpoint_with_too_few_tokens_is_refused(self, llama: Path, tmp_path: Path) -> None:
        (llama / "short.txt").write_text("fifteen letters")
        recipe = load_recipe(MEASURED | {"calibration": TEXT | {"text": "file:short.txt"}})
        before = names(tmp_path)
        with pytest.raises(EmptyText, match="holds 15 tokens, 16 are needed") as refused:
            local.run_recipe(llama, recipe, tmp_path / "out", device="cpu")
        assert refused.value.where == "file:short.txt"
        assert names(tmp_path) == before

    def test_a_file_of_the_checkpoint_is_read_up_to_a_limit(self, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (llama / "long.txt").write_text("x" * 20_000)
        monkeypatch.setattr(forward, "MAX_TEXT_BYTES", 19_999)
        with pytest.raises(InvalidCheckpoint) as refused:
            forward.windows_of(local.open_folder(llama), TEXT | {"text": "file:long.txt"}, "calibration")
        assert refused.value.where == "long.txt"

    def test_windows_are_no_longer_than_the_positions_of_the_model(self, llama: Path) -> None:
        spec = TEXT | {"sequence_length": 4096}
        windows = forward.windows_of(local.open_folder(llama), spec, "evaluation")
        assert windows.ids.shape == (2, 256)


def without_weights(source: Path) -> None:
    (source / "model.safetensors").unlink()


def pickled(source: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")


def truncated(source: Path) -> None:
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[: len(data) // 2])


def no_json(source: Path) -> None:
    (source / "config.json").write_text("{'single': 'quotes'}")


def already_quantised(source: Path) -> None:
    config = (source / "config.json").read_text()
    (source / "config.json").write_text(config[:-1] + ', "quantization_config": {"quant_method": "gptq"}}')


def a_folder_in_a_link(source: Path) -> None:
    (source / "more").symlink_to(source.parent)


def as_it_is(source: Path) -> None:
    """Nothing is wrong with it."""


@pytest.mark.parametrize(
    ("spoil", "changes", "kind", "where"),
    [
        (without_weights, {}, MissingFile, ""),
        (pickled, {}, PickleRefused, "pytorch_model.bin"),
        (truncated, {}, InvalidCheckpoint, "model.safetensors"),
        (no_json, {}, InvalidCheckpoint, "config.json"),
        (already_quantised, {}, InvalidCheckpoint, "config.json"),
        (a_folder_in_a_link, {}, PathNotAllowed, "more"),
        (as_it_is, {"target": {"bits_per_param": 2.0}}, InfeasibleTarget, "target.bits_per_param"),
        (as_it_is, {"target": {"size_bytes": 20_000}}, InfeasibleTarget, "target.size_bytes"),
        (as_it_is, {"evaluation": TEXT | {"text": "file:none.txt"}}, MissingFile, "none.txt"),
    ],
)
def test_what_files_and_recipe_tell_is_refused_before_any_work(
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Path], None],
    changes: dict[str, Any],
    kind: type[BitmillError],
    where: str,
) -> None:
    spoil(llama)
    monkeypatch.setattr(local, "run_steps", None)  # so that a step would fail in another way
    before = names(tmp_path)
    with pytest.raises(BitmillError) as refused:
        local.run_recipe(llama, load_recipe(DATA_FREE | changes), tmp_path / "out", device="cpu")
    assert (type(refused.value), refused.value.where) == (kind, where)
    assert names(tmp_path) == before


@pytest.mark.parametrize("name", ["model.safetensors", "chat_template.jinja"])
def test_a_source_that_changes_while_it_is_read_is_no_source_of_an_artefact(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The manifest would name digests of bytes that were not quantised."""

    def meddled(kind: str, request: StepRequest, ctx: StepContext) -> dict[str, Any]:
        answered = run_step(kind, request, ctx)
        if kind == "fetch":
            data = (llama / name).read_bytes()
            (llama / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        return answered

    monkeypatch.setattr(local, "run_step", meddled)
    before = names(tmp_path)
    with pytest.raises(InvalidCheckpoint, match="changed while it was read") as refused:
        local.run_recipe(llama, load_recipe(DATA_FREE), tmp_path / "out", device="cpu")
    assert refused.value.where == name
    assert names(tmp_path) == before


def test_an_output_is_read_back_as_it_was_answered(ctx: StepContext, tmp_path: Path) -> None:
    source = write_llama(tmp_path / "sources" / "model")
    fetched = fetch(fetch_of(source={"kind": "path", "path": str(source)}), ctx)
    assert StepOutput.model_validate(fetched.model_dump(mode="json")) == fetched
    digests = {entry["path"]: entry["sha256"] for entry in fetched.values["files"]}
    assert digests == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in source.iterdir()}
