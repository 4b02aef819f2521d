"""Claims steps and has the engine do them: the only writer of an attempt. Never imports torch.

One step at a time, in the caller's thread, with a heartbeat thread beside it that renews the lease. Whatever happens to
the engine has one consequence: an answer is handed in, a failure is handed in, the owner's cancel or the worker's stop
is carried out, or the lease is lost and nothing is written. An engine that hangs is silent, and is killed.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import structlog

from core.clock import monotonic
from core.config import Settings
from core.errors import BitmillError, EngineDied, ErrorClass, StoreUnavailable
from core.jobs.queue import Claim, StepQueue
from worker.engine_process import ENGINE_COMMAND, EngineProcess
from worker.protocol import Done, Execute, Failed, Log, Progress

log = structlog.get_logger()

_POLL_S = 0.1
_SILENCE_S = 300.0  # an engine pulses every few seconds; this long without a word is a hang
_HAND_IN_PAUSE_S = 0.5
_LOG_LINES_KEPT = 1000
_STEPS_PER_ENGINE = 32


class Outcome(StrEnum):
    """How `execute` ended."""

    NOTHING = "nothing"  # there was nothing to claim
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"
    LOST = "lost"  # the lease is gone: nothing was written


@dataclass
class _Hand:
    """The step in hand, shared by the thread that does it and the heartbeat."""

    claim: Claim
    engine: EngineProcess
    progress: float = 0.0
    message: str = ""
    verdict: Outcome | None = None  # set by whoever decides that the engine must end
    handing_in: bool = False
    ended: threading.Event = field(default_factory=threading.Event)
    lines: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    renewed_at: float = field(default_factory=monotonic)
    stop_asked_at: float | None = None

    def end(self, verdict: Outcome) -> None:
        """Kill the engine for that reason, the first one given counts."""
        self.verdict = self.verdict or verdict
        self.engine.kill()


class Supervisor:
    """One worker's hands."""

    def __init__(
        self,
        settings: Settings,
        queue: StepQueue,
        worker_id: str,
        *,
        engine_command: Sequence[str] = ENGINE_COMMAND,
        environment: Mapping[str, str] | None = None,
        silence_s: float = _SILENCE_S,
        steps_per_engine: int = _STEPS_PER_ENGINE,
    ) -> None:
        self.settings, self.queue, self.worker_id = settings, queue, worker_id
        self._start: Callable[[], EngineProcess] = lambda: EngineProcess(engine_command, environment)
        self._silence_s, self._steps_per_engine = silence_s, steps_per_engine
        self._engine: EngineProcess | None = None
        self._stopping = threading.Event()
        self.on_device: Callable[[str], None] = lambda _device: None

    @property
    def engine(self) -> EngineProcess | None:
        """The engine that is warm or at work."""
        return self._engine

    def warm(self) -> None:
        """Start the engine before there is work for it. Call from a thread that lasts."""
        self._engine = self._engine or self._start()

    def stop(self) -> None:
        """Have the step in hand end at the next tensor and claim no more. Safe in a signal handler."""
        self._stopping.set()

    def close(self) -> None:
        """End the engine."""
        self._stopping.set()
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def execute(self, step_id: str) -> Outcome:
        """Claim and do the step, if there is anything to claim. Raises only when the claim itself cannot be asked."""
        if self._stopping.is_set():
            return Outcome.NOTHING
        claim = self.queue.claim(step_id, self.worker_id)
        if claim is None:
            log.info("nothing_to_claim", step_id=step_id)
            return Outcome.NOTHING
        names = {"job_id": claim.job_id, "step_id": claim.step_id, "attempt_id": claim.attempt_id}
        with structlog.contextvars.bound_contextvars(**names, kind=claim.request.kind, index=claim.request.index):
            log.info("attempt_started")
            began = monotonic()
            outcome = self._attempt(claim)
            log.info("attempt_ended", outcome=str(outcome), seconds=round(monotonic() - began, 3))
            return outcome

    def _attempt(self, claim: Claim) -> Outcome:
        scratch = self.settings.scratch / self.worker_id / claim.attempt_id
        hand = _Hand(claim, self._engine_for(claim))
        heart = threading.Thread(target=self._heartbeat, args=(hand,), name="heartbeat", daemon=True)
        heart.start()
        try:
            scratch.mkdir(parents=True)
            return self._do(hand, scratch)
        except BitmillError as error:
            return self._after_error(hand, error)
        except OSError as error:
            return self._after_error(hand, StoreUnavailable(f"scratch folder: {error}", where=str(scratch)))
        finally:
            hand.ended.set()
            heart.join()
            self._keep_lines(hand)
            shutil.rmtree(scratch, ignore_errors=True)

    def _engine_for(self, claim: Claim) -> EngineProcess:
        """The warm engine; a new one for another checkpoint when it has done many steps, so that nothing piles up."""
        engine = self._engine
        if engine is not None and engine.alive:
            worn = engine.steps >= self._steps_per_engine
            if not worn or engine.checkpoint == claim.checkpoint_id:
                engine.checkpoint = claim.checkpoint_id
                return engine
        if engine is not None:
            engine.close()
        engine = self._engine = self._start()
        engine.checkpoint = claim.checkpoint_id
        return engine

    def _do(self, hand: _Hand, scratch: Path) -> Outcome:
        """Talk to the engine until it has answered; EngineDied when it never will."""
        engine = hand.engine
        engine.execute(Execute(request=hand.claim.request, scratch=str(scratch)))
        while True:
            self._watch(hand)
            for message in engine.answers(_POLL_S):
                if isinstance(message, Progress):
                    hand.progress, hand.message = message.fraction, message.message
                elif isinstance(message, Log):
                    hand.lines.append((message.event, message.fields))
                    log.info("engine", engine_event=message.event, fields=message.fields)
                elif isinstance(message, Failed):
                    return self._failed(hand, BitmillError.from_dict(message.error))
                elif isinstance(message, Done):
                    return self._succeeded(hand, message.output)
            if engine.device is not None:
                self.on_device(engine.device)

    def _watch(self, hand: _Hand) -> None:
        """Pass the wish to stop on, and end an engine that does not hear it or says nothing any more."""
        if self._stopping.is_set() and hand.stop_asked_at is None:
            hand.stop_asked_at = monotonic()
            hand.engine.ask_to_stop()
        if hand.stop_asked_at is not None and monotonic() - hand.stop_asked_at > self.settings.engine_grace_s:
            hand.end(Outcome.INTERRUPTED)
        if monotonic() - hand.engine.heard_at > self._silence_s:
            hand.engine.kill()
            raise EngineDied(f"the engine has said nothing for {self._silence_s:.0f} s and was killed")

    def _heartbeat(self, hand: _Hand) -> None:
        """Renew the lease until the step has ended; a lease that is lost, or a cancel, ends the engine."""
        while not hand.ended.wait(self.settings.heartbeat_s):
            self._keep_lines(hand)
            try:
                beat = self.queue.heartbeat(hand.claim.attempt_id, hand.progress, hand.message)
            except Exception as error:  # noqa: BLE001 - whatever the database's client raises: the lease still counts
                log.warning("heartbeat_failed", error=repr(error)[:200])
                if monotonic() - hand.renewed_at > hand.claim.lease_s and not hand.handing_in:
                    hand.end(Outcome.LOST)
                continue
            if hand.handing_in:
                continue  # the result decides; `ok` may be False because it is in already
            if not beat.ok:
                hand.end(Outcome.LOST)
            elif beat.cancel:
                hand.end(Outcome.CANCELLED)
            else:
                hand.renewed_at = monotonic()

    def _keep_lines(self, hand: _Hand) -> None:
        lines, hand.lines = hand.lines[:_LOG_LINES_KEPT], []
        if lines:
            try:
                self.queue.log(hand.claim.attempt_id, lines)
            except Exception as error:  # noqa: BLE001 - a log that cannot be kept is no reason to lose the step
                log.warning("log_not_kept", error=repr(error)[:200])

    def _succeeded(self, hand: _Hand, output: dict[str, Any]) -> Outcome:
        attempt_id = hand.claim.attempt_id
        try:
            taken = self._hand_in(hand, lambda: self.queue.succeed(attempt_id, output))
        except StoreUnavailable:
            raise
        except Exception as error:  # an output that the database does not take is a defect of ours
            log.exception("output_refused")
            return self._failed(hand, BitmillError(f"the step's output was refused: {error}"[:1000]))
        return Outcome.SUCCEEDED if taken else Outcome.LOST

    def _failed(self, hand: _Hand, error: BitmillError) -> Outcome:
        """Hand a failure in. The engine lives on, unless the device may be in disorder."""
        attempt_id = hand.claim.attempt_id
        log.warning("attempt_failed", code=error.code, detail=error.detail, where=error.where)
        if error.kind in (ErrorClass.CAPACITY, ErrorClass.INTERNAL):
            hand.engine.kill()
        taken = self._hand_in(hand, lambda: self.queue.fail(attempt_id, error))
        if error.kind is ErrorClass.INTERRUPTED:
            return Outcome.INTERRUPTED if taken else Outcome.LOST
        return Outcome.FAILED if taken else Outcome.LOST

    def _after_error(self, hand: _Hand, error: BitmillError) -> Outcome:
        """The engine is gone, or the result could not be handed in: the reason that ended it decides."""
        attempt_id = hand.claim.attempt_id
        try:
            match hand.verdict:
                case Outcome.LOST:
                    return Outcome.LOST
                case Outcome.CANCELLED:
                    taken = self._hand_in(hand, lambda: self.queue.cancelled(attempt_id))
                    return Outcome.CANCELLED if taken else Outcome.LOST
                case Outcome.INTERRUPTED:
                    taken = self._hand_in(hand, lambda: self.queue.interrupted(attempt_id))
                    return Outcome.INTERRUPTED if taken else Outcome.LOST
                case _:
                    return self._failed(hand, error)
        except StoreUnavailable:
            return Outcome.LOST  # the lease will run out; the reconciler does the rest

    def _hand_in(self, hand: _Hand, write: Callable[[], bool]) -> bool:
        """Write once the database answers, as long as the lease may still be held."""
        hand.handing_in = True
        while True:
            try:
                return write()
            except StoreUnavailable:
                if monotonic() - hand.renewed_at > hand.claim.lease_s:
                    raise
                hand.ended.wait(_HAND_IN_PAUSE_S)
