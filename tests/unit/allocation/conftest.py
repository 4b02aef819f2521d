"""A small random Llama, opened, and pretended Fisher information about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from core.allocation.fisher import Fisher
from core.allocation.forecast import Evidence, Forecast
from core.allocation.sizes import Sizes
from core.allocation.space import Space, build_space
from core.recipe.allocation import AllocationSpec
from core.recipe.override import Override
from core.recipe.tensor_format import TensorFormat, parse
from core.storage.checkpoint import CheckpointIndex
from core.storage.sources import folder_sources
from tests.unit.pipeline.conftest import write_llama

MakeSpace = Callable[..., Space]


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory) -> CheckpointIndex:
    """An untied random Llama of 100 000 parameters."""
    return CheckpointIndex.from_files(folder_sources(write_llama(tmp_path_factory.mktemp("model") / "llama"), ()))


def space_of(
    index: CheckpointIndex,
    text: str = "t7_4@32:signmax",
    *,
    overrides: list[dict[str, Any]] | None = None,
    groups: str | list[list[str]] = "auto",
    **bounds: float,
) -> Space:
    """The space of a recipe that says this."""
    given = [Override.model_validate(one) for one in overrides or []]
    return build_space(index, parse(text), AllocationSpec(**bounds), given, groups)


def fisher_on(index: CheckpointIndex, space: Space, base: TensorFormat, means: Mapping[str, float]) -> Fisher:
    """The Fisher method with these means as its evidence."""
    evidence = Evidence.of(means, lambda _name: None, space.groups)
    return Fisher(Sizes(index, space), base, Forecast(index, evidence))


def pretended_means(space: Space, seed: int = 0) -> dict[str, float]:
    """Means that differ by orders of magnitude, as real ones do."""
    chance = np.random.default_rng(seed)
    names = [name for group in space.groups for name in group.members]
    return {name: float(10.0 ** chance.normal(-6, 1)) for name in names}
