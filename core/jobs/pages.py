"""Cursors of keyset pages: the id of the last row seen, made opaque so that nobody builds on it."""

from __future__ import annotations

import base64
import binascii
import re

from core.errors import UserError


def encode_cursor(last_id: str) -> str:
    return base64.urlsafe_b64encode(last_id.encode()).decode().rstrip("=")


def decode_cursor(cursor: str | None) -> str | None:
    """The id, None for the first page; UserError for anything that `encode_cursor` did not make."""
    if not cursor:
        return None
    try:
        last_id = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode("ascii")
    except (binascii.Error, UnicodeError, ValueError) as error:
        raise UserError("not a cursor of a page", where="cursor") from error
    if not re.fullmatch(r"[a-z]+_[0-9a-f]{32}", last_id):
        raise UserError("not a cursor of a page", where="cursor")
    return last_id
