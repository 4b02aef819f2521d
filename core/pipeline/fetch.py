"""Step fetch: a checkpoint's files, checked and hashed, under immutable keys.

Params: {"files": [{path, size, sha256, key}]} of a finished upload, or {"source": {"kind": "path" | "hf" | "s3", ...}}.
Values: {checkpoint_sha, files: [{path, size, sha256, key}]}, and {root} when the files stay where they are (the local
pipeline, {"source": {"kind": "path", "in_place": true}}). Weights in other formats than safetensors are left behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core.config import Settings
from core.errors import BitmillError, MissingFile, NotFound, PathNotAllowed, StoreUnavailable, UserError
from core.jobs.steps import StepOutput, StepRequest
from core.pipeline.context import StepContext, file_digest, require_disk
from core.storage.checkpoint import INDEX_FILE, CheckpointIndex, FileEntry, checkpoint_sha, is_weight_file
from core.storage.keys import checkpoint_key
from core.storage.preflight import require_unquantised
from core.storage.sources import ByteSource, LocalFile, StoredObject, folder_sources, stored_source


def fetch(request: StepRequest, ctx: StepContext) -> StepOutput:
    """Bring the files under `checkpoints/{sha}/`; raises what `CheckpointIndex` has for untrustworthy ones."""
    if "files" in request.params:
        return _uploaded([FileEntry(**entry) for entry in request.params["files"]], ctx)
    source = dict(request.params["source"])
    match source.pop("kind"):
        case "path":
            return _from_folder(ctx, **source)
        case "hf":
            return _from_hub(ctx, **source)
        case "s3":
            return _from_bucket(ctx, **source)
        case other:
            raise UserError(f"a source of kind {other!r} is not known", hint="path, hf or s3")


def open_checkpoint(ctx: StepContext, fetched: StepOutput) -> CheckpointIndex:
    """The index of a fetched checkpoint, whose files are read where they lie."""
    root = fetched.values.get("root")
    sources: dict[str, ByteSource] = {}
    for entry in files_of(fetched):
        in_place = Path(root) / entry.path if root else None
        sources[entry.path] = (
            LocalFile(in_place, entry.path) if in_place else stored_source(ctx.store, entry.key, entry.size, entry.path)
        )
    return CheckpointIndex.from_files(sources)


def files_of(fetched: StepOutput) -> list[FileEntry]:
    """The files of a fetched checkpoint, sorted by path."""
    return [FileEntry(**entry) for entry in fetched.values["files"]]


def link_roots_of(root: Path) -> tuple[Path, ...]:
    """Where links of a folder may lead: nowhere, but a hub cache's snapshot links to the blobs beside it."""
    return (root.parent.parent / "blobs",) if root.parent.name == "snapshots" else ()


def _answer(files: Iterable[FileEntry], **more: str) -> StepOutput:
    entries = sorted(files, key=lambda entry: entry.path)
    values: dict[str, Any] = {"checkpoint_sha": checkpoint_sha(entries), "files": [asdict(entry) for entry in entries]}
    return StepOutput(values=values | more)


def _uploaded(files: list[FileEntry], ctx: StepContext) -> StepOutput:
    for entry in files:
        if ctx.store.size(entry.key) != entry.size:
            raise StoreUnavailable(f"the store does not hold {entry.size} bytes under {entry.key}", where=entry.path)
    wanted_files({entry.path: stored_source(ctx.store, entry.key, entry.size, entry.path) for entry in files})
    return _answer(files)


def wanted_files(sources: Mapping[str, ByteSource]) -> list[str]:
    """The paths that belong to the model: its weight files and everything that is not weights in another format.

    Raises what `CheckpointIndex` has, and InvalidCheckpoint for weights that are quantised already.
    """
    index = CheckpointIndex.from_files(sources)
    require_unquantised(index)
    return [path for path in sources if path in index.headers or path == INDEX_FILE or not is_weight_file(path)]


def _from_folder(ctx: StepContext, path: str, in_place: bool = False) -> StepOutput:
    root = Path(path).resolve()
    if not in_place and not any(root.is_relative_to(allowed.resolve()) for allowed in ctx.allowed_roots):
        raise PathNotAllowed("outside the allowed roots", where=path, hint="BITMILL_ALLOWED_ROOTS lists folders")
    sources = folder_sources(root, link_roots_of(root))
    chosen = {name: source.path for name in wanted_files(sources) if isinstance(source := sources[name], LocalFile)}
    hashed = _hashed(chosen, ctx.within(0, 1 if in_place else 0.5))
    return _answer(hashed, root=str(root)) if in_place else _store(hashed, chosen, ctx.within(0.5, 1))


def _hashed(paths: Mapping[str, Path], ctx: StepContext) -> list[FileEntry]:
    entries, done = [], 0
    total = sum(path.stat().st_size for path in paths.values()) or 1
    for name, path in paths.items():
        ctx.check()
        ctx.progress(done / total, f"hashing {name}")
        digest, size = file_digest(path)
        entries.append(FileEntry(name, size, digest))
        done += size
    return entries


def _store(entries: list[FileEntry], paths: Mapping[str, Path], ctx: StepContext) -> StepOutput:
    sha = checkpoint_sha(entries)
    stored, done, total = [], 0, sum(entry.size for entry in entries) or 1
    for entry in entries:
        ctx.check()
        ctx.progress(done / total, f"storing {entry.path}")
        key = checkpoint_key(sha, entry.path)
        ctx.store.put_file(key, paths[entry.path], entry.sha256)
        stored.append(FileEntry(entry.path, entry.size, entry.sha256, key))
        done += entry.size
    return _answer(stored)


def _from_hub(ctx: StepContext, repo: str, revision: str = "main") -> StepOutput:
    """A repository of the hub at a revision, through its own client; other weight formats are not downloaded."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"hf:{repo}@{revision}"
    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        wanted = [path for path in sizes if not _other_weights(path)]
        require_disk(ctx.scratch, sum(sizes[path] for path in wanted), where)
        ctx.progress(0.0, f"downloading {where}")
        folder = Path(
            snapshot_download(repo, revision=info.sha, local_dir=ctx.scratch / "hub", allow_patterns=wanted or ["-"])
        )
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise NotFound("no such repository or revision, or not a public one", where=where) from error
    except (HfHubHTTPError, OSError) as error:
        raise StoreUnavailable(f"the hub did not answer: {error}"[:500], where=where) from error
    return _keep_folder(folder, ctx)


def _other_weights(path: str) -> bool:
    return is_weight_file(path) and not path.endswith((".safetensors", INDEX_FILE))


def _keep_folder(folder: Path, ctx: StepContext) -> StepOutput:
    sources = folder_sources(folder)
    paths = {name: folder / name for name in wanted_files(sources)}
    return _store(_hashed(paths, ctx.within(0.5, 0.75)), paths, ctx.within(0.75, 1))


def _from_bucket(ctx: StepContext, url: str) -> StepOutput:
    """The objects below an `s3://bucket/prefix`, read with the service's own credentials, but never its own store."""
    from core.storage.s3_store import S3Store

    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    if _is_own_store(bucket, ctx.settings):
        raise PathNotAllowed("the bucket that holds the service's own objects", where=url)
    remote = S3Store.from_settings(ctx.settings, bucket=bucket, prefix=prefix.strip("/"))
    sizes = dict(remote.list(""))
    if not sizes:
        raise MissingFile("no objects under that prefix", where=url)
    sources: dict[str, ByteSource] = {key: StoredObject(remote, key, size, key) for key, size in sorted(sizes.items())}
    wanted = wanted_files(sources)
    require_disk(ctx.scratch, sum(sizes[key] for key in wanted), url)
    for number, key in enumerate(wanted):
        ctx.check()
        ctx.progress(0.5 * number / len(wanted), f"downloading {key}")
        _download(remote.stream(key), ctx.scratch / "bucket" / key, sizes[key])
    return _keep_folder(ctx.scratch / "bucket", ctx)


def _is_own_store(bucket: str, settings: Settings) -> bool:
    return settings.store_url.removeprefix("s3://").partition("/")[0] == bucket and bool(settings.store_url)


def _download(pieces: Iterable[bytes], target: Path, size: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as file:
        for piece in pieces:
            file.write(piece)
    if target.stat().st_size != size:
        error: BitmillError = StoreUnavailable(f"the bucket gave {target.stat().st_size} of {size} bytes")
        raise error.at(target.name)
