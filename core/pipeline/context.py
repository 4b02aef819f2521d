"""What a step may use beside its request: the store, a scratch folder, a device, and its supervisor's ear.

A step never asks for the time, a database or the environment. It reports through `progress` and `log`, and calls
`check` between tensors so that it can be stopped there (`Interrupted`).
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from core.config import Settings
from core.errors import OutOfDisk
from core.jobs.steps import StepRequest, StoredFile
from core.storage.keys import step_key
from core.storage.object_store import ObjectStore

Progress = Callable[[float, str], None]
_RESERVE_BYTES = 16 << 20
_PIECE = 4 << 20


def silent(_fraction: float, _what: str) -> None:
    """No one listens."""


def _unlogged(_event: str, _fields: dict[str, Any]) -> None:
    """No one writes it down."""


def _never_asked_to_stop() -> None:
    """Nothing stops it."""


@dataclass(frozen=True)
class StepContext:
    """The surroundings of one attempt. `scratch` is a fresh folder; `threads` 0 means as torch decides."""

    store: ObjectStore
    scratch: Path
    device: str = "cpu"
    threads: int = 0
    progress: Progress = silent
    log: Callable[[str, dict[str, Any]], None] = _unlogged
    check: Callable[[], None] = _never_asked_to_stop
    allowed_roots: tuple[Path, ...] = ()
    settings: Settings = field(default_factory=Settings)

    def within(self, low: float, high: float) -> StepContext:
        """The same context, whose progress 0..1 is `low`..`high` of this one's."""
        outer = self.progress
        return replace(self, progress=lambda fraction, what: outer(low + (high - low) * fraction, what))

    def publish(self, request: StepRequest, path: Path) -> StoredFile:
        """Move a finished scratch file into the store under the step's name; it is gone from scratch afterwards."""
        digest, size = file_digest(path)
        key = step_key(request.input_hash, digest, path.name)
        self.store.put_file(key, path, digest)
        path.unlink()
        return StoredFile(key=key, sha256=digest, size=size)

    def publish_bytes(self, request: StepRequest, name: str, data: bytes) -> StoredFile:
        """The same for a small file that is in memory."""
        digest = hashlib.sha256(data).hexdigest()
        key = step_key(request.input_hash, digest, name)
        self.store.put_bytes(key, data)
        return StoredFile(key=key, sha256=digest, size=len(data))


def require_disk(folder: Path, needed: int, what: str) -> None:
    """Raise OutOfDisk unless the disk of `folder` has `needed` bytes and a small reserve free."""
    free = shutil.disk_usage(folder).free
    if free < needed + _RESERVE_BYTES:
        raise OutOfDisk(
            f"{what} needs {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free",
            where=str(folder),
            hint="free disk space, or point BITMILL_SCRATCH_DIR at a larger disk",
        )


def pieces_of(path: Path) -> Iterator[bytes]:
    """The file's bytes in pieces of a few MiB."""
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            yield piece


def file_digest(path: Path) -> tuple[str, int]:
    """sha256 (hex) and size of a file."""
    digest, size = hashlib.sha256(), 0
    for piece in pieces_of(path):
        digest.update(piece)
        size += len(piece)
    return digest.hexdigest(), size
