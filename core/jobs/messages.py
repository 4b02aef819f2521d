"""Messages of webhooks as Standard Webhooks has them: `{type, timestamp, data}`, and the headers that sign one.

The signature is HMAC-SHA256 over `id.timestamp.body`; its key is what follows `whsec_` in the secret, in base64. The id
stays the same however often a message is sent, the timestamp is that of the attempt.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from datetime import UTC, datetime
from typing import Any

from core.ids import canonical_json

PREFIX = "whsec_"


def message(kind: str, at: datetime, data: dict[str, Any]) -> str:
    """The body: JSON text that is stored and sent as it is, so that every attempt is the same."""
    stamp = at.astimezone(UTC).isoformat().replace("+00:00", "Z")
    return canonical_json({"type": kind, "timestamp": stamp, "data": data})


def signed(secret: str, message_id: str, at: datetime, body: str) -> dict[str, str]:
    """The headers `webhook-id`, `webhook-timestamp` (Unix seconds) and `webhook-signature`."""
    stamp = str(int(at.timestamp()))
    key = base64.b64decode(secret.removeprefix(PREFIX))
    digest = hmac.new(key, f"{message_id}.{stamp}.{body}".encode(), hashlib.sha256).digest()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": stamp,
        "webhook-signature": "v1," + base64.b64encode(digest).decode(),
    }
