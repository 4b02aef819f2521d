"""The only now(): everything that needs wall-clock or elapsed time takes it from here.

Deadlines of leases are *not* measured here but by the database's clock, so that workers with wrong clocks do no harm.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime


def now() -> datetime:
    """The current time, timezone-aware, in UTC."""
    return datetime.now(UTC)


def monotonic() -> float:
    """Seconds on a clock that never goes back; for durations only."""
    return time.monotonic()
