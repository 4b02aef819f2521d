"""docker-compose.yml without Docker: the same commands with the same environment, as processes, on real servers.

Only what a container gives is substituted: host names, ports and the folder of the scratch volume.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
import yaml

from cli import upload
from cli.client import Client, Connection
from cli.processes import Child, free_ports
from cli.servers import S3Endpoint, postgres, seaweed, valkey

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = ("migrate", "api", "reconciler", "worker-cpu", "worker-gpu")

pytestmark = pytest.mark.xdist_group("production")


@dataclass(frozen=True)
class Servers:
    """What stands in for the containers that are not ours."""

    database: str
    broker: str
    s3: S3Endpoint


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("servers")
    with (
        postgres(folder / "db", durable=False) as database,
        valkey(folder / "broker") as broker,
        seaweed(folder / "s3") as s3,
    ):
        client = boto3.client(
            "s3",
            endpoint_url=s3.url,
            aws_access_key_id=s3.access_key,
            aws_secret_access_key=s3.secret_key,
            region_name=s3.region,
        )
        client.create_bucket(Bucket="bitmill")
        yield Servers(database, broker, s3)


def environment_of(name: str, servers: Servers, folder: Path) -> dict[str, str]:
    """The environment of a compose service, with secrets filled in and hosts, ports and volumes substituted."""
    given = {
        "POSTGRES_PASSWORD": "unused",
        "S3_ACCESS_KEY": servers.s3.access_key,
        "S3_SECRET_KEY": servers.s3.secret_key,
        "S3_PUBLIC_ENDPOINT": servers.s3.url.replace("127.0.0.1", "localhost"),
        "BITMILL_BOOTSTRAP_KEY": "bm_production_secret",
    }
    settings = {key: interpolated(str(value), given) for key, value in SERVICES[name]["environment"].items()}
    settings["BITMILL_DATABASE_URL"] = servers.database
    settings["BITMILL_BROKER_URL"] = servers.broker
    settings["BITMILL_S3_ENDPOINT"] = servers.s3.url
    image = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(folder)}
    image |= {"BITMILL_DATA_DIR": str(folder), "BITMILL_SCRATCH_DIR": str(folder / "scratch"), "OMP_NUM_THREADS": "1"}
    return image | settings


def interpolated(text: str, values: dict[str, str]) -> str:
    """Compose's own `${NAME:-default}` and `${NAME:?}`."""

    def value(found: re.Match[str]) -> str:
        name, default = found["name"], found["default"]
        assert name in values or default is not None, f"{name} has no value"
        return values.get(name, default or "")

    return re.sub(r"\$\{(?P<name>\w+)(?::\?|:-(?P<default>[^}]*))?\}", value, text)


def command_of(name: str, port: int = 0) -> list[str]:
    command = [str(part) for part in SERVICES[name]["command"]]
    assert command[0] == "python"
    substituted = {"8642": str(port), "0.0.0.0": "127.0.0.1"}
    return [sys.executable, *(substituted.get(part, part) for part in command[1:])]


@pytest.fixture
def stack(servers: Servers, tmp_path: Path) -> Iterator[Connection]:
    [port] = free_ports(1)
    children = {
        name: Child(name, command_of(name, port), tmp_path / f"{name}.log", environment_of(name, servers, tmp_path))
        for name in ("migrate", "api", "reconciler", "worker-cpu")
    }
    url = f"http://127.0.0.1:{port}"
    with contextlib.ExitStack() as running:
        for name, child in children.items():
            child.start()
            running.callback(child.stop)
            if name == "migrate":
                assert child.process is not None
                assert child.process.wait(timeout=60) == 0, child.log.read_text()
        children["api"].wait_until(lambda: _ready(url), 60)
        yield Connection(url, "bm_production_secret")


def _ready(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    return False


def test_an_artefact_goes_through_the_production_stack(
    stack: Connection, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "artefact"
    with Client(stack, patience_s=10) as client:
        files = upload.hash_files(upload.collect(tiny_checkpoint), lambda _: None)
        checkpoint = client.post(
            "/v1/checkpoints", {"source": {"upload": upload.send(client, files, upload.Progress())}}
        )
        job = client.post("/v1/jobs", {"checkpoint": checkpoint["id"], "recipe": "fast"})
        job = client.watch(job["id"], lambda _: None)
        assert job["status"] == "succeeded", job["failure"]
        artefacts = client.get(f"/v1/jobs/{job['id']}/artefacts")["items"]
        first = client._http.get(f"{stack.url}/v1/artefacts/{artefacts[0]['id']}/content")
        assert first.is_redirect, "an S3 store answers with a signed URL"
        assert first.headers["location"].startswith("http://localhost:"), "signed for what clients can reach"
        for artefact in artefacts:
            client.download(artefact, out)
    for line in (out / "SHA256SUMS").read_text().splitlines():
        digest, path = line.split(maxsplit=1)
        assert hashlib.sha256((out / path.lstrip("*")).read_bytes()).hexdigest() == digest
    assert job["summary"]["bits_per_param"] > 0


def test_every_server_and_process_of_the_product_is_there() -> None:
    assert set(SERVICES) == {*OURS, "postgres", "redis", "s3"}


@pytest.mark.parametrize("name", OURS)
def test_our_containers_have_no_privileges_and_their_secrets_come_from_outside(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["read_only"] is True
    for key, value in service["environment"].items():
        if key.endswith(("_KEY", "_DATABASE_URL")):
            assert ":?}" in str(value), f"{key} must be given"


@pytest.mark.parametrize("name", ["api", "postgres", "redis", "s3"])
def test_every_server_has_a_health_check_that_others_wait_for(name: str) -> None:
    assert "healthcheck" in SERVICES[name]


@pytest.mark.parametrize("image", ["api", "worker"])
def test_images_do_not_run_as_root(image: str) -> None:
    lines = (ROOT / "docker" / f"{image}.Dockerfile").read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users, "an image without USER runs as root"
    assert not users[-1].startswith(("0", "root"))


def test_only_the_worker_image_has_torch() -> None:
    assert "worker]" not in (ROOT / "docker" / "api.Dockerfile").read_text()
    assert "'.[worker]'" in (ROOT / "docker" / "worker.Dockerfile").read_text()


@pytest.mark.parametrize("image", ["api", "worker"])
def test_everything_that_an_image_copies_exists_and_is_not_ignored(image: str) -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for line in (ROOT / "docker" / f"{image}.Dockerfile").read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), source
                assert any(source == name or source.startswith(name + "/") for name in allowed), source
