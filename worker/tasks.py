"""What the one Celery task does: hand a step id to the supervisor, and let no error out.

An error here would only be Celery's to log: the step is still `ready`, or its lease will run out, and the reconciler
sends the hint again.
"""

from __future__ import annotations

import structlog

from worker.supervisor import Supervisor

log = structlog.get_logger()


def execute_step(supervisor: Supervisor, step_id: object) -> str:
    """The outcome's name, for the log; `refused` for a message that is not ours, `error` when nothing could be done."""
    if not isinstance(step_id, str):
        log.warning("hint_refused", message=repr(step_id)[:200])
        return "refused"
    try:
        return str(supervisor.execute(step_id))
    except Exception:
        log.exception("step_not_executed", step_id=step_id)
        return "error"
