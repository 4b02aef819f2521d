"""A recipe as text: YAML or JSON, from someone whom nobody vouches for, to plain values; and single values set in it.

Safe loading only, of bounded size and depth. A key that stands twice, an anchor, an alias and a number that is not
finite are refused: a recipe means what it shows. What the values mean is `core.recipe.recipe`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from core.errors import InvalidRecipe

MAX_BYTES = 256 << 10
MAX_DEPTH = 16
_ONE_OF = "target"
_UNSTORABLE = re.compile("[\\0\ud800-\udfff]")  # neither UTF-8 nor PostgreSQL's jsonb holds these


class _Loader(yaml.SafeLoader):
    """Safe loading without anchors, aliases and repeated keys."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not read", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        _require_keys(keys)
        return super().construct_mapping(node, deep=deep)


def read_document(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; InvalidRecipe when it cannot be read or holds something else."""
    if not is_file(path):
        raise _invalid("no such recipe file", str(path))
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _invalid(f"cannot be read: {error}", str(path)) from None
    return parse_document(text, str(path))


def is_file(path: Path) -> bool:
    """Whether a regular file is there and may be seen."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def parse_document(text: str, where: str = "") -> dict[str, Any]:
    """The mapping that a YAML or JSON text holds; `where` names it in errors."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise _invalid(f"larger than {MAX_BYTES} bytes", where)
    try:
        value = _json(text) if text.lstrip().startswith("{") else yaml.load(text, _Loader)  # noqa: S506 (a safe loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _invalid(f"not YAML or JSON: {' '.join(str(error).split())[:500]}", where) from None
    return plain_mapping(value, where)


def plain_mapping(value: Any, where: str = "") -> dict[str, Any]:
    """A copy of a mapping that is known to hold JSON values only, of bounded depth."""
    if not isinstance(value, Mapping):
        raise _invalid("a recipe is a mapping", where)
    copied: dict[str, Any] = _plain(value, "", 0)
    return copied


def with_settings(document: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The document with dotted names set, such as `target.bits_per_param`; the values are copied.

    A dotted name replaces whatever is no mapping on its way: a method's bare name becomes {name: ...}, `false` an
    empty mapping. Setting one kind of target drops the others. What stands in lists can only be set as a whole.
    """
    changed = plain_mapping(document)
    if any(name.startswith(f"{_ONE_OF}.") for name in settings):
        changed[_ONE_OF] = {}
    for name, value in settings.items():
        *path, last = name.split(".")
        place = changed
        for step in path:
            place[step] = _opened(place.get(step), name)
            place = place[step]
        place[last] = _plain(value, name, len(path) + 1)
    return changed


def _invalid(message: str, where: str) -> InvalidRecipe:
    return InvalidRecipe(message, where=where, errors=({"path": where, "message": message},))


def _opened(value: Any, name: str) -> dict[str, Any]:
    """The mapping in which a dotted name goes on."""
    if isinstance(value, list):
        raise _invalid("a list can only be set as a whole", name)
    if isinstance(value, str):
        return {"name": value}
    return value if isinstance(value, dict) else {}


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _require_keys([key for key, _ in pairs])
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def _require_keys(keys: Iterable[Any]) -> None:
    seen: set[str] = set()
    for key in keys:
        if not isinstance(key, str):
            raise yaml.YAMLError(f"the key {str(key)[:80]!r} is not text")
        if key in seen:
            raise yaml.YAMLError(f"the key {key[:80]!r} stands twice")
        seen.add(key)


def _plain(value: Any, path: str, depth: int) -> Any:
    """A copy of JSON values; InvalidRecipe for anything else."""
    if depth > MAX_DEPTH:
        raise _invalid("nested too deeply", path[:200])
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or _UNSTORABLE.search(key):
                raise _invalid(f"the key {str(key)[:80]!r} is not text", path)
        return {key: _plain(item, f"{path}.{key}".lstrip("."), depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}.{at}".lstrip("."), depth + 1) for at, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise _invalid(f"{value} is not a finite number", path)
    if isinstance(value, str) and _UNSTORABLE.search(value):
        raise _invalid("holds a zero character or half a surrogate pair", path)
    if value is None or isinstance(value, str | int | float):
        return value
    raise _invalid(f"a {type(value).__name__} is not a value of a recipe", path)
