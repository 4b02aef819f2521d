"""The million weights that published errors were computed on, drawn anew and checked by their digest."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.recipe.tensor_format import TensorFormat
from core.tensors.errors import squared_error
from core.tensors.nearest import encode_nearest

FORMATS: dict[str, Any] = json.loads((Path(__file__).parent / "formats.json").read_text())
ENTRIES: dict[str, Any] = FORMATS["entries"]
DATA_SETS = ("torch0", "numpy0")


@lru_cache(maxsize=2)
def seeded(name: str) -> torch.Tensor:
    """(1024, 1024) fp32 weights of a data set of the golden file."""
    if name == "torch0":
        weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    else:
        weight = torch.from_numpy(np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32))
    assert hashlib.sha256(weight.numpy().tobytes()).hexdigest() == FORMATS["data"][name]["sha256"]
    return weight


def coder_mse(name: str, fmt: TensorFormat) -> float:
    """Mean squared error of a data set encoded and decoded by the real coder."""
    weight = seeded(name)
    return squared_error(weight, encode_nearest(weight, fmt))[0] / weight.numel()
