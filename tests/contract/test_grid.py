"""The grid itself: it is complete, what it says is refused is refused with that reason, and the page is up to date."""

from pathlib import Path

import pytest

from tests.contract.cases import CASES, FLOATS, QUANTISED
from tests.contract.grid import FOREIGN, NOT_LINEAR, RULES, expectation, ids, page, refused
from tests.contract.support import attach_variant, make_model
from tests.contract.variants import PLAIN, VARIANTS
from veneer import errors
from veneer.nn.kinds import KINDS
from veneer.ops.initialise import INITIALISATIONS
from veneer.storage.quantise import QUANTISERS, quantise_model
from veneer.storage.registry import STORAGES

PAGE = Path(__file__).parents[2] / "docs" / "grid.md"
REFUSED = refused()
NOT_QUANTISED = [(case, storage) for case in CASES if case.kind != "linear" for storage in QUANTISED]


def test_every_row_of_every_registry_is_in_the_grid():
    assert {case.kind for case in CASES} == {kind.name for kind in KINDS}
    assert {"kaiming", *(one.settings["init"] for one in VARIANTS if "init" in one.settings)} == set(INITIALISATIONS)
    assert {"plain", *QUANTISED, *FOREIGN} == {storage.name for storage in STORAGES}
    assert set(QUANTISED) == set(QUANTISERS)
    assert {storage for case in CASES for storage in case.storages} == {*FLOATS, *QUANTISED}


def test_what_kinds_say_they_take_is_what_the_grid_says():
    """`LayerKind.variants` speaks of what an initialisation looks at; the grid of each one by name."""
    asks = {"weight": "init=pissa", "data": "init=eva"}
    for kind in KINDS:
        denied = {ask for rule in RULES if kind.name in rule.kinds for ask in rule.asks}
        for word in ("dora", "dropout", "parts", "freeze_A", *asks):
            assert (word in kind.variants) == (asks.get(word, word) not in denied), (kind.name, word)


@pytest.mark.parametrize(("case", "variant", "storage", "refusal"), REFUSED, ids=ids([cell[:3] for cell in REFUSED]))
def test_what_is_refused_is_refused_with_its_reason(case, variant, storage, refusal):
    model = make_model(case, storage)
    before = dict(model.named_modules())
    with pytest.raises(getattr(errors, refusal.error)) as caught:
        attach_variant(model, case, variant)
    assert refusal.message in str(caught.value)
    assert "layer" in str(caught.value).replace("layers", "")  # the path of the layer
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize(("case", "storage"), NOT_QUANTISED, ids=ids(NOT_QUANTISED))
def test_what_is_not_linear_is_not_quantised(case, storage):
    model = make_model(case)
    before = dict(model.named_modules())
    assert quantise_model(model, storage) == 0
    assert dict(model.named_modules()) == before
    assert expectation(case.kind, PLAIN, storage).why == NOT_LINEAR


def test_the_page_is_what_the_grid_gives():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.contract.grid > docs/grid.md"
