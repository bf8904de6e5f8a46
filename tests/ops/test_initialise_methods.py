"""Each initialisation equals its definition, and PEFT's where PEFT keeps to it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from veneer.errors import ConfigError
from veneer.ops.initialise import eva, gaussian, kaiming, loftq, lora_ga, olora, orthogonal, pissa, redistribute_ranks
from veneer.ops.initialise_svd import truncated_svd


def matrix(outputs: int, inputs: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def best(M: torch.Tensor, rank: int) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(M.double(), full_matrices=False)
    return (U[:, :rank] * S[:rank] @ Vh[:rank]).float()


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# --- the SVD -----------------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99), st.data())
def test_svd_is_the_leading_part_with_signs_by_rule(outputs, inputs, seed, data):
    rank = data.draw(st.integers(1, min(outputs, inputs)))
    M = matrix(outputs, inputs, seed)
    U, S, Vh = truncated_svd(M, rank)
    close(U * S @ Vh, best(M, rank), 1e-4)
    assert (Vh.gather(1, Vh.abs().argmax(1, keepdim=True)) > 0).all()
    flipped = truncated_svd(-M, rank)
    close(flipped[2], Vh, 1e-3)
    close(flipped[0], -U, 1e-3)


def test_randomised_svd_is_near_the_exact_one_and_nearer_with_iterations():
    U, _ = torch.linalg.qr(matrix(200, 200))
    V, _ = torch.linalg.qr(matrix(150, 150, 1))
    M = U[:, :150] * (1 / torch.arange(1, 151)) @ V.T

    def error(niter: int) -> float:
        left, size, right = truncated_svd(M, 8, niter=niter)
        return torch.linalg.norm(left * size @ right - best(M, 8)).item()

    assert error(0) > 10 * error(4)
    assert error(16) < 1e-5


# --- random ------------------------------------------------------------------------------------------------------


def test_moments_of_the_random_ones():
    generator = torch.Generator().manual_seed(0)
    uniform = kaiming((4, 400), 50, generator).lora_A
    assert uniform.abs().max() <= 1 / 20
    assert uniform.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.02)
    assert gaussian((4, 400), 50, generator).lora_A.std().item() == pytest.approx(1 / 50, rel=0.02)
    both = orthogonal((300, 400), 50, generator)
    # Each entry is a sum of 25 normals with weights of mean square 1/50, times a tenth.
    for factor in (both.lora_A, both.lora_B):
        assert factor.std().item() == pytest.approx(0.1 * 0.5**0.5, rel=0.05)


@given(st.integers(1, 8), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_orthogonal_has_two_factors_and_no_product(half, outputs, inputs, seed):
    factors = orthogonal((outputs, inputs), 2 * half, torch.Generator().manual_seed(seed))
    A, B = factors.lora_A.double(), factors.lora_B.double()
    assert (B @ A).norm() <= 1e-6 * B.norm() * A.norm()
    assert factors.lora_A.any()
    assert factors.lora_B.any()


def test_orthogonal_needs_an_even_rank():
    with pytest.raises(ConfigError, match="even rank, got 3"):
        orthogonal((4, 4), 3, torch.Generator())


# --- by the weight -----------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 9), st.floats(0.1, 8), st.data())
def test_pissa_is_the_leading_part_shared_out_evenly(outputs, inputs, scaling, data):
    rank = data.draw(st.integers(1, min(outputs, inputs)))
    W = matrix(outputs, inputs)
    factors = pissa(W, rank, scaling)
    close(scaling * factors.lora_B @ factors.lora_A, best(W, rank), 1e-4)
    close(factors.lora_A.norm(dim=1), factors.lora_B.norm(dim=0), 1e-4)
    assert factors.compensated


def test_pissa_of_a_weight_of_lower_rank_has_no_dead_component():
    W = torch.zeros(4, 5)
    W[0, 1] = 3.0
    factors = pissa(W, 2, 0.5)
    close(0.5 * factors.lora_B @ factors.lora_A, W)
    assert factors.lora_A[1].norm() > 0.5


@pytest.mark.parametrize("scaling", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scaling_that_cannot_be_divided_by_is_refused(scaling):
    for make in (lambda: pissa(matrix(4, 4), 2, scaling), lambda: loftq(matrix(4, 4), 2, scaling, torch.round)):
        with pytest.raises(ConfigError, match="scaling"):
            make()


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_olora_is_the_first_part_of_qr(outputs, inputs, data):
    rank = data.draw(st.integers(1, min(outputs, inputs)))
    W = matrix(outputs, inputs)
    factors = olora(W, rank)
    Q, R = torch.linalg.qr(W.double())
    close(factors.lora_B @ factors.lora_A, (Q[:, :rank] @ R[:rank]).float(), 1e-4)
    close(factors.lora_B.T @ factors.lora_B, torch.eye(rank))
    assert (factors.lora_A.diagonal() >= 0).all()
    close(factors.lora_A.tril(-1), torch.zeros(rank, inputs))


@pytest.mark.parametrize("scaling", [0.5, 4.0])
def test_loftq_brings_the_quantised_weight_nearer_to_the_full_one(scaling):
    def quantise(W: torch.Tensor) -> torch.Tensor:
        return (W * 1.5).round() / 1.5

    W = matrix(20, 30)
    factors = loftq(W, 5, scaling, quantise)
    close(scaling * factors.lora_B @ factors.lora_A, best(W - quantise(W), 5), 1e-4)
    assert not factors.compensated
    left = W - quantise(W) - scaling * factors.lora_B @ factors.lora_A
    assert left.norm() < 0.85 * (W - quantise(W)).norm()
    # With a base that stays as it is, further rounds change nothing; with one quantised again, they help.
    stays = loftq(W, 5, scaling, lambda _: quantise(W), iterations=3)
    close(stays.lora_A, factors.lora_A, 1e-3)
    asked: list[torch.Tensor] = []
    again = loftq(W, 5, scaling, lambda M: asked.append(M) or quantise(M), iterations=3)
    assert len(asked) == 3
    assert (W - quantise(asked[-1]) - scaling * again.lora_B @ again.lora_A).norm() < left.norm()


def test_loftq_of_what_quantisation_kept_adds_nothing_and_can_train():
    factors = loftq(matrix(4, 6).round(), 2, 1.0, torch.round)
    assert not factors.lora_B.any()
    assert factors.lora_A.norm(dim=1).min() > 0.5


def test_loftq_refuses_another_shape():
    with pytest.raises(ConfigError, match=r"quantise returned shape \(6, 4\)"):
        loftq(matrix(4, 6), 2, 1.0, lambda W: W.T)


# --- by data -----------------------------------------------------------------------------------------------------


def test_eva_takes_the_first_directions_and_refuses_raw_inputs():
    V = torch.linalg.qr(matrix(6, 6)).Q.T
    factors = eva(V, 5, 3)
    assert torch.equal(factors.lora_A, V[:3])
    assert factors.lora_B.shape == (5, 3)
    assert not factors.lora_B.any()
    with pytest.raises(ConfigError, match="orthonormal"):
        eva(matrix(8, 6), 5, 3)


variances = st.lists(st.lists(st.floats(0, 1), min_size=6, max_size=8), min_size=1, max_size=5)


@given(variances, st.integers(1, 4), st.floats(1, 3))
def test_ranks_share_out_the_budget_by_the_largest_values(values, rank, rho):
    explained = {f"layer{index}": torch.tensor(sorted(one, reverse=True)) for index, one in enumerate(values)}
    ranks = redistribute_ranks(explained, rank, rho)
    assert list(ranks) == list(explained)
    assert sum(ranks.values()) == rank * len(explained)
    assert max(ranks.values()) <= round(rank * rho)
    # No value that was left out, though its layer had room, is larger than one that was taken.
    most = round(rank * rho)
    left = [one[ranks[path]].item() for path, one in explained.items() if ranks[path] < min(most, len(one))]
    taken = [one[ranks[path] - 1].item() for path, one in explained.items() if ranks[path]]
    assert max(left, default=0.0) <= min(taken)
    assert redistribute_ranks(explained, rank, 1.0) == dict.fromkeys(explained, rank)


def test_ranks_that_cannot_be_shared_out_are_refused():
    with pytest.raises(ConfigError, match="needs 4 directions, found 3"):
        redistribute_ranks({"a": torch.ones(1), "b": torch.ones(2)}, 2, 1.0)
    with pytest.raises(ConfigError, match="rho"):
        redistribute_ranks({"a": torch.ones(2)}, 1, 0.5)
    with pytest.raises(ConfigError, match="finite"):
        redistribute_ranks({"a": torch.tensor([float("nan")])}, 1, 1.0)


@pytest.mark.parametrize(
    ("direction", "rows", "columns"),
    [("ArB2r", [0, 1, 2], [3, 4, 5]), ("A2rBr", [3, 4, 5], [0, 1, 2]), ("ArBr", [1, 3, 5], [0, 2, 4])],
)
def test_lora_ga_takes_pairs_of_the_gradient(direction, rows, columns):
    G = matrix(16, 10)
    factors = lora_ga(G, 3, stable_gamma=4.0, direction=direction)
    U, _, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    for got, expected in ((factors.lora_A, Vh[rows]), (factors.lora_B.T, U.T[columns])):
        cosines = (got.double() * expected).sum(1)
        close(cosines.abs().float(), torch.full((3,), 16**0.25 / 4**0.5))
    assert factors.compensated


def test_lora_ga_takes_the_first_step_of_full_fine_tuning():
    """The first step's change of `B A` is the best fit of rank 2·rank to the gradient, for A and B of equal size."""
    G = matrix(12, 10)
    factors = lora_ga(G, 2, stable_gamma=12**0.5)  # c = 1
    step = G @ factors.lora_A.T @ factors.lora_A + factors.lora_B @ factors.lora_B.T @ G
    close(step, best(G, 4), 1e-4)


def test_lora_ga_needs_two_pairs_for_each_rank():
    with pytest.raises(ConfigError, match=r"rank=3 is too high.*at most 2"):
        lora_ga(matrix(5, 9), 3)
    with pytest.raises(ConfigError, match="the gradient is zero"):
        lora_ga(torch.zeros(5, 9), 1)


# --- against PEFT ------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(12, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def peft_layer(init: str, **settings: object) -> tuple[nn.Module, torch.Tensor]:
    peft = pytest.importorskip("peft")
    net = Net()
    weight = net.layer.weight.detach().clone()
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["layer"], init_lora_weights=init, **settings)
    return peft.get_peft_model(net, config).base_model.model.layer, weight


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora"])
def test_products_equal_those_of_peft(init):
    layer, W = peft_layer(init)
    ours = olora(W, 3) if init == "olora" else pissa(W, 3, 2.0, niter=16 if "niter" in init else None)
    theirs = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    # Their sketch has no column to spare: with 16 iterations it is still 7e-4 off the true leading part, ours 1e-7.
    tolerance = 2e-3 if "niter" in init else 1e-5
    close(ours.lora_B @ ours.lora_A, theirs.detach(), tolerance)
    # What they froze is what our compensating pair leaves of the base.
    close(W - 2.0 * ours.lora_B @ ours.lora_A, layer.base_layer.weight.detach(), tolerance)


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_lora_ga_equals_peft_but_for_the_size_of_rows_and_columns(direction):
    peft = pytest.importorskip("peft")
    net = Net()
    x = matrix(20, 12, 5).requires_grad_()  # else a hook of theirs warns
    ga = peft.LoraGAConfig(direction=direction, stable_gamma=16)
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["layer"], init_lora_weights="lora_ga", lora_ga_config=ga
    )
    (net.layer(x).square().sum()).backward()
    G = net.layer.weight.grad.clone()
    net.zero_grad()
    peft.tuners.lora.preprocess_loraga(net, config, lambda: net(x).square().sum().backward())
    layer = peft.get_peft_model(net, config).base_model.model.layer
    ours = lora_ga(G, 3, stable_gamma=16, direction=direction)
    size = 10**0.25 / 16**0.5
    S = torch.linalg.svdvals(G)[{"ArB2r": slice(3, 6), "A2rBr": slice(0, 3), "ArBr": slice(0, 6, 2)}[direction]]
    # Theirs: rows of A of length 1, columns of B of length size · S. Signs of pairs are free: compare what has none.
    A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    close((ours.lora_A * A).sum(1).abs(), torch.full((3,), size), 1e-4)
    close((ours.lora_B * B / S).sum(0).abs(), torch.full((3,), size**2), 1e-4)
