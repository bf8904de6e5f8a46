"""Every kind: what is saved in PEFT's layout comes back the same, or is refused before anything is written."""

import re

import pytest
import torch

from tests.contract.grid import file_refusal, ids, supported
from tests.contract.support import attached, make_inputs, make_model
from tests.contract.variants import VARIANTS
from veneer.errors import AdapterError
from veneer.files.peft import load_adapter, save_adapter
from veneer.nn.attach import attach, detach

CELLS = supported(VARIANTS, ("float32",))
KEPT = [cell for cell in CELLS if file_refusal(cell[0], cell[1]) is None]
REFUSED = [cell for cell in CELLS if file_refusal(cell[0], cell[1]) is not None]


@pytest.mark.parametrize(("case", "variant", "storage"), KEPT, ids=ids(KEPT))
def test_save_and_load_is_the_identity(case, variant, storage, tmp_path):
    model, _ = attached(case, variant)
    inputs = make_inputs(case)
    expected = model(*inputs)
    adapter = detach(model)
    save_adapter(adapter, tmp_path / "adapter")
    again = load_adapter(tmp_path / "adapter")
    assert again.digest == adapter.digest
    assert {path: pair.form for path, pair in again.modules.items()} == {
        path: pair.form for path, pair in adapter.modules.items()
    }
    other = make_model(case)
    attach(other, again)
    assert torch.equal(other(*inputs), expected)


@pytest.mark.parametrize(("case", "variant", "storage"), REFUSED, ids=ids(REFUSED))
def test_what_the_layout_has_no_place_for_is_refused(case, variant, storage, tmp_path):
    model, _ = attached(case, variant)
    with pytest.raises(AdapterError, match=re.escape(file_refusal(case, variant))) as caught:
        save_adapter(detach(model), tmp_path / "adapter")
    assert "layer" in str(caught.value)
    assert not (tmp_path / "adapter").exists()
