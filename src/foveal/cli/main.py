"""The command line, built from the verbs' signatures: positional parameters become arguments, keyword-only
ones become options, the docstring becomes the help. Nothing is typed twice."""

from __future__ import annotations

import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from foveal import VERBS, __version__
from foveal.cli.progress import TerminalProgress
from foveal.core.errors import FovealError
from foveal.core.progress import Progress

CommandLineError: Any = typer.BadParameter.__mro__[2]
"""click's ClickException, which typer carries but does not export."""

STOPPED = 130
FELLOW = int(os.environ.get("RANK") or 0)
"""Which process of a run this is; all but the first, 0, which torchrun or `accelerate launch` started, are quiet."""

app = typer.Typer(
    name="foveal",
    help="From a folder of images to a vision model you can trust and ship.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit()


def command(verb: Callable[..., Any]) -> Callable[..., None]:
    """A typer command that calls `verb`, shows its progress on stderr and its result on stdout.

    A verb's result has `to_dict()` for --json and `to_text()` for people.
    """
    hints = parameter_types(verb)
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(verb).parameters.items():
        if name == "progress":
            continue
        kind, text = get_args(hints[name])[:2] if get_origin(hints[name]) is Annotated else (hints[name], "")
        given: dict[str, Any] = {"help": text, "parser": reader(kind)}
        info = (
            typer.Option(*short(name), **given, show_default=parameter.default is not None)
            if parameter.kind is parameter.KEYWORD_ONLY
            else typer.Argument(**given, metavar=name.upper())
        )
        parameters.append(parameter.replace(annotation=Annotated[kind, info], kind=parameter.KEYWORD_ONLY))
    as_json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
    parameters.append(inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=as_json))

    def run(**arguments: Any) -> None:
        as_json = arguments.pop("as_json")
        with TerminalProgress() as bars:
            if "progress" in hints:
                arguments["progress"] = Progress() if FELLOW else bars
            result = verb(**arguments)
        if FELLOW:
            return
        if as_json:
            sys.stdout.write(json.dumps(result.to_dict(), indent=2, allow_nan=False) + "\n")
        else:
            sys.stdout.write(printable(result.to_text()) + "\n")

    run.__name__, run.__doc__ = verb.__name__, verb.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def reader(kind: Any) -> Callable[[str], Any] | None:
    """What refuses an empty path or word, as an unset variable of the shell leaves it: Path("") is the folder here."""

    def path(value: str) -> Path:
        return Path(said(str(value)))

    def text(value: str) -> str:
        return said(value)

    def said(value: str) -> str:
        if not value:
            raise typer.BadParameter("it is empty: give a value (for the folder you are in, write .), or leave it out")
        return value

    kinds = {each for each in (kind, *get_args(kind)) if each in (Path, str)}
    return path if Path in kinds else text if str in kinds else None


def short(name: str) -> tuple[str, ...]:
    """A name of one letter is an option of one dash: `-k`. One that ends in a line is a word of Python: `--from`."""
    if name.endswith("_"):
        return (f"--{name[:-1]}",)
    return (f"-{name}",) if len(name) == 1 else ()


def parameter_types(verb: Callable[..., Any]) -> dict[str, Any]:
    """Types of the parameters alone: a verb's result may name a class that only importing torch defines."""
    written = {name: kind for name, kind in verb.__annotations__.items() if name != "return"}
    return get_type_hints(type("_", (), {"__annotations__": written}), verb.__globals__, include_extras=True)


for _name in VERBS:
    app.command(_name)(command(getattr(import_module(f"foveal.verbs.{_name}"), _name)))


def main() -> None:
    """Entry point. Exit code 0 on success, 2 on a usage or data error, 1 on a fault of foveal."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        code = app(standalone_mode=False) or 0
    except FovealError as error:
        code = fail(str(error))
    except CommandLineError as error:
        code = fail(error.format_message())
    except (KeyboardInterrupt, typer.Abort):
        code = STOPPED
    except Exception:
        traceback.print_exc()
        sys.stderr.write("foveal: this is a fault of foveal; please report it with the lines above\n")
        code = 1
    if code == STOPPED:
        sys.stderr.write("foveal: stopped; the same command goes on where it was\n")
    sys.exit(code)


def printable(text: str) -> str:
    """Text without the control characters by which a name in a Bundle or data set could steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def fail(message: str) -> int:
    if message:
        process = f" (process {FELLOW})" if FELLOW else ""
        sys.stderr.write(f"foveal{process}: {printable(' '.join(message.split()))}\n")
    return 2
