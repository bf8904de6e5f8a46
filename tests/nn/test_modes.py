"""Modes are put back module by module, also when something goes wrong."""

import pytest
from torch import nn

from veneer.nn.modes import evaluating


def test_mixed_modes_come_back_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout().eval(), nn.Dropout()))
    before = [module.training for module in model.modules()]
    with pytest.raises(ZeroDivisionError), evaluating(model):
        1 / any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
