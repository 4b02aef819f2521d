"""What an allocator may choose from: groups of tensors that share one format, the formats of each, and what is kept.

Built from the checkpoint's headers and the recipe alone, so it is the same before and after any data was read. Kept:
tensors with fewer than two dimensions, of dtypes that are not floating, without elements, and those that an override
keeps. Whoever contradicts himself (bounds that leave no width) gets InvalidRecipe; nothing is widened silently.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from core.errors import InvalidRecipe
from core.exports.layout import KEEP
from core.recipe.allocation import AllocationSpec, widths_within
from core.recipe.format_names import MAX_GRID_BITS
from core.recipe.format_rules import least_grid_bits
from core.recipe.groups import grouping
from core.recipe.recipe import Override, first_match
from core.recipe.tensor_format import TensorFormat, parse
from core.storage.checkpoint import CheckpointIndex
from core.tensors.dtypes import FLOATING

_LEAST_CODES, _MOST_CODES = 4, 256
RATE_STEP = 0.02  # bits between the rates of a grid that the solver chooses from


@dataclass(frozen=True)
class Group:
    """Tensors that get one format. `widths`: ascending element bits that `base` may take; one when it is fixed."""

    members: tuple[str, ...]
    base: TensorFormat
    widths: tuple[float, ...]

    @property
    def name(self) -> str:
        """The first member's name."""
        return self.members[0]

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats to choose from, by ascending width."""
        return tuple(self.text(bits) for bits in self.widths)

    def at(self, bits: float) -> str:
        """The widest format of at most that many bits between the bounds, on the fine ladder; else the narrowest."""
        fits = bisect_right(self.ladder, bits + 1e-9)
        return self.text(self.ladder[fits - 1] if fits else self.widths[0])

    @property
    def rates(self) -> tuple[float, ...]:
        """What the solver chooses from: of a grid many more rates than `widths`, between which losses are known."""
        if not self.base.is_grid or len(self.widths) == 1:
            return self.widths
        between = (step * RATE_STEP for step in range(math.ceil(self.widths[0] / RATE_STEP), MAX_GRID_BITS * 50))
        inside = {round(bits, 2) for bits in between if self.widths[0] < bits < self.widths[-1]}
        return tuple(sorted(inside | set(self.widths)))

    @cached_property
    def ladder(self) -> tuple[float, ...]:
        """Every width worth having between the bounds: `widths`, all even numbers of codes, a grid's rates."""
        if len(self.widths) == 1:
            return self.widths
        if self.base.is_grid:
            inside = (bits for bits in ladder(self.base) if self.widths[0] < bits < self.widths[-1])
            return (self.widths[0], *inside, self.widths[-1])
        fine = {self.base.with_bits(bits).codes: bits for bits in ladder(self.base)}
        fine |= {self.base.with_bits(bits).codes: bits for bits in self.widths}
        return tuple(bits for _, bits in sorted(fine.items()) if self.widths[0] <= bits <= self.widths[-1])

    def text(self, bits: float) -> str:
        """The format of a width."""
        return str(self.base if bits == self.base.bits else self.base.with_bits(bits))


@dataclass(frozen=True)
class Space:
    """All tensors of a checkpoint that count, each in a group or kept; `warnings` for the report."""

    groups: tuple[Group, ...]
    kept: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    def choice(self, formats: Mapping[str, str]) -> dict[str, str]:
        """Format by tensor from the format by group; "keep" for the kept."""
        chosen = {member: formats[group.name] for group in self.groups for member in group.members}
        return dict(sorted((chosen | dict.fromkeys(self.kept, KEEP)).items()))


def ladder(base: TensorFormat) -> tuple[float, ...]:
    """The finest widths of a format: integer steps, for codebooks log2 of every even number of codes from 4 to 256, for
    grids thousandths of a bit.

    Written with two decimals, or as many more as it takes to give that number of codes again.
    """
    if base.is_grid:
        least = math.ceil(1000 * least_grid_bits(base))
        return tuple(thousandths / 1000 for thousandths in range(least, 1000 * MAX_GRID_BITS + 1))
    if not base.is_codebook:
        return base.allowed_widths()
    return tuple(_label_bits(codes) for codes in range(_LEAST_CODES, _MOST_CODES + 1, 2))


def build_space(
    index: CheckpointIndex,
    base: TensorFormat,
    spec: AllocationSpec,
    overrides: Sequence[Override],
    groups: str | Sequence[Sequence[str]],
) -> Space:
    """The space of a recipe's `format`, `allocation`, `overrides` and `groups` on that checkpoint."""
    found = {name: first_match(overrides, name) for name in index.names}
    kept = tuple(name for name in index.names if _is_kept(index, name, found[name]))
    free = [name for name in index.names if name not in set(kept)]
    shapes = {name: index.tensors[name].shape for name in free}
    made: list[Group] = []
    warnings: list[str] = []
    for members in grouping(groups, shapes, index.config):
        parts = _split(members, found)
        if len(parts) > 1:
            warnings.append(f"an override gives part of a group that a runtime fuses its own format: {members[0]}, ...")
        made += [_group(part, base, spec, [found[name] for name in part]) for part in parts]
    warnings += _split_by_keeping(groups, index, kept)
    return Space(tuple(sorted(made, key=lambda group: group.name)), kept, tuple(warnings))


def _label_bits(codes: int) -> float:
    decimals = 2
    while round(2 ** (bits := round(math.log2(codes), decimals))) != codes:
        decimals += 1
    return bits


def _is_kept(index: CheckpointIndex, name: str, override: Override | None) -> bool:
    entry = index.tensors[name]
    asked = override is not None and bool(override.keep)
    return asked or len(entry.shape) < 2 or entry.dtype not in FLOATING or not entry.elements


def _split(members: Iterable[str], found: Mapping[str, Override | None]) -> list[tuple[str, ...]]:
    """Members by the format that an override gives them, none first."""
    parts: dict[tuple[str, bool], list[str]] = {}
    for name in members:
        override = found[name]
        own = (override.format, override.is_exact) if override is not None and override.format else ("", False)
        parts.setdefault(own, []).append(name)
    return [tuple(names) for _, names in sorted(parts.items())]


def _split_by_keeping(
    groups: str | Sequence[Sequence[str]], index: CheckpointIndex, kept: tuple[str, ...]
) -> list[str]:
    """A warning for every group of which overrides keep a part only."""
    shapes = {name: index.tensors[name].shape for name in index.names}
    names = set(kept)
    return [
        f"an override keeps part of a group that a runtime fuses: {members[0]}, ..."
        for members in grouping(groups, shapes, index.config)
        if 0 < sum(name in names for name in members) < len(members)
    ]


def _group(
    members: tuple[str, ...], base: TensorFormat, spec: AllocationSpec, overrides: Sequence[Override | None]
) -> Group:
    """A group with the bounds of all its members together; an override's bounds take the place of the recipe's."""
    first = overrides[0]
    if first is not None and first.format:
        base = parse(first.format)
        if first.is_exact:
            return Group(members, base, (base.bits,))
    least = max((one and one.min_bits) or spec.min_bits or 0.0 for one in overrides)
    most = min((one and one.max_bits) or spec.max_bits or math.inf for one in overrides)
    widths = widths_within(base, least, most)
    if not widths:
        offered = ", ".join(f"{bits:g}" for bits in base.allowed_widths())
        raise InvalidRecipe(
            f"no width of {base} lies between {least:g} and {most:g} bits, as the members of its group ask together",
            where=members[0],
            hint=f"its widths are {offered}",
        )
    return Group(members, base, widths)


def with_least(group: Group, text: str) -> Group:
    """The group with nothing narrower than the format `text`, which becomes its narrowest."""
    least = parse(text)
    wider = tuple(bits for bits in group.widths if _order(group.base.with_bits(bits)) > _order(least))
    return replace(group, widths=(least.bits, *wider))


def _order(fmt: TensorFormat) -> float:
    """By what widths are told apart."""
    return fmt.bits if fmt.is_grid else fmt.codes
