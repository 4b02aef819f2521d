"""Reading the text of a tensor format into the fields of a `TensorFormat`; every refusal names what would work."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Any

from core.errors import InvalidFormat
from core.formats.block_types import BLOCK_TYPES
from core.recipe.format_names import (
    ALIASES,
    BLOCK_FAMILY,
    FAMILIES,
    NUMBER,
    OPTIONS,
    SCALE_FORMATS,
    STATISTICS,
    split_option,
)

_PLAIN = "|".join(sorted({*FAMILIES} - {"t", "float", "power"}))
_BITS = r"[0-9]+(?:\.[0-9]+)?"
_ELEMENT = re.compile(
    rf"(?:(?P<plain>{_PLAIN})|(?P<t>t)(?P<nu>{NUMBER})?_|(?P<power>power)(?:(?P<alpha>{NUMBER})_)?|(?P<float>float))"
    rf"(?P<bits>{_BITS})(?:_e(?P<exponent>[0-9]{{1,3}})m(?P<mantissa>[0-9]{{1,3}}))?(?:-(?P<mode>[a-z0-9._-]+))?"
)


def fields(text: str) -> dict[str, Any]:
    """The constructor's arguments for a text, alias or block type; InvalidFormat for a text of no format."""
    name, plus, options = text.strip().partition("+")
    alias = ALIASES.get(name.lower())
    if alias is None and name.lower() in BLOCK_TYPES:
        found = BLOCK_TYPES[name.lower()]
        block = {"family": BLOCK_FAMILY, "mode": name.lower(), "bits": found.bits, "granularity": found.elements}
        return block | {"options": tuple(options.split("+")) if plus else ()}
    return _fields((alias or name) + plus + options)


def nearest_name(name: str, known: tuple[str, ...]) -> str:
    """A hint: the known name that is most like it, and all of them."""
    found = get_close_matches(name, known, 1, 0.4)
    return f"did you mean {found[0]}? known: {', '.join(known)}" if found else f"known: {', '.join(known)}"


def _fields(text: str) -> dict[str, Any]:
    body, *options = text.split("+")
    element, at, rest = body.partition("@")
    match = _ELEMENT.fullmatch(element)
    if not match:
        raise _unknown_element(element, text)
    if not at or not rest:
        raise _invalid("no granularity", text, f"{element}@64, {element}@channel or {element}@tensor")
    for option in options:
        if not split_option(option)[0]:
            raise _no_option(option, text)
    granularity, *named = rest.split(":")
    statistic, scale_format = _statistic_and_scale(named, text)
    if match["exponent"] is not None and not match["float"]:
        raise _invalid("only float has exponent and mantissa bits", text, match[0].partition("_e")[0])
    return {
        "family": match["plain"] or match["t"] or match["power"] or match["float"],
        "bits": float(match["bits"]),
        "mode": match["mode"] or "",
        "nu": _optional_float(match["nu"]),
        "alpha": _optional_float(match["alpha"]),
        "exponent_bits": _optional_int(match["exponent"]),
        "mantissa_bits": _optional_int(match["mantissa"]),
        "granularity": _granularity(granularity, text),
        "statistic": statistic,
        "scale_format": scale_format,
        "options": tuple(options),
    }


def _statistic_and_scale(named: list[str], text: str) -> tuple[str, str]:
    """Statistic and scale format, either of which may be left out ("")."""
    if len(named) > 2:
        raise _invalid("too many fields", text, "element@granularity:statistic:scale_format")
    if len(named) == 1 and named[0] in SCALE_FORMATS:
        return "", named[0]
    if len(named) == 2 and named[0] in SCALE_FORMATS and named[1] in STATISTICS:
        raise _invalid("the statistic comes before the scale format", text, f"...:{named[1]}:{named[0]}")
    if "" in named:
        raise _invalid("nothing after a colon", text, "leave the colon out, or write absmax, bf16, absmax:bf16")
    statistic, scale = ((*named, "", "")[:2]) if named else ("", "")
    if named and statistic not in STATISTICS:
        raise _invalid(f"no statistic {statistic!r}", text, nearest_name(statistic, (*STATISTICS, *SCALE_FORMATS)))
    if len(named) == 2 and scale not in SCALE_FORMATS:
        raise _invalid(f"no scale format {scale!r}", text, nearest_name(scale, SCALE_FORMATS))
    return statistic, scale


def _granularity(text: str, whole: str) -> str | int:
    if text in ("tensor", "channel"):
        return text
    if not re.fullmatch(r"[1-9][0-9]{0,9}", text):
        raise _invalid(f"no granularity {text!r}", whole, "tensor, channel or a block size such as 64")
    return int(text)


def _optional_float(text: str | None) -> float | None:
    return None if text is None else float(text)


def _optional_int(text: str | None) -> int | None:
    return None if text is None else int(text)


def _unknown_element(element: str, text: str) -> InvalidFormat:
    name = re.match(r"[a-z]*", element.lower())
    if "@" not in text and (alias := get_close_matches(text.lower(), [*ALIASES, *BLOCK_TYPES], 1)):
        return _invalid(f"no format {text!r}", text, f"did you mean {alias[0]}?")
    if name and name[0] in FAMILIES:
        return _invalid(f"{element!r} is not a family, bits and mode", text, _example(name[0]))
    return _invalid(f"no element format {element!r}", text, nearest_name(name[0] if name else "", FAMILIES))


def _no_option(option: str, text: str) -> InvalidFormat:
    name = re.match(r"[a-z]*", option.lower())
    return _invalid(f"no option {option!r}", text, nearest_name(name[0] if name else "", OPTIONS) + "; outliers0.001")


def _example(family: str) -> str:
    forms = {"t": "t5_4", "float": "float4_e2m1", "power": "power0.7_4", "grid": "grid3.0", "higgs": "higgs3-p2"}
    return f"for instance {forms.get(family, f'{family}4')}"


def _invalid(reason: str, text: str, hint: str = "") -> InvalidFormat:
    return InvalidFormat(reason, where=text, hint=hint)
