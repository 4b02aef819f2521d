"""The command line's own client and uploader against the real application: both ends of the contract meet."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from sqlalchemy import update

from cli import upload
from cli.client import Client, Connection
from core.errors import Conflict, InvalidRecipe, NotFound
from core.jobs.sessions import writing
from core.jobs.tables import Artefact

if TYPE_CHECKING:
    from tests.service.api.conftest import Kit
    from tests.service.conftest import Bench


@pytest.fixture
def client(served: httpx.Client) -> Client:
    key = served.headers["Authorization"].removeprefix("Bearer ")
    return Client(Connection(str(served.base_url).rstrip("/"), key))


def test_a_folder_becomes_a_job_and_its_artefact_comes_back(
    client: Client, bench: Bench, kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, out = tmp_path / "model", tmp_path / "out"
    folder.mkdir()
    for path, data in kit.model_files().items():
        (folder / path).write_bytes(data)
    with client:
        sent = upload.send(client, upload.hash_files(upload.collect(folder), lambda _: None), upload.Progress())
        checkpoint = client.post("/v1/checkpoints", {"source": {"upload": sent}, "name": "model"})
        job = client.post("/v1/jobs", {"checkpoint": checkpoint["id"], "recipe": "fast", "name": "n"})
        bench.work_off(bench.jobs.get("ada", job["id"]))
        states: list[str] = []
        assert client.watch(job["id"], lambda seen: states.append(seen["status"]), 0.01)["status"] == "succeeded"
        [artefact] = client.get(f"/v1/jobs/{job['id']}/artefacts")["items"]
        content = bench.store.read(
            bench.jobs.artefact("ada", artefact["id"]).key,
        )
        digest = hashlib.sha256(content).hexdigest()
        with writing(bench.engine) as session:
            session.execute(update(Artefact).values(sha256=digest, size=len(content)))
        [artefact] = client.get(f"/v1/jobs/{job['id']}/artefacts")["items"]
        out.mkdir()
        (out / "model.safetensors.part").write_bytes(content[:10])  # an earlier download broke off here
        assert client.download(artefact, out).read_bytes() == content


def test_what_the_service_refuses_is_raised_as_what_it_is(client: Client, bench: Bench) -> None:
    job = bench.submit()
    with client:
        with pytest.raises(NotFound):
            client.job("job_none")
        with pytest.raises(InvalidRecipe, match="no preset"):
            client.post("/v1/jobs", {"checkpoint": job.checkpoint, "recipe": "nothing"})
        with pytest.raises(Conflict):
            client.post(f"/v1/jobs/{job.id}/retry")
        assert client.post(f"/v1/jobs/{job.id}/cancel")["status"] == "cancelled"
