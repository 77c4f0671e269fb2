"""The command line: its commands, its global options, and the one place where errors become exit codes."""

from __future__ import annotations

import difflib
import errno
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from truthgpt.cli.benchmark import benchmark_app
from truthgpt.cli.chat import chat
from truthgpt.cli.components import components, load_installed_plugins, load_plugins
from truthgpt.cli.demo import demo
from truthgpt.cli.doctor import doctor
from truthgpt.cli.evaluate import evaluate
from truthgpt.cli.export import export
from truthgpt.cli.generate import generate
from truthgpt.cli.init import init
from truthgpt.cli.inspect import inspect
from truthgpt.cli.output import say
from truthgpt.cli.plan import plan
from truthgpt.cli.runs import runs_app
from truthgpt.cli.schema import schema
from truthgpt.cli.serve import serve
from truthgpt.cli.train import train
from truthgpt.cli.validate import validate
from truthgpt.errors import EXIT_PREEMPTED, ConfigError, Preempted, TruthGPTError
from truthgpt.version import __version__

_EVERYWHERE = "Everywhere: --plugin MODULE loads a module that registers components; --debug shows tracebacks."

_TAKE_KEYS = {"train", "validate", "inspect", "plan", "eval", "benchmark"}
"""Commands that take `key=value`. Other trainers have `--max_steps 3`."""

_OUT_OF_REACH = {errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG}
"""What a path that was given can be, at the first look at it: not a bug."""


class _Listed(TyperGroup):
    """Commands that `--help` lists with the whole of what they do; Click cuts it after one line."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        rows = [(name, " ".join((self.commands[name].help or "").split())) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


class _Commands(_Listed):
    """The commands; an interrupt ends any of them with the exit code of a preempted run."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = found = super().resolve_command(ctx, args)
        if name in _TAKE_KEYS:
            _refuse_keys_as_options(rest, _options_of(command))
        return found

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        with _interrupts():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        with _interrupts():
            return super().invoke(ctx)


@contextmanager
def _interrupts() -> Iterator[None]:
    """Before typer sees an interrupt, which has an exit code of its own for it and says nothing."""
    try:
        yield
    except KeyboardInterrupt:
        say("interrupted")
        raise typer.Exit(EXIT_PREEMPTED) from None


# Without rich: it would add 0.1 s to every command, and error messages here are made for one line each.
app = typer.Typer(
    name="truthgpt",
    help="One YAML in, a trained, measured, resumable language model out.",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"truthgpt {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    plugin: Annotated[
        list[str] | None,
        typer.Option("--plugin", metavar="MODULE", help="Load a module that registers components; repeatable."),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version and exit.")
    ] = False,
) -> None:
    load_installed_plugins()
    load_plugins(plugin or [])


app.command(epilog=_EVERYWHERE)(train)
app.command(epilog=_EVERYWHERE)(validate)
app.command(epilog=_EVERYWHERE)(schema)
app.command(epilog=_EVERYWHERE)(init)
app.command(epilog=_EVERYWHERE)(inspect)
app.command(epilog=_EVERYWHERE)(plan)
app.command(epilog=_EVERYWHERE)(doctor)
app.command(epilog=_EVERYWHERE)(components)
app.command("eval", epilog=_EVERYWHERE)(evaluate)
app.command(epilog=_EVERYWHERE)(generate)
app.command(epilog=_EVERYWHERE)(serve)
app.command(epilog=_EVERYWHERE)(demo)
app.command(epilog=_EVERYWHERE)(chat)
app.command(epilog=_EVERYWHERE)(export)
app.add_typer(runs_app, name="runs", cls=_Listed, epilog=_EVERYWHERE)
app.add_typer(benchmark_app, name="benchmark", cls=_Listed, epilog=_EVERYWHERE)


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv` (default: the process's own) and exit with the code of its outcome."""
    arguments = _global_first(sys.argv[1:] if argv is None else argv)
    try:
        app(arguments, prog_name="truthgpt")
    except TruthGPTError as error:
        _show_traceback(arguments)
        prefix = "" if isinstance(error, Preempted) else "error: "
        for line in str(error).splitlines():
            say(f"{prefix}{line}")
        sys.exit(error.exit_code)
    except Exception as error:  # noqa: BLE001 - whatever no command expects ends here, in one line
        _show_traceback(arguments)
        if isinstance(error, OSError) and error.errno in _OUT_OF_REACH and error.filename is not None:
            say(f"error: {str(error.filename)[:200]}: {error.strerror}; give a path that this user can read")
            sys.exit(ConfigError.exit_code)
        said = " ".join(str(error).split())
        say(f"error: unexpected {type(error).__name__}: {said} (run again with --debug for the traceback)")
        sys.exit(1)


def _global_first(arguments: Sequence[str]) -> list[str]:
    """The arguments with the global options, which may stand anywhere before `--`, moved to the front."""
    first: list[str] = []
    rest: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--debug" or argument.startswith("--plugin="):
            first.append(argument)
        elif argument == "--plugin":
            first += [argument, *[value for value in [next(remaining, None)] if value is not None]]
        elif argument == "--":
            rest += [argument, *remaining]
        else:
            rest.append(argument)
    return [*first, *rest]


def _options_of(command: Any) -> list[str]:
    """The options of a command, or of all commands of a group."""
    commands = (command, *getattr(command, "commands", {}).values())
    return [
        "--help",
        "--version",
        *(name for one in commands for each in one.params for name in (*each.opts, *each.secondary_opts)),
    ]


def _refuse_keys_as_options(arguments: Sequence[str], options: Sequence[str]) -> None:
    """Raise ConfigError for a key given as an option: no option has an underscore or a dot, but most keys do; what else
    is not even nearly an option was meant as a key too, or as the name of the YAML."""
    for argument in arguments[: arguments.index("--") if "--" in arguments else None]:
        name = argument.partition("=")[0]
        if not name.startswith("--") or name.replace("_", "-") in options:
            continue
        key = "_" in name or "." in name
        if key or not difflib.get_close_matches(name, options, n=1, cutoff=0.75):
            told = "a key is set without dashes, such as training.max_steps=100"
            if not key and "config" in name:
                told = "a YAML is named without one, as in truthgpt train my.yaml"
            raise ConfigError(f"{name} is no option; {told}")


def _show_traceback(arguments: Sequence[str]) -> None:
    if "--debug" in arguments:
        import traceback

        traceback.print_exc()
