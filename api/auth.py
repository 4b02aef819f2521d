"""Who is calling: a bearer key and its scopes. Every route but those that tell nothing names one of these.

A download that a browser does by itself cannot carry a header; the dashboard gives it the key in a cookie that lives
for a minute and is sent to that artefact only. No other route reads cookies.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Cookie, Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from api.dependencies import Services, ServicesOf
from core.errors import Unauthenticated
from core.jobs.access import LOCAL, Principal
from core.jobs.views import Scope

DOWNLOAD_COOKIE = "bitmill_download"

_bearer = HTTPBearer(auto_error=False, scheme_name="ApiKey", description="An API key: `Authorization: Bearer KEY`.")
_Given = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


def authenticate(request: Request, services: ServicesOf, given: _Given) -> Principal:
    """Whoever holds the bearer key; everybody is LOCAL where authentication is switched off."""
    return _identify(request, services, given.credentials if given else "")


def authenticate_download(
    request: Request,
    services: ServicesOf,
    given: _Given,
    cookie: Annotated[str, Cookie(alias=DOWNLOAD_COOKIE, include_in_schema=False)] = "",
) -> Principal:
    """The same, for a GET that may carry the key in the dashboard's cookie."""
    found = _identify(request, services, given.credentials if given else cookie)
    found.require("read")
    return found


def _identify(request: Request, services: Services, secret: str) -> Principal:
    if services.settings.auth == "off":
        return LOCAL
    if not secret:
        raise Unauthenticated("no API key", hint="Authorization: Bearer KEY")
    services.bootstrap.ensure()
    found = services.access.authenticate(secret)
    request.state.principal = found
    return found


def _needs(scope: Scope) -> Callable[[Principal], Awaitable[Principal]]:
    async def check(principal: Annotated[Principal, Depends(authenticate)]) -> Principal:
        principal.require(scope)
        return principal

    return check


Reader = Annotated[Principal, Depends(_needs("read"))]
Writer = Annotated[Principal, Depends(_needs("write"))]
Admin = Annotated[Principal, Depends(_needs("admin"))]
Downloader = Annotated[Principal, Depends(authenticate_download)]
