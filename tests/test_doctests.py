"""Every example in a docstring runs."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import veneer

SOURCE = Path(veneer.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts)
    for path in SOURCE.rglob("*.py")
    if path.name != "__init__.py" and ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    found = doctest.testmod(import_module(name))
    assert found.failed == 0
    assert found.attempted > 0
