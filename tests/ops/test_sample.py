"""A sample tells weights apart, whatever dtype they were loaded in."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from veneer.nn.fingerprint import fingerprint
from veneer.ops.sample import SAMPLES, sample_digest, sample_values


@given(st.integers(1, 5000), st.integers(0, 10))
def test_every_weight_up_to_the_number_of_samples_counts(size, seed):
    weight = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    assert len(sample_values(weight)) == min(size, SAMPLES)
    changed = weight.clone()
    changed[0] += 1
    assert sample_digest(weight) != sample_digest(changed)
    assert sample_digest(weight) == sample_digest(weight.double())


def test_shape_counts():
    assert sample_digest(torch.ones(2, 3)) != sample_digest(torch.ones(3, 2))


class Wrapped(Tensor):
    """Codes and scales behind a tensor that cannot be looked at in another shape, as those of torchao."""

    @staticmethod
    def __new__(cls, codes, scale):
        return Tensor._make_wrapper_subclass(cls, codes.shape)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Wrapped(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(function)


def test_of_a_tensor_that_wraps_others_each_of_them_counts():
    codes, scale = torch.randint(-127, 127, (64, 64), dtype=torch.int8), torch.rand(64, 1)
    weight = Wrapped(codes, scale)
    assert torch.equal(sample_values(weight), torch.cat([sample_values(codes), sample_values(scale)]))
    digests = {sample_digest(one) for one in (weight, Wrapped(codes, scale + 1), Wrapped(-codes, scale))}
    assert len(digests) == 3
    assert sample_digest(Wrapped(codes.clone(), scale.clone())) == sample_digest(weight)
    model = nn.Linear(64, 64, bias=False)
    model.weight = nn.Parameter(weight, requires_grad=False)
    assert fingerprint(model) != fingerprint(nn.Linear(64, 64, bias=False))
