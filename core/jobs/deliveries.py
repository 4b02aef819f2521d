"""Sending what webhooks shall hear of: at least once, signed, again after a growing wait, never to closed addresses.

A delivery is claimed by counting its attempt and moving its due time to the end of a lease, in one UPDATE: two
processes never attempt it together, one that dies leaves it due again, and a result is written only by the attempt that
is the latest. One webhook has one delivery in flight per process, so a slow receiver waits for itself alone; the
reconciler's own passes do not wait at all, since deliveries have threads and connections of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping

import structlog
from sqlalchemy import Engine

from core import __version__
from core.clock import monotonic
from core.config import Settings
from core.errors import BitmillError
from core.jobs import outgoing
from core.jobs.messages import signed
from core.jobs.repository import webhooks as webhook_rows
from core.jobs.repository.webhooks import Claimed
from core.jobs.sessions import writing

log = structlog.get_logger()

# Standard Webhooks' schedule: seconds to wait after the first attempt, the second, ...; ten attempts in three days
SCHEDULE = (5.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0, 50400.0, 72000.0, 86400.0)
GONE = 410
_SLOTS = 32
_LEASE_S = 120.0  # more than the deadline of an attempt and the patience of a resolver
_TURN_S = 15.0  # a webhook with much to hear gives its slot back after that
_LAST_S = 3.0
_ERROR_CHARS = 300
_FORGET_EVERY_S, _FORGET_BATCH = 600.0, 1000

Post = Callable[[str, bytes, Mapping[str, str]], int]


class Deliverer:
    """Sends due deliveries. `post` answers with a status, or raises."""

    def __init__(self, engine: Engine, settings: Settings, post: Post | None = None) -> None:
        self.engine, self.settings = engine, settings
        self._post = post or self._post_outside
        self._forget_at = 0.0

    def serve(self, ended: threading.Event) -> None:
        """Deliver until `ended` is set; an attempt that does not end soon then is made again after its lease."""
        turns: dict[threading.Thread, str] = {}
        while not ended.is_set():
            turns = {thread: webhook for thread, webhook in turns.items() if thread.is_alive()}
            try:
                turns |= self._start_turns(turns.values(), ended)
                self.forget_old()
            except Exception as error:  # noqa: BLE001 - the next round may find the database again
                log.warning("deliveries_failed", error=repr(error)[:_ERROR_CHARS])
            ended.wait(self.settings.webhook_poll_s)
        deadline = monotonic() + _LAST_S
        for thread in turns:
            thread.join(max(0.0, deadline - monotonic()))

    def run_once(self) -> int:
        """Attempt the first due delivery of every webhook, together; how many."""
        claims = self._claim(())
        threads = [threading.Thread(target=self._attempt, args=(claimed,), daemon=True) for claimed in claims]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len(claims)

    def forget_old(self) -> int:
        """Every now and then: remove what is too old from the log; how many."""
        if monotonic() < self._forget_at:
            return 0
        self._forget_at = monotonic() + _FORGET_EVERY_S
        with writing(self.engine) as session:
            return webhook_rows.forget_old(session, self.settings.webhook_log_s, _FORGET_BATCH)

    def _start_turns(self, busy: Iterable[str], ended: threading.Event) -> dict[threading.Thread, str]:
        """A thread for each webhook that has something due and no thread yet, as far as there are slots."""
        started = {
            threading.Thread(target=self._turn, args=(claimed, ended), daemon=True): claimed.webhook_id
            for claimed in self._claim(tuple(busy))
        }
        for thread in started:
            thread.start()
        return started

    def _claim(self, busy: tuple[str, ...]) -> list[Claimed]:
        if len(busy) >= _SLOTS:
            return []
        with writing(self.engine) as session:
            return webhook_rows.claim(session, _SLOTS - len(busy), busy, _LEASE_S)

    def _turn(self, claimed: Claimed, ended: threading.Event) -> None:
        """Attempt what is due for one webhook, one after the other."""
        deadline = monotonic() + _TURN_S
        claims = [claimed]
        while claims and self._attempt(claims[0]) and not ended.is_set() and monotonic() < deadline:
            with writing(self.engine) as session:
                claims = webhook_rows.claim_next(session, claimed.webhook_id, _LEASE_S)

    def _attempt(self, claimed: Claimed) -> bool:
        """Send it and write down what came of it; whether the receiver took it."""
        headers = signed(claimed.secret, claimed.id, claimed.at, claimed.body)
        headers |= {"Content-Type": "application/json", "User-Agent": f"Bitmill/{__version__}", "Connection": "close"}
        status, error = None, ""
        try:
            status = self._post(claimed.url, claimed.body.encode(), headers)
        except (BitmillError, OSError) as failure:
            error = _told(failure)
        except Exception:
            log.exception("delivery_broke", delivery_id=claimed.id)  # a defect of ours costs this attempt only
            error = "an error inside the service"
        taken = status is not None and 200 <= status < 300
        try:
            self._settle(claimed, status, error or f"the receiver answered {status}", taken=taken)
        except BitmillError as failure:
            log.warning("delivery_not_settled", delivery_id=claimed.id, error=failure.detail)
            return False
        return taken

    def _settle(self, claimed: Claimed, status: int | None, error: str, *, taken: bool) -> None:
        about = {"delivery_id": claimed.id, "webhook_id": claimed.webhook_id, "kind": claimed.kind}
        with writing(self.engine) as session:
            webhook = webhook_rows.lock(session, claimed.webhook_id)
            if taken and status is not None:
                if webhook_rows.delivered(session, claimed, status):
                    webhook.failing_since = None
                    log.info("webhook_delivered", **about, attempt=claimed.attempt)
                return
            again = claimed.attempt <= len(SCHEDULE)
            if again:
                kept = webhook_rows.again(session, claimed, status, error, SCHEDULE[claimed.attempt - 1])
            else:
                kept = webhook_rows.given_up(session, claimed, status, error)
            if not kept:
                return
            log.warning("webhook_not_delivered", **about, attempt=claimed.attempt, error=error, again=again)
            failing = webhook_rows.failing(session, webhook, self.settings.webhook_disable_s)
            if status == GONE or failing:
                webhook_rows.disable(session, webhook, "gone" if status == GONE else "failing")
                log.warning("webhook_disabled", webhook_id=webhook.id, reason=webhook.disabled_reason)

    def _post_outside(self, url: str, body: bytes, headers: Mapping[str, str]) -> int:
        return outgoing.post(url, body, headers, allow_private=self.settings.allow_private_webhooks)


def _told(failure: Exception) -> str:
    """What the log of deliveries says of a failure; nothing that the receiver has sent."""
    text = failure.detail if isinstance(failure, BitmillError) else str(failure) or type(failure).__name__
    return text[:_ERROR_CHARS]
