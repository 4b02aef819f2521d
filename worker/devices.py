"""Which device a worker owns, told without torch: enough to choose queues before the engine knows for certain."""

from __future__ import annotations

import os
from pathlib import Path


def likely_device(setting: str, proc: Path = Path("/proc/driver/nvidia/gpus"), dev: Path = Path("/dev")) -> str:
    """`cpu` or `cuda` as set; for `auto`, whether this machine shows a GPU that is not hidden from us."""
    if setting != "auto":
        return setting
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return "cpu"
    seen = (proc.is_dir() and any(proc.iterdir())) or any(dev.glob("nvidia[0-9]*"))
    return "cuda" if seen else "cpu"


def queues_of(setting: str) -> tuple[str, ...]:
    """The queues to consume from, urgent ones first: `cpu,gpu` means cpu.high, gpu.high, cpu, gpu."""
    names = tuple(dict.fromkeys(name.strip() for name in setting.split(",") if name.strip()))
    return (*(f"{name}.high" for name in names), *names)
