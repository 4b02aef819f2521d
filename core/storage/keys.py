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
