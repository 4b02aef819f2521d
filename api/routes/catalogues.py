"""What there is to choose from, who works here, and how much the caller holds."""

from __future__ import annotations

from fastapi import APIRouter

from api.auth import Reader
from api.dependencies import ServicesOf
from api.schemas import CatalogueItem, Items, RecipeCatalogue, RecipeItem, UsageAnswer, UsageItem
from core.formats import catalogue as formats
from core.jobs.views import WorkerView
from core.recipe import exports, rounding
from core.recipe.recipe import Recipe, descriptions, presets

router = APIRouter(prefix="/v1", tags=["catalogues"])


@router.get("/formats")
def list_formats(_: Reader) -> Items[CatalogueItem]:
    """The families of number formats and their aliases."""
    return Items[CatalogueItem](items=tuple(CatalogueItem(**item) for item in formats.catalogue()))


@router.get("/roundings")
def list_roundings(_: Reader) -> Items[CatalogueItem]:
    """The rounding methods with the JSON Schemas of their parameters."""
    return Items[CatalogueItem](items=tuple(CatalogueItem(**item) for item in rounding.catalogue()))


@router.get("/exports")
def list_exports(_: Reader) -> Items[CatalogueItem]:
    """The layouts that an artefact can be written in."""
    return Items[CatalogueItem](items=tuple(CatalogueItem(**item) for item in exports.catalogue()))


@router.get("/recipes")
def list_recipes(_: Reader) -> RecipeCatalogue:
    """The presets in their canonical form, and the JSON Schema of a recipe."""
    told = descriptions()
    items = tuple(
        RecipeItem(name=name, description=told[name], recipe=recipe.canonical()) for name, recipe in presets().items()
    )
    return RecipeCatalogue(items=items, json_schema=Recipe.json_schema())


@router.get("/workers")
def list_workers(services: ServicesOf, _: Reader) -> Items[WorkerView]:
    """Living workers, and those that left within the hour."""
    return Items[WorkerView](items=services.workers.list())


@router.get("/usage")
def get_usage(services: ServicesOf, caller: Reader) -> UsageAnswer:
    """What the caller's owner holds, with the limits."""
    found = services.jobs.usage(caller.owner).model_dump()
    settings = services.settings
    limits = {"queued_jobs": settings.max_queued_jobs, "upload_bytes": settings.max_upload_bytes}
    items = tuple(UsageItem(name=name, used=used, limit=limits.get(name)) for name, used in found.items())
    return UsageAnswer(**found, items=items)
