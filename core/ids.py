"""Identifiers and canonical hashing.

Ids are UUIDv7 (time-ordered) shown with a prefix: `job_0190...`. Hashes are sha256 in hex over canonical JSON, so that
equal content has an equal name on every machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from typing import Any

PREFIXES = {
    "checkpoint": "ckpt",
    "upload": "upl",
    "job": "job",
    "step": "step",
    "attempt": "att",
    "artefact": "art",
    "worker": "wrk",
    "api_key": "key",
    "webhook": "wh",
    "delivery": "msg",
    "request": "req",
}


def uuid7() -> uuid.UUID:
    """A UUIDv7 (RFC 9562): 48 bits of Unix milliseconds, then random bits."""
    millis = time.time_ns() // 1_000_000
    value = (millis << 80) | int.from_bytes(os.urandom(10), "big")
    value = (value & ~(0xF << 76)) | (0x7 << 76)
    value = (value & ~(0x3 << 62)) | (0x2 << 62)
    return uuid.UUID(int=value)


def new_id(kind: str) -> str:
    """A fresh id of that kind (a key of `PREFIXES`), such as `job_0190f3...`: 32 hex digits after the prefix."""
    return f"{PREFIXES[kind]}_{uuid7().hex}"


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces and no NaN: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def content_hash(value: Any) -> str:
    """sha256 (hex) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def derived_seed(seed: int, name: str) -> int:
    """The seed of a tensor, sequence or shard: a 63-bit hash of the job's seed and the name, so order never matters."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
