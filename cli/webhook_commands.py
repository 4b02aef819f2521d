"""Commands about webhooks of a service: `webhooks list`, `create`, `delete`, `deliveries` and `test`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote

import typer

from cli.options import AsJson, DataDir, Key, Url
from cli.output import emit, say

if TYPE_CHECKING:
    from pathlib import Path

    from cli.client import Client

WebhookId = Annotated[str, typer.Argument(help="A webhook's id.", metavar="WEBHOOK_ID")]
Limit = Annotated[int, typer.Option("--limit", min=1, max=200)]
Cursor = Annotated[str | None, typer.Option("--cursor", help="Where the last page ended.")]

webhooks_app = typer.Typer(
    rich_markup_mode=None,
    help="Webhooks of a service: list, create, delete, deliveries, test.",
    no_args_is_help=True,
)


def register(app: typer.Typer) -> None:
    app.add_typer(webhooks_app, name="webhooks")


def _client(url: str | None, key: str | None, data_dir: Path | None) -> Client:
    from cli.client import Client, find_connection

    return Client(find_connection(url, key, data_dir))


def _path(webhook_id: str, rest: str = "") -> str:
    return f"/v1/webhooks/{quote(webhook_id, safe='')}{rest}"


@webhooks_app.command("list")
def list_webhooks(
    limit: Limit = 50,
    cursor: Cursor = None,
    url: Url = None,
    key: Key = None,
    data_dir: DataDir = None,
    json: AsJson = False,
) -> None:
    """The webhooks of this key's owner, newest first."""
    from cli import render

    with _client(url, key, data_dir) as client:
        page = client.get("/v1/webhooks", limit=limit, cursor=cursor)
    if json:
        emit(page)
    else:
        render.webhooks(page["items"])


@webhooks_app.command("create")
def create_webhook(
    receiver: Annotated[str, typer.Argument(help="The https URL that messages are sent to.", metavar="RECEIVER")],
    kind: Annotated[
        list[str] | None,
        typer.Option("--kind", help="A kind of event, such as job.failed (repeatable); all by default."),
    ] = None,
    named_only: Annotated[
        bool, typer.Option("--named-only", help="Hear only of jobs that name this webhook, but of all they do.")
    ] = False,
    url: Url = None,
    key: Key = None,
    data_dir: DataDir = None,
    json: AsJson = False,
) -> None:
    """Register a receiver and print its secret, which nobody can see again."""
    kinds = [] if named_only else kind
    body = {"url": receiver} | ({} if kinds is None else {"kinds": kinds})
    with _client(url, key, data_dir) as client:
        made = client.post("/v1/webhooks", body)
    if json:
        emit(made)
        return
    say(f"{made['id']} hears of {', '.join(made['kinds']) or 'jobs that name it'}; the secret is not shown again")
    print(made["secret"] or "")


@webhooks_app.command("delete")
def delete_webhook(
    webhook_id: WebhookId, url: Url = None, key: Key = None, data_dir: DataDir = None, json: AsJson = False
) -> None:
    """Send nothing more to a receiver."""
    with _client(url, key, data_dir) as client:
        client.delete(_path(webhook_id))
    if json:
        emit({"id": webhook_id, "deleted": True})
    else:
        say(f"deleted {webhook_id}")


@webhooks_app.command("deliveries")
def list_deliveries(
    webhook_id: WebhookId,
    limit: Limit = 50,
    cursor: Cursor = None,
    url: Url = None,
    key: Key = None,
    data_dir: DataDir = None,
    json: AsJson = False,
) -> None:
    """What was sent to a receiver, newest first, and what it answered."""
    from cli import render

    with _client(url, key, data_dir) as client:
        page = client.get(_path(webhook_id, "/deliveries"), limit=limit, cursor=cursor)
    if json:
        emit(page)
    else:
        render.deliveries(page["items"])


@webhooks_app.command("test")
def ping_webhook(
    webhook_id: WebhookId, url: Url = None, key: Key = None, data_dir: DataDir = None, json: AsJson = False
) -> None:
    """Have a message of the kind `ping` sent; `deliveries` shows what became of it."""
    with _client(url, key, data_dir) as client:
        sent = client.post(_path(webhook_id, "/test"))
    if json:
        emit(sent)
    else:
        print(sent["id"])
