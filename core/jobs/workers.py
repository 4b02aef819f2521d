"""The register of workers: who is there, with which device, and what each is doing."""

from __future__ import annotations

from sqlalchemy import Engine

from core.jobs.repository import workers as worker_rows
from core.jobs.sessions import reading, writing
from core.jobs.views import WorkerView


class WorkerRegistry:
    """Workers report here; nothing is decided by it but whether the queue `gpu` has somebody to serve it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def hello(self, worker_id: str, *, hostname: str, queues: tuple[str, ...], device: str) -> None:
        """A worker starts, or has learnt what its device is."""
        with writing(self.engine) as session:
            worker_rows.put(session, worker_id, hostname, list(queues), device)

    def beat(self, worker_id: str) -> bool:
        """It is still there; False when nobody said hello by that name."""
        with writing(self.engine) as session:
            return worker_rows.beat(session, worker_id)

    def goodbye(self, worker_id: str) -> None:
        """It stops in order."""
        with writing(self.engine) as session:
            worker_rows.leave(session, worker_id)

    def list(self) -> tuple[WorkerView, ...]:
        """Living workers, and those that left within the hour."""
        with reading(self.engine) as session:
            return tuple(
                WorkerView(
                    id=worker.id,
                    hostname=worker.hostname,
                    queues=tuple(worker.queues),
                    device=worker.device,
                    started_at=worker.started_at,
                    beat_at=worker.beat_at,
                    state=worker.state,
                    step=step,
                )
                for worker, step in worker_rows.listed(session)
            )
