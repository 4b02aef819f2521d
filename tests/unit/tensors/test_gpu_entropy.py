"""The GPU decoder of entropy-coded numbers on a machine without a GPU: interpreted, compiled ahead of time, its PTX.

Interpreted and compiled in processes of their own: Triton decides when a kernel is defined whether it is interpreted.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from core.tensors.entropy.coder import encode_segments
from core.tensors.entropy.decoder import CodedSequence
from core.tensors.entropy.layout import Segment
from core.tensors.entropy.windows import histogram_model
from core.tensors.kernels import gpu_entropy

pytest.importorskip("triton")

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
CASES = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / "gpu_entropy_cases.py")]
BENCHMARK = [sys.executable, str(ROOT / "benchmarks" / "entropy_gpu.py"), "--only-compile"]
LANES = 32
Words = NDArray[np.uint32]


def run(command: list[str], **environment: str) -> str:
    """What a command prints; its output is shown where it fails."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "TRITON"))}
    shown = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=inherited | environment)
    assert shown.returncode == 0, shown.stdout[-4000:] + shown.stderr[-4000:]
    return shown.stdout


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """Numbers and values, compiled for sm_90."""
    cache = str(tmp_path_factory.mktemp("triton"))
    shown = run([*BENCHMARK, "--out", "int16", "bfloat16, blocks", "float32, columns"], TRITON_CACHE_DIR=cache)
    return [json.loads(line) for line in shown.splitlines()]


def test_numbers_and_values_are_those_of_the_cpu_in_the_interpreter() -> None:
    assert " passed" in run(CASES, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.gpu
def test_numbers_and_values_are_those_of_the_cpu_on_this_gpu() -> None:
    assert " passed" in run(CASES)


def test_both_forms_compile_and_keep_everything_in_registers(kernels: list[dict[str, object]]) -> None:
    assert {(made["out"], made["vote"]) for made in kernels} == {
        (out, vote)
        for out in ("torch.int16", "torch.bfloat16, blocks of 64", "torch.float32, columns in order")
        for vote in ("ptx", "portable")
    }
    assert [made for made in kernels if made["local_bytes"] or made["shared_bytes"]] == []


def test_a_step_of_32_numbers_takes_few_instructions(kernels: list[dict[str, object]]) -> None:
    steps = {(made["out"], made["vote"]): float(str(made["instructions_per_step"])) for made in kernels}
    assert steps["torch.int16", "ptx"] <= 24
    assert steps["torch.int16", "portable"] <= 42
    assert steps["torch.bfloat16, blocks of 64", "ptx"] <= 34


def evaluated(text: str, **registers: Words) -> dict[str, Words]:
    """Registers of a warp's lanes after each instruction of a PTX text; `$n` is the register `r<n>`."""
    found: dict[str, Words] = dict(registers)
    body = text.strip().removeprefix("{").removesuffix("}").replace("$", "r")
    for statement in filter(None, (part.strip() for part in body.split(";"))):
        name, *names = re.split(r"[ ,]+", statement)
        if name == ".reg":
            continue
        target, *given_ = names
        read = [found[one] if one in found else np.full(LANES, int(one, 0), np.uint32) for one in given_]
        found[target] = INSTRUCTIONS[name](*read).astype(np.uint32)
    return found


def _ballot(predicate: Words, members: Words) -> Words:
    mask = sum(1 << lane for lane in range(LANES) if predicate[lane])
    return np.full(LANES, mask, np.uint32) & members


def _permuted(a: Words, b: Words, selector: Words) -> Words:
    lanes = np.stack([a, b], axis=1).astype("<u4").view(np.uint8)
    chosen = [(int(selector[0]) >> 4 * i) & 7 for i in range(4)]
    return lanes[:, chosen].copy().view("<u4").reshape(-1)


INSTRUCTIONS: dict[str, Callable[..., NDArray[Any]]] = {
    "setp.lt.u32": lambda a, b: a < b,
    "vote.sync.ballot.b32": _ballot,
    "popc.b32": lambda a: np.array([int(one).bit_count() for one in a]),
    "add.u32": lambda a, b: a + b,
    "and.b32": lambda a, b: a & b,
    "min.u32": np.minimum,
    "prmt.b32": _permuted,
    "selp.b32": lambda a, b, predicate: np.choose(predicate, (b, a)),
}


@given(
    states=st.lists(st.integers(0, 2**32 - 1) | st.integers(65530, 65545), min_size=LANES, max_size=LANES),
    words=st.lists(st.integers(0, 65535), min_size=LANES, max_size=LANES),
    used=st.integers(0, 1 << 24),
    left=st.integers(-40, 40),
)
def test_the_ptx_does_what_sums_do(states: list[int], words: list[int], used: int, left: int) -> None:
    from core.tensors.kernels.gpu_entropy_kernel import JOIN, VOTE

    x, word, limit = np.array(states, np.uint32), np.array(words, np.uint32), max(used + left, 0)
    before = np.array([(1 << lane) - 1 for lane in range(LANES)], np.uint32)
    whole = (np.full(LANES, number, np.uint32) for number in (used, limit))
    voted = evaluated(VOTE.value, **dict(zip(("r2", "r3", "r4", "r5"), (x, before, *whole), strict=True)))
    needs = [state < 65536 for state in states]
    assert voted["r0"].tolist() == [min(used + sum(needs[:lane]), limit) for lane in range(LANES)]
    assert voted["r1"].tolist() == [used + sum(needs)] * LANES
    joined = evaluated(JOIN.value, r1=x, r2=word)["r0"].tolist()
    assert joined == [a << 16 | b if needed else a for a, b, needed in zip(states, words, needs, strict=True)]


def test_without_a_gpu_the_cpu_decodes() -> None:
    codes = np.rint(np.random.default_rng(0).standard_normal(2500) * 3).astype(np.int32)
    data = encode_segments(codes, [histogram_model(codes)], [Segment(0, codes.size)], 32, 10)
    sequence, device = CodedSequence.parse(data, codes.size), torch.device("cpu")
    assert gpu_entropy.decode_codes(sequence, device, range(1, 3)).tolist() == codes[1024:].tolist()
    out, values, factors = torch.empty(2500), torch.arange(41.0) - 20, 1 + torch.arange(100.0)
    gpu_entropy.dequantise(sequence, range(3), out, values, -20, factors, 50, 25)
    assert torch.equal(out, torch.from_numpy(codes).float() * factors.repeat_interleave(25))
