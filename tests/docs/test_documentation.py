"""The documentation says what is: links lead somewhere, commands answer what is shown, tables are complete."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from fastapi.routing import APIRoute

from api import errors as api_errors
from api.routes import artefacts, catalogues, checkpoints, events, health, jobs, keys, plans, uploads, webhooks
from cli.main import app
from core.config import Settings
from core.errors import BitmillError
from core.exports.layout import StoredTensor, WeightFile
from core.formats.block_types import BLOCK_TYPES, TILE_TYPES, TileElement
from core.jobs import events as job_events
from core.recipe import exports, tensor_format
from core.recipe.allocation import AllocationSpec
from core.recipe.calibration import CalibrationSpec, EvaluationSpec
from core.recipe.format_names import OPTIONS, split_option
from core.recipe.override import Override
from core.recipe.recipe import Gate, Recipe, load_recipe
from core.recipe.rounding import RoundingSpec
from core.recipe.target import Target
from core.recipe.tensor_format import parse
from core.rounding.base import Sensitivity, round_tensor
from core.tensors.coded import HEAD_BYTES
from core.tensors.dtypes import SAFETENSORS_NAMES
from core.tensors.encoded import EncodedTensor
from core.tensors.nearest import encode_nearest
from core.tensors.writer import Part, SafetensorsWriter
from tests.docs.scripts import script

ROOT = Path(__file__).parents[2]
ROUTERS = (artefacts, catalogues, checkpoints, events, health, jobs, keys, plans, uploads, webhooks)


EXAMPLES, DRAW = script("examples.py"), script("draw.py")
PAGES: list[Path] = EXAMPLES.pages()
QUICK = [
    pytest.param(block, id=f"{page.name}: {block.commands[0]}")
    for page in PAGES
    for block in EXAMPLES.blocks(page.read_text("utf-8"))
    if block.kind == "quick"
]


def text(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def fenced(page: str, language: str, mark: str = "") -> list[str]:
    """The fenced blocks of a language, all or those after a mark."""
    before = re.escape(f"<!-- {mark} -->\n") if mark else ""
    return re.findall(rf"(?m)^{before}```{language}\n(.*?)^```$", text(page), re.DOTALL)


def table(page: str, mark: str) -> list[list[str]]:
    """The rows of the table after a mark, without the heading; backquotes are dropped."""
    found = re.search(rf"<!-- {mark} -->\n((?:\|.*\n?)+)", text(page))
    assert found, f"{page} has no table {mark}"
    lines = found[1].splitlines()[2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def named_in(page: str) -> set[str]:
    """Every word that stands in backquotes."""
    return {word for code in re.findall(r"`([^`\n]+)`", text(page)) for word in re.findall(r"[\w.+@:<>-]+", code)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        place, _, heading = target.partition("#")
        if "://" in target:
            continue
        linked = (page.parent / place).resolve() if place else page
        assert linked.exists(), target
        assert not heading or heading in headings(linked), target


def headings(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"(?m)^#+ (.+)$", page.read_text("utf-8"))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        links = re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8"))
        waiting += [found for link in links if (found := (page.parent / link).resolve()).is_file()]
    assert set(PAGES) <= seen


@pytest.mark.parametrize("block", QUICK)
def test_commands_answer_what_is_shown(block: Any, tmp_path: Path) -> None:
    shown, now = words(block.text), words(EXAMPLES.shown_now(block, tmp_path))
    assert len(shown) == len(now), "python docs/examples.py refreshes the pages"
    for one, other in zip(shown, now, strict=True):
        assert one == other or close(one, other), "python docs/examples.py refreshes the pages"


def words(shown: str) -> list[str]:
    """What stands in a block, without the rules of tables, whose widths follow from the last digits of numbers."""
    return re.sub(r"[━┏┓┗┛┳┻╇┡┩│┃─┴└┘├┤┼]", " ", shown).split()


def close(one: str, other: str) -> bool:
    """Equal numbers, but for the last places of sums, whose order differs between processors."""
    try:
        return math.isclose(float(one.strip("[],")), float(other.strip("[],")), rel_tol=1e-9)
    except ValueError:
        return False


def test_a_refreshed_page_keeps_everything_but_the_answers(tmp_path: Path) -> None:
    page = "# A page\n\n<!-- shown: quick, 1 lines -->\n```console\n$ bitmill format show mxpf4\nold\n```\n\nEnd.\n"
    fresh = EXAMPLES.refreshed(page, tmp_path, slow=False)
    assert fresh == page.replace("old", "error: invalid_format [mxpf4]: no format 'mxpf4'\n...")


def commands_of(group: Any) -> Iterator[str]:
    for name, command in group.commands.items():
        yield name
        yield from (f"{name} {inner}" for inner in commands_of(command)) if hasattr(command, "commands") else ()


def test_commands_in_the_documentation_exist() -> None:
    known = set(commands_of(typer.main.get_command(app)))
    for page in PAGES:
        code = "\n".join(chain(*(fenced(str(page.relative_to(ROOT)), kind) for kind in ("sh", "console"))))
        for one in re.findall(r"(?m)^\$? ?bitmill ([a-z]+(?: [a-z]+(?=\s|$))?)", code):
            assert one in known or one.split()[0] in known, f"{page.name}: bitmill {one}"


def test_targets_of_make_in_the_documentation_exist() -> None:
    targets = set(re.findall(r"(?m)^([a-z]+):", text("Makefile")))
    for page in PAGES:
        content = page.read_text("utf-8")
        named = re.findall(r"`make ([a-z]+)`", content) + re.findall(r"(?m)^make ([a-z]+)", content)
        assert set(named) <= targets


def test_whatever_shows_a_claim_is_there() -> None:
    paths = re.findall(r"\b((?:tests|benchmarks)/[\w/]+(?:\.py)?)", text("README.md"))
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_picture_and_the_table_show_the_measured_numbers() -> None:
    rows = DRAW.measured(DRAW.NUMBERS.read_text("utf-8"))
    assert f"<!-- numbers -->\n{DRAW.table(rows)}<!-- /numbers -->" in text("README.md")
    picture = DRAW.PICTURE.read_text("utf-8")
    assert len(picture) < 150_000
    for row in rows:
        assert row["method"] != "Fisher" or DRAW.megabytes(row["bytes"]) in picture


def test_every_setting_is_listed_with_its_default() -> None:
    listed = {row[0]: row[1] for row in table("docs/operations.md", "settings")}
    known = {f"BITMILL_{name.upper()}": repr(field.default) for name, field in Settings.model_fields.items()}
    known["BITMILL_DATA_DIR"] = "~/.local/share/bitmill"
    assert listed == known


def test_every_key_of_a_recipe_is_explained() -> None:
    parts = (Recipe, Target, AllocationSpec, CalibrationSpec, EvaluationSpec, Override, Gate)
    keys = {name for part in parts for name in part.model_fields}
    assert keys - named_in("docs/recipes.md") == set()
    names = {*AllocationSpec.KNOWN, *RoundingSpec.KNOWN, *exports.KNOWN}
    assert names - named_in("docs/recipes.md") == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_in_the_documentation_can_be_carried_out(page: Path) -> None:
    for document in fenced(str(page.relative_to(ROOT)), "yaml"):
        load_recipe(yaml.safe_load(document))


def test_the_names_that_are_not_available_are_owned_up_to() -> None:
    later = {*AllocationSpec.LATER, *exports.LATER, *RoundingSpec.LATER}
    assert later - named_in("README.md") == set()


def test_every_family_statistic_scale_format_option_and_alias_is_in_formats() -> None:
    families = {*tensor_format.FAMILIES, "t<nu>_"} - {"t"}
    known = {*families, *tensor_format.STATISTICS, *tensor_format.SCALE_FORMATS}
    assert known - named_in("docs/formats.md") == set()
    options = {re.split(r"[\d.]", row[0], maxsplit=1)[0] for row in table_of_column("docs/formats.md", "option")}
    assert options == {f"+{name}" for name in OPTIONS}
    assert {row[0]: row[1] for row in table("docs/formats.md", "aliases")} == {
        name: str(parse(written)) for name, written in tensor_format.ALIASES.items()
    }


def table_of_column(page: str, heading: str) -> list[list[str]]:
    """The rows of the table whose first column has that heading."""
    found = re.search(rf"(?m)^\| {heading} \|.*\n\|[-|]+\n((?:\|.*\n)+)", text(page))
    assert found, f"{page} has no table of {heading}"
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in found[1].splitlines()]


def test_every_block_type_is_in_formats_with_its_size() -> None:
    rows = {row[0]: row[1:4] for row in table("docs/formats.md", "blocks")}
    known = {name: kind for name, kind in BLOCK_TYPES.items() if name not in tensor_format.ALIASES}
    codebooks = {name for name in known if name in TILE_TYPES and TILE_TYPES[name].element.kind == "codebook"}
    expected = {name: [str(kind.elements), str(kind.nbytes), f"{kind.bits:g}"] for name, kind in known.items()}
    assert rows == {name: sizes for name, sizes in expected.items() if name not in codebooks}
    page = text("docs/formats.md")
    for name in codebooks:
        assert re.search(rf"`{name}`\s{known[name].bits:g}\b", page)


@pytest.mark.parametrize("row", table("docs/formats.md", "canonical"), ids=lambda row: row[0])
def test_formats_have_the_canonical_texts_and_widths_that_are_shown(row: list[str]) -> None:
    written, canonical, codes, widths = row
    fmt = parse(written)
    assert (str(fmt), "integers" if fmt.is_grid else str(fmt.codes)) == (canonical, codes)
    assert fmt.allowed_widths() == tuple(float(width) for width in widths.split(","))


def test_every_route_is_listed() -> None:
    routes = [route for one in ROUTERS for route in one.router.routes if isinstance(route, APIRoute)]
    known = {f"{method} {route.path}" for route in routes if route.include_in_schema for method in route.methods or ()}
    assert {row[0] for row in table("docs/rest.md", "routes")} == known


def error_kinds(kind: type[BitmillError] = BitmillError) -> Iterator[type[BitmillError]]:
    yield kind
    for deeper in kind.__subclasses__():
        yield from error_kinds(deeper)


def test_every_error_is_listed_with_its_status_and_class() -> None:
    kinds = [kind for kind in error_kinds() if kind.__module__ in ("core.errors", "api.errors")]
    known = {kind.code: [str(api_errors.status_of(kind(""))), str(kind.kind)] for kind in kinds}
    assert {row[0]: row[1:] for row in table("docs/rest.md", "errors")} == known


def test_every_kind_of_event_is_listed() -> None:
    listed = text("docs/rest.md").partition("<!-- events -->")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"`([a-z.]+)`", listed)) == sorted(job_events.KINDS)


def test_json_in_the_pages_is_json() -> None:
    for page in PAGES:
        for document in fenced(str(page.relative_to(ROOT)), "json"):
            json.loads(document)


EXAMPLE_PARTS = ("codes", "scales", "outlier_values", "outlier_index")


@pytest.mark.parametrize("document", fenced("docs/artefact.md", "json", "example"))
def test_the_examples_of_the_layout_are_what_the_coder_writes(document: str) -> None:
    example = json.loads(document)
    weight = torch.tensor(example["weight"], dtype=torch.float32).reshape(example["shape"])
    encoded = encode_nearest(weight, parse(example["format"]))
    parts = {name: part.reshape(-1).view(torch.uint8).tolist() for name, part in encoded.parts().items()}
    assert {name: bytes(part).hex(" ") for name, part in parts.items()} == {
        name: example[name] for name in EXAMPLE_PARTS if name in example
    }
    assert encoded.decode().reshape(-1).tolist() == example["decoded"]


READ_FORMATS = (
    "int4@4",
    "int3.58@tensor",
    "int3-sym@channel:rms:fp16",
    "int9@channel",
    "int4-mx@4:e8m0-even",
    "float4_e2m1@4:absmax:e8m0",
    "float8_e4m3@channel",
    "float8_e5m2@8:absmax:fp32",
    "float6_e3m2-ns@8",
    "float8_e4m3-ieee@tensor",
    "float5@4",
    "nvfp4",
    "float4_e2m1@4:fouroversix:e4m3",
    "normal3.58@channel",
    "laplace2.58-sym@tensor:rms",
    "t7_4.58@8:signmax",
    "t5_8-repeat_zero@64",
    "t7_4-opt@8:signmax",
    "t_4-asym@channel:rms-search:dq8",
    "nf4@5:absmax:fp32",
    "nf4@5:dq8",
    "sf4-nu4@8:signmax:e4m3",
    "af4-l1@8",
    "bof4-s@8+opq0.95",
    "lloyd4@4",
    "lloyd3-rows@channel",
    "lloyd2.58-rows@channel:fp16+iqr0.5",
    "lloyd4-rows@channel:e8m0+hadamard+rans",
    "power4@4",
    "power0.7_3.58@8",
    "int4@8:search+unbiased",
    "int8@8+outliers0.1",
    "t5_4@tensor:rms+threshold1.5+hadamard",
    "int6@8+rotate",
    "float4_e2m1@4:e8m0+outliers0.1+rotate",
    "grid4@tensor",
    "grid2.3@channel:absmax:fp32",
    "grid9@8:rms:e4m3+huffman",
    "grid6@4:absmax:dq8+outliers0.1",
    "grid8@tensor+opq0.95+rotate",
    "grid9@tensor+columns",
    "grid9@channel:fp16+columns+huffman",
    "higgs2@8",
    "higgs3-p1@tensor:bf16",
    "higgs2.333-p3@4:fp32+rotate",
    "higgs1.7-p4@channel+outliers0.1",
    "higgs4.5-p2@8",
    "int4@8:signmax+rans",
    "int3.58-sym@channel:rms+huffman",
    "t_4@tensor:rms-search+rans",
    "lloyd4@tensor:rms+threshold2+hadamard+rans",
    "nvfp4+huffman",
    "float8_e4m3@channel+rans",
    "nf4@8:search+unbiased+rans",
)
READ_SHAPES = ((3, 13), (5,), (2, 3, 8), (), (0, 4))
ROTATED_SHAPES = ((130, 12), (96, 192))
TILE_SHAPES = ((3, 67), (5,))


def read_back() -> Callable[[Path], dict[str, list[float]]]:
    """The reader that artefact.md shows, with the decoder of entropy.md."""
    names: dict[str, Any] = {}
    pieces = fenced("docs/artefact.md", "python", "reader") + fenced("docs/entropy.md", "python", "decoder")
    exec("\n".join(pieces), names)
    found: Callable[[Path], dict[str, list[float]]] = names["decode"]
    return found


def written(path: Path, encoded: dict[str, EncodedTensor]) -> dict[str, list[float]]:
    """Encoded tensors by name written as a weight file of an artefact; what they decode to."""
    file = WeightFile(
        tuple(
            StoredTensor(
                name,
                str(tensor.format),
                tensor.dtype,
                tensor.shape,
                tuple(
                    Part(f"{name}.{suffix}", SAFETENSORS_NAMES[part.dtype], tuple(part.shape))
                    for suffix, part in tensor.parts().items()
                ),
            )
            for name, tensor in encoded.items()
        )
    )
    with SafetensorsWriter(path, file.parts, file.metadata) as writer:
        for name, tensor in encoded.items():
            for suffix, data in tensor.parts().items():
                writer.write(f"{name}.{suffix}", data)
    return {name: tensor.decode().reshape(-1).tolist() for name, tensor in encoded.items()}


def drawn(shape: tuple[int, ...], formats: Iterable[str]) -> dict[str, EncodedTensor]:
    """Seeded weights encoded in each format; some of them large, so that statistics and outliers differ."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: encode_nearest(torch.randn(shape, generator=generator) ** 3, parse(name), seed=12345) for name in formats
    }


@pytest.mark.parametrize("shape", READ_SHAPES, ids=str)
def test_the_reader_on_the_page_decodes_every_kind_of_format(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    expected = written(path, drawn(shape, READ_FORMATS))
    assert read_back()(path) == expected


def test_the_reader_on_the_page_decodes_one_model_classes_of_rows_and_classes_of_columns(tmp_path: Path) -> None:
    """The second bytes of the three are those that entropy.md gives them."""
    path, spread = tmp_path / "model.safetensors", torch.linspace(-1, 1, 64).exp()
    normal = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    weights = {"same": normal, "rows": normal * spread[:, None], "columns": normal * spread}
    encoded = {which: encode_nearest(weight, parse("grid3@tensor")) for which, weight in weights.items()}
    expected = written(path, encoded)
    assert [int(tensor.codes[HEAD_BYTES + 1]) for tensor in encoded.values()] == [2, 3, 4]
    assert read_back()(path) == expected


def test_the_reader_on_the_page_decodes_scales_of_columns(tmp_path: Path) -> None:
    """Of columns of many sizes, and one that is always zero."""
    path, columns = tmp_path / "model.safetensors", 48
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, columns, generator=generator, dtype=torch.float64).cumsum(1)
    inputs[:, 7] = 0
    given = Sensitivity(covariance=inputs.T @ inputs / len(inputs))
    weight, spec = torch.randn(32, columns, generator=generator), RoundingSpec(name="watersic")
    encoded = {
        name: round_tensor(weight, parse(name), spec, sensitivity=given, seed=0)
        for name in ("grid3@tensor", "grid5@channel")
    }
    for tensor in encoded.values():
        scales = set(tensor.parts()["column_scales"].tolist())
        assert 0 in scales
        assert len(scales) > 5
    expected = written(path, encoded)
    assert read_back()(path) == expected


@pytest.mark.parametrize("shape", ROTATED_SHAPES, ids=str)
def test_the_reader_on_the_page_turns_every_size_back(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Vocabularies, several equal blocks of a transform and blocks by the size's binary digits."""
    path = tmp_path / "model.safetensors"
    expected = written(path, drawn(shape, ("int4@32+hadamard", "int4@32+rotate")))
    assert read_back()(path) == expected


@pytest.mark.parametrize("shape", TILE_SHAPES, ids=str)
def test_the_reader_on_the_page_decodes_every_block_type(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    expected = written(path, drawn(shape, [name for name in BLOCK_TYPES if name not in tensor_format.ALIASES]))
    assert read_back()(path) == expected


def test_the_formats_that_the_reader_is_tried_with_have_every_family_scale_and_option() -> None:
    formats = [parse(name) for name in READ_FORMATS]
    assert {fmt.family for fmt in formats} == set(tensor_format.FAMILIES)
    kinds = {name.partition("-")[0] for name in tensor_format.SCALE_FORMATS}
    assert {fmt.scale_format.partition("-")[0] for fmt in formats} == kinds
    assert {fmt.fitted for fmt in formats} == {None, "nu", "alpha", "exponent_bits"}
    assert {split_option(option)[0] for fmt in formats for option in fmt.options} == set(OPTIONS)


def test_the_table_of_tiles_has_every_type_with_its_numbers() -> None:
    def element(kind: TileElement) -> str:
        split = f"E{kind.exponent_bits}M{kind.mantissa_bits}"
        return f"float {split}" if kind.kind == "float" else f"{kind.kind}, {kind.bits} bits"

    known = {
        one.name: [
            element(one.element),
            str(one.tile),
            str(one.sub_tile),
            one.scale,
            f"{one.offset_bits}, its offset" if one.offset_bits else "none",
            one.zero or "none",
        ]
        for one in TILE_TYPES.values()
        if one.element.kind != "codebook" and one.name not in tensor_format.ALIASES
    }
    assert {row[0]: row[1:] for row in table("docs/artefact.md", "tiles")} == known


def test_the_bytes_of_the_second_example_follow_from_the_arithmetic_on_the_page() -> None:
    low = [3, 1, 2, 3, 0, 1]
    high = [2, 0, 1, 1, 1, 2]
    assert [digit + 4 * more for digit, more in zip(low, high, strict=True)] == [11, 1, 6, 7, 4, 9]
    assert 3 + 1 * 4 + 2 * 16 + 3 * 64 == 0xE7
    assert 2 + 0 * 3 + 1 * 9 + 1 * 27 + 1 * 81 == 0x77
    assert struct.pack("<f", 1.0)[2:] == bytes.fromhex("803f")
