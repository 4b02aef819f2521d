"""The catalogue of number formats for people and programs: families, aliases, and one format described in numbers."""

from __future__ import annotations

from typing import Any

from core.formats.elements import ASSUMED_CHANNEL, element_table, root_density_families
from core.formats.stored import SCALE_BITS, packed_bits
from core.recipe.tensor_format import ALIASES, SCALE_FORMATS, TensorFormat, parse

_FAMILIES = (
    ("int", "int4-asym@128", "integers: asym has 2^bits levels with a zero, sym is symmetric without one"),
    ("float", "float4_e2m1@32:absmax:e8m0", "floating point with any exponent and mantissa bits, OCP conventions"),
    ("normal", "normal4@64", "cube-root-density codebook for Normal weights"),
    ("laplace", "laplace4@64", "cube-root-density codebook for Laplace weights"),
    ("t", "t7_4@64:signmax", "cube-root-density codebook for Student-t weights with nu degrees of freedom"),
    ("nf", "nf4@64", "the quantile codebook of QLoRA's rule"),
)


def catalogue() -> list[dict[str, Any]]:
    """One entry per family and alias: name, kind, description, an example and the widths that an allocator tries."""
    families = [
        {
            "name": name,
            "kind": "family",
            "description": description,
            "example": str(parse(example)),
            "widths": list(parse(example).allowed_widths()),
            "statistics": ["absmax", "signmax"] + ([] if name == "nf" else ["rms"]),
            "scale_formats": list(SCALE_FORMATS),
        }
        for name, example, description in _FAMILIES
    ]
    aliases = [
        {"name": name, "kind": "alias", "description": f"stands for {parse(text)}", "example": str(parse(text))}
        for name, text in ALIASES.items()
    ]
    return families + aliases


def describe(fmt: TensorFormat) -> dict[str, Any]:
    """A format in numbers: codebook ascending for scale 1, bits of element, scale and stored parameter.

    Where only a tensor's shape tells how many weights share a scale, the codebook is that of `assumed_shared` weights
    and `bits_per_param` leaves the scales out.
    """
    known = isinstance(fmt.granularity, int)
    shared = fmt.granularity if isinstance(fmt.granularity, int) else ASSUMED_CHANNEL
    element = packed_bits(fmt.codes)
    described = {
        "format": str(fmt),
        "codebook": list(element_table(fmt, shared).values),
        "element_bits": fmt.element_bits,
        "scale_bits": SCALE_BITS[fmt.scale_format],
        "block_size": fmt.granularity,
        "bits_per_param": element + SCALE_BITS[fmt.scale_format] / shared if known else element,
        "description": _sentence(fmt),
    }
    depends = not known and fmt.family in root_density_families() and fmt.statistic != "rms"
    return described | ({"assumed_shared": shared} if depends else {})


def _sentence(fmt: TensorFormat) -> str:
    family = next(description for name, _, description in _FAMILIES if name == fmt.family)
    place = {"tensor": "per tensor", "channel": "per output row"}.get(str(fmt.granularity))
    return f"{family}; one {fmt.scale_format} scale {place or f'per block of {fmt.granularity}'}, by {fmt.statistic}"
