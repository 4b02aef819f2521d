"""Bad input through the service: refused where it can first be known, by code and place and advice, nothing half done.

Steps are the product's own, executed in this process as a worker's engine would. What the names of files, headers and
recipes tell by themselves is tested where they are read; here is what becomes of it in the register and in a job.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file, save_file
from sqlalchemy import text

from core.errors import (
    BitmillError,
    InfeasibleTarget,
    InvalidCheckpoint,
    InvalidRecipe,
    MissingFile,
    OutOfDisk,
    PickleRefused,
)
from core.jobs.checkpoints import CheckpointService
from core.jobs.requests import PathSource, UploadFile, UploadSource
from core.jobs.uploads import UploadService
from core.jobs.views import FailureView, JobView
from core.pipeline.context import StepContext
from core.pipeline.steps import run_step
from core.recipe.recipe import load_recipe
from core.storage.local_store import LocalStore
from core.storage.preflight import preflight

if TYPE_CHECKING:
    from tests.service.conftest import Bench

OWNER = "ada"
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


class House:
    """The services of one owner, and a worker that executes steps in this process."""

    def __init__(self, bench: Bench, folder: Path) -> None:
        self.bench, self.folder = bench, folder
        self.checkpoints = CheckpointService(bench.engine, bench.settings, bench.store)
        self.uploads = UploadService(bench.engine, bench.settings, bench.store)

    def submit(self, source: Path, **changes: Any) -> JobView:
        """A job on that folder, whose recipe is data-free but for the changes."""
        checkpoint = self.checkpoints.register(OWNER, PathSource(path=str(source))).id
        return self.bench.submit(checkpoint, recipe=load_recipe(DATA_FREE | changes).canonical())

    def work_off(self, job: JobView) -> JobView:
        """Execute steps until there is none to do; steps that are tried again do not wait."""
        while ready := [step for step in self.bench.now(job).steps if step.status == "ready"]:
            with self.bench.engine.begin() as connection:
                connection.execute(text("UPDATE step SET not_before = NULL"))
            claim = self.bench.queue.claim(ready[0].id, "wrk_a")
            assert claim is not None
            scratch = self.folder / claim.attempt_id
            scratch.mkdir()
            settings = self.bench.settings
            context = StepContext(self.bench.store, scratch, allowed_roots=settings.allowed_roots, settings=settings)
            try:
                output = run_step(claim.request.kind, claim.request, context)
            except BitmillError as error:
                taken = self.bench.queue.fail(claim.attempt_id, error)
            else:
                taken = self.bench.queue.succeed(claim.attempt_id, output)
            assert taken
        return self.bench.now(job)

    def failure(self, job: JobView) -> FailureView:
        """How the job failed; nothing of it may be published."""
        done = self.work_off(job)
        assert done.status == "failed"
        assert self.bench.jobs.artefacts(OWNER, job.id) == ()
        assert done.failure is not None
        return done.failure

    def keys(self, prefix: str = "") -> list[str]:
        return [key for key, _ in self.bench.store.list(prefix)]

    def count(self, table: str) -> int:
        with self.bench.engine.connect() as connection:
            return int(connection.scalar(text(f"SELECT count(*) FROM {table}")) or 0)

    def upload(self, files: dict[str, bytes]) -> str:
        """Promise and send files; the upload's id."""
        promised = [
            UploadFile(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest())
            for path, data in files.items()
        ]
        upload = self.uploads.create(OWNER, promised)
        for part in upload.parts:
            self.uploads.put_part(OWNER, upload.id, part.file, part.number, [files[upload.files[part.file].path]])
        return upload.id


@pytest.fixture
def house(bench: Bench, tmp_path: Path) -> House:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return House(bench.with_settings(lease_s=600.0), folder)  # no reconciler, no heartbeat


def pickled(source: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")


def truncated(source: Path) -> None:
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-1])


def without_a_shard(source: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def without_weights(source: Path) -> None:
    (source / "model.safetensors").unlink()


def with_a_config_that_is_no_json(source: Path) -> None:
    (source / "config.json").write_text("model_type: llama")


SPOILED = [
    (pickled, PickleRefused, "pytorch_model.bin"),
    (truncated, InvalidCheckpoint, "model.safetensors"),
    (without_a_shard, MissingFile, "model.safetensors.index.json"),
    (without_weights, MissingFile, ""),
    (with_a_config_that_is_no_json, InvalidCheckpoint, "config.json"),
]


class TestWhenItIsRegistered:
    def test_a_folder_that_cannot_be_read_safely_is_no_checkpoint(self, house: House, tiny_checkpoint: Path) -> None:
        for spoil, kind, where in SPOILED:
            spoiled = tiny_checkpoint.with_name(spoil.__name__)
            shutil.copytree(tiny_checkpoint, spoiled)
            spoil(spoiled)
            with pytest.raises(BitmillError) as refused:
                house.submit(spoiled)
            assert (type(refused.value), refused.value.where) == (kind, where)
        assert house.count("checkpoint") == house.count("job") == 0
        assert house.keys() == []

    def test_an_upload_whose_config_is_no_json_stays_open_and_is_no_checkpoint(
        self, house: House, tiny_checkpoint: Path
    ) -> None:
        files = {path.name: path.read_bytes() for path in tiny_checkpoint.iterdir()} | {"config.json": b"[]"}
        upload = house.upload(files)
        with pytest.raises(InvalidCheckpoint) as refused:
            house.uploads.complete(OWNER, upload)
        assert refused.value.where == "config.json"
        assert house.uploads.get(OWNER, upload).state == "open"
        assert house.keys("checkpoints/") == []

    def test_a_part_for_which_there_is_too_little_disk_is_refused_and_can_come_again(
        self, house: House, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        house.uploads.settings = house.bench.settings.model_copy(update={"min_free_disk_bytes": 1 << 62})
        data = b"{}"
        files = [
            UploadFile(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest())
            for path in ("config.json", "model.safetensors")
        ]
        upload = house.uploads.create(OWNER, files)
        with pytest.raises(OutOfDisk) as refused:
            house.uploads.put_part(OWNER, upload.id, 0, 1, [data])
        assert refused.value.where == str(house.bench.settings.scratch / "uploads")
        assert house.keys() == []
        house.uploads.settings = house.bench.settings
        assert house.uploads.put_part(OWNER, upload.id, 0, 1, [data]).arrived


class TestWhenItIsSubmitted:
    """`preflight` is what a submission runs through when the files are in the store."""

    def uploaded(self, house: House, source: Path, *left_out: str) -> str:
        files = {path.name: path.read_bytes() for path in source.iterdir() if path.name not in left_out}
        done = house.uploads.complete(OWNER, house.upload(files))
        return house.checkpoints.register(OWNER, UploadSource(upload=done.id)).id

    @pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
    def test_a_forward_pass_without_config_or_tokenizer_is_missed_before_a_job_is_made(
        self, house: House, tiny_checkpoint: Path, missing: str
    ) -> None:
        found = house.checkpoints.get(OWNER, self.uploaded(house, tiny_checkpoint, missing))
        assert any(missing in entry["why"] for entry in found.inspection["unsupported"])
        index = house.checkpoints.index(found.files)
        with pytest.raises(MissingFile) as refused:
            preflight(index, load_recipe(MEASURED))
        assert refused.value.where == missing
        assert "needs no forward pass" in refused.value.hint
        preflight(index, load_recipe(DATA_FREE))

    def test_a_target_below_reach_is_told_the_smallest_that_is_reached(
        self, house: House, tiny_checkpoint: Path
    ) -> None:
        found = house.checkpoints.get(OWNER, self.uploaded(house, tiny_checkpoint))
        index = house.checkpoints.index(found.files)
        with pytest.raises(
            InfeasibleTarget, match=r"1\.5 cannot be reached: .* [2-4]\.\d+ bits per parameter"
        ) as refused:
            preflight(index, load_recipe(DATA_FREE | {"target": {"bits_per_param": 1.5}}))
        assert refused.value.where == "target.bits_per_param"

    def test_keys_that_a_recipe_does_not_have_are_told_the_nearest(self) -> None:
        spec = MEASURED | {"evaluaton": False, "calibration": TEXT | {"sequence": 3}}
        with pytest.raises(InvalidRecipe) as refused:
            load_recipe(spec)
        told = {problem["path"]: problem["message"] for problem in refused.value.errors}
        assert set(told) == {"evaluaton", "calibration.sequence"}
        assert "evaluation" in told["evaluaton"]
        assert "sequences" in told["calibration.sequence"]


class TestWhenAJobIsAtIt:
    """What a folder or a repository tells only when a step reads it: the job fails by name, and once."""

    def test_a_text_with_too_few_tokens(self, house: House, tiny_checkpoint: Path) -> None:
        (tiny_checkpoint / "short.txt").write_text("too short")
        short = TEXT | {"text": "file:short.txt"}
        job = house.submit(tiny_checkpoint, allocation="fisher", calibration=short)
        failure = house.failure(job)
        assert (failure.code, failure.step, failure.where) == ("empty_text", "calibrate", "file:short.txt")
        assert "9 tokens" in failure.detail
        assert not failure.retryable
        assert house.bench.step(job, "calibrate").attempts == 1

    def test_a_text_that_is_not_there(self, house: House, tiny_checkpoint: Path) -> None:
        missing = TEXT | {"text": "file:none.txt"}
        failure = house.failure(house.submit(tiny_checkpoint, allocation="fisher", calibration=missing))
        assert (failure.code, failure.step, failure.where) == ("missing_file", "calibrate", "none.txt")

    def test_a_missing_tokenizer(self, house: House, tiny_checkpoint: Path) -> None:
        (tiny_checkpoint / "tokenizer.json").unlink()
        failure = house.failure(house.submit(tiny_checkpoint, **MEASURED))
        assert (failure.code, failure.step, failure.where) == ("missing_file", "calibrate", "tokenizer.json")
        assert failure.hint

    def test_an_architecture_that_nobody_knows(self, house: House, tiny_checkpoint: Path) -> None:
        (tiny_checkpoint / "config.json").write_text('{"model_type": "nobody_knows_this"}')
        failure = house.failure(house.submit(tiny_checkpoint, **MEASURED))
        assert (failure.code, failure.step) == ("unsupported_architecture", "calibrate")
        assert "nobody_knows_this" in failure.detail

    def test_weights_that_are_quantised_already(self, house: House, tiny_checkpoint: Path) -> None:
        config = json.loads((tiny_checkpoint / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        (tiny_checkpoint / "config.json").write_text(json.dumps(config))
        failure = house.failure(house.submit(tiny_checkpoint))
        assert (failure.code, failure.step, failure.where) == ("invalid_checkpoint", "fetch", "config.json")
        assert "gptq" in failure.detail
        assert house.keys() == []

    def test_a_target_below_reach(self, house: House, tiny_checkpoint: Path) -> None:
        failure = house.failure(house.submit(tiny_checkpoint, target={"bits_per_param": 1.5}))
        assert (failure.code, failure.step) == ("infeasible_target", "allocate")
        assert not failure.retryable

    def test_weights_that_are_no_numbers(self, house: House, tiny_checkpoint: Path) -> None:
        tensors = load_file(tiny_checkpoint / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
        save_file(tensors, tiny_checkpoint / "model.safetensors", {"format": "pt"})
        failure = house.failure(house.submit(tiny_checkpoint))
        assert (failure.code, failure.step) == ("non_finite_weights", "quantise")
        assert failure.tensor == "model.layers.1.mlp.up_proj.weight"

    @pytest.mark.parametrize("spoil", [pickled, truncated])
    def test_a_folder_that_was_spoiled_after_it_was_registered(
        self, house: House, tiny_checkpoint: Path, spoil: Callable[[Path], None]
    ) -> None:
        job = house.submit(tiny_checkpoint)
        spoil(tiny_checkpoint)
        failure = house.failure(job)
        assert (failure.code, failure.step) == (
            "pickle_refused" if spoil is pickled else "invalid_checkpoint",
            "fetch",
        )
        assert house.keys() == []

    def test_a_folder_that_became_a_link_out_of_the_allowed_roots(
        self, house: House, tiny_checkpoint: Path, tmp_path: Path
    ) -> None:
        job = house.submit(tiny_checkpoint)
        tiny_checkpoint.rename(tmp_path / "outside")
        tiny_checkpoint.symlink_to(tmp_path / "outside")
        failure = house.failure(job)
        assert (failure.code, failure.step, failure.where) == ("path_not_allowed", "fetch", str(tiny_checkpoint))
        assert house.keys() == []

    def test_a_full_disk_is_tried_once_more_and_then_told(
        self, house: House, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job = house.submit(tiny_checkpoint)

        def full(self: LocalStore, key: str, path: Path, sha256: str | None = None) -> int:
            raise OutOfDisk("the disk of the object store is full", where=key)

        with monkeypatch.context() as patched:
            patched.setattr(LocalStore, "put_file", full)
            failure = house.failure(job)
        assert (failure.code, failure.kind, failure.step) == ("out_of_disk", "capacity", "fetch")
        assert house.bench.step(job, "fetch").attempts == 2
        assert house.keys() == []
        again = house.bench.jobs.retry(OWNER, job.id).job
        assert house.work_off(again).status == "succeeded"


def test_nothing_is_wrong_with_what_is_spoiled_above(house: House, tiny_checkpoint: Path) -> None:
    job = house.submit(tiny_checkpoint, **MEASURED)
    done = house.work_off(job)
    assert (done.status, done.failure) == ("succeeded", None)
    assert len(house.bench.jobs.artefacts(OWNER, job.id)) > 5
