"""The register of checkpoints."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response

from api.auth import Reader, Writer
from api.dependencies import IdempotencyOf, ServicesOf
from api.schemas import CheckpointItem, NewCheckpoint, PageQuery
from core.jobs.views import CheckpointView, Page

router = APIRouter(prefix="/v1/checkpoints", tags=["checkpoints"])


@router.post("", status_code=201)
def create_checkpoint(
    body: NewCheckpoint, response: Response, services: ServicesOf, caller: Writer, idempotency: IdempotencyOf
) -> CheckpointView:
    """Register a source model; one that lies elsewhere is fetched by the first job that needs it."""
    register = services.checkpoints.register
    checkpoint_id = idempotency.once(
        services, caller.owner, body, lambda: register(caller.owner, body.source.source, body.name).id
    )
    response.headers["Location"] = f"/v1/checkpoints/{checkpoint_id}"
    return services.checkpoints.get(caller.owner, checkpoint_id)


@router.get("")
def list_checkpoints(
    query: Annotated[PageQuery, Query()], services: ServicesOf, caller: Reader
) -> Page[CheckpointItem]:
    """Checkpoints, newest first."""
    page = services.checkpoints.list(caller.owner, query.cursor, query.limit)
    items = tuple(CheckpointItem.model_validate(view, from_attributes=True) for view in page.items)
    return Page[CheckpointItem](items=items, next_cursor=page.next_cursor)


@router.get("/{checkpoint_id}")
def get_checkpoint(checkpoint_id: str, services: ServicesOf, caller: Reader) -> CheckpointView:
    """One checkpoint with its files and its inspection: parameters, dtypes, ties, fused groups, limits."""
    return services.checkpoints.get(caller.owner, checkpoint_id)


@router.delete("/{checkpoint_id}", status_code=204)
def delete_checkpoint(checkpoint_id: str, services: ServicesOf, caller: Writer) -> None:
    """Forget a checkpoint that no job works on."""
    services.checkpoints.delete(caller.owner, checkpoint_id)
