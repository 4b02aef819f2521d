"""The command line as scripts see it: exit codes, one JSON object, nothing heavy loaded."""

import json
import subprocess
import sys

import pytest

from cli.main import run
from cli.options import overrides
from cli.output import exit_code
from core.errors import GateFailed, InvalidRecipe, NonFiniteWeights, NotFound, StoreUnavailable

COMMANDS = ["up", "demo", "submit", "quantise", "inspect", "dequantise", "evaluate", "plan", "recipes", "formats"]
COMMANDS += ["roundings", "format show", "format measure", "layer measure"]
COMMANDS += [f"jobs {verb}" for verb in ("list", "show", "watch", "cancel", "retry", "download")]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_contract_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command.split(), "--help"]) == 0
    assert "Usage:" in capsys.readouterr().out


def test_help_loads_neither_torch_nor_the_service() -> None:
    code = (
        "import sys; from cli.main import run; assert run(['--help']) == 0;"
        "heavy = {'torch', 'transformers', 'sqlalchemy', 'fastapi', 'celery', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_a_wrong_option_is_exit_code_2_and_with_json_an_error_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["jobs", "list", "--no-such-option", "--json"]) == 2
    shown = capsys.readouterr()
    assert json.loads(shown.out)["error"]["code"] == "usage"
    assert "--no-such-option" in shown.err


def test_a_service_that_is_not_there_is_exit_code_1_with_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["jobs", "show", "job_1", "--url", "http://127.0.0.1:9", "--json"]) == 1
    shown = capsys.readouterr()
    error = json.loads(shown.out)["error"]
    assert (error["code"], error["where"]) == ("service_unreachable", "http://127.0.0.1:9")
    assert "bitmill up" in shown.err


def test_without_json_nothing_of_an_error_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "/no/such/folder"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "/no/such/folder" in shown.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotFound("x"), 2),
        (InvalidRecipe("x"), 2),
        (GateFailed("x"), 1),
        (NonFiniteWeights("x"), 1),
        (StoreUnavailable("x"), 1),
    ],
)
def test_exit_codes_tell_a_wrong_request_from_failed_work(error: Exception, code: int) -> None:
    assert exit_code(error) == code  # type: ignore[arg-type]


def test_overrides_are_yaml_values_under_dotted_names() -> None:
    assert overrides(["target.bits_per_param=3.5", "evaluation=false", "exports=[bitmill]", "format=t5_4@64"]) == {
        "target.bits_per_param": 3.5,
        "evaluation": False,
        "exports": ["bitmill"],
        "format": "t5_4@64",
    }


@pytest.mark.parametrize("setting", ["target", "=3", "a=[1"])
def test_an_override_that_is_not_key_and_value_is_refused(setting: str) -> None:
    with pytest.raises(InvalidRecipe):
        overrides([setting])
