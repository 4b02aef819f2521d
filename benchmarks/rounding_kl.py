"""What the rounding methods do to the bundled model: KL divergence of real artefacts beside the bits that they store.

Every case is a job of the pipeline, preset `demo` but for its rounding, format, allocation and target: calibrated,
allocated, quantised, assembled, and measured from the assembled files on text that calibration has not seen. Equal
steps are done once. Prints a JSON line per case: bits per parameter of the weight files, everything counted; KL (nats
per token) with its standard error; agreement of the likeliest token; seconds of this case's own steps; the notes of
tensors that were rounded otherwise than asked, with their number. A target that the format cannot meet gives
`infeasible`. With `--out` lines are added to a file, and what stands there already is not measured again.

    python benchmarks/rounding_kl.py [--bits 3] [--allocation fisher] [--row gptq ...] [--out FILE]
    python benchmarks/rounding_kl.py --bits 3 4 2.5 2 --allocation fisher uniform --out docs/images/rounding_kl.jsonl
    python benchmarks/rounding_kl.py --tables   writes those numbers into docs/rounding.md and README.md
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core.jobs.steps import StepKind, StepOutput
    from core.pipeline.context import StepContext
    from core.recipe.recipe import Recipe

ROOT = Path(__file__).parents[1]
NUMBERS = ROOT / "docs" / "images" / "rounding_kl.jsonl"
PAGE, README = ROOT / "docs" / "rounding.md", ROOT / "README.md"
PRESET = "demo"
BITS = (2.0, 2.5, 3.0, 4.0)
ALLOCATIONS = ("uniform", "fisher")
WITHIN = 0.01  # bits below the target that a table does not mention

Json = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A line of the table: how it is called, its rounding, and a format of which allocation varies the width."""

    title: str
    rounding: Json
    format: str

    def key(self, allocation: str, bits: float) -> str:
        """What a measured line is told apart by; a row that is defined otherwise is measured again."""
        return json.dumps([self.rounding, self.format, allocation, float(bits)], sort_keys=True)


# The format of the presets, best of those with codes of fixed length; one grid for all that have grids, so that they
# differ in rounding only; for power grids whole rows, as they are meant, and signmax, under which 2 bits are allowed.
BLOCKS, GRID, POWERS = "t7_4@32:signmax-search:e4m3", "grid3@tensor", "power4@channel:signmax-search"
PAPER = {"name": "watersic", "paths": 1, "mmse_damping": 0, "classes": False}
ROWS = (
    Row("nearest", {"name": "nearest"}, BLOCKS),
    Row("gptq", {"name": "gptq"}, BLOCKS),
    Row("error_diffusion", {"name": "error_diffusion"}, BLOCKS),
    Row("power_learned", {"name": "power_learned"}, POWERS),
    Row("nearest, grid", {"name": "nearest"}, GRID),
    Row("gptq, grid", {"name": "gptq"}, GRID),
    Row("watersic, paper", PAPER, GRID),
    Row("watersic", {"name": "watersic"}, GRID),
    Row("watersic, sequential", {"name": "watersic", "layers": "sequential"}, GRID),
)


@dataclass
class Bench:
    """The pipeline on one checkpoint; what was once answered to a request is answered again."""

    source: Path
    ctx: StepContext
    known: dict[str, StepOutput] = field(default_factory=dict)

    def line(self, row: Row, allocation: str, bits: float) -> Json:
        """Measure one case."""
        from core.errors import InfeasibleTarget

        asked: Json = {"benchmark": "rounding_kl", "row": row.title, "rounding": row.rounding, "format": row.format}
        asked |= {"allocation": allocation, "asked_bits": float(bits)}
        begin = monotonic()
        try:
            outputs = self.outputs(recipe_of(row, allocation, bits))
        except InfeasibleTarget as error:
            return asked | {"infeasible": error.detail}
        return asked | measured(outputs) | {"seconds": round(monotonic() - begin, 1)}

    def outputs(self, recipe: Recipe) -> dict[StepKind, StepOutput]:
        """Execute the steps of a recipe but the export, one quantise shard."""
        from core.jobs.steps import dependencies_of, kinds_of

        canonical = recipe.canonical()
        done: dict[StepKind, StepOutput] = {}
        for kind in (kind for kind in kinds_of(canonical) if kind != "export"):
            needed = {one: done[one] for one in dependencies_of(kind, canonical)}
            done[kind] = self._step(kind, canonical, needed)
        return done

    def _step(self, kind: StepKind, canonical: Json, needed: Mapping[StepKind, StepOutput]) -> StepOutput:
        from core.jobs.steps import (
            StepInput,
            StepOutput,
            StepRequest,
            input_hash,
            output_hash,
            recipe_params,
            step_seed,
        )
        from core.pipeline.steps import run_step

        source = {"source": {"kind": "path", "path": str(self.source), "in_place": True}}
        params = source if kind == "fetch" else recipe_params(kind, canonical)
        seed = step_seed(kind, canonical)
        name = input_hash(kind, params, [output_hash(output) for output in needed.values()], seed=seed)
        if name not in self.known:
            inputs = tuple(StepInput(kind=one, output=output) for one, output in needed.items())
            request = StepRequest(kind=kind, input_hash=name, params=params, inputs=inputs, seed=seed)
            self.known[name] = StepOutput.model_validate(run_step(kind, request, self.ctx))
        return self.known[name]


def recipe_of(row: Row, allocation: str, bits: float) -> Recipe:
    """The job of a case; `bitmill quantise --recipe demo` with the same four values set does the same."""
    from core.recipe.recipe import load_recipe, presets

    changed = {"rounding": row.rounding, "format": row.format, "allocation": allocation}
    return load_recipe(presets()[PRESET].canonical() | changed | {"target": {"bits_per_param": float(bits)}})


def measured(outputs: Mapping[StepKind, StepOutput]) -> Json:
    """What a finished job says of itself."""
    files, metrics = outputs["assemble"].values, outputs["evaluate"].values["metrics"]
    notes = Counter(note for tensor in files["tensors"] for note in tensor.get("notes", ()))
    return {
        "bits_per_param": files["bits_per_param"],
        "size_bytes": files["size_bytes"],
        **{key: metrics[key] for key in ("kl_mean", "kl_stderr", "top1_agreement", "perplexity")},
        "notes": dict(sorted(notes.items())),
    }


def cases(rows: Iterable[Row], allocations: Iterable[str], bits: Iterable[float]) -> Iterator[tuple[Row, str, float]]:
    """All combinations, rows within a target within an allocation."""
    rows, bits = tuple(rows), tuple(bits)
    return ((row, allocation, width) for allocation in allocations for width in bits for row in rows)


def complete_lines(text: str) -> str:
    """A file's text without a last line that was broken off."""
    return text[: text.rfind("\n") + 1]


def by_key(text: str) -> dict[str, Json]:
    """Measured lines by what `Row.key` says of them."""
    lines = [json.loads(line) for line in text.splitlines()]
    named = ((Row(one["row"], one["rounding"], one["format"]), one) for one in lines)
    return {row.key(one["allocation"], one["asked_bits"]): one for row, one in named}


def table(known: Mapping[str, Json]) -> str:
    """KL by row, allocation and target in Markdown, with the reasons for what is missing below it."""
    heads = [f"{bits:g} bits" for bits in BITS]
    lines = [f"| rounding | format | allocation | {' | '.join(heads)} |", "|---|---|---|" + "---|" * len(BITS)]
    lacking: dict[str, str] = {}
    for row, allocation in ((row, allocation) for row in ROWS for allocation in ALLOCATIONS):
        found = [known.get(row.key(allocation, bits)) for bits in BITS]
        cells = [cell(one) for one in found]
        if set(cells) != {""}:
            lines.append(f"| {row.title} | `{row.format}` | {allocation} | {' | '.join(cells)} |")
        lacking.update((row.format, one["infeasible"]) for one in found if one and "infeasible" in one)
    reasons = [f"`{text}`: {reason}." for text, reason in lacking.items()]
    return "\n".join(lines) + "\n" + (f"\n— {' '.join(reasons)}\n" if reasons else "")


def cell(line: Json | None) -> str:
    """KL to three digits, and the bits where less was stored than asked for."""
    if line is None:
        return ""
    if "infeasible" in line:
        return "—"
    less = line["asked_bits"] - line["bits_per_param"] > WITHIN
    return f"{line['kl_mean']:.3g}" + (f" at {line['bits_per_param']:.2f}" if less else "")


def best_table(known: Mapping[str, Json]) -> str:
    """For every target the case with the least KL, beside nearest rounding with the same allocation."""
    lines = [
        "| stored bits per parameter | size | least KL | rounding, allocation | nearest, grid | nearest, blocks |",
        "|---|---|---|---|---|---|",
    ]
    plain = [next(row for row in ROWS if row.title == title) for title in ("nearest, grid", "nearest")]
    for bits in BITS:
        keys = [row.key(allocation, bits) for row in ROWS for allocation in ALLOCATIONS]
        there = [known[key] for key in keys if "kl_mean" in known.get(key, {})]
        if there:
            best = min(there, key=lambda one: float(one["kl_mean"]))
            others = [cell(known.get(row.key(best["allocation"], bits))) for row in plain]
            made = f"{best['row']}, {best['allocation']}"
            first = (f"{best['bits_per_param']:.3f}", f"{best['size_bytes'] / 1e6:.2f} MB", cell(best), made)
            lines.append(f"| {' | '.join((*first, *others))} |")
    return "\n".join(lines) + "\n"


def write_tables() -> None:
    """The numbers into the pages."""
    from docs.pictures import with_tables

    known = by_key(NUMBERS.read_text("utf-8"))
    PAGE.write_text(with_tables(PAGE.read_text("utf-8"), {"whole models": table(known)}), "utf-8")
    README.write_text(with_tables(README.read_text("utf-8"), {"best roundings": best_table(known)}), "utf-8")


@contextmanager
def bench(progress: Callable[[float, str], None]) -> Iterator[Bench]:
    """The bundled model, with a store that is gone afterwards."""
    from core.pipeline.context import StepContext
    from core.storage.local_store import LocalStore
    from models import BUNDLED

    with tempfile.TemporaryDirectory() as work:
        scratch = Path(work) / "scratch"
        scratch.mkdir()
        yield Bench(BUNDLED, StepContext(store=LocalStore(Path(work) / "store"), scratch=scratch, progress=progress))


def measure(wanted: Iterable[tuple[Row, str, float]], out: Path | None) -> None:
    """Measure what is not yet known, and print it."""
    text = complete_lines(out.read_text("utf-8")) if out and out.exists() else ""
    if out:
        out.write_text(text, "utf-8")
    known, wanted = by_key(text), list(wanted)
    with bench(lambda _fraction, what: print(f"  {what}\033[K", end="\r", file=sys.stderr)) as job:
        for at, (row, allocation, bits) in enumerate(wanted):
            if row.key(allocation, bits) not in known:
                print(f"{at + 1}/{len(wanted)} {row.title}, {allocation}, {bits:g} bits\033[K", file=sys.stderr)
                written = json.dumps(job.line(row, allocation, bits)) + "\n"
                print(written, end="", flush=True)
                if out:
                    with out.open("a", encoding="utf-8") as file:
                        file.write(written)


def main() -> None:
    """Measure, or write the tables."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    arguments.add_argument("--bits", type=float, nargs="+", default=[3.0])
    arguments.add_argument("--allocation", nargs="+", choices=ALLOCATIONS, default=["fisher"])
    arguments.add_argument("--row", nargs="+", choices=[row.title for row in ROWS])
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--tables", action="store_true")
    given = arguments.parse_args()
    if given.tables:
        write_tables()
        return
    rows = [row for row in ROWS if given.row is None or row.title in given.row]
    measure(cases(rows, given.allocation, given.bits), given.out)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
