"""The dashboard: pages that hold no data of anybody. Their script asks the API with the reader's own key.

Also `/docs`, the reference made from the OpenAPI document. No page loads anything from elsewhere, and a policy forbids
it to: scripts and styles come from `/static` only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi import Path as PathParameter
from fastapi.responses import HTMLResponse
from fastapi.templating import Jinja2Templates
from starlette.responses import Response

from core import __version__

ROOT = Path(__file__).parents[1]
router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)

_templates = Jinja2Templates(ROOT / "templates")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
JobId = Annotated[str, PathParameter(pattern=r"^job_[0-9a-f]{32}$")]


@router.get("/")
def show_jobs(request: Request) -> Response:
    """The list of jobs."""
    return _page(request, "jobs.html")


@router.get("/jobs/{job_id}")
def show_job(request: Request, job_id: JobId) -> Response:
    """One job as it goes on."""
    return _page(request, "job.html", job_id=job_id)


@router.get("/docs")
def show_reference(request: Request) -> Response:
    """The reference of the API."""
    document = request.app.openapi()
    operations = [
        {"method": method.upper(), "path": path, **operation}
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    groups = {tag: [one for one in operations if tag in one.get("tags", [])] for tag in _tags(operations)}
    return _page(request, "docs.html", groups=groups, schemas=document["components"]["schemas"])


def _tags(operations: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(tag for one in operations for tag in one.get("tags", [])))


def _page(request: Request, name: str, **values: Any) -> Response:
    headers = {"Content-Security-Policy": _POLICY, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
    return _templates.TemplateResponse(request, name, {"version": __version__, **values}, headers=headers)
