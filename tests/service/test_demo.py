"""`bitmill demo --json`: the whole product in one command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("stack")


@pytest.mark.parametrize("model", ["bundled", pytest.param("smollm2", marks=pytest.mark.slow)])
def test_the_demo_leaves_a_measured_artefact_and_says_where(model: str, tmp_path: Path) -> None:
    out = tmp_path / "artefact"
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", "demo", "--json", "--model", model, "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
        timeout=280 if model == "bundled" else 3600,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    summary = report["summary"]
    target = report["recipe"]["target"]["bits_per_param"]
    assert target - 0.05 < summary["bits_per_param"] <= target
    assert summary["kl_mean"] > 0
    assert summary["predicted_kl"] > 0
    assert summary["perplexity"] > 1
    assert summary["size_bytes"] < summary["original_size_bytes"]
    assert report["artefact"] == str(out)
    assert (out / "manifest.json").is_file()
    assert not any(path.name.endswith(".part") for path in out.rglob("*"))
