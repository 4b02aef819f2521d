"""The command line as scripts see it: exit codes, one JSON object, nothing heavy loaded."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cli.main import main, run
from cli.options import overrides
from cli.output import exit_code
from core import __version__
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


def test_the_version_is_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_what_the_system_refuses_is_exit_code_2_with_the_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert run(["format", "measure", "int4@64", "--data", str(tmp_path), "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["code"], error["where"]) == ("invalid_request", str(tmp_path))


def test_a_defect_is_exit_code_1_one_json_object_and_a_traceback_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: str) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr("core.recipe.tensor_format.parse", broken)
    assert run(["format", "show", "int4@64", "--json"]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["error"]["code"] == "internal_error"
    assert "Traceback" in shown.err


@pytest.mark.parametrize("value", ["2020-13-45", "[" * 3000, "9" * 5000])
def test_a_setting_that_cannot_be_read_is_refused(value: str) -> None:
    with pytest.raises(InvalidRecipe):
        overrides([f"seed={value}"])


def test_a_device_that_is_not_here_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(tmp_path), "--recipe", "fast", "--device", "tpu", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["where"] == "--device"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_being_asked_to_stop_is_like_ctrl_c(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(0.1)

    before = signal.signal(number, signal.SIG_DFL)
    monkeypatch.setattr("cli.main.app", work)
    try:
        with pytest.raises(SystemExit) as ended:
            main([])
    finally:
        signal.signal(number, before)
    assert ended.value.code == 130
