"""The fingerprint notices another model and nothing else."""

import torch
from torch import nn

from veneer.nn.fingerprint import fingerprint


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(50, 60), nn.Linear(60, 3))


def test_same_weights_same_fingerprint_others_not():
    one = net()
    before = fingerprint(one)
    assert fingerprint(net()) == before
    assert fingerprint(net(1)) != before
    assert fingerprint(one.double()) == before, "the dtype it is loaded in is no difference"
    assert fingerprint(nn.Sequential(*net()[:1])) != before
    with torch.no_grad():
        one[1].bias[2] += 0.1
    assert fingerprint(one) != before


def test_a_changed_mode_or_flag_is_no_difference():
    one = net()
    before = fingerprint(one)
    assert fingerprint(one.eval().requires_grad_(False)) == before
