"""The docstrings are the reference: what they must say of every public name."""

from __future__ import annotations

import inspect
import re

import pytest

import torchrl_spar


def functions_of(cls):
    """The public methods and properties that a class defines itself."""
    for name, member in vars(cls).items():
        member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if not name.startswith("_") and inspect.isfunction(member):
            yield name, member


@pytest.mark.parametrize("name", torchrl_spar.__all__)
def test_a_public_name_is_explained(name):
    thing = getattr(torchrl_spar, name)
    text = inspect.getdoc(thing)
    assert ">>> " in text, "no example"
    assert re.search(r"^Source: \w", text, re.M), "no source"
    is_class = inspect.isclass(thing)
    body = thing.__init__ if is_class else thing
    if not (is_class and issubclass(thing, Exception)):
        parameters = [parameter for parameter in inspect.signature(body).parameters if parameter != "self"]
        described = re.findall(r"^    \*{0,2}(\w+): ", text, re.M)
        assert set(parameters) <= set(described), "parameters that Args does not describe"
        assert "raise InputError" not in inspect.getsource(body) or "Raises:\n    InputError: " in text, "no errors"
    for method, function in functions_of(thing) if is_class else ():
        assert function.__doc__, f"{method}: no docstring"
