"""What routes are given: the services of this process, and the caller's idempotency key.

`Services.open` connects to nothing: every server may be away when the process starts, and `/readyz` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from anyio import CapacityLimiter
from fastapi import Depends, Header, Request
from pydantic import BaseModel
from sqlalchemy import Engine

from api.metrics import Metrics
from api.probes import Probes
from core.config import Settings
from core.errors import UserError
from core.ids import content_hash
from core.jobs.access import AccessService
from core.jobs.checkpoints import CheckpointService
from core.jobs.dispatch import BrokerDispatcher
from core.jobs.health import database_ready
from core.jobs.idempotency import IdempotencyService
from core.jobs.service import JobService
from core.jobs.sessions import connect
from core.jobs.uploads import UploadService
from core.jobs.webhooks import WebhookService
from core.jobs.workers import WorkerRegistry
from core.storage.object_store import ObjectStore, open_store

_CONNECTIONS = 20  # as many again under load: together the 40 threads of the pool that runs the routes
_TRANSFERS = 32
_NO_OBJECT = "readyz"  # asking for the size of an object that is not there is enough to hear the store


class Bootstrap:
    """The key of the settings, made sure of as soon as the database answers."""

    def __init__(self, engine: Engine, access: AccessService, secret: str) -> None:
        self._engine, self._access, self._secret = engine, access, secret
        self._done = not secret

    def ensure(self) -> None:
        """StoreUnavailable while the database is away or has no tables; nothing once it was done."""
        if not self._done:
            database_ready(self._engine)
            self._access.ensure_bootstrap(self._secret)
            self._done = True


@dataclass(frozen=True)
class Services:
    """Everything that routes call. `transfers` are the threads that long bodies may hold, apart from all others."""

    settings: Settings
    engine: Engine
    store: ObjectStore
    dispatcher: BrokerDispatcher
    jobs: JobService
    uploads: UploadService
    checkpoints: CheckpointService
    access: AccessService
    workers: WorkerRegistry
    webhooks: WebhookService
    idempotency: IdempotencyService
    bootstrap: Bootstrap
    probes: Probes
    metrics: Metrics
    transfers: CapacityLimiter

    @classmethod
    def open(cls, settings: Settings) -> Services:
        engine = connect(settings.database_url, pool_size=_CONNECTIONS)
        store, dispatcher, access = open_store(settings), BrokerDispatcher(settings.broker_url), AccessService(engine)
        bootstrap = Bootstrap(engine, access, settings.bootstrap_key)
        return cls(
            settings=settings,
            engine=engine,
            store=store,
            dispatcher=dispatcher,
            jobs=JobService(engine, settings, dispatcher, store),
            uploads=UploadService(engine, settings, store),
            checkpoints=CheckpointService(engine, settings, store),
            access=access,
            workers=WorkerRegistry(engine),
            webhooks=WebhookService(engine, settings),
            idempotency=IdempotencyService(engine),
            bootstrap=bootstrap,
            probes=Probes(_questions(engine, bootstrap, dispatcher, store)),
            metrics=Metrics(engine),
            transfers=CapacityLimiter(_TRANSFERS),
        )

    def close(self) -> None:
        self.probes.close()
        self.engine.dispose()


def _questions(
    engine: Engine, bootstrap: Bootstrap, dispatcher: BrokerDispatcher, store: ObjectStore
) -> dict[str, Callable[[], object]]:
    def database() -> None:
        database_ready(engine)
        bootstrap.ensure()

    return {"database": database, "broker": dispatcher.ping, "store": lambda: store.size(_NO_OBJECT)}


async def services_of(request: Request) -> Services:
    found: Services = request.app.state.services
    return found


ServicesOf = Annotated[Services, Depends(services_of)]


@dataclass(frozen=True)
class Idempotency:
    """The caller's Idempotency-Key, if any, and what the request's path adds to the hash of its body."""

    key: str | None
    path: str

    def body_hash(self, body: BaseModel | None = None) -> str:
        """Equal for equal bodies of the same route."""
        try:
            return content_hash([self.path, body.model_dump(mode="json") if body else None])
        except ValueError as error:
            raise UserError("the body holds what is not JSON") from error

    def once(self, services: Services, owner: str, body: BaseModel | None, work: Callable[[], str]) -> str:
        """The id that `work` makes, or that it made before under this key.

        Conflict while another request does it, IdempotencyMismatch when its body was another.
        """
        if self.key is None:
            return work()
        stored = services.idempotency.begin(owner, self.key, self.body_hash(body))
        if stored is not None:
            return str(stored["id"])
        try:
            made = work()
        except BaseException:
            services.idempotency.release(owner, self.key)
            raise
        services.idempotency.finish(owner, self.key, {"id": made})
        return made


async def idempotency_of(
    request: Request,
    key: Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=255)] = None,
) -> Idempotency:
    return Idempotency(key, request.url.path)


IdempotencyOf = Annotated[Idempotency, Depends(idempotency_of)]
