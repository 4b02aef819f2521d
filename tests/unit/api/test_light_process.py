"""The API is a small process: it never loads torch or anything numeric, and its imports stay under 200 MiB."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]

MEASURE = """
import json, sys
from pathlib import Path
from api.main import create_app
from core.config import Settings
create_app(Settings(database_url="postgresql://localhost/none", data_dir=Path(sys.argv[1]))).openapi()
resident = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
print(json.dumps({"kib": int(resident.split()[1]), "modules": sorted(sys.modules)}))
"""
HEAVY = ("torch", "transformers", "triton", "scipy", "numba", "celery", "boto3")
NUMERIC = ("tensors", "sensitivity", "allocation", "rounding", "evaluation", "exports", "networks", "pipeline")


def test_the_process_is_small_and_has_neither_torch_nor_the_numeric_wing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    measured = json.loads(shown.stdout)
    assert measured["kib"] < 200 * 1024
    loaded = {name.partition(".")[0] for name in measured["modules"]}
    assert not loaded.intersection(HEAVY)
    numeric = {f"core.{room}" for room in NUMERIC}
    assert not [name for name in measured["modules"] if ".".join(name.split(".")[:2]) in numeric]
