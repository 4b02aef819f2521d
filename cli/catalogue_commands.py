"""The catalogues: `bitmill recipes`, `bitmill formats`, `bitmill roundings`."""

from __future__ import annotations

import typer

from cli.options import AsJson
from cli.output import emit


def register(app: typer.Typer) -> None:
    app.command("recipes")(recipes)
    app.command("formats")(formats)
    app.command("roundings")(roundings)


def recipes(json: AsJson = False) -> None:
    """The presets."""
    from cli import render
    from core.recipe.recipe import presets

    found = {name: recipe.canonical() for name, recipe in presets().items()}
    if json:
        emit({"recipes": found})
    else:
        rows = [(name, item["format"], item["allocation"], item["target"]) for name, item in found.items()]
        render.table(("recipe", "format", "allocation", "target"), rows)


def formats(json: AsJson = False) -> None:
    """The families of number formats and their aliases."""
    from cli import render
    from core.formats.catalogue import catalogue

    found = catalogue()
    if json:
        emit({"formats": found})
    else:
        render.catalogue(found)


def roundings(json: AsJson = False) -> None:
    """The rounding methods."""
    from cli import render
    from core.recipe.rounding import catalogue

    found = catalogue()
    if json:
        emit({"roundings": found})
    else:
        render.catalogue(found)
