"""The real engine on a real queue: killed in the middle of quantising, the job still ends in the very same bytes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.processes import Child, tail
from core.config import Settings
from core.jobs.checkpoints import CheckpointService
from core.jobs.dispatch import BrokerDispatcher
from core.jobs.requests import PathSource, SubmitJob
from core.jobs.service import JobService
from core.jobs.views import JobView
from core.recipe.recipe import load_recipe

if TYPE_CHECKING:
    from tests.service.conftest import Bench

pytestmark = pytest.mark.xdist_group("worker_processes")

OWNER = "ada"
DATA_FREE: dict[str, Any] = {
    "version": 1,
    "target": {"bits_per_param": 6.5},
    "format": "t7_6@64",
    "allocation": "uniform",
    "calibration": False,
    "evaluation": False,
}
MEASURED = DATA_FREE | {
    "format": "int4@32",
    "allocation": "fisher",
    "calibration": {"text": "builtin", "sequences": 2, "sequence_length": 64},
    "evaluation": {"text": "builtin", "sequences": 2, "sequence_length": 64},
}


@dataclass
class House:
    """A worker, a reconciler and the services of one owner around one store."""

    bench: Bench
    settings: Settings
    environment: dict[str, str]
    folder: Path
    children: list[Child] = field(default_factory=list)

    def start(self, name: str, module: str) -> Child:
        child = Child(name, [sys.executable, "-m", module], self.folder / f"{name}.log", environment=self.environment)
        child.start()
        self.children.append(child)
        return child

    def worker(self, name: str) -> Child:
        child = self.start(name, "worker")
        child.wait_until(lambda: '"worker_started"' in tail(child.log, 1000), 60)
        return child

    def submit(self, source: Path, recipe: dict[str, Any]) -> JobView:
        registered = CheckpointService(self.bench.engine, self.settings, self.bench.store).register(
            OWNER, PathSource(path=str(source))
        )
        request = SubmitJob(checkpoint=registered.id, recipe=load_recipe(recipe).canonical())
        return self.bench.jobs.submit(OWNER, request).job

    def wait(self, happened: Callable[[], object], what: str, timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while not happened():
            logs = "\n".join(f"--- {child.name}\n{tail(child.log, 20)}" for child in self.children)
            assert time.monotonic() < deadline, f"{what} did not happen\n{logs}"
            time.sleep(0.02)

    def wait_for_quantise(self, job: JobView) -> None:
        """Until a shard is being encoded."""

        def under_way() -> bool:
            steps = self.bench.now(job).steps
            assert not all(step.status == "succeeded" for step in steps if step.kind == "quantise"), "it was too fast"
            return any(step.kind == "quantise" and step.status == "running" for step in steps)

        self.wait(under_way, "the first shard")

    def finished(self, job: JobView) -> JobView:
        self.wait(lambda: self.bench.now(job).finished_at, "the end of the job")
        done = self.bench.now(job)
        assert done.status == "succeeded", done.failure
        return done

    def artefacts(self, job: JobView) -> list[tuple[str, str, int]]:
        return [(found.path, found.sha256, found.size) for found in self.bench.jobs.artefacts(OWNER, job.id)]

    def forget_results(self) -> None:
        """So that the next job does everything anew."""
        for key, _ in list(self.bench.store.list("steps/")):
            self.bench.store.delete(key)


@pytest.fixture
def house(bench: Bench, broker: str, environment: dict[str, str], tmp_path: Path) -> Iterator[House]:
    settings = bench.settings.model_copy(update={"shard_bytes": 8 << 20})
    environment |= {"BITMILL_SHARD_BYTES": str(8 << 20), "OMP_NUM_THREADS": "1"}
    bench = bench.with_settings(shard_bytes=8 << 20)
    bench.jobs = JobService(bench.engine, settings, BrokerDispatcher(broker), bench.store)
    house = House(bench, settings, environment, tmp_path)
    yield house
    for child in house.children:
        child.stop(grace_s=0)


@pytest.fixture
def layers(tmp_path: Path) -> Path:
    """Twenty-four MiB of weights of no known architecture: three shards of about a second each."""
    folder = tmp_path / "sources" / "layers"
    folder.mkdir(parents=True)
    chance = torch.Generator().manual_seed(1)
    tensors = {f"layers.{at}.weight": torch.randn(1024, 1024, generator=chance).to(torch.bfloat16) for at in range(12)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "layers"}')
    return folder


def engine_of(worker: Child) -> int:
    """The process id of the worker's engine."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == worker.pid and b"worker.engine" in (entry / "cmdline").read_bytes():
                return int(entry.name)
    raise AssertionError("the worker has no engine")


def kill_engine(house: House, worker: Child) -> None:
    os.kill(engine_of(worker), signal.SIGKILL)


def kill_worker(house: House, worker: Child) -> None:
    assert worker.process is not None
    worker.process.send_signal(signal.SIGKILL)
    worker.process.wait()
    house.worker("second")


@pytest.mark.parametrize("kill", [kill_engine, kill_worker])
def test_a_kill_in_the_middle_of_quantising_changes_no_byte(
    house: House, layers: Path, kill: Callable[[House, Child], None]
) -> None:
    house.start("reconciler", "worker.reconciler")
    worker = house.worker("first")
    job = house.submit(layers, DATA_FREE)
    house.wait_for_quantise(job)
    kill(house, worker)
    disturbed = house.finished(job)
    shards = [step for step in disturbed.steps if step.kind == "quantise"]
    assert len(shards) == 4
    assert sum(step.attempts for step in shards) == len(shards) + 1
    house.forget_results()
    undisturbed = house.finished(house.submit(layers, DATA_FREE))
    assert {step.status for step in undisturbed.steps} == {"succeeded"}
    assert house.artefacts(undisturbed) == house.artefacts(disturbed)


def test_the_service_makes_the_bytes_of_the_local_pipeline_whatever_the_shards_and_workers(
    house: House, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    from core.pipeline.local import run_recipe

    house.environment["BITMILL_SHARD_BYTES"] = "60000"
    settings = house.settings.model_copy(update={"shard_bytes": 60_000})
    house.bench.jobs.settings = settings
    house.start("reconciler", "worker.reconciler")
    house.worker("first")
    house.worker("second")
    done = house.finished(house.submit(tiny_checkpoint, MEASURED))
    assert len([step for step in done.steps if step.kind == "quantise"]) > 2
    run_recipe(tiny_checkpoint, load_recipe(MEASURED), tmp_path / "local", device="cpu")
    local = {
        path.relative_to(tmp_path / "local").as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (tmp_path / "local").rglob("*")
        if path.is_file()
    }
    assert {path: sha for path, sha, _ in house.artefacts(done)} == local


def test_a_second_recipe_reuses_the_estimate_of_the_first(house: House, tiny_checkpoint: Path) -> None:
    house.start("reconciler", "worker.reconciler")
    house.worker("first")
    house.finished(house.submit(tiny_checkpoint, MEASURED))
    other = house.finished(house.submit(tiny_checkpoint, MEASURED | {"target": {"bits_per_param": 7.0}}))
    assert {step.kind: step.status for step in other.steps}["calibrate"] == "reused"


def test_weights_that_are_no_numbers_fail_the_job_and_name_the_tensor(house: House, layers: Path) -> None:
    tensors = load_file(layers / "model.safetensors")
    tensors["layers.7.weight"][3, 4] = float("inf")
    save_file(tensors, layers / "model.safetensors", {"format": "pt"})
    house.worker("first")
    job = house.submit(layers, DATA_FREE)
    house.wait(lambda: house.bench.now(job).finished_at, "the end of the job")
    failure = house.bench.now(job).failure
    assert failure is not None
    assert (failure.code, failure.kind, failure.tensor) == ("non_finite_weights", "numerical", "layers.7.weight")
    assert house.artefacts(job) == []
