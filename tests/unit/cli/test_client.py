"""The REST client and the uploader against a small server that misbehaves on purpose."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cli import upload
from cli.client import Client, Connection, RequestRefused, ServiceUnreachable, find_connection, safe_relative
from core.errors import BitmillError, DigestMismatch, InvalidCheckpoint, InvalidRecipe, MissingFile, Unauthenticated

WEIGHTS = bytes(range(256)) * 100


class Service:
    """Answers by (method, path): a list of (status, headers, body), the last one again and again."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, str], list[tuple[int, dict[str, str], bytes]]] = {}
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = self.path.partition("?")[0]
                service.seen.append((self.command, path, dict(self.headers), body))
                queue = service.answers.get((self.command, path), [(404, {}, b'{"code": "not_found", "detail": "no"}')])
                status, headers, content = queue.pop(0) if len(queue) > 1 else queue[0]
                self.send_response(status)
                if "Content-Length" not in headers and status != 304:
                    self.send_header("Content-Length", str(len(content)))
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
                if len(content) < int(headers.get("Content-Length", 0)):
                    self.close_connection = True

            do_GET = do_POST = do_PUT = do_DELETE = answer  # noqa: N815 - names that http.server calls

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def on(self, method: str, path: str, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.answers.setdefault((method, path), []).append((status, headers or {}, content))

    def sent(self, method: str) -> list[str]:
        return [path for verb, path, _, _ in self.seen if verb == method]


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    thread = threading.Thread(target=service.server.serve_forever, args=(0.02,))
    thread.start()
    yield service
    service.server.shutdown()
    service.server.server_close()
    thread.join()


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with Client(Connection(service.url, "secret"), patience_s=5.0) as client:
        yield client


def test_every_request_carries_the_key(service: Service, client: Client) -> None:
    service.on("GET", "/v1/jobs/job_1", {"id": "job_1"})
    assert client.job("job_1") == {"id": "job_1"}
    assert service.seen[0][2]["Authorization"] == "Bearer secret"


def test_a_problem_becomes_the_error_that_the_service_meant(service: Service, client: Client) -> None:
    problem = {"code": "invalid_recipe", "detail": "no", "hint": "try", "errors": [{"path": "format", "message": "x"}]}
    service.on("POST", "/v1/jobs", problem, 422)
    with pytest.raises(InvalidRecipe) as caught:
        client.post("/v1/jobs", {})
    assert (caught.value.hint, caught.value.errors[0]["path"]) == ("try", "format")


def test_an_unknown_code_keeps_its_name(service: Service, client: Client) -> None:
    service.on("GET", "/v1/x", {"code": "from_the_future", "detail": "?"}, 418)
    with pytest.raises(RequestRefused) as caught:
        client.get("/v1/x")
    assert caught.value.to_dict()["code"] == "from_the_future"
    assert caught.value.to_dict()["class"] == "user"


def test_an_answer_that_is_not_json_is_an_error_too(service: Service, client: Client) -> None:
    service.on("GET", "/v1/x", b"<h1>proxy</h1>", 404)
    with pytest.raises(BitmillError, match="proxy"):
        client.get("/v1/x")


def test_a_missing_key_says_so(service: Service, client: Client) -> None:
    service.on("GET", "/v1/jobs", {"code": "unauthenticated", "detail": "no key"}, 401)
    with pytest.raises(Unauthenticated):
        client.get("/v1/jobs")


def test_a_service_that_restarts_is_waited_for(service: Service, client: Client) -> None:
    service.on("GET", "/v1/jobs/job_1", {"code": "unavailable"}, 503)
    service.on("GET", "/v1/jobs/job_1", {"id": "job_1"})
    assert client.job("job_1")["id"] == "job_1"


def test_nothing_listening_is_reported_with_what_to_do() -> None:
    client = Client(Connection("http://127.0.0.1:9", ""), patience_s=0.0)
    with client, pytest.raises(ServiceUnreachable) as caught:
        client.get("/v1/jobs")
    assert "bitmill up" in caught.value.hint


def test_a_repeated_post_has_the_same_idempotency_key(service: Service, client: Client) -> None:
    service.on("POST", "/v1/jobs", {}, 503)
    service.on("POST", "/v1/jobs", {"id": "job_1"}, 201)
    client.post("/v1/jobs", {})
    first, second = (headers["Idempotency-Key"] for _, _, headers, _ in service.seen)
    assert first == second


def test_watching_ends_with_the_job_and_sees_only_changes(service: Service, client: Client) -> None:
    service.on("GET", "/v1/jobs/job_1", {"status": "running"}, headers={"ETag": '"1"'})
    service.on("GET", "/v1/jobs/job_1", b"", 304)
    service.on("GET", "/v1/jobs/job_1", {"status": "succeeded"})
    seen: list[str] = []
    assert client.watch("job_1", lambda job: seen.append(job["status"]), interval_s=0.0)["status"] == "succeeded"
    assert seen == ["running", "succeeded"]
    assert service.seen[1][2]["If-None-Match"] == '"1"'


def _artefact(data: bytes = WEIGHTS, path: str = "model.safetensors") -> dict[str, Any]:
    return {"id": "art_1", "path": path, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


CONTENT = "/v1/artefacts/art_1/content"


def test_a_download_that_breaks_off_goes_on_where_it_broke(service: Service, client: Client, tmp_path: Path) -> None:
    service.on("GET", CONTENT, WEIGHTS[:1], 206)  # the look for a redirect
    service.on("GET", CONTENT, WEIGHTS[:5000], headers={"Content-Length": str(len(WEIGHTS))})
    service.on("GET", CONTENT, WEIGHTS[:1], 206)
    service.on("GET", CONTENT, WEIGHTS[5000:], 206)
    assert client.download(_artefact(), tmp_path).read_bytes() == WEIGHTS
    assert service.seen[-1][2]["Range"] == "bytes=5000-"


def test_a_file_that_is_there_already_is_not_fetched_again(service: Service, client: Client, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    client.download(_artefact(), tmp_path)
    assert service.seen == []


def test_bytes_with_another_digest_are_not_kept(service: Service, client: Client, tmp_path: Path) -> None:
    service.on("GET", CONTENT, b"tampered")
    with pytest.raises(DigestMismatch):
        client.download(_artefact(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_key_is_not_sent_to_a_signed_url_elsewhere(service: Service, client: Client, tmp_path: Path) -> None:
    elsewhere = service.url.replace("127.0.0.1", "localhost")
    service.on("GET", CONTENT, b"", 307, {"Location": f"{elsewhere}/signed"})
    service.on("GET", "/signed", WEIGHTS)
    assert client.download(_artefact(), tmp_path).read_bytes() == WEIGHTS
    assert "Authorization" not in service.seen[-1][2]


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", ""])
def test_a_service_cannot_write_outside_the_folder(path: str) -> None:
    with pytest.raises(BitmillError):
        safe_relative(path)


def test_the_connection_is_found_in_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITMILL_URL", raising=False)
    monkeypatch.delenv("BITMILL_KEY", raising=False)
    (tmp_path / "key").write_text("k\n")
    (tmp_path / "url").write_text("http://127.0.0.1:1234\n")
    assert find_connection(None, None, tmp_path) == Connection("http://127.0.0.1:1234", "k")
    assert find_connection("http://x/", "y", tmp_path) == Connection("http://x", "y")
    monkeypatch.setenv("BITMILL_DATA_DIR", str(tmp_path))
    assert find_connection(None, None, None).key == "k"


class TestUpload:
    """A folder by parts."""

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    @pytest.fixture
    def files(self, tmp_path: Path) -> list[upload.LocalFile]:
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(WEIGHTS)
        (folder / "pytorch_model.bin").write_bytes(b"pickle")
        (folder / ".git").mkdir()
        (folder / ".git" / "config").write_text("x")
        return upload.hash_files(upload.collect(folder), lambda _: None)

    def _upload(self, state: str = "open", arrived: bool = False) -> dict[str, Any]:
        parts = [{"file": 0, "number": 1, "url": "/v1/parts/0/1", "arrived": arrived}]
        parts += [{"file": 1, "number": n, "url": f"/v1/parts/1/{n}", "arrived": False} for n in (1, 2, 3)]
        return {"id": "upl_1", "state": state, "part_size": 10_000, "parts": parts}

    def test_only_safetensors_and_their_companions_are_sent(self, files: list[upload.LocalFile]) -> None:
        assert [file.path for file in files] == ["config.json", "model.safetensors"]
        assert files[1].sha256 == hashlib.sha256(WEIGHTS).hexdigest()

    def test_parts_together_are_the_file(self, service: Service, client: Client, files: list[upload.LocalFile]) -> None:
        service.on("POST", "/v1/uploads", self._upload(), 201)
        service.on("POST", "/v1/uploads/upl_1/complete", {"id": "upl_1"})
        for path in ("0/1", "1/1", "1/2", "1/3"):
            service.on("PUT", f"/v1/parts/{path}", {})
        sent: list[int] = []
        assert upload.send(client, files, upload.Progress(sent=sent.append)) == "upl_1"
        bodies = {path: body for verb, path, _, body in service.seen if verb == "PUT"}
        assert b"".join(bodies[f"/v1/parts/1/{n}"] for n in (1, 2, 3)) == WEIGHTS
        assert sum(sent) == len(WEIGHTS) + 2

    def test_an_interrupted_upload_goes_on_with_what_is_missing(
        self, service: Service, client: Client, files: list[upload.LocalFile]
    ) -> None:
        service.on("POST", "/v1/uploads", self._upload(), 201)
        for path in ("0/1", "1/1", "1/3"):
            service.on("PUT", f"/v1/parts/{path}", {})
        service.on("PUT", "/v1/parts/1/2", {"code": "digest_mismatch", "detail": "broken"}, 422)
        with pytest.raises(DigestMismatch):
            upload.send(client, files, upload.Progress())
        service.seen.clear()
        service.answers[("PUT", "/v1/parts/1/2")] = [(200, {}, b"{}")]
        service.on("GET", "/v1/uploads/upl_1", self._upload(arrived=True))
        service.on("POST", "/v1/uploads/upl_1/complete", {"id": "upl_1"})
        upload.send(client, files, upload.Progress())
        assert "/v1/uploads" not in service.sent("POST")
        assert "/v1/parts/0/1" not in service.sent("PUT")

    def test_an_upload_that_the_service_forgot_starts_again(
        self, service: Service, client: Client, files: list[upload.LocalFile]
    ) -> None:
        memory = upload._memory(service.url, files)
        memory.parent.mkdir(parents=True)
        memory.write_text("upl_gone")
        service.on("POST", "/v1/uploads", {**self._upload(), "parts": []}, 201)
        service.on("POST", "/v1/uploads/upl_1/complete", {"id": "upl_1"})
        assert upload.send(client, files, upload.Progress()) == "upl_1"
        assert not memory.exists()

    def test_a_folder_without_safetensors_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
        with pytest.raises(InvalidCheckpoint, match=r"no \*\.safetensors"):
            upload.collect(tmp_path)

    def test_a_folder_that_is_not_there_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(MissingFile):
            upload.collect(tmp_path / "nowhere")


def test_a_key_that_no_header_can_hold_is_refused() -> None:
    with pytest.raises(Unauthenticated):
        find_connection("http://127.0.0.1:9", "clé", None)
