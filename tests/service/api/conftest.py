"""The HTTP application on real servers, and callers with keys of their own.

`ada` owns what `bench` makes; `eve` is another owner; `nobody` has no key. `served` is the same application behind a
real uvicorn, for what only a socket shows: streams, bodies in pieces, connections that break.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from safetensors.numpy import save
from sqlalchemy import Engine
from starlette.testclient import TestClient

from api.main import create_app
from core.config import Settings
from core.jobs.access import AccessService
from core.jobs.views import Scope

ADMIN = "bm_bootstrap_0123456789"


@pytest.fixture
def app(settings: Settings) -> FastAPI:
    return create_app(settings.model_copy(update={"bootstrap_key": ADMIN}))


@pytest.fixture
def nobody(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, follow_redirects=False, raise_server_exceptions=False) as client:
        yield client


def bearer(engine: Engine, owner: str, *scopes: Scope) -> dict[str, str]:
    return {"Authorization": f"Bearer {AccessService(engine).create_key(owner, scopes).secret}"}


@pytest.fixture
def caller(app: FastAPI, nobody: TestClient, engine: Engine) -> Callable[..., TestClient]:
    """A client of that owner, with that scope."""

    def make(owner: str, scope: Scope = "write") -> TestClient:
        headers = bearer(engine, owner, scope)
        return TestClient(app, headers=headers, follow_redirects=False, raise_server_exceptions=False)

    return make


@pytest.fixture
def ada(caller: Callable[..., TestClient]) -> TestClient:
    return caller("ada")


@pytest.fixture
def eve(caller: Callable[..., TestClient]) -> TestClient:
    return caller("eve")


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """The application on a port of this machine; yields its URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline, "uvicorn does not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(20)


@pytest.fixture
def served(app: FastAPI, engine: Engine) -> Iterator[httpx.Client]:
    """Ada's client on a real connection."""
    with running(app) as url, httpx.Client(base_url=url, headers=bearer(engine, "ada", "write"), timeout=20) as client:
        yield client


def model_files() -> dict[str, bytes]:
    """A checkpoint of two small matrices that every recipe without a forward pass accepts."""
    generator = np.random.default_rng(0)
    tensors = {f"layers.{i}.weight": generator.normal(size=(64, 64)).astype(np.float32) for i in range(2)}
    return {"config.json": json.dumps({"model_type": "llama"}).encode(), "model.safetensors": save(tensors)}


def promised(files: dict[str, bytes]) -> list[dict[str, Any]]:
    return [
        {"path": path, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for path, data in files.items()
    ]


def upload(client: TestClient, files: dict[str, bytes]) -> str:
    """Promise and send files, without completing; the upload's id."""
    made = client.post("/v1/uploads", json={"files": promised(files)})
    assert made.status_code == 201, made.text
    contents = list(files.values())
    for part in made.json()["parts"]:
        start = (part["number"] - 1) * made.json()["part_size"]
        data = contents[part["file"]][start : start + part["size"]]
        assert client.put(part["url"], content=data).status_code == 200
    return str(made.json()["id"])


def checkpoint(client: TestClient, files: dict[str, bytes] | None = None) -> str:
    """An uploaded checkpoint; its id."""
    upload_id = upload(client, files or model_files())
    completed = client.post(f"/v1/uploads/{upload_id}/complete")
    assert completed.status_code == 200, completed.text
    made = client.post("/v1/checkpoints", json={"source": {"upload": upload_id}, "name": "small"})
    assert made.status_code == 201, made.text
    return str(made.json()["id"])


class Kit:
    """The helpers above for tests, which cannot import this file."""

    model_files = staticmethod(model_files)
    promised = staticmethod(promised)
    upload = staticmethod(upload)
    checkpoint = staticmethod(checkpoint)
    running = staticmethod(running)


@pytest.fixture
def kit() -> Kit:
    return Kit()
