"""Putting right what died: the one place that acts on time, by the database's clock.

`run_once` is a pass over everything: leases that ran out, jobs that waited or ran too long, hints that were lost,
uploads nobody completed, workers that fell silent. Any number of reconcilers may run; an advisory lock lets one pass
at a time happen. A pass needs the database only: hints that the broker does not take are due again at the next pass.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog
from sqlalchemy import text

from core.errors import BitmillError, DeadlineExceeded
from core.jobs import lifecycle
from core.jobs.change import Unit
from core.jobs.dispatch import queue_for
from core.jobs.queue import reap
from core.jobs.repository import attempts as attempt_rows
from core.jobs.repository import jobs as job_rows
from core.jobs.repository import steps as step_rows
from core.jobs.repository import uploads as upload_rows
from core.jobs.repository import workers as worker_rows
from core.jobs.sessions import ReadSession, reading, writing
from core.jobs.uploads import discard_parts

log = structlog.get_logger()

PASS_LOCK = 0x6269746D  # "bitm": the advisory lock of whoever makes a pass
_BATCH = 500
_SILENT_LEASES = 2.0  # a worker that was not heard for that many leases is gone


class Reconciler(Unit):
    """The background service of the queue."""

    def run_once(self) -> dict[str, int]:
        """One pass; what was done, by name. Empty when another reconciler is at it."""
        with self.engine.connect() as connection:
            if not connection.scalar(text("SELECT pg_try_advisory_lock(:name)"), {"name": PASS_LOCK}):
                return {}
            connection.commit()  # the lock belongs to the session, not to a transaction that would stay open
            try:
                return self._pass()
            finally:
                connection.execute(text("SELECT pg_advisory_unlock(:name)"), {"name": PASS_LOCK})
                connection.commit()

    def _pass(self) -> dict[str, int]:
        return {
            "leases_expired": self._each(attempt_rows.lapsed, lambda found: reap(self, found)),
            "jobs_expired": self._each(job_rows.pending_too_long, self._expire),
            "jobs_overdue": self._each(job_rows.running_too_long, self._end_overdue),
            "uploads_expired": self._each(_expired_uploads, self._expire_upload),
            "workers_gone": self._leave_silent_workers(),
            "redispatched": self.redispatch(),
        }

    def _each(self, find: Callable[[ReadSession, int], list[str]], act: Callable[[str], bool]) -> int:
        """Act on everything that `find` finds, each in a transaction of its own: one that fails stops no other."""
        with reading(self.engine) as session:
            found = find(session, _BATCH)
        done = 0
        for name in found:
            try:
                done += act(name)
            except BitmillError as error:
                log.warning("reconcile_failed", id=name, code=error.code, detail=error.detail)
        return done

    def _expire(self, job_id: str) -> bool:
        with self.change() as change:
            job = job_rows.lock(change.session, job_id)
            if job.status == "queued":
                lifecycle.expire(change, job)
            return job.status == "expired"

    def _end_overdue(self, job_id: str) -> bool:
        with self.change() as change:
            job = job_rows.lock(change.session, job_id)
            if job.status != "running":
                return False
            running = [step.kind for step in step_rows.of_job(change.session, job_id) if step.state == "running"]
            error = DeadlineExceeded(
                f"the job ran longer than its {job.max_runtime_s:g} s",
                hint="raise limits.max_runtime_s and retry: finished steps are reused",
            )
            lifecycle.fail_job(change, job, running[0] if running else "", error)
            return True

    def _expire_upload(self, upload_id: str) -> bool:
        with writing(self.engine) as session:
            ended = upload_rows.finish(session, upload_id, "expired")
        discard_parts(self.store, upload_id)
        return ended

    def _leave_silent_workers(self) -> int:
        with writing(self.engine) as session:
            return worker_rows.leave_silent(session, _SILENT_LEASES * self.settings.lease_s)

    def redispatch(self) -> int:
        """Send hints for ready steps whose last one is older than a delay that doubles with each."""
        with reading(self.engine) as session:
            due = step_rows.due_hints(session, self.settings.redispatch_s, _BATCH)
            gpu_workers = worker_rows.gpu_alive(session)
        queues = {step_id: queue_for(kind, gpu_workers=gpu_workers) for step_id, kind in due}
        with writing(self.engine) as session:  # marked before they are sent: a mark that is wrong is only late
            for queue in set(queues.values()):
                step_rows.mark_sent(session, [step_id for step_id, name in queues.items() if name == queue], queue)
        return self.send(queues)


def _expired_uploads(session: ReadSession, limit: int) -> list[str]:
    return [upload.id for upload in upload_rows.expired(session, limit)]
