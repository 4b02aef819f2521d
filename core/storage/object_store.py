"""The object store as the rest of Bitmill sees it: immutable bytes under keys, written once.

Two implementations keep the same promises and pass the same tests: a local folder and S3. What both promise: a key is
either absent or complete; putting a key that exists changes nothing and is not an error (keys name content); reads see
bytes from the first to the last or raise. What neither does: overwrite, append, lock, or keep user text in keys beyond
a validated file name.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

from core.config import Settings
from core.errors import PathNotAllowed, UserError

_MAX_KEY_BYTES = 1024
_MAX_COMPONENT_BYTES = 255


class StoredEntry(NamedTuple):
    """An object of a listing; `modified` by the store's clock, with a time zone."""

    key: str
    size: int
    modified: datetime


class ObjectStore(Protocol):
    """Immutable objects. `NotFound` for absent keys, `StoreUnavailable` for what may pass, `OutOfDisk` when full."""

    def put_file(self, key: str, path: Path, sha256: str | None = None) -> int:
        """Store the file's bytes and return their number; `DigestMismatch` when they do not have that sha256 (hex)."""
        ...

    def put_bytes(self, key: str, data: bytes) -> int:
        """Store `data` and return its length."""
        ...

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """The bytes from `start`, at most `length` of them; fewer only where the object ends."""
        ...

    def stream(self, key: str, start: int = 0, length: int | None = None, chunk: int = 1 << 20) -> Iterator[bytes]:
        """The same bytes in pieces of at most `chunk`; an absent key raises here, not at the first piece."""
        ...

    def size(self, key: str) -> int | None:
        """The object's length in bytes, None when it is absent."""
        ...

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """(key, size) of every object whose key starts with `prefix`, each once, in no particular order."""
        ...

    def inventory(self, prefix: str) -> Iterator[StoredEntry]:
        """The same with the time at which each object was written."""
        ...

    def discard_unfinished(self, before: datetime) -> tuple[int, int]:
        """Remove what writers that died before then left unfinished, never an object; (number, bytes)."""
        ...

    def delete(self, key: str) -> None:
        """Remove the object; an absent one is not an error."""
        ...

    def local_path(self, key: str) -> Path | None:
        """Where the object lies as a file on this machine, None when it does not or is absent. Never write to it."""
        ...

    def presigned_url(self, key: str, expires_s: int, filename: str) -> str | None:
        """A URL that anyone may GET for `expires_s` seconds, saved as `filename`; None when the store has none."""
        ...

    def presigned_put_url(self, key: str, size: int, expires_s: int) -> str | None:
        """A URL that anyone may PUT exactly `size` bytes to for `expires_s` seconds; None when the store has none."""
        ...


def validate_key(key: str) -> str:
    """`key` itself when it is safe in every store; PathNotAllowed otherwise.

    Relative, forward slashes, no empty, `.` or `..` component, no control character, at most 1024 bytes; the first
    component does not start with a dot, those names belong to the stores.
    """
    components = key.split("/")
    encoded = key.encode("utf-8", "surrogatepass")
    wrong = (
        not key
        or len(encoded) > _MAX_KEY_BYTES
        or key.startswith(".")
        or any(
            part in ("", ".", "..") or len(part.encode("utf-8", "surrogatepass")) > _MAX_COMPONENT_BYTES
            for part in components
        )
        or any(ord(char) < 32 or char in "\\\x7f" or 0xD800 <= ord(char) < 0xE000 for char in key)
    )
    if wrong:
        raise PathNotAllowed("not a valid object key", where=repr(key[:200]))
    return key


def open_store(settings: Settings) -> ObjectStore:
    """The store that `store_url` names: `file:///folder` or `s3://bucket/prefix`; empty: a folder in `data_dir`."""
    if not settings.store_url:
        from core.storage.local_store import LocalStore

        return LocalStore(settings.data_dir / "objects")
    parts = urlsplit(settings.store_url)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.startswith("/"):
        from core.storage.local_store import LocalStore

        return LocalStore(Path(unquote(parts.path)))
    if parts.scheme == "s3" and parts.netloc:
        from core.storage.s3_store import S3Store

        return S3Store.from_settings(settings, bucket=parts.netloc, prefix=parts.path.strip("/"))
    raise UserError(
        "not the URL of an object store", where=settings.store_url, hint="file:///absolute/folder or s3://bucket/prefix"
    )
