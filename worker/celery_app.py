"""The Celery application of a worker: late acknowledgement, one message in hand, one thread that only supervises.

Nothing relies on Celery remembering anything: messages are hints, results go to the database, retries are the queue's.
Each setting has its reason:

- late acknowledgement and a prefetch of one: a message does not wait behind a busy worker while another is idle;
- no rejection when a worker is lost, and no retries: the lease and the reconciler bring work back, with a limit;
- threads: under prefork a task never learns of SIGTERM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kombu.entity import Queue

from core.config import Settings
from core.jobs.dispatch import TASK_NAME, new_app
from worker.devices import queues_of


def make_app(settings: Settings, execute: Callable[[str], object]) -> Any:
    """An application whose one task hands the step id to `execute`."""
    app = new_app(settings.broker_url)
    app.conf.update(
        task_acks_late=True,
        task_reject_on_worker_lost=False,
        worker_prefetch_multiplier=1,
        worker_concurrency=1,
        worker_pool="threads",
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_send_task_events=False,
        worker_enable_remote_control=True,  # its socket notices a broker that went away while a step was in hand
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        task_queues=[Queue(name, routing_key=name) for name in queues_of(settings.queue)],
        task_default_queue=queues_of(settings.queue)[-1],
        task_create_missing_queues=True,
    )

    @app.task(name=TASK_NAME, acks_late=True, ignore_result=True)  # type: ignore[untyped-decorator]
    def execute_step(step_id: str) -> None:
        execute(step_id)

    return app
