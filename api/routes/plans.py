"""Plans: the allocation for another target, from sensitivities that are stored; no weights are written."""

from __future__ import annotations

import json
from typing import Any

import anyio
from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from api.auth import Reader, Writer
from api.dependencies import Idempotency, IdempotencyOf, Services, ServicesOf
from api.recipes import check_in_advance, read_recipe
from api.schemas import NewPlan, PlanAnswer
from core.clock import monotonic
from core.errors import BitmillError, Conflict
from core.jobs.requests import SubmitJob
from core.jobs.states import JOB
from core.jobs.views import JobView

router = APIRouter(prefix="/v1/plans", tags=["plans"])

WAIT_S = 20.0
_POLL_S = 0.1
_LIFETIME_S = 600.0  # a plan that nobody computes by then is no longer waited for
_PLAN_FILE = "allocation.json"
_ACCEPTED: dict[int | str, dict[str, Any]] = {202: {"model": PlanAnswer, "description": "Still computing."}}


@router.post("", response_model=PlanAnswer, responses=_ACCEPTED)
async def create_plan(
    body: NewPlan,
    request: Request,
    response: Response,
    services: ServicesOf,
    caller: Writer,
    idempotency: IdempotencyOf,
) -> PlanAnswer:
    """The allocation for a recipe, waited for a while. Conflict when there are no stored sensitivities for it."""
    plan_id = await run_in_threadpool(_submit, services, caller.owner, body, idempotency)
    deadline = monotonic() + WAIT_S
    job = await run_in_threadpool(services.jobs.get, caller.owner, plan_id)
    while job.status not in JOB.terminal and monotonic() < deadline and not await request.is_disconnected():
        await anyio.sleep(_POLL_S)
        job = await run_in_threadpool(services.jobs.get, caller.owner, plan_id)
    return await run_in_threadpool(_answer, services, caller.owner, job, response)


@router.get("/{plan_id}", responses=_ACCEPTED)
def get_plan(plan_id: str, response: Response, services: ServicesOf, caller: Reader) -> PlanAnswer:
    """The plan, or 202 while it is computed; whatever made it fail is the answer's problem."""
    return _answer(services, caller.owner, services.jobs.get(caller.owner, plan_id), response)


def _submit(services: Services, owner: str, body: NewPlan, idempotency: Idempotency) -> str:
    recipe = read_recipe(body.recipe)
    check_in_advance(services.checkpoints, owner, body.checkpoint, recipe)
    wanted = SubmitJob(
        checkpoint=body.checkpoint,
        recipe=recipe.canonical(),
        max_pending_s=_LIFETIME_S,
        max_runtime_s=_LIFETIME_S,
    )
    return idempotency.once(services, owner, body, lambda: services.jobs.plan(owner, wanted).id)


def _answer(services: Services, owner: str, job: JobView, response: Response) -> PlanAnswer:
    if job.failure is not None:
        raise BitmillError.from_dict(job.failure.to_json())
    if job.status in ("cancelled", "expired"):
        raise Conflict(f"the plan is {job.status}", where=job.id, hint="POST /v1/plans again")
    output = services.jobs.allocation(owner, job.id)
    numbers = {} if output is None else _numbers(services, output)
    if output is None:
        response.status_code = 202
        response.headers["Location"] = f"/v1/plans/{job.id}"
        response.headers["Retry-After"] = "2"
    return PlanAnswer(id=job.id, status=job.status, checkpoint=job.checkpoint, recipe=job.recipe, **numbers)


def _numbers(services: Services, output: dict[str, Any]) -> dict[str, Any]:
    """The fields of the file that the allocate step wrote."""
    written = json.loads(services.store.read(output["files"][_PLAN_FILE]["key"]))
    return {
        "predicted_bits_per_param": written["predicted_bits_per_param"],
        "predicted_size_bytes": written["predicted_bytes"],
        "predicted_kl": written["predicted_kl"],
        "warnings": tuple(written["warnings"]),
        "tensors": tuple(written["tensors"]),
    }
