"""The HTTP application: `uvicorn api.main:create_app --factory`.

Holds no state but its connections: any number of these processes serve one database. Never loads torch. Starting
needs no server to be there; `/readyz` says which are.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import structlog
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.staticfiles import StaticFiles

from api import errors
from api.dependencies import Services
from api.middleware import BodyLimit, RequestContext
from api.openapi import describe
from api.routes import artefacts, catalogues, checkpoints, events, health, jobs, keys, pages, plans, uploads, webhooks
from core import __version__
from core.config import Settings
from core.errors import StoreUnavailable
from worker.logs import configure

log = structlog.get_logger()

_ROUTES = (uploads, checkpoints, jobs, events, artefacts, plans, catalogues, keys, webhooks, health, pages)


class Application(FastAPI):
    """FastAPI with the documents of this API: problems instead of the framework's errors."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = describe(super().openapi())
        return self.openapi_schema


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application. Without `settings` it is the whole process: it reads `BITMILL_*` and sets up the log."""
    if settings is None:
        settings = Settings()
        configure(settings)
        _take_over_uvicorn_log()
    app = Application(
        title="Bitmill",
        version=__version__,
        summary="Quantisation of models as a queue of jobs.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
        generate_unique_id_function=_operation_id,
    )
    app.state.services = services = Services.open(settings)
    errors.install(app)
    for module in _ROUTES:
        app.include_router(module.router)
    app.mount("/static", StaticFiles(directory=pages.ROOT / "static"), name="static")
    app.add_middleware(BodyLimit)
    app.add_middleware(RequestContext, metrics=services.metrics)
    return app


def _operation_id(route: APIRoute) -> str:
    return route.name


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    try:
        await run_in_threadpool(services.bootstrap.ensure)
    except StoreUnavailable as error:
        log.warning("database_away_at_start", error=str(error))
    yield
    services.close()


def _take_over_uvicorn_log() -> None:
    """uvicorn's lines in our form; its access log says less than ours."""
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = name != "uvicorn.access"
