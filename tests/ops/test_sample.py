"""A sample tells weights apart, whatever dtype they were loaded in."""

import torch
from hypothesis import given
from hypothesis import strategies as st

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
