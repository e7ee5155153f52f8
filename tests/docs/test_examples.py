"""The example in each verb's help names options that the verb has; the guides run them on real data."""

import re
import shlex
from importlib import import_module

import pytest
import typer

from foveal import VERBS
from foveal.cli.main import app


@pytest.mark.parametrize("verb", VERBS)
def test_the_example_is_a_command(verb: str):
    told = getattr(import_module(f"foveal.verbs.{verb}"), verb).__doc__
    example = re.search(r"^ *Example: foveal (.+)$", told, re.MULTILINE)
    assert example, f"the help of {verb} shows no example"
    name, *arguments = shlex.split(example[1])
    assert name == verb
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    given = command.make_context(verb, arguments).params
    assert any(value is not None for value in given.values())
    with pytest.raises(Exception, match="No such option"):
        command.make_context(verb, [*arguments, "--no-such-option"])
