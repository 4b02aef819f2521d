"""The `bitmill` command: puts the groups of commands together and turns errors into messages and exit codes.

Starting it imports neither torch nor the service; each command imports what it needs when it runs.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

import typer
from typer.exceptions import Abort, TyperException

from cli import catalogue_commands, key_commands, local_commands, output, service_commands, webhook_commands
from core import __version__
from core.errors import BitmillError

app = typer.Typer(
    name="bitmill",
    help="Give it a checkpoint and a budget; get back the best quantised model that the budget allows.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its help pages take longer to import than everything else
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    del version  # the callback has done what it asks for


_root.__doc__ = app.info.help
service_commands.register(app)
key_commands.register(app)
webhook_commands.register(app)
local_commands.register(app)
catalogue_commands.register(app)


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit with its code."""
    given = sys.argv[1:] if arguments is None else arguments
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # `nohup` has asked for something else
            signal.signal(number, _interrupt)
    sys.exit(run(given))


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """Being asked to stop is like Ctrl-C: what is half written is removed on the way out."""
    raise KeyboardInterrupt


def run(arguments: list[str]) -> int:
    """Run one command; its exit code: 0 done, 1 the work failed, 2 the request was wrong."""
    as_json = output.wants_json(arguments)
    try:
        code = app(arguments, standalone_mode=False)
    except BitmillError as error:
        output.report_error(error, as_json=as_json)
        return output.exit_code(error)
    except TyperException as error:
        output.report_usage(error.format_message(), as_json=as_json)
        return output.WRONG
    except (KeyboardInterrupt, Abort):
        output.say("interrupted")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        return output.FAILED
    except Exception as error:  # noqa: BLE001 - whatever else happens is told like every other error
        named = output.named(error)
        output.report_error(named, as_json=as_json)
        return output.exit_code(named)
    return code if isinstance(code, int) else output.DONE


if __name__ == "__main__":
    main()
