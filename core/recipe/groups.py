"""Which tensors must share one tensor format because a runtime fuses them into one.

By name and input dimension: q/k/v of one attention, gate and up of one feed-forward block, and of a mixture of experts
all experts' gate and up together, all experts' down together, and so on for every other role. A group that is not
needed costs a little quality; one that is missing makes a runtime fail or answer nonsense. Down-projections into
latents (`q_a_proj`, `kv_a_proj_with_mqa`) stand alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
Group = tuple[str, ...]

# What is fused, and the tensors of which it is made; a name stands in one row.
_FUSED: dict[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "qkv (BERT)": ("query", "key", "value"),
    "qkv (original Llama)": ("wq", "wk", "wv"),
    "qkv (DistilBERT)": ("q_lin", "k_lin", "v_lin"),
    "gate and up": ("gate_proj", "up_proj"),
    "gate and up (original Llama)": ("w1", "w3"),
}
_FUSED_AS = {role: fused for fused, roles in _FUSED.items() for role in roles}
_QUERIES = {roles[0] for fused, roles in _FUSED.items() if fused.startswith("qkv")}
_CROSS = ("encoder_attn", "crossattention", "cross_attn", "encdecattention")
_EXPERTS = "experts"


def grouping(spec: str | Sequence[Sequence[str]], shapes: Shapes, config: Mapping[str, Any]) -> list[Group]:
    """The partition of the names with two or more dimensions that a recipe's `groups` asks for.

    `auto`: `fused_groups`. `none`: every tensor alone. A list of lists of globs: every inner list is one group of all
    names that it matches (the first list that matches a name has it), and the names that none matches stand alone.
    """
    if spec == "auto":
        return fused_groups(shapes, config)
    listed = [] if isinstance(spec, str) else spec
    return _partition((name, _first_list(listed, name) or name) for name in _matrices(shapes))


def fused_groups(shapes: Shapes, config: Mapping[str, Any]) -> list[Group]:
    """What runtimes fuse, as a partition of the names with two or more dimensions: sorted, single tensors included.

    `config`: the checkpoint's; in an encoder-decoder's cross-attention q reads another input than k and v.
    """
    encoder_decoder = bool(config.get("is_encoder_decoder"))
    return _partition((name, _key(name, shapes[name], encoder_decoder)) for name in _matrices(shapes))


def _matrices(shapes: Shapes) -> list[str]:
    return sorted(name for name, shape in shapes.items() if len(shape) > 1)


def _partition(keyed: Iterable[tuple[str, object]]) -> list[Group]:
    """Names of equal keys together; the groups in order of their first names when the names are sorted."""
    found: dict[object, list[str]] = defaultdict(list)
    for name, key in keyed:
        found[key].append(name)
    return [tuple(names) for names in found.values()]


def _key(name: str, shape: tuple[int, ...], encoder_decoder: bool) -> object:
    """Equal for the tensors that are fused with each other."""
    *path, role, suffix = ("", *name.split(".")) if name.endswith(".weight") else ("", *name.split("."), "")
    if encoder_decoder and role in _QUERIES and any(mark in part.lower() for part in path for mark in _CROSS):
        return name
    layer, in_experts = _without_expert(path)
    if role not in _FUSED_AS and not in_experts:
        return name
    return layer, _FUSED_AS.get(role, role), suffix, shape[-1]


def _without_expert(path: list[str]) -> tuple[Group, bool]:
    """The path with the number of an expert left out, and whether there was one."""
    for at, (part, following) in enumerate(pairwise(path)):
        if part == _EXPERTS and following.isdigit():
            return (*path[: at + 1], *path[at + 2 :]), True
    return tuple(path), False


def _first_list(listed: Sequence[Sequence[str]], name: str) -> int:
    """The number, from one, of the first list with a glob that matches; zero when none does."""
    for number, globs in enumerate(listed, 1):
        if any(fnmatchcase(name, glob) for glob in globs):
            return number
    return 0
