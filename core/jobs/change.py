"""One transaction of the queue, and the hints that go out after it is committed.

`Unit.change()` opens a `Change`: a write session, the rows' moves by the table of states, and an outbox. A hint leaves
only after the commit, so no worker ever hears of a row that it cannot see; when the broker does not take it, the row
says so and the reconciler sends it at its next pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import cached_property

import structlog
from sqlalchemy import DateTime, Engine, func, select

from core.config import Settings
from core.errors import BitmillError
from core.jobs.dispatch import Dispatcher, queue_for
from core.jobs.repository import steps as step_rows
from core.jobs.repository import workers as worker_rows
from core.jobs.sessions import WriteSession, writing
from core.jobs.states import JOB, STEP, move
from core.jobs.tables import Job, Step
from core.storage.object_store import ObjectStore

log = structlog.get_logger()


class Change:
    """A transaction under way. The caller locks the job before it changes anything of it."""

    def __init__(self, session: WriteSession, settings: Settings, exists: Callable[[str], bool]) -> None:
        self.session, self.settings, self.exists = session, settings, exists
        self.outbox: dict[str, str] = {}

    @cached_property
    def now(self) -> datetime:
        """The database's clock, read when first asked, which is after the job's lock was taken."""
        with self.session.no_autoflush:  # rows may be half changed when it is first asked
            return self.session.scalars(select(func.clock_timestamp(type_=DateTime(timezone=True)))).one()

    @cached_property
    def gpu_workers(self) -> bool:
        with self.session.no_autoflush:
            return worker_rows.gpu_alive(self.session)

    def move_job(self, job: Job, trigger: str) -> None:
        job.status = move(JOB, job.status, trigger)
        if job.status == "running":
            job.started_at = self.now
        if job.status in JOB.terminal:
            job.finished_at = self.now

    def move_step(self, step: Step, trigger: str) -> None:
        step.state = move(STEP, step.state, trigger)
        step.attempt_id = None  # whatever leaves or never enters `running` has none; `claim` sets it
        if step.state in STEP.terminal:
            step.finished_at = self.now

    def hint(self, step: Step, *, urgent: bool = False) -> None:
        """Send the step's id when this is committed; a step that has to wait is the reconciler's to send."""
        step.dispatched_at, step.dispatches = None, 0
        if step.not_before is None:
            step.queue = queue_for(step.kind, gpu_workers=self.gpu_workers, urgent=urgent)
            step.dispatched_at, step.dispatches = self.now, 1
            self.outbox[step.id] = step.queue


class Unit:
    """What all services of the queue are made of."""

    def __init__(self, engine: Engine, settings: Settings, dispatcher: Dispatcher | None, store: ObjectStore) -> None:
        self.engine, self.settings, self.dispatcher, self.store = engine, settings, dispatcher, store

    @contextlib.contextmanager
    def change(self) -> Iterator[Change]:
        """A transaction that is committed when the block ends, and then sends its hints."""
        with writing(self.engine) as session:
            change = Change(session, self.settings, lambda key: self.store.size(key) is not None)
            yield change
        self.send(change.outbox)

    def send(self, hints: dict[str, str]) -> int:
        """Send the hints (queue by step id); how many the broker took. Never raises: the rest is marked as not sent."""
        if self.dispatcher is None or not hints:
            return 0
        waiting = dict(hints)
        for step_id, queue in hints.items():
            try:
                self.dispatcher.send(step_id, queue)
            except Exception as error:  # noqa: BLE001 - whatever a broker's client raises
                log.warning("hint_not_sent", step_id=step_id, error=repr(error)[:200])
                break
            del waiting[step_id]
        if waiting:
            with contextlib.suppress(BitmillError), writing(self.engine) as session:
                step_rows.mark_unsent(session, waiting)
        return len(hints) - len(waiting)
