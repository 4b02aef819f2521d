"""The options that several commands share, spelled once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from core.errors import InvalidRecipe

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]
Url = Annotated[str | None, typer.Option("--url", help="The service [env: BITMILL_URL].", metavar="URL")]
Key = Annotated[str | None, typer.Option("--key", help="The API key [env: BITMILL_KEY].", metavar="KEY")]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Folder of an embedded stack [env: BITMILL_DATA_DIR].", metavar="DIR")
]
RecipeName = Annotated[
    str, typer.Option("--recipe", "-r", help="A preset's name or a YAML/JSON file.", metavar="RECIPE")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one value: target.bits_per_param=3.5 (repeatable).", metavar="KEY=VALUE"),
]
Source = Annotated[str, typer.Argument(help="A checkpoint: a folder, hf:org/name@revision, s3://..., or ckpt_...")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda or auto.")]


def overrides(settings: list[str] | None) -> dict[str, Any]:
    """`["target.bits_per_param=3.5"]` as dotted names and YAML values."""
    import yaml

    found: dict[str, Any] = {}
    for setting in settings or []:
        name, equals, value = setting.partition("=")
        if not equals or not name.strip():
            raise InvalidRecipe("--set takes KEY=VALUE", where=setting)
        try:
            found[name.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise InvalidRecipe(f"the value is not YAML: {error}", where=setting[:200]) from None
    return found
