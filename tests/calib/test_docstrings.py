"""The examples in docstrings of calib give what they say."""

import doctest
import importlib
import pkgutil

import pytest

import calib

MODULES = sorted(module.name for module in pkgutil.iter_modules(calib.__path__, "calib."))


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_say(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0
