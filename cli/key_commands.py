"""Commands about API keys of a service: `keys list`, `keys create`, `keys revoke`. They need a key with scope admin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote

import typer

from cli.options import AsJson, DataDir, Key, Url
from cli.output import emit, say

if TYPE_CHECKING:
    from pathlib import Path

    from cli.client import Client

Owner = Annotated[str | None, typer.Option("--owner", help="Whose keys; yours if left out.")]

keys_app = typer.Typer(rich_markup_mode=None, help="API keys of a service: list, create, revoke.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.add_typer(keys_app, name="keys")


def _client(url: str | None, key: str | None, data_dir: Path | None) -> Client:
    from cli.client import Client, find_connection

    return Client(find_connection(url, key, data_dir))


@keys_app.command("list")
def list_keys(
    owner: Owner = None, url: Url = None, key: Key = None, data_dir: DataDir = None, json: AsJson = False
) -> None:
    """The keys of an owner, without their secrets."""
    from cli import render

    with _client(url, key, data_dir) as client:
        page = client.get("/v1/keys", owner=owner)
    if json:
        emit(page)
    else:
        render.keys(page["items"])


@keys_app.command("create")
def create_key(
    scope: Annotated[list[str], typer.Option("--scope", help="read, write or admin (repeatable).")],
    owner: Owner = None,
    url: Url = None,
    key: Key = None,
    data_dir: DataDir = None,
    json: AsJson = False,
) -> None:
    """Make a key and print its secret, which nobody can see again."""
    body = {"scopes": scope} | ({"owner": owner} if owner else {})
    with _client(url, key, data_dir) as client:
        made = client.post("/v1/keys", body)
    if json:
        emit(made)
        return
    say(f"{made['id']} of {made['owner']}, scopes {', '.join(made['scopes'])}; the secret is not shown again")
    print(made["secret"] or "")


@keys_app.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(help="A key's id.", metavar="KEY_ID")],
    owner: Owner = None,
    url: Url = None,
    key: Key = None,
    data_dir: DataDir = None,
    json: AsJson = False,
) -> None:
    """Make a key useless, at once and for good."""
    with _client(url, key, data_dir) as client:
        client.delete(f"/v1/keys/{quote(key_id, safe='')}" + (f"?owner={quote(owner, safe='')}" if owner else ""))
    if json:
        emit({"id": key_id, "revoked": True})
    else:
        say(f"revoked {key_id}")
