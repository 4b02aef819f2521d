"""Checkpoints that arrive in parts: promised, sent in any order, verified, and only then put together.

An upload begins with the list of its files (path, size, sha256). Parts may come twice, in parallel and after an
interruption; each is an object of its own. `complete` checks the headers, hashes every file against its promise and
stores it under `checkpoints/{sha}/{path}`; until then nothing can be used. Completing twice is harmless.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import Engine, func

from core.config import Settings
from core.errors import (
    BitmillError,
    Conflict,
    DigestMismatch,
    MissingFile,
    NotFound,
    OutOfDisk,
    PathNotAllowed,
    PickleRefused,
    QuotaExceeded,
    UserError,
)
from core.ids import new_id
from core.jobs.parts import PartsSource, part_count, part_length
from core.jobs.repository import quotas
from core.jobs.repository import uploads as upload_rows
from core.jobs.requests import UploadFile
from core.jobs.sessions import reading, writing
from core.jobs.tables import Upload, UploadPart
from core.jobs.views import UploadFileView, UploadPartView, UploadView
from core.storage.checkpoint import CheckpointIndex, FileEntry, checkpoint_sha, is_weight_file, validate_path
from core.storage.inspection import inspection
from core.storage.keys import checkpoint_key, upload_part_key
from core.storage.object_store import ObjectStore
from core.storage.safetensors_header import MAX_HEADER_BYTES, parse_header
from core.storage.sources import ByteSource, LocalFile

log = structlog.get_logger()

_PART_BYTES, _LARGE_PART_BYTES = 64 << 20, 256 << 20
_LARGE_UPLOAD_BYTES = 64 << 30
_MAX_FILES = 10_000
_LIFETIME = timedelta(days=7)


class UploadService:
    """Uploads, for their owners."""

    def __init__(self, engine: Engine, settings: Settings, store: ObjectStore) -> None:
        self.engine, self.settings, self.store = engine, settings, store

    def create(self, owner: str, files: Sequence[UploadFile]) -> UploadView:
        """Promise files; refused at once for what can be told from their names and sizes."""
        _check_names([file.path for file in files])
        total = sum(file.size for file in files)
        upload = Upload(
            id=new_id("upload"),
            owner=owner,
            state="open",
            files=[file.model_dump() for file in files],
            part_size=_LARGE_PART_BYTES if total > _LARGE_UPLOAD_BYTES else _PART_BYTES,
            expires_at=func.clock_timestamp() + _LIFETIME,
        )
        with writing(self.engine) as session:
            quotas.hold(session, owner)
            if total + upload_rows.promised_bytes(session, owner) > self.settings.max_upload_bytes:
                raise QuotaExceeded(
                    f"more than {self.settings.max_upload_bytes} bytes of open uploads",
                    where="files",
                    hint="complete or abort other uploads first",
                )
            session.add(upload)
        return self.get(owner, upload.id)

    def get(self, owner: str, upload_id: str) -> UploadView:
        """The upload with every part that it consists of, arrived or not: what a resuming client needs."""
        with reading(self.engine) as session:
            upload = upload_rows.get(session, owner, upload_id)
            return _view(upload, upload_rows.parts(session, upload_id))

    def part_size_of(self, owner: str, upload_id: str, file_no: int, number: int) -> int:
        """The exact length in bytes of one part; NotFound for a part that there is not."""
        with reading(self.engine) as session:
            return _length_of(upload_rows.get(session, owner, upload_id), file_no, number)

    def put_part(
        self, owner: str, upload_id: str, file_no: int, number: int, chunks: Iterable[bytes]
    ) -> UploadPartView:
        """Store one part. DigestMismatch unless its length is right; a header that has arrived whole is checked."""
        with reading(self.engine) as session:
            upload = upload_rows.get(session, owner, upload_id)
        _require_open(upload)
        length = _length_of(upload, file_no, number)
        path, size = upload.files[file_no]["path"], int(upload.files[file_no]["size"])
        with self._temporary(length) as temporary:
            sha256 = _write(temporary, chunks, length, path)
            if number == 1 and path.endswith(".safetensors"):
                _check_early(LocalFile(temporary, path), size, path)
            key = f"{upload_part_key(upload_id, file_no, number)}-{sha256[:16]}"
            self.store.put_file(key, temporary, sha256)
        try:
            with writing(self.engine) as session:
                _require_open(upload_rows.hold(session, owner, upload_id))
                replaced = upload_rows.put_part(session, upload_id, file_no, number, length, sha256, key)
        except Conflict:
            discard_parts(self.store, upload_id)  # it ended while this part was on its way
            raise
        if replaced:
            self.store.delete(replaced)
        return UploadPartView(file=file_no, number=number, size=length, arrived=True, sha256=sha256)

    def complete(self, owner: str, upload_id: str) -> UploadView:
        """Verify everything and make it a checkpoint's files. Conflict names parts that have not arrived.

        DigestMismatch and InvalidCheckpoint leave the upload open, so that a wrong part can be sent again.
        """
        with reading(self.engine) as session:
            upload = upload_rows.get(session, owner, upload_id)
            parts = upload_rows.parts(session, upload_id)
        if upload.state == "complete":
            return self.get(owner, upload_id)
        _require_open(upload)
        _require_all(upload, parts)
        try:
            self._put_together(upload, self._sources(upload, parts))
        except NotFound:  # another call has completed it and removed the parts
            if self.get(owner, upload_id).state != "complete":
                raise
        return self.get(owner, upload_id)

    def abort(self, owner: str, upload_id: str) -> None:
        """Forget the upload and its parts; Conflict when it is complete."""
        with writing(self.engine) as session:
            upload = upload_rows.get(session, owner, upload_id)
            if upload.state == "complete":
                raise Conflict("the upload is complete", where=upload_id)
            upload_rows.finish(session, upload_id, "aborted")
        discard_parts(self.store, upload_id)

    def _sources(self, upload: Upload, parts: Mapping[tuple[int, int], UploadPart]) -> dict[str, PartsSource]:
        found = {}
        for file_no, file in enumerate(upload.files):
            count = part_count(int(file["size"]), upload.part_size)
            keys = [(parts[file_no, number].key, parts[file_no, number].size) for number in range(1, count + 1)]
            found[str(file["path"])] = PartsSource(self.store, keys, file["path"])
        return found

    def _put_together(self, upload: Upload, sources: Mapping[str, PartsSource]) -> None:
        inspected = inspection(CheckpointIndex.from_files(sources))
        sha256 = checkpoint_sha(files_of(upload))
        for entry in files_of(upload):
            self._assemble(sources[entry.path], entry, checkpoint_key(sha256, entry.path))
        with writing(self.engine) as session:
            ended = upload_rows.finish(session, upload.id, "complete", sha256=sha256, inspection=inspected)
        if ended:
            discard_parts(self.store, upload.id)

    def _assemble(self, source: PartsSource, entry: FileEntry, key: str) -> None:
        """The file's parts in one object. They are hashed even where it exists: to know a digest is not to have it."""
        with self._temporary(entry.size) as temporary:
            found = _write(temporary, source.stream(), entry.size, entry.path)
            if found != entry.sha256:
                raise DigestMismatch(
                    f"sha256 is {found}, promised was {entry.sha256}", where=entry.path, hint="send its parts again"
                )
            self.store.put_file(key, temporary, entry.sha256)

    @contextlib.contextmanager
    def _temporary(self, needed: int) -> Iterator[Path]:
        folder = self.settings.scratch / "uploads"
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < needed + self.settings.min_free_disk_bytes:
            raise OutOfDisk("too little disk for this part", where=str(folder))
        with tempfile.TemporaryFile(dir=folder) as file:  # without a name: gone with this process
            yield Path(f"/proc/self/fd/{file.fileno()}")


def files_of(upload: Upload) -> list[FileEntry]:
    """The promised files; their keys are set once the upload is complete."""
    key = checkpoint_key(upload.sha256, "") if upload.sha256 else ""
    return [
        FileEntry(file["path"], int(file["size"]), file["sha256"], key and key + file["path"]) for file in upload.files
    ]


def promised_sha(upload: Upload) -> str:
    """The digest of the checkpoint that the upload becomes when it is complete."""
    return checkpoint_sha(FileEntry(file["path"], int(file["size"]), file["sha256"]) for file in upload.files)


def discard_parts(store: ObjectStore, upload_id: str) -> None:
    """Remove the objects of an upload's parts; what cannot be removed stays, and the log says so."""
    try:
        for key, _ in list(store.list(f"uploads/{upload_id}/")):
            store.delete(key)
    except BitmillError as error:
        log.warning("parts_not_removed", upload_id=upload_id, error=str(error))


def _check_names(paths: Sequence[str]) -> None:
    if not 0 < len(paths) <= _MAX_FILES:
        raise UserError(f"an upload has between 1 and {_MAX_FILES} files", where="files")
    for path in paths:
        validate_path(path)
    for one, other in pairwise(sorted(path + "/" for path in paths)):
        if other.startswith(one):
            raise PathNotAllowed("the path is promised twice, or is also a folder", where=one.rstrip("/"))
    if any(path.endswith(".safetensors") for path in paths):
        return
    weights = [path for path in paths if is_weight_file(path) and not path.endswith(".json")]
    if weights:
        raise PickleRefused("only safetensors weights are read", where=weights[0], hint="convert them to safetensors")
    raise MissingFile("no *.safetensors among the files", where="files")


def _length_of(upload: Upload, file_no: int, number: int) -> int:
    if 0 <= file_no < len(upload.files):
        length = part_length(int(upload.files[file_no]["size"]), upload.part_size, number)
        if length is not None:
            return length
    raise NotFound("the upload has no such part", where=f"{upload.id}/{file_no}/{number}")


def _require_open(upload: Upload) -> None:
    if upload.state != "open":
        raise Conflict(f"the upload is {upload.state}", where=upload.id)


def _require_all(upload: Upload, parts: Mapping[tuple[int, int], UploadPart]) -> None:
    missing = [
        (str(file["path"]), number)
        for file_no, file in enumerate(upload.files)
        for number in range(1, part_count(int(file["size"]), upload.part_size) + 1)
        if (file_no, number) not in parts
    ]
    if missing:
        listed = tuple({"path": path, "message": f"part {number} has not arrived"} for path, number in missing[:20])
        raise Conflict(f"{len(missing)} parts have not arrived", where=upload.id, errors=listed)


def _write(target: Path, chunks: Iterable[bytes], length: int, where: str) -> str:
    """Write exactly `length` bytes and return their sha256; DigestMismatch for more or fewer."""
    digest, done = hashlib.sha256(), 0
    with target.open("wb") as file:
        for chunk in chunks:
            done += len(chunk)
            if done > length:
                raise DigestMismatch(f"more than the {length} bytes that belong here", where=where)
            digest.update(chunk)
            file.write(chunk)
    if done != length:
        raise DigestMismatch(f"{done} of {length} bytes", where=where)
    return digest.hexdigest()


def _check_early(first: ByteSource, size: int, path: str) -> None:
    """Check a safetensors header as far as the file's first part has it; `complete` checks longer ones whole."""
    end = 8 + int.from_bytes(first.read(0, 8), "little") if first.size >= 8 else 0
    if end <= first.size or end > min(size, 8 + MAX_HEADER_BYTES):
        parse_header(first.read, size, path)


def _view(upload: Upload, arrived: Mapping[tuple[int, int], UploadPart]) -> UploadView:
    files = tuple(_file(number, file) for number, file in enumerate(upload.files))
    parts = tuple(
        _part(
            file.file, number, part_length(file.size, upload.part_size, number) or 0, arrived.get((file.file, number))
        )
        for file in files
        for number in range(1, part_count(file.size, upload.part_size) + 1)
    )
    return UploadView(
        id=upload.id,
        state=upload.state,
        part_size=upload.part_size,
        files=files,
        parts=parts,
        created_at=upload.created_at,
        expires_at=upload.expires_at,
        sha256=upload.sha256,
    )


def _file(number: int, file: dict[str, Any]) -> UploadFileView:
    return UploadFileView(file=number, path=file["path"], size=file["size"], sha256=file["sha256"])


def _part(file_no: int, number: int, size: int, arrived: UploadPart | None) -> UploadPartView:
    sha256 = arrived.sha256 if arrived else None
    return UploadPartView(file=file_no, number=number, size=size, arrived=arrived is not None, sha256=sha256)
