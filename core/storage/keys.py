"""Where objects lie in the store. Keys hold digests and validated file names, no other text of a user."""

from __future__ import annotations


def checkpoint_key(checkpoint_sha: str, path: str) -> str:
    """A file of a checkpoint; `path` has passed `core.storage.checkpoint.validate_path`."""
    return f"checkpoints/{checkpoint_sha}/{path}"


def step_key(input_hash: str, sha256: str, name: str) -> str:
    """A file that a step made. The digest in the key keeps it write-once: other bytes would have another key."""
    return f"steps/{input_hash}/{sha256[:16]}-{name}"


def upload_part_key(upload_id: str, file_no: int, number: int) -> str:
    """A part of an upload that is not complete yet; files count from 0, parts from 1."""
    return f"uploads/{upload_id}/{file_no:06d}/{number:06d}"


STEPS, CHECKPOINTS, UPLOADS, STAGING, ARTEFACTS = PREFIXES = ("steps", "checkpoints", "uploads", "jobs", "artefacts")


def owner_of(key: str) -> tuple[str, str]:
    """(prefix, name of what the object belongs to): an input hash, a checkpoint's sha256, an upload, attempt or job.

    ("", "") for a key that is none of ours.
    """
    prefix, *rest = key.split("/")
    place = 1 if prefix == STAGING else 0
    return (prefix, rest[place]) if prefix in PREFIXES and len(rest) > place + 1 else ("", "")
