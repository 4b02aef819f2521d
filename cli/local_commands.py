"""Commands that work in this process, without a service: quantise, plan, inspect, dequantise, evaluate, measure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli.options import AsJson, Device, RecipeName, Set, overrides
from cli.output import DONE, FAILED, emit

Folder = Annotated[Path, typer.Argument(help="A folder.")]
OutFolder = Annotated[Path, typer.Option("--out", help="Folder to write; must be empty or absent.", metavar="DIR")]

format_app = typer.Typer(
    rich_markup_mode=None, help="One format string: what it is, and what it costs on data.", no_args_is_help=True
)
layer_app = typer.Typer(rich_markup_mode=None, help="One layer with its activations' covariance.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.command("quantise")(quantise)
    app.command("plan")(plan)
    app.command("inspect")(inspect)
    app.command("dequantise")(dequantise)
    app.command("evaluate")(evaluate)
    app.add_typer(format_app, name="format")
    app.add_typer(layer_app, name="layer")


def quantise(
    source: Folder,
    recipe: RecipeName,
    out: OutFolder,
    settings: Set = None,
    device: Device = "auto",
    json: AsJson = False,
) -> int:
    """Quantise a checkpoint in this process, without the service."""
    from cli import local, render
    from core.recipe.recipe import load_recipe

    chosen = load_recipe(recipe, overrides(settings))
    with render.work_progress("quantising") as progress:
        report = local.quantise(source, chosen, out, device, progress)
    if json:
        emit(report)
    else:
        render.summary(str(out), report["summary"])
    return FAILED if report["failure"] else DONE


def plan(
    source: Folder, recipe: RecipeName, settings: Set = None, device: Device = "auto", json: AsJson = False
) -> None:
    """The allocation only, no weights are written.

    Bits per tensor, predicted size and KL divergence.
    """
    from cli import local, render
    from core.recipe.recipe import load_recipe

    chosen = load_recipe(recipe, overrides(settings))
    with render.work_progress("planning") as progress:
        planned = local.plan(source, chosen, device, progress)
    if json:
        emit(planned)
    else:
        render.plan(planned)


def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint or an artefact.")],
    json: AsJson = False,
) -> None:
    """What a checkpoint or an artefact holds.

    Tensors, shapes, dtypes, ties, fused groups, bits per parameter as stored.
    """
    from cli import local, render

    found = local.inspect(path)
    if json:
        emit(found)
    else:
        render.inspection(found)


def dequantise(
    artefact: Folder,
    out: OutFolder,
    dtype: Annotated[str, typer.Option("--dtype", help="bf16, fp16 or fp32.")] = "bf16",
    json: AsJson = False,
) -> None:
    """Back to a plain safetensors checkpoint that transformers loads."""
    from cli import local

    written = local.dequantise(artefact, out, dtype)
    if json:
        emit(written)
    else:
        print(out)


def evaluate(
    reference: Annotated[Path, typer.Option("--reference", help="The original checkpoint.")],
    candidate: Annotated[Path, typer.Option("--candidate", help="An artefact or a checkpoint.")],
    text: Annotated[str, typer.Option("--text", help="A text file, or `builtin`.", metavar="FILE")],
    sequence_length: Annotated[int, typer.Option("--sequence-length", min=8)] = 512,
    sequences: Annotated[int, typer.Option("--sequences", min=1)] = 16,
    device: Device = "auto",
    json: AsJson = False,
) -> None:
    """How far a candidate is from its reference on a text.

    KL divergence, top-1 agreement and both perplexities.
    """
    from cli import local, render

    with render.work_progress("evaluating") as progress:
        metrics = local.evaluate(reference, candidate, text, sequences, sequence_length, device, progress)
    if json:
        emit(metrics)
    else:
        render.table(("", ""), [(name, value) for name, value in metrics.items() if not isinstance(value, list)])


FormatText = Annotated[str, typer.Argument(help="A format string, such as t5_4@64:signmax.", metavar="FORMAT")]


@format_app.command("show")
def show_format(text: FormatText, json: AsJson = False) -> None:
    """Codebook, bits and description of a format string."""
    from cli import render
    from core.formats.catalogue import describe
    from core.recipe.tensor_format import parse

    described: dict[str, Any] = describe(parse(text))
    if json:
        emit(described)
    else:
        render.table(("", ""), described.items())


@format_app.command("measure")
def measure_format(
    text: FormatText,
    distribution: Annotated[
        str, typer.Option("--distribution", help="normal, laplace or student_t:NU, of unit variance.")
    ] = "normal",
    samples: Annotated[int, typer.Option("--samples", min=1, max=1 << 32)] = 1 << 20,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    shape: Annotated[str | None, typer.Option("--shape", help="Rows and columns of the tensor.", metavar="R,C")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="A 2-D float32 array instead.", metavar="FILE.npy")
    ] = None,
    json: AsJson = False,
) -> None:
    """Encode data with the real coder: bits per parameter from the bytes, and the error."""
    from cli import local, render

    measured = local.measure_format(text, local.data_to_measure(distribution, samples, seed, shape, data), seed)
    if json:
        emit(measured)
    else:
        render.table(("", ""), measured.items())


@layer_app.command("measure")
def measure_layer(
    rounding: Annotated[
        str,
        typer.Option("--rounding", help='A method, or JSON: {"name": "gptq", "columns": "pivot"}.', metavar="METHOD"),
    ],
    text: Annotated[str, typer.Option("--format", help="A format string.", metavar="FORMAT")],
    layer: Annotated[
        Path,
        typer.Option(
            "--layer",
            help="Safetensors: `weight` (out, in), `covariance` (in, in); if known `cross` (in, in), `tokens` (1,).",
            metavar="FILE",
        ),
    ],
    bits: Annotated[float | None, typer.Option("--bits", help="Another width for the format.")] = None,
    json: AsJson = False,
) -> None:
    """The distortion that a rounding method leaves on one layer, and its distance from the limit."""
    from cli import local, render

    measured = local.measure_layer(rounding, text, layer, bits)
    if json:
        emit(measured)
    else:
        render.table(("", ""), measured.items())
