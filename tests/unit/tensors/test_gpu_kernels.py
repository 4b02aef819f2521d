"""GPU kernels on a machine without a GPU: run in Triton's interpreter, and compiled ahead of time for sm_80 and sm_90.

Both in processes of their own: Triton decides when a kernel is defined whether it is interpreted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from core.formats.elements import element_table
from core.recipe.tensor_format import parse
from core.tensors.blocks import BlockGrid
from core.tensors.kernels import gpu
from core.tensors.kernels.gpu_plan import Element, Geometry, refusal

pytest.importorskip("triton")

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
CASES = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / "gpu_kernel_cases.py")]


def run(command: list[str], **environment: str) -> str:
    """What a command prints; its output is shown where it fails."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "TRITON"))}
    shown = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=inherited | environment)
    assert shown.returncode == 0, shown.stdout[-4000:] + shown.stderr[-4000:]
    return shown.stdout


@lru_cache(maxsize=1)
def compiled(cache: Path) -> list[dict[str, object]]:
    shown = run([sys.executable, str(HERE / "compile_ahead.py")], TRITON_CACHE_DIR=str(cache))
    return [json.loads(line) for line in shown.splitlines()]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    return compiled(tmp_path_factory.mktemp("triton"))


def test_kernels_give_the_bits_of_the_reference_in_the_interpreter() -> None:
    assert " passed" in run(CASES, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.gpu
def test_kernels_give_the_bits_of_the_reference_on_this_gpu() -> None:
    assert " passed" in run(CASES)


def test_every_kernel_compiles_for_both_architectures(kernels: list[dict[str, object]]) -> None:
    assert {(made["kernel"], made["capability"]) for made in kernels} == {
        (kernel, capability)
        for kernel in ("encode_kernel", "scales_kernel", "codes_kernel", "decode_kernel")
        for capability in (80, 90)
    }
    assert all(made["ptx"] and int(str(made["cubin_bytes"])) > 0 for made in kernels)


def test_no_kernel_spills_registers_to_memory(kernels: list[dict[str, object]]) -> None:
    assert [made for made in kernels if made["stack_bytes"] or made["local_bytes"]] == []


def test_no_kernel_loses_denormals_or_approximates_what_decides_a_bit(kernels: list[dict[str, object]]) -> None:
    assert [made for made in kernels if made["flushes"] or made["approximates"]] == []


def test_weights_are_read_and_values_written_sixteen_bytes_at_a_time(kernels: list[dict[str, object]]) -> None:
    for made in kernels:
        wanted = "st.global.v4.b32" if made["kernel"] == "decode_kernel" else "ld.global.v4.b32"
        assert wanted in str(made["vectors"]), made


@pytest.mark.parametrize("scale", ["bf16", "fp16", "e8m0"])
@pytest.mark.parametrize("element", ["int4", "int4-sym", "int8", "float4_e2m1", "float8_e4m3", "float8_e5m2"])
def test_limits_are_multiplied_in_fp32_only_where_every_product_is_exact(element: str, scale: str) -> None:
    """All scales there are: the fp32 product equals the fp64 one, or overflows, for every limit."""
    fmt = parse(f"{element}@32:absmax:{scale}")
    made = Element.of(fmt, element_table(fmt, 32))
    patterns = torch.arange(0x7C00 if scale == "fp16" else 0x7F80, dtype=torch.int16)
    scales = {
        "bf16": patterns.view(torch.bfloat16).float(),
        "fp16": patterns.view(torch.float16).float(),
        "e8m0": torch.ldexp(torch.ones(255), torch.arange(255) - 127),
    }[scale]
    limits = torch.tensor([limit for limit in made.limits if abs(limit) < float("inf")], dtype=torch.float64)
    products = scales[:, None] * limits.float()
    is_exact = bool(((products.double() == scales.double()[:, None] * limits) | products.isinf()).all())
    assert made.rule == ("product" if is_exact else "exact")


@pytest.mark.parametrize("width", [1, 5, 8, 16, 64, 100, 128, 1000, 4096, 11_008, 20_000])
def test_a_launch_covers_every_block_with_whole_warps(width: int) -> None:
    grid = BlockGrid(elements=48 * width, columns=4 * width, width=width)
    for geometry in (Geometry.of(grid), Geometry.for_decoding(grid)):
        assert geometry.lanes * geometry.chunks >= width
        assert geometry.programs * geometry.rows >= geometry.blocks * geometry.chunks
        assert geometry.lanes % (8 * geometry.parts) == 0
        assert geometry.warps in (1, 2, 4, 8, 16)
        assert width % geometry.aligned == 0


def test_tensors_that_32_bits_cannot_count_are_left_to_the_reference() -> None:
    fmt = parse("int4@tensor")
    assert refusal(fmt, BlockGrid(1 << 30, 1 << 30, 1 << 30, one_scale=True)) is None
    assert "32 bits" in str(refusal(fmt, BlockGrid(1 << 32, 1 << 32, 1 << 32, one_scale=True)))


def test_without_a_gpu_the_caller_is_told_to_use_the_reference() -> None:
    fmt = parse("int4@64")
    assert gpu.encode(torch.ones(2, 64), fmt, element_table(fmt, 64)) is None
