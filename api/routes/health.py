"""Whether this process lives, whether it can work, and its numbers. Outside `/v1`, and without a key."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from api.dependencies import ServicesOf
from api.errors import problem, request_id_of
from api.schemas import Health
from core.errors import StoreUnavailable

router = APIRouter(tags=["health"])

_AWAY: dict[int | str, dict[str, Any]] = {503: {"description": "A server is away; `checks` says which and why."}}


@router.get("/livez")
async def get_liveness() -> dict[str, str]:
    """This process answers."""
    return {"status": "alive"}


@router.get("/readyz", response_model=Health, responses=_AWAY)
def get_readiness(request: Request, services: ServicesOf) -> Response | Health:
    """Database, broker and store, each asked now."""
    checks = services.probes.ask()
    away = ", ".join(name for name, check in checks.items() if not check.ok)
    if not away:
        return Health(ready=True, checks=checks)
    error = StoreUnavailable(f"no use can be made of: {away}", where=away, hint="`checks` says why")
    shown = {name: check.to_json() for name, check in checks.items()}
    return problem(error, request_id_of(request), ready=False, checks=shown)


@router.get("/metrics", response_class=Response)
def get_metrics(services: ServicesOf) -> Response:
    """Prometheus' text format."""
    return Response(services.metrics.render(), media_type=CONTENT_TYPE_LATEST)
