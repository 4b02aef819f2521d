"""`python -m worker`: one worker, that is one Celery process, one engine, one device."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import structlog

from core.config import Settings
from core.ids import new_id
from core.jobs.dispatch import BrokerDispatcher
from core.jobs.queue import StepQueue
from core.jobs.sessions import connect
from core.jobs.workers import WorkerRegistry
from core.storage.object_store import open_store
from worker import logs, scratch, tasks
from worker.celery_app import make_app
from worker.devices import queues_of
from worker.engine_process import ENGINE_COMMAND
from worker.pulse import WorkerPulse
from worker.supervisor import Supervisor

log = structlog.get_logger()


def main(engine_command: Sequence[str] = ENGINE_COMMAND) -> int:
    """Work until SIGTERM; the exit status is Celery's."""
    settings = Settings()
    logs.configure(settings)
    missing = [name for name in ("database_url", "broker_url") if not getattr(settings, name)]
    if missing:
        sys.stderr.write("".join(f"BITMILL_{name.upper()} is not set\n" for name in missing))
        return 2
    worker_id = new_id("worker")
    structlog.contextvars.bind_contextvars(worker_id=worker_id)
    scratch.remove_abandoned(settings.scratch)
    with scratch.take(settings.scratch, worker_id):
        try:
            return _work(settings, worker_id, engine_command)
        finally:
            scratch.give_back(settings.scratch, worker_id)


def _work(settings: Settings, worker_id: str, engine_command: Sequence[str]) -> int:
    engine = connect(settings.database_url, pool_size=4)
    queue = StepQueue(engine, settings, BrokerDispatcher(settings.broker_url), open_store(settings))
    supervisor = Supervisor(settings, queue, worker_id, engine_command=engine_command)
    pulse = WorkerPulse(WorkerRegistry(engine), settings, worker_id)
    supervisor.on_device = pulse.device_is
    supervisor.warm()  # in the main thread, which lasts as long as the process
    pulse.start()
    try:
        return _consume(settings, supervisor, worker_id)
    finally:
        supervisor.close()
        pulse.stop()
        engine.dispose()


def _consume(settings: Settings, supervisor: Supervisor, worker_id: str) -> int:
    from celery.signals import worker_shutting_down

    def bound(step_id: str) -> str:
        with structlog.contextvars.bound_contextvars(worker_id=worker_id):  # the task has a thread of its own
            return tasks.execute_step(supervisor, step_id)

    def stop(**_: Any) -> None:
        supervisor.stop()

    worker_shutting_down.connect(stop, weak=False)
    app = make_app(settings, bound)
    worker = app.Worker(
        hostname=f"{worker_id}@bitmill",
        queues=list(queues_of(settings.queue)),
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        quiet=True,
        loglevel="WARNING",
    )
    log.info("worker_started", queues=settings.queue, device=settings.device)
    worker.start()
    return int(worker.exitcode or 0)


if __name__ == "__main__":
    sys.exit(main())
