"""The object store in S3 or anything that speaks it.

Objects are written with `If-None-Match: *`, so that a key is written once even when two workers finish together, and
with sha256 checksums that the server verifies (per part for large files). The service's own client retries what S3 asks
to retry; a body that breaks off is resumed at the byte where it broke. Presigned URLs use the public endpoint.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from core.config import Settings
from core.errors import BitmillError, DigestMismatch, NotFound, OutOfDisk, StoreUnavailable
from core.storage.object_store import StoredEntry, validate_key

_MIN_PART = 16 << 20
_MAX_PARTS = 9_000  # S3 allows 10 000
_IN_FLIGHT = 4
_RESUMES = 4
_Parts = list[dict[str, Any]]  # the class has a method named list
_ABSENT = {"404", "NoSuchKey", "NotFound"}


class S3Store:
    """Objects under `prefix` in one bucket, which must exist."""

    def __init__(
        self, client: Any, bucket: str, prefix: str = "", *, public_client: Any = None, brief_client: Any = None
    ) -> None:
        self._client, self._public, self._brief = client, public_client or client, brief_client or client
        self._bucket, self._prefix = bucket, f"{prefix}/" if prefix else ""

    @classmethod
    def from_settings(cls, settings: Settings, bucket: str, prefix: str) -> S3Store:
        client = make_client(settings, settings.s3_endpoint)
        public = make_client(settings, settings.s3_public_endpoint) if settings.s3_public_endpoint else None
        brief = make_client(settings, settings.s3_endpoint, brief=True)
        return cls(client, bucket, prefix, public_client=public, brief_client=brief)

    def put_file(self, key: str, path: Path, sha256: str | None = None) -> int:
        existing = self.size(key)
        if existing is not None:
            return existing
        size = path.stat().st_size
        if size <= _MIN_PART:
            return self._put(key, path.read_bytes(), sha256)
        with _translated(key):
            self._put_parts(key, path, size, sha256)
        return size

    def put_bytes(self, key: str, data: bytes) -> int:
        existing = self.size(key)
        return existing if existing is not None else self._put(key, data, None)

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        return b"".join(self.stream(key, start, length, chunk=8 << 20))

    def stream(self, key: str, start: int = 0, length: int | None = None, chunk: int = 1 << 20) -> Iterator[bytes]:
        size = self.size(key)
        if size is None:
            raise NotFound("no such object", where=key)
        end = size if length is None else min(size, start + length)
        return self._pieces(key, start, end, chunk)

    def size(self, key: str) -> int | None:
        with contextlib.suppress(NotFound), _translated(key):
            head = self._client.head_object(Bucket=self._bucket, Key=self._name(key))
            return int(head["ContentLength"])
        return None

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        for entry in self.inventory(prefix):
            yield entry.key, entry.size

    def inventory(self, prefix: str) -> Iterator[StoredEntry]:
        with _translated(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix
            )
            for page in pages:
                for item in page.get("Contents", []):
                    yield StoredEntry(item["Key"][len(self._prefix) :], int(item["Size"]), item["LastModified"])

    def discard_unfinished(self, before: datetime) -> tuple[int, int]:
        removed, freed = 0, 0
        with _translated("unfinished uploads"):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=self._prefix
            )
            for upload in [item for page in pages for item in page.get("Uploads", []) if item["Initiated"] < before]:
                with contextlib.suppress(self._client.exceptions.NoSuchUpload):  # it was completed meanwhile
                    freed += self._abort(upload["Key"], upload["UploadId"])
                    removed += 1
        return removed, freed

    def _abort(self, name: str, upload_id: str) -> int:
        """Abort a multipart upload; the bytes that had arrived."""
        where = {"Bucket": self._bucket, "Key": name, "UploadId": upload_id}
        pages = self._client.get_paginator("list_parts").paginate(**where)
        arrived = sum(int(part["Size"]) for page in pages for part in page.get("Parts", []))
        self._client.abort_multipart_upload(**where)
        return arrived

    def delete(self, key: str) -> None:
        with contextlib.suppress(NotFound), _translated(key):
            self._brief.delete_object(Bucket=self._bucket, Key=self._name(key))

    def local_path(self, key: str) -> Path | None:
        validate_key(key)
        return None

    def presigned_url(self, key: str, expires_s: int, filename: str) -> str | None:
        disposition = f"attachment; filename*=UTF-8''{quote(filename, safe='')}"
        parameters = {"Bucket": self._bucket, "Key": self._name(key), "ResponseContentDisposition": disposition}
        return str(self._public.generate_presigned_url("get_object", Params=parameters, ExpiresIn=expires_s))

    def presigned_put_url(self, key: str, size: int, expires_s: int) -> str | None:
        parameters = {"Bucket": self._bucket, "Key": self._name(key), "ContentLength": size}
        return str(self._public.generate_presigned_url("put_object", Params=parameters, ExpiresIn=expires_s))

    def _name(self, key: str) -> str:
        return self._prefix + validate_key(key)

    def _put(self, key: str, data: bytes, sha256: str | None) -> int:
        digest = hashlib.sha256(data)
        _verify(key, digest.hexdigest(), sha256)
        send = functools.partial(
            self._client.put_object,
            Bucket=self._bucket,
            Key=self._name(key),
            Body=data,
            ChecksumSHA256=_base64(digest.digest()),
            Metadata={"sha256": digest.hexdigest()},
            IfNoneMatch="*",
        )
        with _translated(key):
            _written_once(send)
        return len(data)

    def _put_parts(self, key: str, path: Path, size: int, sha256: str | None) -> None:
        where = {"Bucket": self._bucket, "Key": self._name(key)}
        metadata = {"sha256": sha256} if sha256 else {}
        upload = self._client.create_multipart_upload(**where, ChecksumAlgorithm="SHA256", Metadata=metadata)
        where["UploadId"] = upload["UploadId"]
        try:
            parts = self._send_parts(where, path, part_size(size), key, sha256)
        except BaseException:
            self._client.abort_multipart_upload(**where)
            raise
        complete = functools.partial(
            self._client.complete_multipart_upload, **where, MultipartUpload={"Parts": parts}, IfNoneMatch="*"
        )
        if not _written_once(complete):
            self._client.abort_multipart_upload(**where)

    def _send_parts(self, where: dict[str, str], path: Path, part_bytes: int, key: str, sha256: str | None) -> _Parts:
        """Send at most four parts at a time; the digest of the whole is checked before the upload is completed."""
        digest = hashlib.sha256()
        parts: _Parts = []
        waiting: set[Future[dict[str, Any]]] = set()
        with ThreadPoolExecutor(_IN_FLIGHT) as pool, path.open("rb") as file:
            while data := file.read(part_bytes):
                digest.update(data)
                waiting.add(pool.submit(self._send_part, where, len(parts) + len(waiting) + 1, data))
                if len(waiting) >= _IN_FLIGHT:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    parts += [future.result() for future in done]
            parts += [future.result() for future in waiting]
        _verify(key, digest.hexdigest(), sha256)
        return sorted(parts, key=lambda part: int(part["PartNumber"]))

    def _send_part(self, where: dict[str, str], number: int, data: bytes) -> dict[str, Any]:
        checksum = _base64(hashlib.sha256(data).digest())
        sent = self._client.upload_part(**where, PartNumber=number, Body=data, ChecksumSHA256=checksum)
        return {"PartNumber": number, "ETag": sent["ETag"], "ChecksumSHA256": checksum}

    def _pieces(self, key: str, start: int, end: int, chunk: int) -> Iterator[bytes]:
        position, failures = start, 0
        while position < end:
            try:
                with _translated(key):
                    for piece in self._open_range(key, position, end).iter_chunks(chunk):
                        position += len(piece)
                        yield piece
            except StoreUnavailable:
                failures += 1
                if failures > _RESUMES:
                    raise
                time.sleep(0.1 * 2**failures)

    def _open_range(self, key: str, start: int, end: int) -> Any:
        answer = self._client.get_object(Bucket=self._bucket, Key=self._name(key), Range=f"bytes={start}-{end - 1}")
        return answer["Body"]


def make_client(settings: Settings, endpoint: str, *, brief: bool = False) -> Any:
    """A boto3 client; without keys in the settings boto3's own chain (environment, role) finds them.

    `brief`: for small requests that others wait for: given up after seconds.
    """
    config = Config(
        signature_version="s3v4",
        s3={"addressing_style": "path"} if endpoint else None,
        retries={"max_attempts": 2 if brief else 5, "mode": "standard"},
        connect_timeout=2 if brief else 5,
        read_timeout=5 if brief else 60,
        max_pool_connections=4 * _IN_FLIGHT,
        request_checksum_calculation="when_required",  # we send sha256 ourselves
        response_checksum_validation="when_required",
    )
    return boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint or None,
        region_name=settings.s3_region,
        aws_access_key_id=settings.s3_access_key or None,
        aws_secret_access_key=settings.s3_secret_key or None,
        config=config,
    )


def part_size(size: int) -> int:
    """Bytes per part of a file of `size` bytes: 16 MiB, more where 9000 parts would not hold it; whole MiB."""
    mib = 1 << 20
    return max(_MIN_PART, -(-size // (_MAX_PARTS * mib)) * mib)


def _written_once(send: Callable[[], Any]) -> bool:
    """Whether `send` wrote the object; False when another writer was first, whose bytes stay."""
    for attempt in range(_RESUMES + 1):
        try:
            send()
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code"))
            if code in ("PreconditionFailed", "412"):
                return False
            if code != "ConditionalRequestConflict" or attempt == _RESUMES:
                raise
            time.sleep(0.1 * 2**attempt)
        else:
            return True
    return False


def _verify(key: str, found: str, promised: str | None) -> None:
    if promised is not None and found != promised:
        raise DigestMismatch(f"the bytes have sha256 {found}, promised was {promised}", where=key)


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


@contextlib.contextmanager
def _translated(where: str) -> Iterator[None]:
    """boto's errors in our words."""
    try:
        yield
    except BitmillError:
        raise
    except ClientError as error:
        raise _from_client_error(error, where) from error
    except (BotoCoreError, OSError) as error:
        raise StoreUnavailable(f"the object store does not answer: {error}", where=where) from error


def _from_client_error(error: ClientError, where: str) -> BitmillError:
    details = error.response.get("Error", {})
    code, status = str(details.get("Code")), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if code in _ABSENT:
        return NotFound("no such object", where=where)
    if status == 507:
        return OutOfDisk("the object store is full", where=where)
    hint = {
        "NoSuchBucket": "create the bucket that BITMILL_STORE_URL names",
        "403": "check BITMILL_S3_ACCESS_KEY and BITMILL_S3_SECRET_KEY",
        "AccessDenied": "check BITMILL_S3_ACCESS_KEY and BITMILL_S3_SECRET_KEY",
        "InvalidAccessKeyId": "check BITMILL_S3_ACCESS_KEY",
        "SignatureDoesNotMatch": "check BITMILL_S3_SECRET_KEY",
    }.get(code, "")
    return StoreUnavailable(f"the object store answered {code}: {details.get('Message', '')}", where=where, hint=hint)
