"""API keys, for those who hold one with the scope `admin`: they administer every owner's keys, and see nothing else."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response

from api.auth import Admin
from api.dependencies import IdempotencyOf, ServicesOf
from api.schemas import Items, KeyMade, KeyQuery, NewKey
from core.errors import Conflict
from core.jobs.views import KeyView

router = APIRouter(prefix="/v1/keys", tags=["keys"])


@router.post("", status_code=201)
def create_key(
    body: NewKey, response: Response, services: ServicesOf, caller: Admin, idempotency: IdempotencyOf
) -> KeyMade:
    """A new key. Its secret is in this answer and nowhere else; a repeated request is not told it again."""
    owner, secrets = body.owner or caller.owner, dict[str, str]()

    def make() -> str:
        made = services.access.create_key(owner, body.scopes)
        secrets[made.view.id] = made.secret
        return made.view.id

    key_id = idempotency.once(services, caller.owner, body, make)
    response.headers["Location"] = f"/v1/keys?owner={owner}"
    response.headers["Cache-Control"] = "no-store"
    view = next(key for key in services.access.list_keys(owner) if key.id == key_id)
    return KeyMade(**view.model_dump(), secret=secrets.get(key_id))


@router.get("")
def list_keys(query: Annotated[KeyQuery, Query()], services: ServicesOf, caller: Admin) -> Items[KeyView]:
    """The keys of an owner, oldest first, revoked ones too; yours where none is named."""
    return Items[KeyView](items=services.access.list_keys(query.owner or caller.owner))


@router.delete("/{key_id}", status_code=204)
def revoke_key(key_id: str, query: Annotated[KeyQuery, Query()], services: ServicesOf, caller: Admin) -> None:
    """From now on the key opens nothing. The key that asks cannot be revoked by itself."""
    if key_id == caller.key_id:
        raise Conflict("this is the key that asks", where=key_id, hint="revoke it with another admin key")
    services.access.revoke(query.owner or caller.owner, key_id)
