"""The supervisor with an engine in a real child process and a real database: whatever the engine does, one outcome."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from core.jobs.queue import StepQueue
from core.jobs.sessions import connect
from core.jobs.views import JobView
from worker.supervisor import Outcome, Supervisor

if TYPE_CHECKING:
    from tests.service.conftest import Bench

ROOT = Path(__file__).parents[2]

PRETENDED = str(Path(__file__).with_name("pretended_engine.py"))


@dataclass
class Hands:
    """A supervisor, the folder that tells its engine what to do, and what has been done."""

    bench: Bench
    supervisor: Supervisor
    told: Path

    def tell(self, step: str, what: str) -> None:
        (self.told / step).write_text(what)

    def begun(self) -> list[str]:
        """`pid kind index` of every step that an engine has begun."""
        log = self.told / "log"
        return log.read_text().splitlines() if log.exists() else []

    def execute(self, job: JobView, kind: str, index: int = 0) -> Outcome:
        return self.supervisor.execute(self.bench.step(job, kind, index).id)

    def in_background(self, job: JobView, kind: str) -> Callable[[], Outcome]:
        """Begin the step in another thread and return when the engine is at it; call for the outcome."""
        found: list[Outcome] = []
        before = len(self.begun())
        thread = threading.Thread(target=lambda: found.append(self.execute(job, kind)))
        thread.start()
        wait_until(lambda: len(self.begun()) > before)

        def outcome() -> Outcome:
            thread.join(20)
            return found[0]

        return outcome


def wait_until(happened: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


@pytest.fixture
def hands(bench: Bench, tmp_path: Path, environment: dict[str, str]) -> Iterator[Hands]:
    told = tmp_path / "told"
    told.mkdir()
    command = (sys.executable, PRETENDED, str(told))
    supervisor = Supervisor(bench.settings, bench.queue, "wrk_a", engine_command=command, environment=environment)
    supervisor.warm()
    yield Hands(bench, supervisor, told)
    supervisor.close()


def test_an_engine_does_all_the_steps_of_a_job_and_stays_warm(hands: Hands) -> None:
    job = hands.bench.submit()
    for step in job.steps:
        assert hands.execute(job, step.kind, step.index) == Outcome.SUCCEEDED
    assert hands.bench.now(job).status == "succeeded"
    assert len({line.split()[0] for line in hands.begun()}) == 1


def test_an_engine_that_has_done_many_steps_is_renewed_for_the_next_checkpoint(hands: Hands) -> None:
    hands.supervisor._steps_per_engine = 2
    job = hands.bench.submit()
    for kind in ("fetch", "calibrate", "allocate"):
        assert hands.execute(job, kind) == Outcome.SUCCEEDED
    assert len({line.split()[0] for line in hands.begun()}) == 1
    assert hands.execute(hands.bench.submit(), "fetch") == Outcome.SUCCEEDED
    assert len({line.split()[0] for line in hands.begun()}) == 2


def test_a_hint_for_a_step_that_is_done_does_nothing(hands: Hands) -> None:
    job = hands.bench.submit()
    assert hands.execute(job, "fetch") == Outcome.SUCCEEDED
    assert hands.execute(job, "fetch") == Outcome.NOTHING
    assert len(hands.begun()) == 1


def test_what_libraries_print_does_not_disturb_the_conversation(hands: Hands) -> None:
    job = hands.bench.submit()
    hands.tell("fetch", "print")
    assert hands.execute(job, "fetch") == Outcome.SUCCEEDED


def test_an_engine_that_is_killed_costs_one_attempt(hands: Hands) -> None:
    job = hands.bench.submit()
    hands.tell("fetch", "sleep 30")
    outcome = hands.in_background(job, "fetch")
    assert hands.supervisor.engine is not None
    os.kill(hands.supervisor.engine.process.pid, signal.SIGKILL)
    assert outcome() == Outcome.FAILED
    (attempt,) = hands.bench.attempts(hands.bench.step(job, "fetch").id)
    assert (attempt.state, attempt.error_code, attempt.charged) == ("lost", "engine_died", True)
    assert attempt.error is not None
    assert "SIGKILL" in attempt.error["detail"]
    assert hands.execute(job, "fetch") == Outcome.SUCCEEDED
    assert hands.bench.step(job, "fetch").attempts == 2


@pytest.mark.parametrize(
    ("what", "code"),
    [("exit 3", "engine_died"), ("nonsense", "engine_died"), ("fail out_of_memory", "out_of_memory")],
)
def test_a_failure_is_named_and_the_worker_goes_on(hands: Hands, what: str, code: str) -> None:
    job = hands.bench.submit()
    hands.tell("fetch", what)
    assert hands.execute(job, "fetch") == Outcome.FAILED
    (attempt,) = hands.bench.attempts(hands.bench.step(job, "fetch").id)
    assert attempt.error_code == code
    assert hands.execute(hands.bench.submit(), "fetch") == Outcome.SUCCEEDED


def test_an_error_of_the_user_ends_the_job_and_keeps_the_engine(hands: Hands) -> None:
    job = hands.bench.submit()
    hands.tell("fetch", "fail invalid_checkpoint")
    assert hands.execute(job, "fetch") == Outcome.FAILED
    failure = hands.bench.now(job).failure
    assert failure is not None
    assert (failure.code, failure.step, failure.where) == ("invalid_checkpoint", "fetch", "here")
    assert hands.supervisor.engine is not None
    assert hands.supervisor.engine.alive


def test_a_cancel_reaches_an_engine_that_does_not_listen(hands: Hands) -> None:
    job = hands.bench.submit()
    hands.tell("fetch", "deaf 30")
    outcome = hands.in_background(job, "fetch")
    hands.bench.jobs.cancel("ada", job.id)
    assert outcome() == Outcome.CANCELLED
    assert hands.bench.now(job).status == "cancelled"


def test_a_lost_lease_ends_the_engine_and_writes_nothing(hands: Hands) -> None:
    job = hands.bench.submit()
    hands.tell("fetch", "deaf 30")
    outcome = hands.in_background(job, "fetch")
    hands.bench.let_leases_lapse()
    hands.bench.reconciler.run_once()
    assert outcome() == Outcome.LOST
    assert hands.bench.step(job, "fetch").status == "ready"
    assert hands.bench.step(job, "fetch").attempts == 1


def test_a_stop_ends_the_step_at_the_next_tensor_free_of_charge(hands: Hands) -> None:
    job = hands.bench.submit()
    hands.tell("fetch", "sleep 30")
    outcome = hands.in_background(job, "fetch")
    hands.supervisor.stop()
    assert outcome() == Outcome.INTERRUPTED
    step = hands.bench.step(job, "fetch")
    assert (step.status, step.attempts) == ("ready", 0)
    assert "attempt.interrupted" in hands.bench.kinds(job)
    assert hands.execute(job, "fetch") == Outcome.NOTHING  # it claims no more


def test_a_stop_does_not_wait_for_an_engine_that_does_not_listen(hands: Hands) -> None:
    job = hands.bench.submit()
    hands.tell("fetch", "deaf 30")
    outcome = hands.in_background(job, "fetch")
    began = time.monotonic()
    hands.supervisor.stop()
    assert outcome() == Outcome.INTERRUPTED
    assert time.monotonic() - began < 5
    assert hands.bench.step(job, "fetch").attempts == 0


def test_an_engine_that_hangs_is_killed(bench: Bench, tmp_path: Path, environment: dict[str, str]) -> None:
    command = (sys.executable, PRETENDED, str(tmp_path))
    job = bench.submit()
    (tmp_path / "fetch").write_text("sleep 30")
    supervisor = Supervisor(
        bench.settings, bench.queue, "wrk_a", engine_command=command, environment=environment, silence_s=1.0
    )
    supervisor.warm()
    assert supervisor.engine is not None
    hung = supervisor.engine.process.pid

    def stop_the_engine() -> None:
        wait_until((tmp_path / "log").exists)
        os.kill(hung, signal.SIGSTOP)

    stopper = threading.Thread(target=stop_the_engine)
    stopper.start()
    assert supervisor.execute(bench.step(job, "fetch").id) == Outcome.FAILED
    (attempt,) = bench.attempts(bench.step(job, "fetch").id)
    assert attempt.error is not None
    assert "said nothing" in attempt.error["detail"]
    supervisor.close()


def test_a_long_step_keeps_its_lease_and_tells_its_progress(hands: Hands) -> None:
    job = hands.bench.submit()
    hands.tell("fetch", f"sleep {2 * hands.bench.settings.lease_s}")
    outcome = hands.in_background(job, "fetch")
    wait_until(lambda: hands.bench.step(job, "fetch").progress == 0.5)
    assert hands.bench.step(job, "fetch").message == "half of fetch"
    while hands.bench.step(job, "fetch").status == "running":
        assert hands.bench.reconciler.run_once()["leases_expired"] == 0
        time.sleep(0.2)
    assert outcome() == Outcome.SUCCEEDED


def test_scratch_folders_are_gone_when_their_step_has_ended(hands: Hands) -> None:
    job = hands.bench.submit()
    hands.tell("fetch", "exit 1")
    hands.execute(job, "fetch")
    hands.execute(job, "fetch")
    assert list((hands.bench.settings.scratch / "wrk_a").iterdir()) == []


def test_an_engine_ends_with_its_supervisors_process(tmp_path: Path, environment: dict[str, str]) -> None:
    code = (
        "import sys, time; from worker.engine_process import EngineProcess;"
        f"engine = EngineProcess((sys.executable, {PRETENDED!r}, {str(tmp_path)!r}));"
        "print(engine.process.pid, flush=True); time.sleep(60)"
    )
    import subprocess

    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT, env=environment)
    assert parent.stdout is not None
    engine = int(parent.stdout.readline())
    assert Path(f"/proc/{engine}").exists()
    parent.kill()
    parent.communicate()
    wait_until(lambda: not Path(f"/proc/{engine}").exists() or _is_zombie(engine))


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def test_a_result_waits_for_a_database_that_is_away_for_a_moment(hands: Hands, monkeypatch: pytest.MonkeyPatch) -> None:
    from core.errors import StoreUnavailable

    job = hands.bench.submit()
    real, calls = StepQueue.succeed, []

    def flaky(self: StepQueue, attempt_id: str, output: dict[str, object]) -> bool:
        calls.append(attempt_id)
        if len(calls) < 3:
            raise StoreUnavailable("restarting", where="database")
        return real(self, attempt_id, output)

    monkeypatch.setattr(StepQueue, "succeed", flaky)
    assert hands.execute(job, "fetch") == Outcome.SUCCEEDED
    assert len(calls) == 3


def test_a_database_that_stays_away_costs_the_lease(hands: Hands) -> None:
    job = hands.bench.submit()
    claim = hands.bench.step(job, "fetch").id
    hands.tell("fetch", "sleep 30")
    outcome = hands.in_background(job, "fetch")
    away = connect("postgresql://nobody@/none?host=/nonexistent")
    hands.supervisor.queue.engine = away
    assert outcome() == Outcome.LOST
    hands.supervisor.queue.engine = hands.bench.engine
    assert hands.bench.step(job, "fetch").id == claim
    time.sleep(0.1)
    hands.bench.reconciler.run_once()
    assert hands.bench.step(job, "fetch").status == "ready"
