"""The recipe: every spelling has one canonical form, and every problem is told with its path."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from core.errors import BitmillError, InvalidFormat, InvalidRecipe, MethodNotAvailable
from core.ids import content_hash
from core.jobs.graph import SourceFacts, build
from core.recipe import allocation, exports, rounding
from core.recipe.allocation import AllocationSpec, widths_within
from core.recipe.calibration import CalibrationSpec
from core.recipe.recipe import Recipe, descriptions, load_recipe, presets
from core.recipe.rounding import RoundingSpec
from core.recipe.tensor_format import parse

SHORT: dict[str, Any] = {"target": {"bits_per_param": 4}, "format": "int4@128"}
CANONICAL: dict[str, Any] = {
    "version": 1,
    "target": {"bits_per_param": 4.0},
    "format": "int4-asym@128:absmax:bf16",
    "rounding": {"name": "nearest"},
    "allocation": {"name": "fisher"},
    "calibration": {"text": "builtin", "sequences": 128, "sequence_length": 2048, "seed": 0},
    "evaluation": {"text": "builtin", "sequences": 64, "sequence_length": 2048},
    "overrides": [],
    "groups": "auto",
    "exports": ["bitmill"],
    "gate": None,
    "seed": 0,
}
CONTRACT = """
version: 1
target: {bits_per_param: 3.5}            # or {size_bytes: 2100000000} or {kl: 0.05}
format: "t7_4@64:signmax"                # the family; the allocator varies its bits
rounding: nearest
allocation: fisher
calibration: {text: builtin, sequences: 128, sequence_length: 2048, seed: 0}
evaluation: {text: builtin, sequences: 64, sequence_length: 2048}
overrides:
  - {match: "*norm*", keep: true}
  - {match: "lm_head.weight", min_bits: 4}
groups: auto
exports: [bitmill]
gate: {max_kl: 0.2}
seed: 0
"""


def refusal(value: Any, changes: dict[str, Any] | None = None) -> BitmillError:
    with pytest.raises(BitmillError) as refused:
        load_recipe(value, changes)
    return refused.value


def problems(**changes: Any) -> dict[str, str]:
    """Path to message of what is wrong with a recipe with these parts."""
    return {item["path"]: item["message"] for item in refusal(SHORT | changes).errors}


def test_every_default_is_filled_in() -> None:
    assert load_recipe(SHORT).canonical() == CANONICAL


def test_the_recipe_of_the_contract_is_read(tmp_path: Path) -> None:
    path = tmp_path / "contract.yaml"
    path.write_text(CONTRACT)
    canonical = load_recipe(path).canonical()
    assert canonical["overrides"] == [{"match": "*norm*", "keep": True}, {"match": "lm_head.weight", "min_bits": 4.0}]
    assert canonical["gate"] == {"max_kl": 0.2}
    assert load_recipe(str(path)).canonical() == canonical
    (tmp_path / "contract.json").write_text(json.dumps(canonical))
    assert load_recipe(tmp_path / "contract.json").canonical() == canonical


SPECS = st.fixed_dictionaries(
    {
        "target": st.one_of(
            st.fixed_dictionaries({"bits_per_param": st.integers(2, 16) | st.floats(0.1, 64)}),
            st.fixed_dictionaries({"size_bytes": st.integers(1, 1 << 60)}),
            st.fixed_dictionaries({"kl": st.floats(1e-9, 10)}),
        ),
        "format": st.sampled_from(["int4@128", "mxfp4", "t7_4@64:signmax", "nf4@64", "normal3.58@channel:rms"]),
    },
    optional={
        "rounding": st.sampled_from(["nearest", {"name": "nearest"}, {}]),
        "allocation": st.sampled_from(["fisher", {"name": "fisher", "min_bits": 3, "max_bits": None}, {"max_bits": 6}]),
        "calibration": st.sampled_from([{}, {"text": "file:a/b.txt"}, {"text": "hf:org/name:config:split", "seed": 3}]),
        "evaluation": st.sampled_from([False, {}, {"sequences": 3.0}]),
        "overrides": st.lists(
            st.sampled_from(
                [{"match": "*a", "keep": True}, {"match": "b", "format": "mxfp4"}, {"match": "[", "min_bits": 3}]
            )
        ),
        "groups": st.sampled_from(["auto", "none", [], [["*a", "b"], ["c"]]]),
        "seed": st.integers(0, 1 << 62),
    },
)


@settings(deadline=None)  # the first example reads the presets
@given(SPECS)
def test_the_canonical_form_is_its_own_canonical_form_and_plain_json(spec: dict[str, Any]) -> None:
    canonical = load_recipe(spec).canonical()
    again = json.loads(json.dumps(canonical))
    assert again == canonical
    assert load_recipe(again).canonical() == canonical
    assert load_recipe(load_recipe(spec)).canonical() == canonical
    assert content_hash(load_recipe(yaml.safe_load(yaml.safe_dump(canonical))).canonical()) == content_hash(canonical)
    assert list(canonical) == list(CANONICAL)
    assert build(canonical, SourceFacts({}, 1), 1)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"rounding": "nearest"}, {"rounding": {"name": "nearest"}}),
        ({"allocation": "fisher"}, {}),
        ({"format": "int4-asym@128"}, {"format": " int4@128:absmax:bf16"}),
        ({"target": {"bits_per_param": 4}}, {"target": {"bits_per_param": 4.0, "kl": None}}),
        ({"gate": None}, {}),
        ({"gate": {"max_kl": "1e-3"}}, {"gate": {"max_kl": 0.001, "min_top1": None}}),
        ({"seed": 3}, {"seed": 3.0}),
        (
            {"overrides": [{"match": "a", "min_bits": 3}]},
            {"overrides": [{"match": "a", "min_bits": 3.0, "keep": None}]},
        ),
    ],
)
def test_two_spellings_of_one_recipe_have_one_hash(one: dict[str, Any], other: dict[str, Any]) -> None:
    first, second = (content_hash(load_recipe(SHORT | changes).canonical()) for changes in (one, other))
    assert first == second


@pytest.mark.parametrize(
    ("part", "given", "canonical"),
    [
        ("allocation", {"name": "fisher", "min_bits": 3}, {"name": "fisher", "min_bits": 3.0}),
        ("rounding", "gptq", {"name": "gptq"}),
        ("rounding", {"name": "gptq", "damping": 0, "diagonal": None}, {"name": "gptq", "damping": 0.0}),
        ("rounding", {"name": "gptq", "steps": None}, {"name": "gptq"}),
    ],
)
def test_parameters_stand_in_the_canonical_form_only_where_they_are_set(part: str, given: Any, canonical: Any) -> None:
    assert load_recipe(SHORT | {part: given}).canonical()[part] == canonical


NO_TEXT: dict[str, Any] = {"allocation": "uniform"}
USABLE = {
    "gptq": "int4@128",
    "watersic": "grid4@tensor",
    "error_diffusion": "int4@128",
    "power_learned": "power4@channel",
    "squeezellm": "lloyd4-rows@channel",
    "signround": "int4@128",
}


@pytest.mark.parametrize(
    "changes",
    [
        {"allocation": "fisher"},
        {"allocation": "higgs"},
        {"allocation": "baq"},
        NO_TEXT | {"target": {"kl": 0.1}},
        NO_TEXT | {"format": "lloyd4-weighted@64"},
        *(NO_TEXT | {"rounding": name, "format": fmt} for name, fmt in USABLE.items()),
    ],
    ids=str,
)
def test_what_needs_a_text_turns_calibration_on(changes: dict[str, Any]) -> None:
    assert load_recipe(SHORT | changes).calibration == CalibrationSpec()


def test_calibration_is_off_where_nothing_needs_it() -> None:
    assert load_recipe(SHORT | NO_TEXT).calibration is False
    assert load_recipe(SHORT | {"allocation": "heuristic"}).calibration is False


def test_every_method_but_nearest_needs_the_covariance() -> None:
    assert {name for name in RoundingSpec.KNOWN if RoundingSpec(name=name).needs_covariance} == set(USABLE)
    assert set(RoundingSpec.KNOWN) == {"nearest", *USABLE}


GIVEN: dict[str, Any] = {
    "damping": 0.5,
    "diagonal": 0.5,
    "columns": "pivot",
    "shrinkage": True,
    "rescale": True,
    "mmse_damping": 0.5,
    "classes": True,
    "paths": 2,
    "refine": 1,
    "steps": 1,
    "layers": "sequential",
    "drift": 0.5,
    "residual": False,
    "attention": 0.5,
}


@pytest.mark.parametrize("name", RoundingSpec.KNOWN)
def test_a_method_has_its_own_parameters_and_refuses_all_others(name: str) -> None:
    fmt = USABLE.get(name, "int4@128")
    own = {key: value for key, value in GIVEN.items() if key in rounding.PARAMETERS[name]}
    assert load_recipe(SHORT | {"format": fmt, "rounding": {"name": name} | own}).canonical()["rounding"] == {
        "name": name,
        **own,
    }
    for key in GIVEN.keys() - own.keys():
        error = refusal(SHORT | {"format": fmt, "rounding": {"name": name, key: GIVEN[key]}})
        assert (type(error), error.where) == (InvalidRecipe, f"rounding.{key}")
        assert f"{name} has no parameter {key}" in error.errors[0]["message"]
        assert error.hint.endswith(f"known: {', '.join(own)}" if own else "it has none")


def test_what_is_left_out_takes_the_default_of_the_method() -> None:
    filled = RoundingSpec.model_validate({"name": "watersic", "paths": 1}).filled
    assert (filled.columns, filled.paths, filled.rescale, filled.steps) == ("natural", 1, True, None)
    assert RoundingSpec(name="signround").filled.steps == 200


@pytest.mark.parametrize(
    ("name", "fmt", "reason", "hint"),
    [
        ("watersic", "int4@128", "watersic rounds to grids with rans", "grid3@tensor, or rounding: gptq"),
        ("watersic", "grid3@64", "with scales of rows or of the tensor", "grid3@tensor"),
        ("watersic", "grid3@tensor+huffman", "rounds to grids with rans", "grid3@tensor"),
        ("gptq", "q4_k", "needs scales that stand before the codes are chosen", "int4@32"),
        ("gptq", "lloyd4-rows@channel", "needs scales that stand before the codes are chosen", "nearest"),
        ("gptq", "int4@64+outliers0.01", "has no use for outliers", "without that option"),
        ("gptq", "grid4@tensor+rotate", "does not rotate grids", "without rotation"),
        ("error_diffusion", "grid4@tensor", "has no grids", "watersic"),
        ("power_learned", "int4@128", "rounds to power grids", "power4@channel"),
        ("signround", "nf4@64", "learns offsets to integers", "int4@128"),
    ],
)
def test_a_format_that_a_method_cannot_use_is_refused_with_one_that_it_can(
    name: str, fmt: str, reason: str, hint: str
) -> None:
    for path, changes in (("format", {"format": fmt}), ("overrides.0.format", _overridden(name, fmt))):
        error = refusal(SHORT | {"rounding": name} | changes)
        assert (type(error), error.where) == (InvalidRecipe, path)
        assert reason in error.detail
        assert hint in error.hint


def test_layers_one_after_another_need_formats_whose_sizes_do_not_hang_on_the_codes() -> None:
    rounding = {"name": "gptq", "layers": "sequential"}
    error = refusal(SHORT | {"rounding": rounding, "format": "int4@64+rans"})
    assert (error.where, error.hint) == ("format", "grid3@tensor, or layers: parallel")
    for fmt in ("int4@64", "grid3@tensor"):
        assert load_recipe(SHORT | {"rounding": rounding, "format": fmt}).rounding.is_sequential


def _overridden(name: str, fmt: str) -> dict[str, Any]:
    return {"format": USABLE[name], "overrides": [{"match": "*", "format": fmt}]}


def test_watersic_stores_the_grid_that_is_asked_for_with_scales_of_columns() -> None:
    spec = RoundingSpec(name="watersic")
    assert str(spec.stored_format(parse("grid3@tensor"))) == "grid3@tensor:rms:bf16+columns+rans"
    assert str(spec.stored_format(parse("grid3@channel"))) == "grid3@channel:rms:fp16+columns+rans"
    for name in USABLE.keys() - {"watersic"}:
        fmt = parse(USABLE[name])
        assert RoundingSpec(name=name).stored_format(fmt) == fmt


def test_unknown_keys_are_refused_with_their_path_and_the_nearest_known_key() -> None:
    found = problems(
        seeed=1,
        allocation={"name": "fisher", "minbits": 3},
        calibration={"sequence": 3},
        evaluation={"seed": 3},
        overrides=[{"match": "a", "keep": True}, {"match": "b", "formt": "int4@64"}],
        gate={"max_lk": 1},
        target={"bits_per_params": 4},
    )
    assert {path: message.partition("known:")[0].strip() for path, message in found.items()} == {
        "target.bits_per_params": "unknown key; did you mean bits_per_param?",
        "allocation.minbits": "unknown key; did you mean min_bits?",
        "calibration.sequence": "unknown key; did you mean sequences?",
        "evaluation.seed": "unknown key;",
        "overrides.1.formt": "unknown key; did you mean format?",
        "gate.max_lk": "unknown key; did you mean max_kl?",
        "seeed": "unknown key; did you mean seed?",
    }


def test_all_problems_are_listed_and_the_first_is_where_the_error_is() -> None:
    error = refusal({"target": {"bits_per_param": -1}, "seed": -1})
    assert [item["path"] for item in error.errors] == ["target.bits_per_param", "format", "seed"]
    assert (error.code, error.where) == ("invalid_recipe", "target.bits_per_param")
    assert "3 problems" in error.detail


@pytest.mark.parametrize(
    ("changes", "path", "reason"),
    [
        ({"target": {}}, "target", "exactly one of"),
        ({"target": {"kl": 0.1, "size_bytes": 5}}, "target", "size_bytes and kl given"),
        ({"target": {"bits_per_param": True}}, "target.bits_per_param", "number"),
        ({"target": {"bits_per_param": "4"}}, "target.bits_per_param", "number"),
        ({"target": {"bits_per_param": 65}}, "target.bits_per_param", "64"),
        ({"target": {"bits_per_param": 0}}, "target.bits_per_param", "greater than 0"),
        ({"target": {"bits_per_param": 10**400}}, "target.bits_per_param", "number"),
        ({"target": {"size_bytes": 0}}, "target.size_bytes", "greater than 0"),
        ({"target": {"size_bytes": 1.5}}, "target.size_bytes", "integer"),
        ({"target": {"kl": 0}}, "target.kl", "greater than 0"),
        ({"target": 4}, "target", "a mapping is needed"),
        ({"version": 2}, "version", "1"),
        ({"version": True}, "version", "integer"),
        ({"rounding": "neerest"}, "rounding.name", "did you mean nearest"),
        ({"rounding": {"name": 3}}, "rounding.name", "string"),
        (
            {"rounding": {"name": "gptq", "layer": "sequential"}},
            "rounding.layer",
            "unknown key; did you mean layers",
        ),
        ({"rounding": {"name": "gptq", "damping": 1.5}}, "rounding.damping", "1"),
        ({"rounding": {"name": "gptq", "columns": "sorted"}}, "rounding.columns", "'ascending'"),
        ({"rounding": {"name": "gptq", "layers": "ordered"}}, "rounding.layers", "'sequential'"),
        ({"rounding": {"name": "gptq", "drift": 0.5}}, "rounding.drift", "drift needs layers: sequential"),
        (
            {"rounding": {"name": "gptq", "layers": "parallel", "attention": 1}},
            "rounding.attention",
            "attention needs layers: sequential",
        ),
        ({"rounding": "gptq", "allocation": "uniform", "calibration": False}, "rounding", "gptq needs calibration"),
        ({"allocation": "fischer"}, "allocation.name", "did you mean fisher"),
        ({"allocation": {"min_bits": 5, "max_bits": 4}}, "allocation.min_bits", "above max_bits"),
        ({"allocation": {"min_bits": 2.2, "max_bits": 2.8}}, "allocation", "no width between"),
        ({"allocation": {"min_bits": 0}}, "allocation.min_bits", "greater than or equal to 0.1"),
        ({"calibration": True}, "calibration", "a mapping is needed"),
        ({"calibration": False}, "allocation", "fisher needs calibration allocation: uniform, or give"),
        ({"calibration": {"sequences": 0}}, "calibration.sequences", "1"),
        ({"calibration": {"sequences": 65537}}, "calibration.sequences", "65536"),
        ({"calibration": {"sequence_length": 7}}, "calibration.sequence_length", "8"),
        ({"calibration": {"text": "s3://bucket/a"}}, "calibration.text", "no kind of text"),
        ({"evaluation": {"sequence_length": 131073}}, "evaluation.sequence_length", "131072"),
        ({"evaluation": {"text": ""}}, "evaluation.text", "empty"),
        ({"evaluation": False, "gate": {"max_kl": 1}}, "gate", "a gate needs evaluation"),
        ({"gate": {}}, "gate", "give max_kl or min_top1"),
        ({"gate": {"min_top1": 1.5}}, "gate.min_top1", "1"),
        ({"gate": {"max_kl": float("nan")}}, "gate.max_kl", "finite"),
        ({"overrides": {"match": "a"}}, "overrides", "list"),
        ({"overrides": [{"match": "a"}]}, "overrides.0", "says nothing"),
        ({"overrides": [{"keep": True}]}, "overrides.0.match", "required"),
        ({"overrides": [{"match": "a", "keep": False}]}, "overrides.0.keep", "True"),
        ({"overrides": [{"match": "a", "keep": True, "min_bits": 3}]}, "overrides.0", "excludes min_bits"),
        ({"overrides": [{"match": "a", "min_bits": 9}]}, "overrides.0", "no width between"),
        ({"overrides": [{"match": "a", "min_bits": 5, "max_bits": 4}]}, "overrides.0", "above max_bits"),
        ({"groups": "some"}, "groups", "auto"),
        ({"groups": [[]]}, "groups.0", "empty"),
        ({"groups": ["a"]}, "groups.0", "list"),
        ({"exports": []}, "exports", "empty"),
        ({"exports": ["bitmill", "bitmill"]}, "exports", "twice"),
        ({"exports": ["gguff"]}, "exports.0", "did you mean gguf"),
        ({"seed": -1}, "seed", "0"),
        ({"seed": 1 << 63}, "seed", "less than"),
        ({"seed": False}, "seed", "integer"),
    ],
)
def test_what_makes_no_sense_is_refused_at_its_path(changes: dict[str, Any], path: str, reason: str) -> None:
    error = refusal(SHORT | changes)
    assert isinstance(error, InvalidRecipe)
    assert error.where == path
    assert reason in f"{error.detail} {error.hint}"
    assert [item["path"] for item in error.errors] == [path]


@pytest.mark.parametrize(
    ("changes", "path", "kind"),
    [
        ({"format": "int4"}, "format", InvalidFormat),
        ({"format": "int4@64+ransx77"}, "format", InvalidFormat),
        ({"overrides": [{"match": "a", "format": "int4"}]}, "overrides.0.format", InvalidFormat),
        ({"exports": ["bitmill", "gguf"]}, "exports.1", MethodNotAvailable),
    ],
)
def test_formats_and_methods_keep_their_own_class(changes: dict[str, Any], path: str, kind: type[BitmillError]) -> None:
    error = refusal(SHORT | changes)
    assert type(error) is kind
    assert error.where == path
    assert error.hint
    assert [item["path"] for item in error.errors] == [path]


def test_a_method_that_comes_later_and_a_defect_are_together_a_defect() -> None:
    error = refusal(SHORT | {"exports": ["gguf"], "seed": -1})
    assert type(error) is InvalidRecipe
    assert len(error.errors) == 2


@settings(deadline=None)  # the first example reads the presets
@given(
    st.dictionaries(
        st.sampled_from(list(CANONICAL)),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
            max_leaves=6,
        ),
    )
)
def test_no_value_fails_in_another_way(changes: dict[str, Any]) -> None:
    try:
        load_recipe(SHORT | changes)
    except BitmillError as error:
        listed = error.errors
    else:
        return
    assert listed


def test_settings_go_on_top_of_a_preset() -> None:
    changed = load_recipe("default", {"target.kl": 0.05, "allocation.min_bits": 3, "evaluation": False})
    assert changed.canonical() | {"target": 0, "allocation": 0, "evaluation": 0} == presets()["default"].canonical() | {
        "target": 0,
        "allocation": 0,
        "evaluation": 0,
    }
    assert changed.canonical()["target"] == {"kl": 0.05}
    assert changed.canonical()["allocation"] == {"name": "fisher", "min_bits": 3.0}


def test_a_name_that_is_no_preset_is_refused_with_the_nearest_one() -> None:
    error = refusal("defualt")
    assert isinstance(error, InvalidRecipe)
    assert error.hint.startswith("did you mean default?")


def test_presets_differ_in_what_they_are_for() -> None:
    found = presets()
    assert list(found) == ["best", "default", "demo", "fast", "small"]
    assert set(descriptions()) == set(found)
    assert all(20 < len(text) < 121 for text in descriptions().values())
    assert (found["fast"].calibration, found["fast"].evaluation) == (False, False)
    assert found["default"].canonical()["target"] == {"bits_per_param": 4.25}
    assert found["demo"].format == "t7_4@32:signmax-search:e4m3"
    assert found["best"].rounding.is_sequential
    for recipe in found.values():
        assert load_recipe(recipe.canonical()).canonical() == recipe.canonical()


def test_presets_that_are_handed_out_cannot_be_spoiled() -> None:
    presets().clear()
    assert presets()
    with pytest.raises(ValidationError):
        presets()["fast"].seed = 3  # type: ignore[misc]


@pytest.mark.parametrize("catalogue", [rounding.catalogue, allocation.catalogue, exports.catalogue])
def test_catalogues_describe_every_name_and_its_parameters(catalogue: Any) -> None:
    for item in catalogue():
        assert item["name"]
        assert item["description"]
        assert (item["parameters"].get("type") == "object") == item["available"]
        assert item["description"].endswith("(not available yet)") != item["available"]
    assert json.dumps(catalogue())


def test_the_schema_of_a_rounding_method_has_its_parameters_with_their_defaults() -> None:
    for item in rounding.catalogue():
        properties = item["parameters"]["properties"]
        assert {key: field["default"] for key, field in properties.items()} == rounding.PARAMETERS[item["name"]]


def test_the_parameters_of_an_allocation_are_in_its_schema() -> None:
    fisher = next(item for item in allocation.catalogue() if item["name"] == "fisher")
    assert set(fisher["parameters"]["properties"]) == {"min_bits", "max_bits"}


def test_the_schema_has_every_part_and_its_bounds() -> None:
    schema = Recipe.json_schema()
    assert set(schema["properties"]) == set(CANONICAL)
    assert schema["required"] == ["target", "format"]
    bits = schema["$defs"]["Target"]["properties"]["bits_per_param"]["anyOf"][0]
    assert (bits["exclusiveMinimum"], bits["maximum"]) == (0, 64)
    assert {"type": "string", "enum": list(RoundingSpec.KNOWN)} in schema["$defs"]["RoundingSpec"]["anyOf"]


def test_a_method_is_refused_where_it_is_made_without_a_recipe() -> None:
    assert RoundingSpec.model_validate({"name": "nearest"}) == RoundingSpec(name="nearest")
    with pytest.raises(InvalidRecipe, match="neerest"):
        RoundingSpec(name="neerest")
    with pytest.raises(InvalidRecipe, match="gptq has no parameter steps"):
        RoundingSpec(name="gptq", steps=3)


def test_bounds_select_from_the_widths_of_a_format() -> None:
    fmt = parse("int4@64")
    spec = AllocationSpec(min_bits=3, max_bits=5)
    assert widths_within(fmt, spec.min_bits, spec.max_bits) == (3, 4, 5)
    assert widths_within(fmt, None, None) == fmt.allowed_widths()
    assert widths_within(fmt, 9, None) == ()


def test_reading_a_recipe_loads_nothing_heavy() -> None:
    code = (
        "import sys, core.storage.preflight; from core.recipe.recipe import load_recipe; load_recipe('default');"
        "print(sorted({'torch', 'numpy', 'scipy', 'transformers'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
