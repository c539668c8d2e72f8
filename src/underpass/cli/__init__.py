"""The command line: one file a command, thin over the rest. ``main`` is the entry point."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

import click

from underpass import __version__, namespaces
from underpass.cli import interrupt, output
from underpass.errors import UnderpassError, Usage

_USUAL_PINS = Path("/sys/fs/bpf/underpass")  # dataplane.DEFAULT_PINS, which is slow to import
#: Command -> module of this package that holds it, imported when it is used.
_COMMANDS = {
    "up": "up",
    "upgrade": "upgrade",
    "down": "down",
    "status": "status",
    "connections": "connections",
    "top": "top",
    "explain": "explain",
    "adopt": "adopt",
    "pause": "pause",
    "resume": "pause",
    "guard": "guard",
    "policy": "policy",
    "agent": "agent",
    "doctor": "doctor",
    "calibrate": "calibrate",
    "bench": "bench",
    "torture": "torture",
    "bugreport": "bugreport",
    "completion": "completion",
    "man": "completion",
}


class _Commands(click.Group):
    """Imports a command's module only when it is called: `status` need not load `bench`."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, _ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module = importlib.import_module(f"underpass.cli.{_COMMANDS[name]}")
        command: click.Command = getattr(module, name)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="underpass")
@click.option(
    "--pins",
    type=click.Path(path_type=Path, readable=False),
    default=_USUAL_PINS,
    show_default=True,
    help="Pin directory of the generation to act on (in a bpffs).",
)
@click.pass_context
def cli(ctx: click.Context, pins: Path) -> None:
    """TCP between processes of this node passes under the TCP/IP stack.

    Faster where it helps, plain TCP everywhere else.

    \b
    Start with         `underpass doctor`, then `underpass up`
    what took it       `underpass connections`, and `underpass explain` tells why
    what stays on TCP  `underpass guard list`

    \b
    Exit codes
      0  ok
      1  a check failed or an operation did not complete
      2  usage
      4  kernel unsupported
    130  interrupted
    """  # noqa: D301 - to click, a real \b says that lines stay as they are
    ctx.obj = Path(os.path.normpath(pins.absolute()))
    if not ctx.obj.name:
        raise Usage("pin in", ctx.obj, "it has no name", "name a directory in a bpffs")
    if "." in ctx.obj.name:
        raise Usage("pin in", ctx.obj, "bpffs takes no name with a dot", "choose another")
    if ctx.obj != _USUAL_PINS:
        output.act_on(ctx.obj)
    namespaces.join_host_cgroups()


def main() -> None:
    """Run the command line; every error ends in one line on stderr and an exit code."""
    try:
        with interrupt.raised():
            _run()
    except interrupt.Signalled as stopped:
        if stopped.number != signal.SIGINT:
            signal.raise_signal(stopped.number)  # as without a handler: it is undone by now
        output.fail("interrupted; run the command again to go on", 128 + stopped.number)


def _run() -> None:
    output.open_streams()
    try:
        code = cli.main(prog_name="underpass", standalone_mode=False)
        sys.stdout.flush()
    except UnderpassError as error:
        output.fail(str(error), error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:  # no command was named: its help, whole
        click.echo(error.format_message(), err=True)
        sys.exit(error.exit_code)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "underpass"
        output.fail(f"{error.format_message().rstrip('.')}; see `{command} --help`", 2)
    except click.Abort:
        output.fail("interrupted; run the command again to go on", 130)
    except click.ClickException as error:
        output.fail(error.format_message(), 1)
    except BrokenPipeError:
        output.silence(sys.stdout)
        sys.exit(1)
    except OSError as error:
        _refused(error)
    except MemoryError:
        output.fail("cannot go on: out of memory; give it more, or run it where there is more", 1)
    sys.exit(code if isinstance(code, int) else 0)


def _refused(error: OSError) -> NoReturn:
    """The one line about what the system refuses."""
    output.silence(sys.stdout)
    if error.errno == errno.ENOSPC and not error.filename:
        output.fail(f"cannot write what it found: {error.strerror}; make room there", 1)
    if isinstance(error, PermissionError) and os.geteuid() != 0:
        output.fail(f"cannot use {error.filename}: {error.strerror}; run as root", 1)
    output.fail(f"cannot go on: {error}; run `underpass doctor`", 1)
