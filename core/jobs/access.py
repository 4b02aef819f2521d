"""Who may do what: API keys with an owner and scopes, known by the sha256 of their secret only.

A secret has 256 random bits, so it cannot be guessed from its digest and needs no slow hash. `write` includes `read`,
`admin` includes both.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import get_args

from sqlalchemy import Engine

from core.errors import Forbidden, NotFound, Unauthenticated, UserError
from core.ids import new_id
from core.jobs.repository import access as access_rows
from core.jobs.sessions import reading, writing
from core.jobs.tables import ApiKey
from core.jobs.views import KeyView, Scope

SCOPES: tuple[Scope, ...] = get_args(Scope)
LOCAL_OWNER = "local"
_IMPLIED: dict[str, frozenset[Scope]] = {
    "read": frozenset({"read"}),
    "write": frozenset({"read", "write"}),
    "admin": frozenset({"read", "write", "admin"}),
}
_SHORTEST_SECRET = 16
_SHOWN = 8


@dataclass(frozen=True)
class Principal:
    """Whoever a key speaks for. `scopes` holds the implied ones too."""

    key_id: str
    owner: str
    scopes: frozenset[Scope]

    def require(self, scope: Scope) -> None:
        """Forbidden unless the key covers `scope`."""
        if scope not in self.scopes:
            raise Forbidden(f"this key does not have the scope {scope!r}", hint="use another key")


LOCAL = Principal("", LOCAL_OWNER, frozenset(SCOPES))  # everybody, where authentication is switched off


@dataclass(frozen=True)
class NewKey:
    """A key that was just made: the only time its secret can be seen."""

    view: KeyView
    secret: str


class AccessService:
    """API keys."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def authenticate(self, secret: str) -> Principal:
        """Whoever holds this secret; Unauthenticated when it is not a living key."""
        with reading(self.engine) as session:
            key = access_rows.by_digest(session, _digest(secret))
        if key is None:
            raise Unauthenticated("no such API key, or it was revoked", hint="Authorization: Bearer KEY")
        return Principal(key.id, key.owner, frozenset().union(*(_IMPLIED[scope] for scope in key.scopes)))

    def create_key(self, owner: str, scopes: Iterable[Scope]) -> NewKey:
        """A new key of that owner."""
        chosen = sorted(set(scopes))
        if not chosen or any(scope not in SCOPES for scope in chosen):
            raise UserError("a key has at least one of the scopes read, write, admin", where="scopes")
        secret, key_id = "bm_" + secrets.token_urlsafe(32), new_id("api_key")
        with writing(self.engine) as session:
            access_rows.add_key(session, key_id, owner, _digest(secret), secret[:_SHOWN], list(chosen))
            row = next(key for key in access_rows.keys(session, owner) if key.id == key_id)
        return NewKey(_view(row), secret)

    def list_keys(self, owner: str) -> tuple[KeyView, ...]:
        with reading(self.engine) as session:
            return tuple(_view(key) for key in access_rows.keys(session, owner))

    def revoke(self, owner: str, key_id: str) -> None:
        """The key is of no use from now on; NotFound when there is no such living key."""
        with writing(self.engine) as session:
            if not access_rows.revoke(session, owner, key_id):
                raise NotFound("no such API key", where=key_id)

    def ensure_bootstrap(self, secret: str, owner: str = LOCAL_OWNER) -> None:
        """Have an admin key with this very secret; doing it again, or from several processes, changes nothing."""
        if len(secret) < _SHORTEST_SECRET:
            raise UserError(
                f"a bootstrap key has at least {_SHORTEST_SECRET} characters", where="BITMILL_BOOTSTRAP_KEY"
            )
        with writing(self.engine) as session:
            # No prefix is shown: this secret may not be one of ours.
            access_rows.add_key(session, new_id("api_key"), owner, _digest(secret), "bootstrap", ["admin"])


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _view(key: ApiKey) -> KeyView:
    return KeyView(
        id=key.id,
        owner=key.owner,
        prefix=key.prefix,
        scopes=tuple(key.scopes),
        created_at=key.created_at,
        revoked_at=key.revoked_at,
    )
