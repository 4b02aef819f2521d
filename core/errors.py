"""One tree of errors with stable codes, shared by every room.

An error says what happened (`detail`), where (`where`: a file, tensor, recipe path or step) and what to do (`hint`).
`code` never changes once released; `kind` decides what the queue does next (service: failure classes). No HTTP and no
torch here: the API maps kinds to statuses, the engine sends errors over its protocol as `to_dict()`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, ClassVar, Self


class ErrorClass(StrEnum):
    """What an error means for the attempt that met it."""

    USER = "user"  # the request is wrong: never retried
    CAPACITY = "capacity"  # out of device memory, host memory or disk: once more
    TRANSIENT = "transient"  # a store, hub, database or broker did not answer: backoff
    NUMERICAL = "numerical"  # the weights or the arithmetic are broken: never retried
    LOST = "lost"  # the process or its lease is gone: charged, tried again
    INTERRUPTED = "interrupted"  # asked to stop: not charged
    INTERNAL = "internal"  # a defect of ours


RETRYABLE = frozenset(
    {ErrorClass.CAPACITY, ErrorClass.TRANSIENT, ErrorClass.LOST, ErrorClass.INTERRUPTED, ErrorClass.INTERNAL}
)


class BitmillError(Exception):
    """Root of the tree. Raise a subclass; `internal_error` is what an unknown exception becomes."""

    code: ClassVar[str] = "internal_error"
    kind: ClassVar[ErrorClass] = ErrorClass.INTERNAL

    def __init__(
        self, detail: str, *, where: str = "", hint: str = "", errors: tuple[dict[str, str], ...] = ()
    ) -> None:
        super().__init__(detail)
        self.detail, self.where, self.hint, self.errors = detail, where, hint, errors

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        advice = f" ({self.hint})" if self.hint else ""
        return f"{place}{self.detail}{advice}"

    @property
    def retryable(self) -> bool:
        return self.kind in RETRYABLE

    def to_dict(self) -> dict[str, Any]:
        """The wire and database form; `from_dict` restores the same class."""
        return {
            "code": self.code,
            "class": str(self.kind),
            "retryable": self.retryable,
            "detail": self.detail,
            "where": self.where,
            "hint": self.hint,
            "errors": list(self.errors),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BitmillError:
        """The error of that code, or the root for a code that this version does not know."""
        known = {kind.code: kind for kind in _descendants(BitmillError)}
        make = known.get(str(data.get("code")), BitmillError)
        return make(
            str(data.get("detail", "")),
            where=str(data.get("where", "")),
            hint=str(data.get("hint", "")),
            errors=tuple(data.get("errors", ())),
        )

    def at(self, where: str) -> Self:
        """The same error with its place filled in, if nobody nearer has done so."""
        self.where = self.where or where
        return self


def _descendants(kind: type[BitmillError]) -> list[type[BitmillError]]:
    return [kind, *(deeper for child in kind.__subclasses__() for deeper in _descendants(child))]


class UserError(BitmillError):
    """The request cannot be carried out as written."""

    code, kind = "invalid_request", ErrorClass.USER


class InvalidRecipe(UserError):
    """A recipe that does not validate; `errors` lists each place as {"path", "message"}."""

    code = "invalid_recipe"


class InvalidFormat(UserError):
    """A format string outside the grammar, or an impossible combination."""

    code = "invalid_format"


class MethodNotAvailable(UserError):
    """A name of the contract whose method this version does not have."""

    code = "method_not_available"


class InvalidCheckpoint(UserError):
    """A checkpoint that cannot be read safely: truncated, lying or hostile headers, missing files."""

    code = "invalid_checkpoint"


class PickleRefused(InvalidCheckpoint):
    """Weights in a format that executes code when read."""

    code = "pickle_refused"


class MissingFile(InvalidCheckpoint):
    """A file that this recipe needs (config.json, tokenizer.json, a shard) is not in the checkpoint."""

    code = "missing_file"


class UnsupportedArchitecture(UserError):
    """A forward pass is needed and no known architecture fits the checkpoint."""

    code = "unsupported_architecture"


class InfeasibleTarget(UserError):
    """The budget is below what the formats, clamps and kept tensors can reach."""

    code = "infeasible_target"


class EmptyText(UserError):
    """Calibration or evaluation text that holds too few tokens."""

    code = "empty_text"


class PathNotAllowed(UserError):
    """A path outside the allowed roots, absolute where it must not be, or a link."""

    code = "path_not_allowed"


class DigestMismatch(UserError):
    """Bytes that do not have the sha256 or the size that was promised."""

    code = "digest_mismatch"


class GateFailed(UserError):
    """The exported model is worse than the recipe's gate allows; artefacts are kept."""

    code = "gate_failed"


class NotFound(UserError):
    """No such object, or not the caller's."""

    code = "not_found"


class Conflict(UserError):
    """The object is in a state that does not allow this."""

    code = "conflict"


class IdempotencyMismatch(UserError):
    """The same Idempotency-Key with another body."""

    code = "idempotency_mismatch"


class Unauthenticated(UserError):
    """No API key, or one that is not known."""

    code = "unauthenticated"


class Forbidden(UserError):
    """The key's scopes do not cover this."""

    code = "forbidden"


class QuotaExceeded(UserError):
    """The owner's quota is used up."""

    code = "quota_exceeded"


class NonFiniteWeights(BitmillError):
    """NaN or infinity in a weight."""

    code, kind = "non_finite_weights", ErrorClass.NUMERICAL


class OutOfDisk(BitmillError):
    """Too little disk for what the job will write."""

    code, kind = "out_of_disk", ErrorClass.CAPACITY


class OutOfMemory(BitmillError):
    """The device or the host has too little memory."""

    code, kind = "out_of_memory", ErrorClass.CAPACITY


class StoreUnavailable(BitmillError):
    """The object store or a hub did not answer, or answered with an error that may pass."""

    code, kind = "store_unavailable", ErrorClass.TRANSIENT


class EngineDied(BitmillError):
    """The engine process ended without an answer (killed, crashed, out of memory)."""

    code, kind = "engine_died", ErrorClass.LOST


class LeaseLost(BitmillError):
    """The attempt's lease expired before its work was done."""

    code, kind = "lease_lost", ErrorClass.LOST


class Interrupted(BitmillError):
    """The worker was asked to stop."""

    code, kind = "interrupted", ErrorClass.INTERRUPTED


class DeadlineExceeded(BitmillError):
    """The job ran longer than its limit."""

    code, kind = "deadline_exceeded", ErrorClass.USER
