"""The register of checkpoints: what a job can be applied to.

An upload that is complete is a checkpoint at once; so is a local folder under an allowed root, whose headers are
checked here and whose bytes are read by the first fetch step. Sources elsewhere (a hub, a bucket) stay `pending` until
a fetch step has brought their files. Rows are immutable but for what a fetch finds out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import Engine

from core.config import Settings
from core.errors import Conflict, PathNotAllowed
from core.ids import new_id
from core.jobs.pages import decode_cursor, encode_cursor
from core.jobs.repository import checkpoints as checkpoint_rows
from core.jobs.repository import jobs as job_rows
from core.jobs.repository import uploads as upload_rows
from core.jobs.requests import HubSource, PathSource, S3Source, Source, UploadSource
from core.jobs.sessions import reading, writing
from core.jobs.tables import Checkpoint, CheckpointFile
from core.jobs.uploads import files_of
from core.jobs.views import CheckpointFileView, CheckpointView, Page
from core.storage.checkpoint import CheckpointIndex, FileEntry
from core.storage.inspection import inspection
from core.storage.object_store import ObjectStore
from core.storage.sources import folder_sources, stored_source

MAX_PAGE = 200


class CheckpointService:
    """Checkpoints, for their owners."""

    def __init__(self, engine: Engine, settings: Settings, store: ObjectStore) -> None:
        self.engine, self.settings, self.store = engine, settings, store

    def register(self, owner: str, source: Source, name: str = "") -> CheckpointView:
        """A new checkpoint; refused when the source cannot be read safely, as far as it can be known now."""
        row = Checkpoint(
            id=new_id("checkpoint"), owner=owner, source=source.model_dump(), state="pending", inspection={}
        )
        match source:
            case UploadSource():
                files = self._from_upload(row, source)
            case PathSource():
                files = self._from_folder(row, source)
            case HubSource():
                files, row.name = [], f"{source.repo}@{source.revision}"
            case S3Source():
                files, row.name = [], source.url
        row.name = (name or row.name)[:200]
        with writing(self.engine) as session:
            session.add(row)
            session.flush()
            session.add_all(
                CheckpointFile(checkpoint_id=row.id, path=one.path, size=one.size, sha256=one.sha256, key=one.key)
                for one in files
            )
        return self.get(owner, row.id)

    def get(self, owner: str, checkpoint_id: str) -> CheckpointView:
        """The checkpoint with its inspection, which is made here for sources that a fetch step has brought."""
        with reading(self.engine) as session:
            row = checkpoint_rows.get(session, owner, checkpoint_id)
            files = checkpoint_rows.files(session, checkpoint_id)
        if row.state == "ready" and not row.inspection:
            row.inspection = inspection(self.index(files))
            with writing(self.engine) as session:
                checkpoint_rows.put_inspection(session, checkpoint_id, row.inspection)
        return _view(row, files)

    def list(self, owner: str, cursor: str | None = None, limit: int = 50) -> Page[CheckpointView]:
        """Checkpoints, newest first, without their files and the tables of their tensors."""
        limit = max(1, min(limit, MAX_PAGE))
        with reading(self.engine) as session:
            found = checkpoint_rows.page(session, owner, decode_cursor(cursor), limit + 1)
        items = tuple(_view(_summarised(row), []) for row in found[:limit])
        return Page[CheckpointView](
            items=items, next_cursor=encode_cursor(items[-1].id) if len(found) > limit else None
        )

    def delete(self, owner: str, checkpoint_id: str) -> None:
        """Forget the checkpoint; Conflict while jobs work on it."""
        with writing(self.engine) as session:
            row = checkpoint_rows.lock(session, owner, checkpoint_id)
            live = job_rows.live_of_checkpoint(session, checkpoint_id)
            if live:
                raise Conflict(f"{live} jobs work on this checkpoint", where=checkpoint_id, hint="cancel them first")
            row.state = "deleted"

    def readable(self, view: CheckpointView) -> CheckpointIndex | None:
        """The headers of a checkpoint where its files can be read from here: in the store, or in an allowed folder."""
        if view.state != "ready" or not view.files:
            return None
        if all(one.key for one in view.files):
            return self.index(view.files)
        if view.source.get("kind") != "path":
            return None
        root = allowed_folder(str(view.source["path"]), self.settings.allowed_roots)
        return CheckpointIndex.from_files(folder_sources(root, _link_roots(root)))

    def index(self, files: Sequence[CheckpointFile | CheckpointFileView]) -> CheckpointIndex:
        """The tensors of a checkpoint whose files lie in the store."""
        return CheckpointIndex.from_files(
            {one.path: stored_source(self.store, one.key, one.size, one.path) for one in files}
        )

    def _from_upload(self, row: Checkpoint, source: UploadSource) -> Sequence[FileEntry]:
        with reading(self.engine) as session:
            upload = upload_rows.get(session, row.owner, source.upload)
        if upload.state != "complete":
            raise Conflict(
                f"the upload is {upload.state}", where=upload.id, hint=f"POST /v1/uploads/{upload.id}/complete"
            )
        files = files_of(upload)
        row.state, row.sha256, row.name = "ready", upload.sha256, upload.id
        row.size_bytes, row.inspection = sum(one.size for one in files), upload.inspection
        return files

    def _from_folder(self, row: Checkpoint, source: PathSource) -> Sequence[FileEntry]:
        root = allowed_folder(source.path, self.settings.allowed_roots)
        sources = folder_sources(root, _link_roots(root))
        row.inspection = inspection(CheckpointIndex.from_files(sources))
        row.source = {"kind": "path", "path": str(root)}
        row.state, row.name = "ready", root.name
        files = [FileEntry(path, sources[path].size, "") for path in sources if path not in row.inspection["left_out"]]
        row.size_bytes = sum(one.size for one in files)
        return files


def allowed_folder(path: str, roots: tuple[Path, ...]) -> Path:
    """The folder with all links resolved; PathNotAllowed unless it is absolute and lies under one of `roots`."""
    if "\0" in path or not Path(path).is_absolute():
        raise PathNotAllowed("not an absolute path", where=path.replace("\0", "\\0")[:200])
    resolved = Path(path).resolve()
    if not any(resolved.is_relative_to(root.resolve()) for root in roots):
        hint = "BITMILL_ALLOWED_ROOTS lists the folders that sources may lie under"
        raise PathNotAllowed("outside the allowed roots", where=path[:200], hint=hint)
    return resolved


def _link_roots(root: Path) -> tuple[Path, ...]:
    """Where links of a folder may lead: nowhere, but a hub cache's snapshot links to the blobs beside it."""
    return (root.parent.parent / "blobs",) if root.parent.name == "snapshots" else ()


def _summarised(row: Checkpoint) -> Checkpoint:
    row.inspection = {key: value for key, value in row.inspection.items() if key != "tensors"}
    return row


def _view(row: Checkpoint, files: Sequence[CheckpointFile]) -> CheckpointView:
    return CheckpointView(
        id=row.id,
        name=row.name,
        state=row.state,
        source=row.source,
        sha256=row.sha256,
        size_bytes=row.size_bytes,
        created_at=row.created_at,
        files=tuple(CheckpointFileView(path=one.path, size=one.size, sha256=one.sha256, key=one.key) for one in files),
        inspection=row.inspection,
    )
