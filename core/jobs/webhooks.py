"""What an owner can do with webhooks: register, look, delete, send a test, read the log of deliveries.

A secret is told once, when it is made; it is kept as it is, since every message is signed with it. Sending is
`core.jobs.deliveries`; what is sent is written down by `core.jobs.events`, in the transaction of the change itself.
"""

from __future__ import annotations

import base64
import secrets
from dataclasses import dataclass

from sqlalchemy import DateTime, Engine, func, select

from core.config import Settings
from core.errors import Conflict, QuotaExceeded
from core.ids import new_id
from core.jobs.messages import message
from core.jobs.outgoing import parse_url
from core.jobs.pages import decode_cursor, encode_cursor
from core.jobs.repository import webhooks as webhook_rows
from core.jobs.requests import NewWebhook
from core.jobs.sessions import reading, writing
from core.jobs.tables import Webhook, WebhookDelivery
from core.jobs.views import DeliveryView, Page, WebhookView

MAX_PAGE = 200
_SECRET_BYTES = 32


@dataclass(frozen=True)
class MadeWebhook:
    """A webhook that was just made: the only time its secret can be seen."""

    view: WebhookView
    secret: str


class WebhookService:
    """Webhooks, for their owners: what is not the owner's is NotFound."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings

    def create(self, owner: str, request: NewWebhook) -> MadeWebhook:
        """A new webhook; AddressRefused for a URL that is never called, QuotaExceeded for one too many."""
        parse_url(request.url, allow_private=self.settings.allow_private_webhooks)
        secret = "whsec_" + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()
        kinds = list(dict.fromkeys(request.kinds))
        row = Webhook(id=new_id("webhook"), owner=owner, url=request.url, kinds=kinds, secret=secret)
        most = self.settings.max_webhooks
        with writing(self.engine) as session:
            webhook_rows.lock_owner(session, owner)
            if webhook_rows.count(session, owner) >= most:
                raise QuotaExceeded(f"{most} webhooks are registered", hint="delete one that is not needed")
            session.add(row)
            session.flush()
            return MadeWebhook(_view(row), secret)

    def get(self, owner: str, webhook_id: str) -> WebhookView:
        with reading(self.engine) as session:
            return _view(webhook_rows.get(session, owner, webhook_id))

    def list(self, owner: str, cursor: str | None = None, limit: int = 50) -> Page[WebhookView]:
        """Webhooks, newest first."""
        limit = max(1, min(limit, MAX_PAGE))
        with reading(self.engine) as session:
            found = webhook_rows.page(session, owner, decode_cursor(cursor), limit + 1)
        items = tuple(_view(row) for row in found[:limit])
        return Page[WebhookView](items=items, next_cursor=encode_cursor(items[-1].id) if len(found) > limit else None)

    def delete(self, owner: str, webhook_id: str) -> None:
        """Nothing is sent from now on, and the secret is forgotten."""
        with writing(self.engine) as session:
            webhook_rows.get(session, owner, webhook_id)
            row = webhook_rows.lock(session, webhook_id)
            if row.disabled_reason != "deleted":
                webhook_rows.disable(session, row, "deleted")

    def ping(self, owner: str, webhook_id: str) -> DeliveryView:
        """Have a message of the kind `ping` sent; Conflict when the webhook is disabled."""
        with writing(self.engine) as session:
            row = webhook_rows.hold(session, owner, webhook_id)
            if row.disabled_at is not None:
                raise Conflict(f"the webhook is disabled: {row.disabled_reason}", where=row.id, hint="make a new one")
            at = session.scalars(select(func.clock_timestamp(type_=DateTime(timezone=True)))).one()
            return _delivery(webhook_rows.add(session, row.id, "ping", message("ping", at, {"webhook": row.id})))

    def delivery(self, owner: str, webhook_id: str, delivery_id: str) -> DeliveryView:
        with reading(self.engine) as session:
            webhook_rows.get(session, owner, webhook_id)
            return _delivery(webhook_rows.delivery(session, webhook_id, delivery_id))

    def deliveries(self, owner: str, webhook_id: str, cursor: str | None = None, limit: int = 50) -> Page[DeliveryView]:
        """The log of what was sent, newest first."""
        limit = max(1, min(limit, MAX_PAGE))
        with reading(self.engine) as session:
            webhook_rows.get(session, owner, webhook_id)
            found = webhook_rows.deliveries(session, webhook_id, decode_cursor(cursor), limit + 1)
        items = tuple(_delivery(row) for row in found[:limit])
        return Page[DeliveryView](items=items, next_cursor=encode_cursor(items[-1].id) if len(found) > limit else None)


def _view(row: Webhook) -> WebhookView:
    return WebhookView.model_validate(row, from_attributes=True)


def _delivery(row: WebhookDelivery) -> DeliveryView:
    return DeliveryView(
        id=row.id,
        webhook=row.webhook_id,
        kind=row.kind,
        job=row.job_id,
        event=row.event_seq,
        state=row.state,
        attempts=row.attempts,
        created_at=row.created_at,
        attempted_at=row.attempted_at,
        next_at=row.next_at,
        delivered_at=row.delivered_at,
        last_status=row.last_status,
        last_error=row.last_error,
    )
