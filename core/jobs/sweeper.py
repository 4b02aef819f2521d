"""What no row speaks for is removed from the store, and rows that are too old from the database.

Promise: an object that a row names, or that work under way may come to name, is never removed; every other object
under our prefixes is, at the first sweep after its grace period. Keys that are none of ours are left alone.

Kept are: `steps/{input_hash}/...` while a step with that hash is not done, and what the outputs of living jobs, or of
steps that ended within `keep_results_days`, name there; whatever an artefact was published under, as long as its job's
row is there; `checkpoints/{sha}/...` that a checkpoint (not deleted), a complete upload or a living job's fetch step
names, or that an open upload may yet become; `uploads/{id}/...` while the upload is open; `jobs/{job}/{attempt}/...`
while the attempt runs.

Three things keep an object from being removed while somebody comes to rely on it:

- Who writes an object inserts its row later. An object younger than `sweep_grace_s` is not even looked at.
- Who finds an old object (a step that reuses an output, an engine or an upload whose put finds its key there and so
  writes nothing) has a row that says so: the step is ready or running, the upload is open. Only a fetch step does not
  know its keys before it ends; while one runs, no checkpoint's files are removed.
- Looking and removing are one: the second look, which decides, and the removal happen while jobs, uploads and
  checkpoints stand still (`repository.sweep.freeze`). Who relies on the object was committed before, and is seen; or
  comes after, and finds it absent. The stillness lasts at most `_STILL_S` at a time, and only orphans cost it.

Ages are measured between the database's clock and the store's: the grace period must be longer than they may differ.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from itertools import islice

import structlog
from sqlalchemy import Engine, text

from core.clock import monotonic
from core.config import Settings
from core.errors import BitmillError
from core.jobs.repository import sweep as sweep_rows
from core.jobs.sessions import ReadSession, WriteSession, reading, writing
from core.jobs.uploads import promised_sha
from core.storage.keys import CHECKPOINTS, PREFIXES, STAGING, STEPS, UPLOADS, owner_of
from core.storage.object_store import ObjectStore, StoredEntry

log = structlog.get_logger()

SWEEP_LOCK = 0x62697473  # "bits": the advisory lock of whoever sweeps
_BATCH = 500
_STILL_S = 0.05
_WAIT_MS = 50
_TRIES = 40
_PAUSE_S = 0.05
_ROWS = 10_000
_MOST_FAILURES = 5


@dataclass
class Swept:
    """What one sweep did: `objects` and `bytes` that it removed, `uploads` that it expired, rows that it removed.

    `busy`: orphans that stay until the next sweep, because the tables never stood still; `failed`: those that the store
    did not remove.
    """

    objects: int = 0
    bytes: int = 0
    busy: int = 0
    failed: int = 0
    uploads: int = 0
    answers: int = 0
    log_lines: int = 0
    events: int = 0


@dataclass
class Sweeper:
    """The background service of the store. `stopping` ends a sweep between two batches."""

    engine: Engine
    settings: Settings
    store: ObjectStore
    stopping: threading.Event = field(default_factory=threading.Event)
    on_removed: Callable[[int, int], None] = lambda _count, _bytes: None

    def run_once(self) -> dict[str, int]:
        """One sweep of everything; what was done, by name. Empty when another sweeper is at it."""
        with self.engine.connect() as connection:
            if not connection.scalar(text("SELECT pg_try_advisory_lock(:name)"), {"name": SWEEP_LOCK}):
                return {}
            connection.commit()
            try:
                return asdict(self._sweep())
            finally:
                connection.execute(text("SELECT pg_advisory_unlock(:name)"), {"name": SWEEP_LOCK})
                connection.commit()

    def _sweep(self) -> Swept:
        swept = Swept()
        with reading(self.engine) as session:
            before = sweep_rows.clock(session) - timedelta(seconds=self.settings.sweep_grace_s)
        self._remove_unfinished(before, swept)
        for prefix in PREFIXES:
            for batch in _batches(self._old(prefix, before)):
                self._remove(self._orphans(batch), swept)
                if self.stopping.is_set():
                    return swept
        self._forget(swept)  # after the objects: an upload that expires here loses them at the next sweep
        return swept

    def _remove_unfinished(self, before: datetime, swept: Swept) -> None:
        try:
            self._removed(swept, *self.store.discard_unfinished(before))
        except BitmillError as error:
            log.warning("unfinished_not_removed", code=error.code, detail=error.detail)

    def _old(self, prefix: str, before: datetime) -> Iterator[StoredEntry]:
        """The objects under the prefix that are past their grace period."""
        listed = self.store.inventory(prefix + "/")
        return (entry for entry in listed if entry.modified < before and owner_of(entry.key)[0])

    def _orphans(self, batch: list[StoredEntry]) -> list[StoredEntry]:
        """The first look, which changes nothing and holds nobody up."""
        with reading(self.engine) as session:
            return self._unnamed(session, batch)

    def _unnamed(self, session: ReadSession, entries: list[StoredEntry]) -> list[StoredEntry]:
        """Those that no row speaks for."""
        keys: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        for entry in entries:
            prefix, owner = owner_of(entry.key)
            keys[prefix][owner].add(entry.key)
        rules = {STEPS: self._kept_results, CHECKPOINTS: _kept_files, UPLOADS: _kept_parts, STAGING: _kept_staging}
        kept = sweep_rows.named_artefacts(session, [entry.key for entry in entries])
        for prefix, owned in keys.items():
            kept |= rules.get(prefix, _kept_exports)(session, owned)
        return [entry for entry in entries if entry.key not in kept]

    def _kept_results(self, session: ReadSession, owned: dict[str, set[str]]) -> set[str]:
        named = sweep_rows.named_results(session, owned.keys(), self.settings.keep_results_days)
        return named | _all_of(owned, sweep_rows.at_work(session, owned.keys()))

    def _remove(self, orphans: list[StoredEntry], swept: Swept) -> None:
        """The second look and the removal, a few at a time, while nothing that could name them changes."""
        left, tries = orphans, _TRIES
        while left and tries and not self.stopping.is_set():
            with writing(self.engine) as session:
                still = sweep_rows.freeze(session, _WAIT_MS)
                if still:
                    left = self._remove_some(session, left, swept)
            tries = _TRIES if still else tries - 1
            if left:
                self.stopping.wait(_PAUSE_S)
        swept.busy += len(left)

    def _remove_some(self, session: WriteSession, entries: list[StoredEntry], swept: Swept) -> list[StoredEntry]:
        """Remove as many as there is time for; what is left."""
        ends = monotonic() + _STILL_S
        some, left = entries[: _BATCH // 10], entries[_BATCH // 10 :]
        found = self._unnamed(session, some)
        for number, entry in enumerate(found):
            if not self._delete(entry, swept) or monotonic() > ends:
                return found[number + 1 :] + left
        return left

    def _delete(self, entry: StoredEntry, swept: Swept) -> bool:
        """Whether the store did it; raises what it says when it has refused several times."""
        try:
            self.store.delete(entry.key)
        except BitmillError as error:
            log.warning("orphan_not_removed", key=entry.key, code=error.code, detail=error.detail)
            swept.failed += 1
            if swept.failed >= _MOST_FAILURES:
                raise
            return False
        self._removed(swept, 1, entry.size)
        return True

    def _removed(self, swept: Swept, count: int, size: int) -> None:
        swept.objects += count
        swept.bytes += size
        self.on_removed(count, size)

    def _forget(self, swept: Swept) -> None:
        """Rows past their time."""
        days = self.settings
        with writing(self.engine) as session:
            swept.uploads = sweep_rows.expire_unused_uploads(session, days.keep_results_days)
            swept.answers = sweep_rows.forget_answers(session, days.keep_answers_days)
        while not self.stopping.is_set():
            with writing(self.engine) as session:
                lines = sweep_rows.forget_logs(session, days.keep_logs_days, _ROWS)
                told = sweep_rows.forget_step_events(session, days.keep_logs_days, _BATCH)
            swept.log_lines, swept.events = swept.log_lines + lines, swept.events + told
            if not lines and not told:
                return


def _all_of(owned: dict[str, set[str]], owners: Iterable[str]) -> set[str]:
    return {key for owner in owners for key in owned.get(owner, ())}


def _kept_files(session: ReadSession, owned: dict[str, set[str]]) -> set[str]:
    every = _all_of(owned, owned)
    if sweep_rows.fetching(session):
        return every
    promised = {promised_sha(upload) for upload in sweep_rows.open_uploads(session)}
    named = sweep_rows.named_files(session, every) | sweep_rows.named_fetched(session)
    return named | _all_of(owned, promised | sweep_rows.completed_uploads(session, owned.keys()))


def _kept_parts(session: ReadSession, owned: dict[str, set[str]]) -> set[str]:
    return _all_of(owned, [upload.id for upload in sweep_rows.open_uploads(session)])


def _kept_staging(session: ReadSession, owned: dict[str, set[str]]) -> set[str]:
    return _all_of(owned, sweep_rows.running_attempts(session, owned.keys()))


def _kept_exports(session: ReadSession, owned: dict[str, set[str]]) -> set[str]:
    return _all_of(owned, sweep_rows.live_jobs(session, owned.keys()))


def _batches(entries: Iterator[StoredEntry]) -> Iterator[list[StoredEntry]]:
    while batch := list(islice(entries, _BATCH)):
        yield batch
