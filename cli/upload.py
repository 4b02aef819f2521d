"""Sending a local checkpoint folder to a service by parts, four at a time, and going on after an interruption.

Every file is hashed first; the list of (path, size, sha256) names the upload, so that a second `submit` of the same
folder to the same service finds the unfinished one (remembered in the user's cache folder) and sends only what is
missing. The service verifies every digest before the checkpoint is usable. Nothing here prints.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from cli.client import Client, Json
from core.errors import BitmillError, InvalidCheckpoint, MissingFile, UserError
from core.ids import content_hash

_IN_FLIGHT = 4
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")


@dataclass(frozen=True)
class LocalFile:
    """A file to send: `path` is relative with forward slashes, `source` is where it lies."""

    path: str
    source: Path
    size: int
    sha256: str = ""

    def to_json(self) -> Json:
        return {"path": self.path, "size": self.size, "sha256": self.sha256}


@dataclass(frozen=True)
class Progress:
    """What the sender reports: `hashed` and `sent` are called with numbers of bytes."""

    hashed: Callable[[int], None] = lambda _: None
    sent: Callable[[int], None] = lambda _: None


def collect(folder: Path) -> list[LocalFile]:
    """The files of a checkpoint folder, sorted; hidden ones and weights that are not safetensors stay out."""
    if not folder.is_dir():
        raise MissingFile(
            "no such folder", where=str(folder), hint="SOURCE is a folder, hf:org/name, s3://... or ckpt_..."
        )
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            source = Path(parent) / name
            if not name.startswith(".") and source.is_file():
                found.append(LocalFile(source.relative_to(folder).as_posix(), source, source.stat().st_size))
    weights = [file for file in found if file.path.endswith(".safetensors")]
    if not weights:
        raise InvalidCheckpoint(
            "no *.safetensors in this folder", where=str(folder), hint="only safetensors weights are read"
        )
    return sorted((file for file in found if not file.path.endswith(_PICKLES)), key=lambda file: file.path)


def hash_files(files: list[LocalFile], hashed: Callable[[int], None]) -> list[LocalFile]:
    """The same files with their digests."""
    return [LocalFile(file.path, file.source, file.size, _sha256(file.source, hashed)) for file in files]


def _sha256(path: Path, hashed: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
            hashed(len(piece))
    return digest.hexdigest()


def send(client: Client, files: list[LocalFile], progress: Progress) -> str:
    """Upload hashed files and complete the upload; its id."""
    memory = _memory(client.connection.url, files)
    upload = _resumable(client, memory) or client.post("/v1/uploads", {"files": [file.to_json() for file in files]})
    memory.parent.mkdir(parents=True, exist_ok=True)
    memory.write_text(str(upload["id"]))
    _send_parts(client, upload, files, progress)
    client.post(f"/v1/uploads/{upload['id']}/complete")
    memory.unlink(missing_ok=True)
    return str(upload["id"])


def _resumable(client: Client, memory: Path) -> Json | None:
    """The open upload that the memory names, None when there is none or the service has forgotten it."""
    try:
        upload = client.get(f"/v1/uploads/{memory.read_text().strip()}")
    except OSError:
        return None
    except UserError:
        memory.unlink(missing_ok=True)
        return None
    return upload if upload.get("state", "open") == "open" else None


def _memory(url: str, files: list[LocalFile]) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = content_hash([url, [[file.path, file.size, file.sha256] for file in files]])
    return cache / "bitmill" / "uploads" / name


def _send_parts(client: Client, upload: Json, files: list[LocalFile], progress: Progress) -> None:
    part_size = int(upload["part_size"])

    def send_one(part: Json) -> None:
        file, number = files[int(part["file"])], int(part["number"])
        start = (number - 1) * part_size
        length = min(part_size, file.size - start)
        if not part.get("arrived"):
            client.put_part(str(part["url"]), _read(file.source, start, length))
        progress.sent(length)

    with ThreadPoolExecutor(_IN_FLIGHT) as pool:
        waiting = [pool.submit(send_one, part) for part in upload["parts"]]
        done, rest = wait(waiting, return_when=FIRST_EXCEPTION)
        for future in rest:
            future.cancel()
        for future in done:
            future.result()


def _read(path: Path, start: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(length)
    if len(data) != length:
        raise BitmillError("the file became shorter while it was sent", where=str(path))
    return data
