"""The REST client: what `bitmill submit` and `bitmill jobs` say to a service, here or elsewhere.

Every answer that is not a success becomes the `BitmillError` that the service meant. Requests that may be repeated are
repeated while the service is away (a restart heals), for as long as the caller's patience. Nothing here prints.
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self
from urllib.parse import urlsplit

import httpx

from core.clock import monotonic
from core.config import Settings
from core.errors import BitmillError, DigestMismatch, ErrorClass, OutOfDisk, Unauthenticated

_AGAIN = {429, 502, 503, 504}
_TERMINAL = {"succeeded", "failed", "cancelled", "expired"}

Json = dict[str, Any]


class ServiceUnreachable(BitmillError):
    """Nothing answers at the service's URL."""

    code, kind = "service_unreachable", ErrorClass.TRANSIENT


class RequestRefused(BitmillError):
    """An answer of the service whose code this client does not know; it keeps the service's code and class."""

    code: ClassVar[str] = "request_refused"

    def __init__(self, status: int, body: Json) -> None:
        super().__init__(
            str(body.get("detail") or body.get("title") or f"the service answered {status}"),
            where=str(body.get("where", "")),
            hint=str(body.get("hint", "")),
            errors=tuple(body.get("errors") or ()),
        )
        self.status = status
        self.remote_code = str(body.get("code", "request_refused"))

    def to_dict(self) -> Json:
        return {**super().to_dict(), "code": self.remote_code, "class": "user" if self.status < 500 else "internal"}


@dataclass(frozen=True)
class Connection:
    """Where the service is and with which key."""

    url: str
    key: str


def find_connection(url: str | None, key: str | None, data_dir: Path | None) -> Connection:
    """Options first, then `BITMILL_URL`/`BITMILL_KEY`, then what `bitmill up` left in its data folder."""
    folder = data_dir or Settings().data_dir
    settings = Settings()
    usual = f"http://{settings.host}:{settings.port}"
    chosen = key or os.environ.get("BITMILL_KEY") or _first_line(folder / "key") or ""
    if not chosen.isascii() or not chosen.isprintable():
        raise Unauthenticated("the key holds characters that no key has", where="--key")
    return Connection(
        (url or os.environ.get("BITMILL_URL") or _first_line(folder / "url") or usual).rstrip("/"), chosen
    )


def _first_line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


class Client:
    """One service. `patience_s`: how long a request that may be repeated waits for a service that is away."""

    def __init__(self, connection: Connection, *, patience_s: float = 2.0) -> None:
        self.connection, self.patience_s = connection, patience_s
        headers = {"Authorization": f"Bearer {connection.key}"} if connection.key else {}
        timeout = httpx.Timeout(60.0, connect=5.0)
        self._http = httpx.Client(headers=headers, timeout=timeout, follow_redirects=False)
        self._plain = httpx.Client(timeout=timeout, follow_redirects=True)  # for presigned URLs: no key of ours

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()
        self._plain.close()

    def get(self, path: str, **parameters: Any) -> Json:
        wanted = {name: value for name, value in parameters.items() if value is not None}
        return self._json("GET", path, params=wanted)

    def post(self, path: str, body: Json | None = None) -> Json:
        """A POST with an idempotency key of its own, so that repeating it is safe."""
        return self._json("POST", path, json=body or {}, headers={"Idempotency-Key": uuid.uuid4().hex})

    def delete(self, path: str) -> None:
        self._send("DELETE", path)

    def job(self, job_id: str) -> Json:
        return self.get(f"/v1/jobs/{job_id}")

    def watch(self, job_id: str, seen: Callable[[Json], None], interval_s: float = 0.5) -> Json:
        """Poll until the job is terminal, calling `seen` with every new state of it; the last state."""
        etag = ""
        while True:
            answer = self._send("GET", f"/v1/jobs/{job_id}", headers={"If-None-Match": etag} if etag else {})
            if answer.status_code != 304:
                etag = answer.headers.get("ETag", "")
                job: Json = answer.json()
                seen(job)
                if job["status"] in _TERMINAL:
                    return job
            time.sleep(interval_s)

    def put_part(self, url: str, data: bytes) -> None:
        """Send one part to the URL that the service gave for it."""
        mine = urlsplit(url).netloc in ("", urlsplit(self.connection.url).netloc)
        self._send("PUT", url, content=data, http=self._http if mine else self._plain)

    def download(self, artefact: Json, folder: Path, progress: Callable[[int], None] = lambda _: None) -> Path:
        """Fetch one artefact into `folder` under its own path, verified; what is there already is not fetched again."""
        target = folder / safe_relative(str(artefact["path"]))
        if target.exists() and _digest(target) == artefact["sha256"]:
            progress(int(artefact["size"]))
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".part")
        try:
            self._fetch(f"/v1/artefacts/{artefact['id']}/content", partial, progress)
        except OSError as error:
            raise OutOfDisk(f"cannot be written: {error}", where=str(partial)) from error
        if (found := _digest(partial)) != artefact["sha256"]:
            partial.unlink()
            raise DigestMismatch(f"has sha256 {found}, the service says {artefact['sha256']}", where=str(target))
        partial.replace(target)
        return target

    def _fetch(self, path: str, partial: Path, progress: Callable[[int], None]) -> None:
        """Download into `partial`, going on where an earlier attempt broke off."""
        deadline = monotonic() + max(self.patience_s, 10.0)
        while True:
            try:
                for piece in self._content(path, partial):
                    progress(piece)
                    deadline = monotonic() + max(self.patience_s, 10.0)
            except httpx.TransportError as error:
                if monotonic() > deadline:
                    raise self._unreachable(error) from error
                time.sleep(0.5)
            else:
                return

    def _content(self, path: str, partial: Path) -> Iterator[int]:
        done = partial.stat().st_size if partial.exists() else 0
        url, http = self._content_url(path)
        with http.stream("GET", url, headers={"Range": f"bytes={done}-"} if done else {}) as answer:
            if answer.status_code == 416:
                return
            if answer.status_code >= 400:
                answer.read()
                raise _error(answer)
            with partial.open("ab" if answer.status_code == 206 else "wb") as file:
                for piece in answer.iter_raw():
                    file.write(piece)
                    yield len(piece)

    def _content_url(self, path: str) -> tuple[str, httpx.Client]:
        """The service's own URL, or the signed one that it redirects to."""
        url = self._absolute(path)
        with self._http.stream("GET", url, headers={"Range": "bytes=0-0"}) as answer:
            if answer.is_redirect:
                return str(answer.headers["Location"]), self._plain
        return url, self._http

    def _absolute(self, path: str) -> str:
        return path if "://" in path else f"{self.connection.url}/{path.lstrip('/')}"

    def _json(self, method: str, path: str, **options: Any) -> Json:
        answer: Json = self._send(method, path, **options).json()
        return answer

    def _send(self, method: str, path: str, http: httpx.Client | None = None, **options: Any) -> httpx.Response:
        deadline, delay = monotonic() + self.patience_s, 0.1
        while True:
            try:
                answer = (http or self._http).request(method, self._absolute(path), **options)
            except httpx.TransportError as error:
                if monotonic() > deadline:
                    raise self._unreachable(error) from error
            except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
                raise self._unreachable(error) from error
            else:
                if answer.status_code < 400:
                    return answer
                if answer.status_code not in _AGAIN or monotonic() > deadline:
                    raise _error(answer)
            time.sleep(delay)
            delay = min(2 * delay, 2.0)

    def _unreachable(self, error: Exception) -> ServiceUnreachable:
        return ServiceUnreachable(
            f"no service answers: {error}", where=self.connection.url, hint="start one with `bitmill up`, or give --url"
        )


def safe_relative(path: str) -> Path:
    """A path that stays inside the folder it is joined to; the service is not trusted with more."""
    relative = Path(path)
    if relative.is_absolute() or ".." in relative.parts or not relative.parts:
        raise BitmillError("the service names a file outside the folder", where=path)
    return relative


def _error(answer: httpx.Response) -> BitmillError:
    """The error that a problem document stands for."""
    try:
        body = answer.json()
    except ValueError:
        body = {"detail": answer.text[:500]}
    if not isinstance(body, dict):
        body = {"detail": str(body)[:500]}
    known = BitmillError.from_dict(body)
    return known if known.code == body.get("code") else RequestRefused(answer.status_code, body)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
