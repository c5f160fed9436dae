# SPDX-License-Identifier: MIT
"""The `polarismail` command. It acts on the running server through its control socket, and on the databases where none runs.

Exit codes: 0 done; 1 refused (there is no such thing, or it cannot be done so); 2 wrong usage; 3 the configuration is
wrong; 4 try again (server or database cannot answer now, or a 4yz reply); 5 not permitted; 130 interrupted.

Tables for people on a terminal; `--json` (before or after the noun) prints one JSON value for programs. What goes wrong is
said on standard error, in one line.
"""

from __future__ import annotations

import os
import sys

import click

from polarismail import __version__
from polarismail.cli.account import account
from polarismail.cli.alias import alias
from polarismail.cli.check import check
from polarismail.cli.domain import domain
from polarismail.cli.invocation import Invocation
from polarismail.cli.queue import queue
from polarismail.cli.send import send
from polarismail.cli.status import status
from polarismail.cli.trace import trace
from polarismail.config import DEFAULT_PATH
from polarismail.values.errors import ConfigError, ControlError, PolarisError

REFUSED, WRONG_CONFIG, TRY_AGAIN, NOT_PERMITTED, INTERRUPTED = 1, 3, 4, 5, 130

_EPILOG = "Exit codes: 0 done, 1 refused, 2 wrong usage, 3 wrong configuration, 4 try again, 5 not permitted, 130 interrupted."


@click.group(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config",
    "-c",
    default=DEFAULT_PATH,
    envvar="POLARISMAIL_CONFIG",
    show_default=True,
    metavar="FILE",
    help="The configuration file.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON value for programs.")
@click.version_option(__version__, prog_name="polarismail")
@click.pass_context
def command(context: click.Context, config: str, as_json: bool) -> None:
    """Look after a polarismail server: accounts, queue, logs."""
    context.obj = Invocation(config, as_json)


for each in (check, domain, account, alias, queue, send, trace, status):
    command.add_command(each)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        outcome = command.main(arguments, prog_name="polarismail", standalone_mode=False)
        sys.stdout.flush()
        return outcome if isinstance(outcome, int) else 0
    except click.ClickException as problem:
        problem.show()
        return problem.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _say("interrupted", INTERRUPTED)
    except ConfigError as problem:
        return _say(str(problem), WRONG_CONFIG)
    except ControlError as problem:
        return _say(str(problem), REFUSED)
    except PolarisError as problem:
        return _say(f"{problem} (try again)", TRY_AGAIN)
    except BrokenPipeError:
        # Somebody reads only the head of our output; the interpreter must not complain at its end either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except PermissionError as problem:
        return _say(f"not permitted: {problem.filename or problem}", NOT_PERMITTED)


def _say(text: str, code: int) -> int:
    click.echo(f"polarismail: {text}", err=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
