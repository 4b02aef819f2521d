"""Uploads: parts in any order and as often as they like, verified bytes or nothing, and no litter whatever happens."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
from safetensors.numpy import save
from sqlalchemy import Engine, func, update

from core.config import Settings
from core.errors import (
    BitmillError,
    Conflict,
    DigestMismatch,
    InvalidCheckpoint,
    MissingFile,
    NotFound,
    PathNotAllowed,
    PickleRefused,
    QuotaExceeded,
    StoreUnavailable,
    UserError,
)
from core.jobs import uploads as uploads_module
from core.jobs.reconcile import Reconciler
from core.jobs.requests import UploadFile
from core.jobs.sessions import connect, writing
from core.jobs.tables import Upload
from core.jobs.uploads import UploadService
from core.jobs.views import UploadPartView, UploadView
from core.storage.inspection import inspection
from core.storage.local_store import LocalStore

OWNER = "ada"
PART = 4096
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "empty.txt": b"",
    "model.safetensors": save({"layer.weight": np.arange(64 * 64, dtype=np.float32).reshape(64, 64)}),
}


class Sender:
    """A client that sends `files` to the service; it knows nothing but what the service answers."""

    def __init__(self, uploads: UploadService, files: dict[str, bytes], owner: str = OWNER) -> None:
        self.uploads, self.files, self.owner = uploads, files, owner
        self.id = uploads.create(owner, promises(files)).id

    def view(self) -> UploadView:
        return self.uploads.get(self.owner, self.id)

    def missing(self) -> list[UploadPartView]:
        return [part for part in self.view().parts if not part.arrived]

    def bytes_of(self, part: UploadPartView) -> bytes:
        view = self.view()
        start = (part.number - 1) * view.part_size
        return self.files[view.files[part.file].path][start : start + part.size]

    def send(self, part: UploadPartView, chunks: Iterable[bytes] | None = None) -> UploadPartView:
        given = [self.bytes_of(part)] if chunks is None else chunks
        return self.uploads.put_part(self.owner, self.id, part.file, part.number, given)

    def send_all(self) -> None:
        for part in self.missing():
            self.send(part)

    def complete(self) -> UploadView:
        return self.uploads.complete(self.owner, self.id)


def promises(files: dict[str, bytes]) -> list[UploadFile]:
    return [
        UploadFile(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest()) for path, data in files.items()
    ]


def keys(store: LocalStore, prefix: str) -> list[str]:
    return [key for key, _ in store.list(prefix)]


@pytest.fixture
def uploads(engine: Engine, settings: Settings, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> UploadService:
    """Parts of 4 KiB, so that small files have several."""
    monkeypatch.setattr(uploads_module, "_PART_BYTES", PART)
    return UploadService(engine, settings, store)


@pytest.fixture
def hasty(tmp_path: Path) -> UploadService:
    """A service without a database: what it refuses is refused before anything is written down."""
    nowhere = connect("postgresql://nobody@/none?host=/nonexistent")
    return UploadService(nowhere, Settings(data_dir=tmp_path), LocalStore(tmp_path / "objects"))


@pytest.fixture
def sender(uploads: UploadService) -> Sender:
    return Sender(uploads, FILES)


def in_order(sender: Sender) -> None:
    sender.send_all()


def shuffled(sender: Sender) -> None:
    parts = sender.missing()
    random.Random(3).shuffle(parts)
    for part in parts:
        sender.send(part)


def every_part_twice(sender: Sender) -> None:
    for part in [*sender.missing(), *sender.missing()]:
        sender.send(part)


def in_parallel_and_twice(sender: Sender) -> None:
    parts = sender.missing()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(sender.send, parts + parts))


def byte_by_byte(sender: Sender) -> None:
    for part in sender.missing():
        sender.send(part, (bytes([byte]) for byte in sender.bytes_of(part)))


class TestParts:
    @pytest.mark.parametrize("way", [in_order, shuffled, every_part_twice, in_parallel_and_twice, byte_by_byte])
    def test_whatever_way_they_come_the_files_are_those_that_were_promised(
        self, sender: Sender, store: LocalStore, way: Callable[[Sender], None]
    ) -> None:
        way(sender)
        done = sender.complete()
        assert done.state == "complete"
        assert {path: store.read(f"checkpoints/{done.sha256}/{path}") for path in FILES} == FILES
        assert keys(store, "uploads/") == []

    def test_they_cover_each_file_once_and_an_empty_file_has_none(self, sender: Sender) -> None:
        view = sender.view()
        assert [file.path for file in view.files] == list(FILES)
        sizes = {number: [part.size for part in view.parts if part.file == number] for number in range(3)}
        assert (sizes[0], sizes[1]) == ([len(FILES["config.json"])], [])
        assert set(sizes[2][:-1]) == {PART}
        assert sum(sizes[2]) == len(FILES["model.safetensors"])

    def test_they_are_larger_where_an_upload_is_large(self, engine: Engine, settings: Settings) -> None:
        uploads = UploadService(engine, settings, LocalStore(settings.data_dir))
        sizes = {}
        for gibibytes in (1, 1000):
            file = UploadFile(path="model.safetensors", size=gibibytes << 30, sha256="0" * 64)
            view = uploads.create(OWNER, [file])
            sizes[gibibytes] = (view.part_size, len(view.parts))
        assert sizes == {1: (64 << 20, 16), 1000: (256 << 20, 4000)}

    def test_an_interrupted_upload_goes_on_with_what_is_missing(
        self, sender: Sender, engine: Engine, settings: Settings, store: LocalStore
    ) -> None:
        first, *rest = sender.missing()
        sender.send(first)
        sender.uploads = UploadService(engine, settings, store)  # the service was started anew
        assert sender.missing() == rest
        assert sender.view().parts[0].sha256 == hashlib.sha256(sender.bytes_of(first)).hexdigest()
        sender.send_all()
        assert sender.complete().state == "complete"

    def test_one_that_breaks_off_leaves_nothing(self, sender: Sender, store: LocalStore, settings: Settings) -> None:
        part = sender.missing()[1]

        def broken() -> Iterator[bytes]:
            yield sender.bytes_of(part)[:100]
            raise ConnectionResetError

        with pytest.raises(ConnectionResetError):
            sender.send(part, broken())
        assert part in sender.missing()
        assert keys(store, "") == []
        assert list((settings.scratch / "uploads").iterdir()) == []

    def test_one_of_another_length_is_refused_and_is_not_read_to_its_end(
        self, sender: Sender, store: LocalStore
    ) -> None:
        part = sender.missing()[1]
        data, read = sender.bytes_of(part), []

        def endless() -> Iterator[bytes]:
            while True:
                read.append(1)
                yield data

        for chunks in ([data[:-1]], [data, b"!"], endless()):
            with pytest.raises(DigestMismatch) as refused:
                sender.send(part, chunks)
            assert refused.value.where == "model.safetensors"
        assert len(read) == 2
        assert part in sender.missing()
        assert keys(store, "") == []

    def test_one_that_there_is_not_is_not_found(self, sender: Sender) -> None:
        for file, number in [(0, 2), (0, 0), (1, 1), (3, 1), (-1, 1)]:
            with pytest.raises(NotFound):
                sender.uploads.put_part(OWNER, sender.id, file, number, [b""])
            with pytest.raises(NotFound):
                sender.uploads.part_size_of(OWNER, sender.id, file, number)
        assert sender.uploads.part_size_of(OWNER, sender.id, 2, 1) == PART

    def test_a_header_is_checked_with_the_first_of_its_file(self, uploads: UploadService, store: LocalStore) -> None:
        good = FILES["model.safetensors"]
        beyond_the_file, beyond_the_limit = len(good).to_bytes(8, "little"), (1 << 60).to_bytes(8, "little")
        lies = [beyond_the_file + good[8:], beyond_the_limit + good[8:], good.replace(b"F32", b"F64"), b"short"]
        for data in lies:
            sender = Sender(uploads, {"model.safetensors": data})
            with pytest.raises(InvalidCheckpoint) as refused:
                sender.send(sender.missing()[0])
            assert refused.value.where == "model.safetensors"
            assert keys(store, "") == []

    def test_a_header_longer_than_the_first_is_checked_at_the_end(
        self, uploads: UploadService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(uploads_module, "_PART_BYTES", 16)
        data = save({"w": np.zeros((2, 2), np.float32)}).replace(b"F32", b"F64")
        sender = Sender(uploads, {"model.safetensors": data})
        sender.send_all()
        with pytest.raises(InvalidCheckpoint) as refused:
            sender.complete()
        assert refused.value.where == "model.safetensors"
        assert sender.view().state == "open"


class TestCompleting:
    def test_what_has_not_arrived_is_named(self, sender: Sender) -> None:
        for part in sender.missing()[2:]:
            sender.send(part)
        with pytest.raises(Conflict) as refused:
            sender.complete()
        assert refused.value.errors == (
            {"path": "config.json", "message": "part 1 has not arrived"},
            {"path": "model.safetensors", "message": "part 1 has not arrived"},
        )

    def test_wrong_bytes_are_named_and_sending_them_again_heals_it(self, sender: Sender, store: LocalStore) -> None:
        sender.send_all()
        part = sender.view().parts[-1]
        wrong = bytes(part.size)
        sender.send(part, [wrong])
        with pytest.raises(DigestMismatch) as refused:
            sender.complete()
        assert (refused.value.where, refused.value.hint) == ("model.safetensors", "send its parts again")
        assert sender.view().state == "open"
        assert [key for key in keys(store, "checkpoints/") if key.endswith("model.safetensors")] == []
        sender.send(part)
        assert hashlib.sha256(wrong).hexdigest()[:16] not in " ".join(keys(store, "uploads/"))
        assert sender.complete().state == "complete"

    def test_twice_is_like_once(self, sender: Sender) -> None:
        sender.send_all()
        assert sender.complete() == sender.complete()

    def test_at_the_same_time_it_is_like_once(self, sender: Sender, store: LocalStore) -> None:
        sender.send_all()
        together = Barrier(3)

        def complete(_: int) -> UploadView:
            together.wait()
            return sender.complete()

        with ThreadPoolExecutor(3) as pool:
            views = list(pool.map(complete, range(3)))
        assert {(view.state, view.sha256) for view in views} == {("complete", views[0].sha256)}
        assert keys(store, "uploads/") == []

    def test_a_call_that_finds_the_parts_removed_by_another_answers_the_same(
        self, sender: Sender, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As when a proxy's patience ends before the first call does, and the client asks again."""
        sender.send_all()

        def overtaken(*given: object) -> dict[str, object]:
            monkeypatch.setattr(uploads_module, "inspection", inspection)
            sender.complete()
            return {}

        monkeypatch.setattr(uploads_module, "inspection", overtaken)
        assert sender.complete().state == "complete"

    def test_it_goes_on_after_a_store_that_was_away(self, sender: Sender, monkeypatch: pytest.MonkeyPatch) -> None:
        sender.send_all()
        real, calls = LocalStore.put_file, []

        def flaky(self: LocalStore, key: str, path: object, sha256: str | None = None) -> int:
            calls.append(key)
            if len(calls) == 2:
                raise StoreUnavailable("restarting", where=key)
            return real(self, key, path, sha256)  # type: ignore[arg-type]

        monkeypatch.setattr(LocalStore, "put_file", flaky)
        with pytest.raises(StoreUnavailable):
            sender.complete()
        assert sender.view().state == "open"
        assert sender.complete().state == "complete"

    def test_the_same_files_twice_are_stored_once_and_are_two_uploads(
        self, uploads: UploadService, store: LocalStore
    ) -> None:
        done = []
        for _ in range(2):
            sender = Sender(uploads, FILES)
            sender.send_all()
            done.append(sender.complete())
        assert done[0].id != done[1].id
        assert done[0].sha256 == done[1].sha256
        assert len(keys(store, "checkpoints/")) == len(FILES)

    def test_knowing_the_digests_of_files_is_not_having_them(self, sender: Sender, uploads: UploadService) -> None:
        sender.send_all()
        sender.complete()
        thief = Sender(uploads, FILES, owner="eve")
        header = 8 + int.from_bytes(FILES["model.safetensors"][:8], "little")
        thief.files = {**FILES, "model.safetensors": FILES["model.safetensors"][:header].ljust(header + 4 * 64 * 64)}
        thief.send_all()
        with pytest.raises(DigestMismatch):
            thief.complete()
        assert thief.view().state == "open"


class TestPromises:
    @pytest.mark.parametrize(
        ("paths", "kind", "where"),
        [
            (["../model.safetensors"], PathNotAllowed, "'../model.safetensors'"),
            (["/etc/model.safetensors"], PathNotAllowed, "'/etc/model.safetensors'"),
            (["a/./model.safetensors"], PathNotAllowed, "'a/./model.safetensors'"),
            (["C:\\model.safetensors"], PathNotAllowed, "'C:\\\\model.safetensors'"),
            (["a\0.safetensors"], PathNotAllowed, "'a\\x00.safetensors'"),
            (["", "model.safetensors"], PathNotAllowed, "''"),
            (["x" * 300 + ".safetensors"], PathNotAllowed, repr("x" * 200)),
            (["model.safetensors", "a", "model.safetensors"], PathNotAllowed, "model.safetensors"),
            (["model.safetensors", "a/b", "a-c", "a"], PathNotAllowed, "a"),
            (["pytorch_model.bin", "config.json"], PickleRefused, "pytorch_model.bin"),
            (["model.gguf"], PickleRefused, "model.gguf"),
            (["config.json"], MissingFile, "files"),
            ([], UserError, "files"),
        ],
    )
    def test_what_their_names_tell_is_refused_before_a_byte_is_sent(
        self, hasty: UploadService, paths: list[str], kind: type[BitmillError], where: str
    ) -> None:
        with pytest.raises(kind) as refused:
            hasty.create(OWNER, [UploadFile(path=path, size=1, sha256="0" * 64) for path in paths])
        assert (type(refused.value), refused.value.where) == (kind, where)

    def test_too_many_files_are_refused(self, hasty: UploadService) -> None:
        many = [UploadFile(path=f"{number}.safetensors", size=0, sha256="0" * 64) for number in range(10_001)]
        with pytest.raises(UserError, match="10000"):
            hasty.create(OWNER, many)

    def test_the_quota_counts_what_is_promised_and_is_free_again_when_the_upload_has_ended(
        self, engine: Engine, settings: Settings, store: LocalStore
    ) -> None:
        total = sum(map(len, FILES.values()))
        narrow = settings.model_copy(update={"max_upload_bytes": 2 * total - 1})
        uploads = UploadService(engine, narrow, store)
        first = Sender(uploads, FILES)
        with pytest.raises(QuotaExceeded) as refused:
            Sender(uploads, FILES)
        assert "abort" in refused.value.hint
        Sender(uploads, FILES, owner="eve")  # the quota is each owner's own
        first.send_all()
        first.complete()
        second = Sender(uploads, FILES)
        uploads.abort(OWNER, second.id)
        Sender(uploads, FILES)


class TestEnding:
    def test_an_aborted_upload_leaves_nothing_and_takes_nothing(self, sender: Sender, store: LocalStore) -> None:
        sender.send_all()
        sender.uploads.abort(OWNER, sender.id)
        assert keys(store, "") == []
        for call in (lambda: sender.send(sender.view().parts[0]), sender.complete):
            with pytest.raises(Conflict, match="aborted"):
                call()
        sender.uploads.abort(OWNER, sender.id)  # once more changes nothing
        assert keys(store, "") == []

    def test_a_complete_upload_cannot_be_aborted(self, sender: Sender, store: LocalStore) -> None:
        sender.send_all()
        sender.complete()
        with pytest.raises(Conflict, match="complete"):
            sender.uploads.abort(OWNER, sender.id)
        assert len(keys(store, "checkpoints/")) == len(FILES)

    def test_a_part_on_its_way_while_the_upload_ends_leaves_nothing(self, sender: Sender, store: LocalStore) -> None:
        part = sender.missing()[0]

        def slow() -> Iterator[bytes]:
            sender.uploads.abort(OWNER, sender.id)
            yield sender.bytes_of(part)

        with pytest.raises(Conflict, match="aborted"):
            sender.send(part, slow())
        assert keys(store, "") == []

    def test_an_upload_that_nobody_completes_expires_with_its_parts(
        self, sender: Sender, engine: Engine, settings: Settings, store: LocalStore
    ) -> None:
        other = Sender(sender.uploads, FILES)
        for one in (sender, other):
            one.send_all()
        with writing(engine) as session:
            session.execute(update(Upload).where(Upload.id == sender.id).values(expires_at=func.clock_timestamp()))
        reconciler = Reconciler(engine, settings, None, store)
        assert reconciler.run_once()["uploads_expired"] == 1
        assert reconciler.run_once()["uploads_expired"] == 0
        assert sender.view().state == "expired"
        assert [key for key in keys(store, "uploads/") if sender.id in key] == []
        with pytest.raises(Conflict, match="expired"):
            sender.send(sender.view().parts[0])
        assert other.complete().state == "complete"


def test_another_owner_sees_no_upload(sender: Sender, store: LocalStore) -> None:
    uploads = sender.uploads
    sender.send_all()
    for call in (
        lambda: uploads.get("eve", sender.id),
        lambda: uploads.part_size_of("eve", sender.id, 0, 1),
        lambda: uploads.put_part("eve", sender.id, 0, 1, [FILES["config.json"]]),
        lambda: uploads.complete("eve", sender.id),
        lambda: uploads.abort("eve", sender.id),
    ):
        with pytest.raises(NotFound):
            call()
    assert sender.missing() == []
    assert sender.complete().state == "complete"
