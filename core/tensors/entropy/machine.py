"""Which of the compiled loops this process can run; imports numba only to ask."""

from __future__ import annotations

from functools import lru_cache

_NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi2")


@lru_cache(maxsize=1)
def has_wide_vectors() -> bool:
    """Whether numba compiles for a processor with the instructions of `avx512_jit`."""
    from llvmlite import binding  # type: ignore[import-untyped]
    from numba.core import config

    settings = vars(config)
    if settings.get("CPU_FEATURES") is not None:
        return all(f"+{name}" in settings["CPU_FEATURES"].split(",") for name in _NEEDED)
    if settings.get("CPU_NAME") is not None:
        return False
    features = binding.get_host_cpu_features()
    return all(features.get(name, False) for name in _NEEDED)
