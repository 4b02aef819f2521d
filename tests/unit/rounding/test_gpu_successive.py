"""Rounding on a GPU on a machine without one: its kernels interpreted, compiled ahead of time, and when they are asked.

Interpreted and compiled in processes of their own: Triton decides when a kernel is defined whether it is interpreted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.recipe.tensor_format import parse
from core.rounding import gpu_successive
from core.rounding.levels import Levels
from core.rounding.successive import Numbers, Scales, round_to_steps, spread
from core.tensors.frame import Frame

pytest.importorskip("triton")

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
CASES = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / "gpu_successive_cases.py")]
BENCHMARK = [sys.executable, str(ROOT / "benchmarks" / "rounding_gpu.py"), "--only-compile"]
KERNELS = [f"{what}, {kind}" for kind in ("fp32", "fp64") for what in ("numbers", "numbers and gains")] + [
    "16 levels, exact",
    "16 levels, rounded",
    "15 levels, quotients",
    "256 levels, exact",
]


def run(command: list[str], **environment: str) -> str:
    """What a command prints; its output is shown where it fails."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "TRITON"))}
    shown = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=inherited | environment)
    assert shown.returncode == 0, shown.stdout[-4000:] + shown.stderr[-4000:]
    return shown.stdout


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    shown = run(BENCHMARK, TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))
    return [json.loads(line) for line in shown.splitlines()]


@pytest.mark.parametrize("cases", ["levels", "not levels"])
def test_codes_are_those_of_the_cpu_in_the_interpreter(cases: str) -> None:
    assert " passed" in run([*CASES, "-k", cases], TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.gpu
def test_codes_are_those_of_the_cpu_on_this_gpu() -> None:
    assert " passed" in run(CASES)


def test_every_kernel_compiles_for_both_architectures(kernels: list[dict[str, Any]]) -> None:
    made = [(one["kernel"], one["architecture"]) for one in kernels]
    assert made == [(name, architecture) for name in KERNELS for architecture in ("sm_80", "sm_90")]


def test_no_kernel_spills_registers_to_memory(kernels: list[dict[str, Any]]) -> None:
    assert [one for one in kernels if one["local_bytes"]] == []


def test_no_division_is_inexact_and_no_denormal_lost(kernels: list[dict[str, Any]]) -> None:
    assert [one for one in kernels if one["inexact"]] == []


def test_passing_an_error_on_takes_few_instructions(kernels: list[dict[str, Any]]) -> None:
    assert max(one["instructions_per_product"] for one in kernels) <= 5
    assert max(one["loads_per_product"] for one in kernels) <= 1.25


class Elsewhere:
    """Stands for a tensor on a device; `here` is what it holds."""

    device = torch.device("meta")

    def __init__(self, here: torch.Tensor) -> None:
        self.here = here
        self.shape = here.shape

    def cpu(self) -> torch.Tensor:
        return self.here.clone()

    def numel(self) -> int:
        return self.here.numel()


def elsewhere(tensor: torch.Tensor) -> Any:
    return Elsewhere(tensor)


TARGETS = torch.randn((6, 5), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
FACTOR = torch.eye(6, dtype=torch.float64) + torch.ones(6, 6).double().tril(-1) / 4


def test_tensors_on_a_device_are_rounded_there(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, indices = Numbers(np.zeros((0, 0), np.int32), np.zeros(0)), np.zeros((0, 0), np.int32)
    monkeypatch.setattr(gpu_successive, "round_to_steps", lambda *_: numbers)
    monkeypatch.setattr(gpu_successive, "spread", lambda *_: indices)
    targets, levels = elsewhere(TARGETS), Levels.of(Frame.of(torch.ones(5, 6), parse("int4@6")))
    assert round_to_steps(targets, elsewhere(FACTOR), np.ones(6), Scales.ones(5, 6)) is numbers
    assert spread(targets, targets, elsewhere(FACTOR), levels) is indices


def test_where_kernels_do_not_run_the_cpu_gives_the_same_codes() -> None:
    given = (np.full(6, 0.3), Scales.ones(5, 6))
    found = round_to_steps(elsewhere(TARGETS), elsewhere(FACTOR), *given)
    assert np.array_equal(found.numbers, round_to_steps(TARGETS.clone(), FACTOR, *given).numbers)
    levels, ratios = Levels.of(Frame.of(TARGETS.T.float(), parse("int4@6"))), FACTOR.T.contiguous()
    indices = spread(elsewhere(TARGETS), elsewhere(TARGETS), elsewhere(ratios), levels)
    assert np.array_equal(indices, spread(TARGETS.clone(), TARGETS, ratios, levels))
