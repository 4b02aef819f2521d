"""What a user should know about an allocation, in sentences. Judges nothing and changes nothing.

Tensors without evidence (fisher-and-allocation, section 5), too little calibration text (section 6), weights at a clamp
(8.2.4), and what sharing formats costs (7.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from core.allocation.forecast import Forecast, grouping_cost_bits
from core.allocation.space import Space

_HALVES_BITS = 0.05
_AT_A_CLAMP = 0.05
_GROUPING_COST_BITS = 0.1
_NAMED = 20


def warnings(space: Space, formats: Mapping[str, str], forecast: Forecast | None, *, by_fisher: bool) -> list[str]:
    """Warnings about the formats by group; `by_fisher`: whether Fisher information chose them."""
    said = list(space.warnings)
    if forecast is not None:
        said += _not_reached(space, forecast, by_fisher)
    if forecast is not None and by_fisher:
        said += [*_short_text(forecast), *_at_a_clamp(space, formats, forecast), *_grouping(space, forecast)]
    return said


def _not_reached(space: Space, forecast: Forecast, by_fisher: bool) -> Iterator[str]:
    missed, pooled = forecast.evidence.not_reached(space.groups), forecast.evidence.pooled
    alone = "they have at least the width that uniform would give" if by_fisher else "no KL is predicted for them"
    for names, what in (
        ([name for name in missed if name not in pooled], alone),
        ([name for name in missed if name in pooled], "they are taken for as sensitive as those of their group"),
    ):
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            yield f"no Fisher information of {len(names)} tensors; {what}: {', '.join(names[:_NAMED])}{more}"


def _short_text(forecast: Forecast) -> Iterator[str]:
    halves = forecast.evidence.halves_bits
    if halves is not None and halves > _HALVES_BITS:
        yield (
            f"two halves of the calibration text would allocate {halves:.2f} bits apart (RMS over tensors); "
            f"twice as many sequences are advised above {_HALVES_BITS}"
        )


def _at_a_clamp(space: Space, formats: Mapping[str, str], forecast: Forecast) -> Iterator[str]:
    elements = {one.name: sum(forecast.elements(name) for name in one.members) for one in space.groups}
    for end, at in (("smallest", 0), ("largest", -1)):
        clamped = [one for one in space.groups if len(one.widths) > 1 and formats[one.name] == one.formats[at]]
        share = sum(elements[one.name] for one in clamped) / max(sum(elements.values()), 1)
        if share > _AT_A_CLAMP:
            yield f"{100 * share:.0f} % of the quantised weights have the {end} width that they may have"


def _grouping(space: Space, forecast: Forecast) -> Iterator[str]:
    cost = grouping_cost_bits(forecast, space.groups)
    if cost > _GROUPING_COST_BITS:
        yield f"sharing formats within groups that a runtime fuses costs about {cost:.2f} bits per weight"
