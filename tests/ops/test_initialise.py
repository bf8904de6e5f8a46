"""Every row of the registry keeps the promises of the registry; names, options and needs are checked."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.errors import ConfigError
from veneer.ops.initialise import INITIALISATIONS, InitialRequest, initial_factors, initialisation_named, kaiming

NAMES = [*INITIALISATIONS, "pissa_niter_4"]
sizes = st.integers(4, 12)


def full_request(shape=(7, 9), rank=2, scaling=0.5, seed=0, **changes) -> InitialRequest:
    """A request that brings everything that any initialisation needs."""
    generator = torch.Generator().manual_seed(seed + 1)
    return replace(
        InitialRequest(
            shape,
            rank,
            scaling,
            torch.Generator().manual_seed(seed),
            weight_OI=torch.randn(*shape, generator=generator),
            inputs=torch.linalg.qr(torch.randn(shape[1], shape[1], generator=generator)).Q.T,
            gradient_OI=torch.randn(*shape, generator=generator),
            quantise=lambda W: (W * 2).round() / 2,
        ),
        **changes,
    )


@pytest.mark.parametrize("name", NAMES)
@given(outputs=sizes, inputs=sizes, scaling=st.floats(0.1, 8), seed=st.integers(0, 99))
def test_shapes_dtypes_and_the_first_output(name, outputs, inputs, scaling, seed):
    request = full_request((outputs, inputs), 2, scaling, seed)
    row, _ = initialisation_named(name)
    factors = initial_factors(name, request)
    assert factors.lora_A.shape == (2, inputs)
    assert factors.lora_B.shape == (outputs, 2)
    assert factors.lora_A.dtype == factors.lora_B.dtype == torch.float32
    assert factors.compensated == row.compensated
    product = factors.lora_B @ factors.lora_A
    assert product.isfinite().all()
    if not row.compensated and row.keeps_output:
        bound = factors.lora_B.norm() * factors.lora_A.norm()
        assert product.norm() <= 1e-6 * bound
    else:
        assert product.any()
    # One step must be able to move it: not both factors are zero, in any of their rows and columns.
    assert (factors.lora_A.abs().sum(1) + factors.lora_B.abs().sum(0) > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_equal_seeds_give_equal_factors_and_the_global_state_is_left_alone(name):
    before = torch.get_rng_state()
    one, same = (initial_factors(name, full_request(seed=3)) for _ in range(2))
    assert torch.equal(one.lora_A, same.lora_A)
    assert torch.equal(one.lora_B, same.lora_B)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["kaiming", "gaussian", "orthogonal"])
def test_other_seeds_give_other_factors(name):
    one, other = (initial_factors(name, full_request(seed=seed)) for seed in (1, 2))
    assert not torch.equal(one.lora_A, other.lora_A)


@pytest.mark.parametrize("name", ["pissa", "olora", "loftq", "eva", "lora_ga"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_a_request_brings_may_have_any_floating_dtype_and_is_not_changed(name, dtype):
    request = full_request()
    names = ("weight_OI", "inputs", "gradient_OI")
    tensors = {one: getattr(request, one).to(dtype) for one in names}
    if name == "eva":
        tensors["inputs"] = torch.eye(9, dtype=dtype)
    kept = {one: value.clone() for one, value in tensors.items()}
    assert initial_factors(name, replace(request, **tensors)).lora_A.dtype == torch.float32
    assert all(torch.equal(kept[one], tensors[one]) for one in names)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("pissa", "weight_OI"),
        ("olora", "weight_OI"),
        ("loftq", "weight_OI"),
        ("loftq", "quantise"),
        ("eva", "inputs"),
        ("lora_ga", "gradient_OI"),
    ],
)
def test_a_missing_need_is_named(name, field):
    with pytest.raises(ConfigError, match=rf"request\.{field} is missing"):
        initial_factors(name, full_request(**{field: None}))


@pytest.mark.parametrize(
    ("name", "field", "shape"),
    [
        ("pissa", "weight_OI", (9, 7)),
        ("olora", "weight_OI", (7, 9, 1)),
        ("eva", "inputs", (3, 8)),
        ("eva", "inputs", (9,)),
        ("lora_ga", "gradient_OI", (9, 7)),
    ],
)
def test_another_shape_is_refused(name, field, shape):
    with pytest.raises(ConfigError, match=rf"request\.{field} has shape"):
        initial_factors(name, full_request(**{field: torch.ones(shape)}))


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("pissa", "weight_OI"),
        ("olora", "weight_OI"),
        ("loftq", "weight_OI"),
        ("eva", "inputs"),
        ("lora_ga", "gradient_OI"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(name, field, value):
    request = full_request()
    getattr(request, field)[1, 1] = value
    with pytest.raises(ConfigError, match="NaN or infinity"):
        initial_factors(name, request)


@pytest.mark.parametrize("name", ["pissa", "olora", "loftq", "eva", "lora_ga"])
def test_a_rank_above_what_there_is_is_refused(name):
    with pytest.raises(ConfigError, match=r"rank=10 is too high.*at most"):
        initial_factors(name, full_request(rank=10))


@pytest.mark.parametrize("name", ["kaiming", "gaussian", "orthogonal"])
def test_random_factors_take_any_rank(name):
    assert initial_factors(name, full_request(rank=20)).lora_A.shape == (20, 9)


@pytest.mark.parametrize("name", NAMES)
def test_a_rank_of_zero_is_refused(name):
    with pytest.raises(ConfigError, match="at least 1"):
        initial_factors(name, full_request(rank=0))


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_a_zero_weight_is_refused(name):
    with pytest.raises(ConfigError, match="the weight is zero"):
        initial_factors(name, full_request(weight_OI=torch.zeros(7, 9)))


def test_names():
    for wrong, near in {"OLoRA": "'olora'", "kaimin": "'kaiming'", "pissa_niter_": "'pissa_niter_16'"}.items():
        with pytest.raises(ConfigError, match=f"no initialisation '{wrong}'; nearest: {near}"):
            initial_factors(wrong, full_request())
    with pytest.raises(ConfigError, match="there are kaiming"):
        initial_factors("olora_niter_4", full_request())


def test_options_are_checked():
    with pytest.raises(ConfigError, match="unknown option 'nitre'; nearest: 'niter'"):
        initial_factors("pissa", full_request(options={"nitre": 4}))
    with pytest.raises(ConfigError, match="option 'niter' is 4, the name says 16"):
        initial_factors("pissa_niter_16", full_request(options={"niter": 4}))
    for name, options in {
        "pissa": {"niter": -1},
        "loftq": {"iterations": 0},
        "lora_ga": {"stable_gamma": 0},
    }.items():
        with pytest.raises(ConfigError, match=f"{next(iter(options))} must be"):
            initial_factors(name, full_request(options=options))
    with pytest.raises(ConfigError, match="nearest: 'ArB2r'"):
        initial_factors("lora_ga", full_request(options={"direction": "ArB2"}))


def test_a_name_with_iterations_is_the_option():
    named = initial_factors("pissa_niter_2", full_request())
    option = initial_factors("pissa", full_request(options={"niter": 2}))
    assert torch.equal(named.lora_A, option.lora_A)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 999))
def test_kaiming_draws_what_it_always_drew(rank, inputs, seed):
    """To the last bit: a seed must go on meaning the same run."""
    bound = 1 / math.sqrt(inputs)
    drawn = (torch.rand(rank, inputs, generator=torch.Generator().manual_seed(seed)) * 2 - 1) * bound
    assert torch.equal(kaiming((3, inputs), rank, torch.Generator().manual_seed(seed)).lora_A, drawn)
