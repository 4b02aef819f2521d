"""Webhooks: receivers of what happens to jobs, by the rules of Standard Webhooks, with a log of every delivery."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response

from api.auth import Reader, Writer
from api.dependencies import IdempotencyOf, ServicesOf
from api.schemas import PageQuery, WebhookBody, WebhookMade
from core.jobs.views import DeliveryView, Page, WebhookView

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"])


@router.post("", status_code=201)
def create_webhook(
    body: WebhookBody, response: Response, services: ServicesOf, caller: Writer, idempotency: IdempotencyOf
) -> WebhookMade:
    """A new receiver. Its secret is in this answer and nowhere else; a repeated request is not told it again."""
    secrets = dict[str, str]()

    def make() -> str:
        made = services.webhooks.create(caller.owner, body)
        secrets[made.view.id] = made.secret
        return made.view.id

    webhook_id = idempotency.once(services, caller.owner, body, make)
    response.headers["Location"] = f"/v1/webhooks/{webhook_id}"
    response.headers["Cache-Control"] = "no-store"
    view = services.webhooks.get(caller.owner, webhook_id)
    return WebhookMade(**view.model_dump(), secret=secrets.get(webhook_id))


@router.get("")
def list_webhooks(query: Annotated[PageQuery, Query()], services: ServicesOf, caller: Reader) -> Page[WebhookView]:
    """Webhooks, newest first, without their secrets."""
    return services.webhooks.list(caller.owner, query.cursor, query.limit)


@router.get("/{webhook_id}")
def get_webhook(webhook_id: str, services: ServicesOf, caller: Reader) -> WebhookView:
    """One webhook: what it hears of, since when it fails, whether and why it was disabled."""
    return services.webhooks.get(caller.owner, webhook_id)


@router.delete("/{webhook_id}", status_code=204)
def delete_webhook(webhook_id: str, services: ServicesOf, caller: Writer) -> None:
    """Nothing is sent to it from now on."""
    services.webhooks.delete(caller.owner, webhook_id)


@router.get("/{webhook_id}/deliveries")
def list_deliveries(
    webhook_id: str, query: Annotated[PageQuery, Query()], services: ServicesOf, caller: Reader
) -> Page[DeliveryView]:
    """The log: every message, newest first, with the last attempt's outcome and the time of the next."""
    return services.webhooks.deliveries(caller.owner, webhook_id, query.cursor, query.limit)


@router.post("/{webhook_id}/test", status_code=202)
def ping_webhook(
    webhook_id: str, response: Response, services: ServicesOf, caller: Writer, idempotency: IdempotencyOf
) -> DeliveryView:
    """Have a message of the kind `ping` sent; the log tells what became of it."""
    ping = services.webhooks.ping
    delivery_id = idempotency.once(services, caller.owner, None, lambda: ping(caller.owner, webhook_id).id)
    response.headers["Location"] = f"/v1/webhooks/{webhook_id}/deliveries"
    return services.webhooks.delivery(caller.owner, webhook_id, delivery_id)
