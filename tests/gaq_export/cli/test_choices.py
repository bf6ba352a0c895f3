"""The names in help texts: those of the tables, all of them, in the help of the command that takes them."""

from importlib import import_module

import pytest
from typer.main import get_command

from calib import choices as settings
from gaq_export.cli import choices
from gaq_export.cli.app import app
from gaq_export.cli.choices import Names, either
from gaq_export.graph.profiles import PROFILES
from gaq_export.quantize.presets import PRESETS

LISTS = {name: value for name, value in vars(choices).items() if isinstance(value, Names)}
OPTIONS = [
    ("calibrate", "--preset", tuple(PRESETS)),
    ("calibrate", "--omega", tuple(settings.OmegaRule)),
    ("calibrate", "--convention", tuple(settings.Convention)),
    ("calibrate", "--correct", tuple(settings.CorrectionRule)),
    ("build-engine", "--backend", choices.BACKENDS.names),
    ("build-engine", "--graph", choices.GRAPHS.names),
    ("build-engine", "--compute", choices.COMPUTE.names),
    ("build-engine", "--numbers", choices.NUMBERS.names),
    ("build-engine", "--portable", choices.PORTABLE.names),
    *((command, "--sampler", choices.SAMPLERS.names) for command in ("build-engine", "sample", "compare", "triton")),
    *((command, "--spacing", choices.SPACINGS.names) for command in ("build-engine", "sample", "compare", "triton")),
    ("export", "--profile", tuple(PROFILES)),
    ("pack", "--profile", tuple(PROFILES)),
    ("evaluate", "--features", choices.EXTRACTORS.names),
    ("triton", "--backend", choices.SERVERS.names),
]


@pytest.mark.parametrize("name", LISTS)
def test_a_list_has_the_names_of_its_table_in_their_order(name: str) -> None:
    module, _, attribute = LISTS[name].table.partition(":")
    assert LISTS[name].names == tuple(getattr(import_module(module), attribute))


@pytest.mark.parametrize(("command", "option", "names"), OPTIONS)
def test_the_help_of_an_option_names_every_choice(command: str, option: str, names: tuple[str, ...]) -> None:
    parameters = get_command(app).commands[command].params
    text = next(parameter.help for parameter in parameters if option in parameter.opts)
    assert len(names) > 1
    assert [name for name in names if name not in text] == []


def test_names_are_joined_as_people_do() -> None:
    assert [either(names) for names in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a or b", "a, b or c"]
