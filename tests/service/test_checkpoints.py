"""The register of checkpoints: what may become one, what is known of it when, and who may forget it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import save
from sqlalchemy import Engine

from core.config import Settings
from core.errors import (
    BitmillError,
    Conflict,
    InvalidCheckpoint,
    MissingFile,
    NotFound,
    PathNotAllowed,
    UserError,
)
from core.jobs.checkpoints import MAX_PAGE, CheckpointService
from core.jobs.requests import HubSource, PathSource, S3Source, UploadFile, UploadSource
from core.jobs.sessions import connect
from core.jobs.uploads import UploadService
from core.storage.local_store import LocalStore

if TYPE_CHECKING:
    from tests.service.conftest import Bench

OWNER = "ada"
HUB = HubSource(repo="org/name", revision="v1")
FILES = {
    "config.json": json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}).encode(),
    "model.safetensors": save(
        {f"layers.0.{name}_proj.weight": np.ones((8, 16), np.float32) for name in ("q", "k", "v")}
    ),
    "tokenizer.json": b"{}",
}
SIZE = sum(map(len, FILES.values()))


@pytest.fixture
def uploads(engine: Engine, settings: Settings, store: LocalStore) -> UploadService:
    return UploadService(engine, settings, store)


@pytest.fixture
def checkpoints(engine: Engine, settings: Settings, store: LocalStore) -> CheckpointService:
    return CheckpointService(engine, settings, store)


@pytest.fixture
def hasty(tmp_path: Path) -> CheckpointService:
    """A service without a database: what it refuses is refused before anything is written down."""
    nowhere = connect("postgresql://nobody@/none?host=/nonexistent")
    return CheckpointService(nowhere, Settings(allowed_roots=(tmp_path / "sources",)), LocalStore(tmp_path / "objects"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint under the allowed root."""
    return write(tmp_path / "sources" / "model")


def write(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for path, data in FILES.items():
        (folder / path).write_bytes(data)
    return folder


def open_upload(uploads: UploadService, owner: str = OWNER) -> str:
    """An upload whose parts have all arrived; its id."""
    promised = [
        UploadFile(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest()) for path, data in FILES.items()
    ]
    upload = uploads.create(owner, promised)
    for part in upload.parts:
        uploads.put_part(owner, upload.id, part.file, part.number, [FILES[upload.files[part.file].path]])
    return upload.id


class TestFromAnUpload:
    def test_it_is_ready_at_once_with_its_files_and_its_inspection(
        self, checkpoints: CheckpointService, uploads: UploadService, store: LocalStore
    ) -> None:
        upload = uploads.complete(OWNER, open_upload(uploads))
        found = checkpoints.register(OWNER, UploadSource(upload=upload.id), "mine")
        assert (found.state, found.name, found.size_bytes, found.sha256) == ("ready", "mine", SIZE, upload.sha256)
        assert found.source == {"kind": "upload", "upload": upload.id}
        assert {file.path: store.read(file.key) for file in found.files} == FILES
        assert {file.path: file.sha256 for file in found.files} == {file.path: file.sha256 for file in upload.files}
        inspected = found.inspection
        assert (inspected["parameters"], inspected["architecture"]) == (3 * 8 * 16, "LlamaForCausalLM")
        assert inspected["fused_groups"] == [[f"layers.0.{name}_proj.weight" for name in ("k", "q", "v")]]
        assert (inspected["has_config"], inspected["has_tokenizer"], inspected["unsupported"]) == (True, True, [])

    def test_without_a_name_it_is_called_by_its_upload(
        self, checkpoints: CheckpointService, uploads: UploadService
    ) -> None:
        upload = uploads.complete(OWNER, open_upload(uploads)).id
        assert checkpoints.register(OWNER, UploadSource(upload=upload)).name == upload

    def test_an_upload_that_is_not_complete_is_none_yet(
        self, checkpoints: CheckpointService, uploads: UploadService
    ) -> None:
        upload = open_upload(uploads)
        with pytest.raises(Conflict, match="open") as refused:
            checkpoints.register(OWNER, UploadSource(upload=upload))
        assert (refused.value.where, refused.value.hint) == (upload, f"POST /v1/uploads/{upload}/complete")
        uploads.abort(OWNER, upload)
        with pytest.raises(Conflict, match="aborted"):
            checkpoints.register(OWNER, UploadSource(upload=upload))
        assert checkpoints.list(OWNER).items == ()

    def test_an_upload_of_another_owner_is_not_found(
        self, checkpoints: CheckpointService, uploads: UploadService
    ) -> None:
        upload = uploads.complete("eve", open_upload(uploads, "eve")).id
        for unknown in (upload, "upl_" + "0" * 32):
            with pytest.raises(NotFound):
                checkpoints.register(OWNER, UploadSource(upload=unknown))


class TestFromAFolder:
    def test_headers_are_read_now_and_digests_by_the_first_job(
        self, checkpoints: CheckpointService, folder: Path
    ) -> None:
        (folder / "pytorch_model.bin").write_bytes(b"not of this model")
        found = checkpoints.register(OWNER, PathSource(path=str(folder)))
        assert (found.state, found.name, found.size_bytes, found.sha256) == ("ready", "model", SIZE, None)
        assert {file.path: (file.size, file.sha256, file.key) for file in found.files} == {
            path: (len(data), "", "") for path, data in FILES.items()
        }
        assert found.inspection["left_out"] == ["pytorch_model.bin"]

    def test_a_link_to_the_folder_is_followed_and_kept_as_what_it_leads_to(
        self, checkpoints: CheckpointService, folder: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "link").symlink_to(folder)
        found = checkpoints.register(OWNER, PathSource(path=str(tmp_path / "link")))
        assert found.source == {"kind": "path", "path": str(folder.resolve())}

    @pytest.mark.parametrize(
        ("path", "reason"),
        [
            ("model", "not an absolute path"),
            ("~/model", "not an absolute path"),
            ("", "not an absolute path"),
            ("{root}/model\0", "not an absolute path"),
            ("/", "outside the allowed roots"),
            ("/proc/self/root{root}/../outside", "outside the allowed roots"),
            ("{root}/../outside", "outside the allowed roots"),
            ("{root}-more", "outside the allowed roots"),
            ("{root}/away", "outside the allowed roots"),
        ],
    )
    def test_a_path_that_is_not_under_an_allowed_root_is_refused(
        self, hasty: CheckpointService, folder: Path, path: str, reason: str
    ) -> None:
        root = folder.parent
        outside = write(root.parent / "outside")
        write(root.parent / f"{root.name}-more")
        (root / "away").symlink_to(outside)
        asked = path.format(root=root)
        with pytest.raises(PathNotAllowed, match=reason) as refused:
            hasty.register(OWNER, PathSource(path=asked))
        assert refused.value.where == asked.replace("\0", "\\0")

    def test_without_allowed_roots_there_are_no_folders(self, hasty: CheckpointService, folder: Path) -> None:
        hasty.settings = Settings()
        with pytest.raises(PathNotAllowed) as refused:
            hasty.register(OWNER, PathSource(path=str(folder)))
        assert "BITMILL_ALLOWED_ROOTS" in refused.value.hint

    def test_a_file_that_is_a_link_out_of_it_is_refused(
        self, hasty: CheckpointService, folder: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "secret").write_text("secret")
        (folder / "notes.txt").symlink_to(tmp_path / "secret")
        with pytest.raises(PathNotAllowed) as refused:
            hasty.register(OWNER, PathSource(path=str(folder)))
        assert refused.value.where == "notes.txt"

    def test_what_is_no_folder_of_a_checkpoint_is_refused(self, hasty: CheckpointService, folder: Path) -> None:
        empty = folder.parent / "empty"
        empty.mkdir()
        for path in (folder / "config.json", folder / "nowhere", empty):
            with pytest.raises(MissingFile):
                hasty.register(OWNER, PathSource(path=str(path)))
        (folder / "model.safetensors").write_bytes(FILES["model.safetensors"][:-1])
        with pytest.raises(InvalidCheckpoint) as refused:
            hasty.register(OWNER, PathSource(path=str(folder)))
        assert refused.value.where == "model.safetensors"


class TestFromElsewhere:
    @pytest.mark.parametrize(
        ("source", "name"), [(HUB, "org/name@v1"), (S3Source(url="s3://bucket/a/b"), "s3://bucket/a/b")]
    )
    def test_it_waits_for_the_first_job(
        self, checkpoints: CheckpointService, source: HubSource | S3Source, name: str
    ) -> None:
        found = checkpoints.register(OWNER, source)
        assert (found.state, found.name, found.source) == ("pending", name, source.model_dump())
        assert (found.files, found.size_bytes, found.sha256, found.inspection) == ((), None, None, {})

    def test_the_first_job_brings_its_files_and_they_are_inspected_when_somebody_looks(
        self, checkpoints: CheckpointService, bench: Bench
    ) -> None:
        pending = checkpoints.register(OWNER, HUB)
        job = bench.submit(pending.id)
        claim = bench.claim(job, "fetch")
        entries = []
        for path, data in FILES.items():
            key = f"checkpoints/{'c' * 64}/{path}"
            bench.store.put_bytes(key, data)
            entries.append({"path": path, "size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "key": key})
        assert bench.queue.succeed(claim.attempt_id, {"values": {"checkpoint_sha": "c" * 64, "files": entries}})
        found = checkpoints.get(OWNER, pending.id)
        assert (found.state, found.sha256, found.size_bytes) == ("ready", "c" * 64, SIZE)
        assert [file.path for file in found.files] == sorted(FILES)
        assert found.inspection["parameters"] == 3 * 8 * 16
        assert checkpoints.list(OWNER).items[0].inspection["parameters"] == 3 * 8 * 16

    @pytest.mark.parametrize(
        "source",
        [
            {"repo": "name"},
            {"repo": "org/name/more"},
            {"repo": "org/name", "revision": ""},
            {"repo": "org/name", "revision": "a b"},
            {"repo": "org/name", "token": "secret"},
            {"url": "https://bucket/prefix"},
            {"url": "s3://UPPER/prefix"},
            {"url": "s3://bucket/with space"},
        ],
    )
    def test_what_is_spelled_wrongly_is_no_source(self, source: dict[str, str]) -> None:
        with pytest.raises(ValidationError):
            (S3Source if "url" in source else HubSource)(**source)


class TestListing:
    def test_pages_are_newest_first_without_files_and_tensors(
        self, checkpoints: CheckpointService, folder: Path
    ) -> None:
        made = [checkpoints.register(OWNER, PathSource(path=str(folder)), f"{number}").id for number in range(5)]
        first = checkpoints.list(OWNER, limit=3)
        rest = checkpoints.list(OWNER, first.next_cursor, limit=3)
        assert [item.id for item in (*first.items, *rest.items)] == made[::-1]
        assert rest.next_cursor is None
        assert {item.files for item in first.items} == {()}
        assert "tensors" not in first.items[0].inspection
        assert first.items[0].inspection["parameters"] == 3 * 8 * 16

    def test_limits_are_brought_into_range_and_cursors_are_ours(self, checkpoints: CheckpointService) -> None:
        checkpoints.register(OWNER, HUB)
        for limit in (-1, 0, 1, MAX_PAGE, 10**9):
            assert len(checkpoints.list(OWNER, limit=limit).items) == 1
        with pytest.raises(UserError) as refused:
            checkpoints.list(OWNER, cursor="not one of ours")
        assert refused.value.where == "cursor"


class TestDeleting:
    def test_it_is_refused_while_jobs_work_on_it(self, checkpoints: CheckpointService, bench: Bench) -> None:
        found = checkpoints.register(OWNER, HUB).id
        job = bench.submit(found)
        with pytest.raises(Conflict, match="1 jobs") as refused:
            checkpoints.delete(OWNER, found)
        assert (refused.value.where, refused.value.hint) == (found, "cancel them first")
        bench.jobs.cancel(OWNER, job.id)
        checkpoints.delete(OWNER, found)
        assert bench.now(job).checkpoint == found  # what was done with it is not forgotten

    def test_what_is_deleted_is_found_nowhere_and_used_by_no_job(
        self, checkpoints: CheckpointService, bench: Bench
    ) -> None:
        found, other = checkpoints.register(OWNER, HUB).id, checkpoints.register(OWNER, HUB).id
        cancelled = bench.submit(found)
        bench.jobs.cancel(OWNER, cancelled.id)
        checkpoints.delete(OWNER, found)
        for call in (
            lambda: checkpoints.get(OWNER, found),
            lambda: checkpoints.delete(OWNER, found),
            lambda: bench.submit(found),
            lambda: bench.jobs.retry(OWNER, cancelled.id),
        ):
            with pytest.raises(NotFound):
                call()
        assert [item.id for item in checkpoints.list(OWNER).items] == [other]
        assert bench.jobs.usage(OWNER).checkpoints == 1

    def test_one_that_was_deleted_while_a_job_fetched_it_stays_deleted(
        self, checkpoints: CheckpointService, bench: Bench
    ) -> None:
        found = checkpoints.register(OWNER, HUB).id
        job = bench.submit(found)
        claim = bench.claim(job, "fetch")
        bench.jobs.cancel(OWNER, job.id)
        assert bench.queue.succeed(claim.attempt_id, bench.output(claim))
        checkpoints.delete(OWNER, found)
        with pytest.raises(NotFound):
            checkpoints.get(OWNER, found)

    def test_an_upload_that_was_used_can_be_registered_again(
        self, checkpoints: CheckpointService, uploads: UploadService
    ) -> None:
        upload = UploadSource(upload=uploads.complete(OWNER, open_upload(uploads)).id)
        first = checkpoints.register(OWNER, upload)
        checkpoints.delete(OWNER, first.id)
        again = checkpoints.register(OWNER, upload)
        assert again.id != first.id
        assert (again.state, again.sha256, again.files) == ("ready", first.sha256, first.files)


def test_another_owner_sees_no_checkpoint(checkpoints: CheckpointService, bench: Bench) -> None:
    found = checkpoints.register(OWNER, HUB).id
    for call in (
        lambda: checkpoints.get("eve", found),
        lambda: checkpoints.delete("eve", found),
        lambda: bench.submit(found, owner="eve"),
    ):
        with pytest.raises(BitmillError) as refused:
            call()
        assert (type(refused.value), refused.value.where) == (NotFound, found)
    assert checkpoints.list("eve").items == ()
    assert checkpoints.get(OWNER, found).id == found
