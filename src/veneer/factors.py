"""How two factors make an update: one row for each form, in plain formulas.

The form belongs to the value: it says what the axes of `lora_A` and `lora_B` are, and what delta they give to the
weight that they were made for. Layers, files and tools read it here; nothing in this module knows a layer.

Shapes: R rank, I in, O out, N rows of an embedding, D its size, g groups, k… a kernel, E experts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Form:
    """How the factors of one kind of weight are laid out.

    Args:
        name: What values and files call it.
        axes: The shapes of lora_A and lora_B in words, for messages.
        problem: Returns why two tensors are not such factors, or None.
        rank: Returns their inner dimension.
        sizes: Returns (out, in).
        delta: Returns `lora_B · lora_A` in the shape of the weight.
    """

    name: str
    axes: str
    problem: Callable[[Tensor, Tensor], str | None]
    rank: Callable[[Tensor, Tensor], int]
    sizes: Callable[[Tensor, Tensor], tuple[int, int]]
    delta: Callable[[Tensor, Tensor], Tensor]


def _first(A: Tensor, B: Tensor) -> int:  # noqa: ARG001 (one signature for all forms)
    return A.shape[0]


def _matrix_sizes(A: Tensor, B: Tensor) -> tuple[int, int]:
    return B.shape[0], A[0].numel()


def _no_matrices(A: Tensor, B: Tensor) -> str | None:
    fits = A.ndim == 2 and B.ndim == 2 and A.shape[0] == B.shape[1] > 0
    return None if fits else "two matrices of one rank"


def _no_kernels(A: Tensor, B: Tensor) -> str | None:
    if A.ndim < 3 or A.ndim > 5 or B.ndim != A.ndim or any(size != 1 for size in B.shape[2:]) or 0 in A.shape:
        return "a kernel and a 1×1 kernel"
    rank, part = A.shape[0], B.shape[1]
    if part == 0 or rank % part or B.shape[0] % (rank // part):
        return "ranks and outputs that the groups divide"
    return None


def _no_stacks(A: Tensor, B: Tensor) -> str | None:
    fits = A.ndim == 3 and B.ndim == 3 and A.shape[0] == B.shape[0] > 0 and A.shape[1] == B.shape[2] > 0
    return None if fits else "two stacks of as many matrices of one rank"


def conv_groups(A: Tensor, B: Tensor) -> int:
    """Return the number of groups that a pair of kernels was made for.

    Example:
        >>> conv_groups(torch.zeros(4, 3, 3, 3), torch.zeros(8, 2, 1, 1))
        2
    """
    return A.shape[0] // B.shape[1]


def _conv_delta(A: Tensor, B: Tensor) -> Tensor:
    """Return (O, I/g, k…): for each group, its rows of B times its rows of A."""
    groups = conv_groups(A, B)
    A_g, B_g = A.flatten(1).unflatten(0, (groups, -1)), B.flatten(1).unflatten(0, (groups, -1))
    return (B_g @ A_g).flatten(0, 1).unflatten(1, A.shape[1:])


def _conv_transpose_delta(A: Tensor, B: Tensor) -> Tensor:
    """Return (I, O/g, k…): a transposed convolution stores its inputs first, its groups along them."""
    groups = conv_groups(A, B)
    delta = _conv_delta(A, B).unflatten(0, (groups, -1))  # (g, O/g, I/g, k…)
    return delta.transpose(1, 2).flatten(0, 1)


FORMS: Mapping[str, Form] = {
    form.name: form
    for form in (
        Form("linear", "(R, I) and (O, R)", _no_matrices, _first, _matrix_sizes, lambda A, B: B @ A),
        # transformers' Conv1D: a linear layer that stores its weight as (I, O).
        Form("transposed", "(R, I) and (O, R)", _no_matrices, _first, _matrix_sizes, lambda A, B: (B @ A).T),
        Form("embedding", "(R, N) and (D, R)", _no_matrices, _first, _matrix_sizes, lambda A, B: (B @ A).T),
        Form("conv", "(R, I/g, k…) and (O, R/g, 1…)", _no_kernels, _first, _matrix_sizes, _conv_delta),
        # As PEFT trains them where there are groups: each rank looks at the inputs of all groups.
        Form("conv_across", "(R, I, k…) and (O, R/g, 1…)", _no_kernels, _first, _matrix_sizes, _conv_delta),
        Form(
            "conv_transpose", "(R, I/g, k…) and (O, R/g, 1…)", _no_kernels, _first, _matrix_sizes, _conv_transpose_delta
        ),
        # nn.MultiheadAttention: its packed input projection, and its output projection.
        Form("attention_in", "(R, I) and (3·D, R)", _no_matrices, _first, _matrix_sizes, lambda A, B: B @ A),
        Form("attention_out", "(R, I) and (O, R)", _no_matrices, _first, _matrix_sizes, lambda A, B: B @ A),
        Form("parameter", "(R, I) and (O, R)", _no_matrices, _first, _matrix_sizes, lambda A, B: B @ A),
        Form(
            "experts",
            "(E, R, I) and (E, O, R)",
            _no_stacks,
            lambda A, B: A.shape[1],  # noqa: ARG005
            lambda A, B: (B.shape[1], A.shape[2]),
            lambda A, B: B @ A,
        ),
        # As PEFT before 0.19 wrote them: A over the first axis of each matrix, whichever that is.
        Form(
            "experts_by_position",
            "(E, R, first) and (E, second, R)",
            _no_stacks,
            lambda A, B: A.shape[1],  # noqa: ARG005
            lambda A, B: (A.shape[2], B.shape[1]),
            lambda A, B: (B @ A).transpose(1, 2),
        ),
    )
}
"""Every form by name. A weight stored the other way round (`transposed`, experts that store (E, I, O)) is the layer's
affair: the factors are those of the function from inputs to outputs."""


def compute_delta(form: str, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Return `scaling · lora_B · lora_A` in float64, in the weight's shape.

    Example:
        >>> compute_delta("embedding", torch.ones(2, 5), torch.ones(3, 2), 0.5).shape
        torch.Size([5, 3])
    """
    return scaling * FORMS[form].delta(A.double(), B.double())


def as_matrices(form: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors as stacks of matrices, (M, R, I) and (M, O, R), whose products hold all values of the delta.

    Example:
        >>> [one.shape for one in as_matrices("conv", torch.zeros(4, 3, 3, 3), torch.zeros(8, 2, 1, 1))]
        [torch.Size([2, 2, 27]), torch.Size([2, 4, 2])]
    """
    if form.startswith("experts"):
        return A, B
    groups = conv_groups(A, B) if form.startswith("conv") else 1
    return A.flatten(1).unflatten(0, (groups, -1)), B.flatten(1).unflatten(0, (groups, -1))


def row_axes(form: str, ndim: int) -> tuple[int, ...]:
    """Return the axes of a delta that run over the inputs: a magnitude (DoRA) is a norm over them.

    Example:
        >>> row_axes("linear", 2), row_axes("embedding", 2), row_axes("conv", 4)
        ((1,), (0,), (1, 2, 3))
    """
    return (0,) if form in ("embedding", "transposed") else tuple(range(1, ndim))


def cat_ranks(form: str, parts: "list[tuple[Tensor, Tensor]]") -> tuple[Tensor, Tensor]:
    """Return the factors whose product is the sum of the products of several pairs of the same form.

    Example:
        >>> A, B = cat_ranks("linear", [(torch.ones(1, 2), torch.ones(3, 1)), (torch.ones(2, 2), torch.ones(3, 2))])
        >>> A.shape, B.shape
        (torch.Size([3, 2]), torch.Size([3, 3]))
    """
    if form.startswith("experts"):
        return torch.cat([A for A, _ in parts], 1), torch.cat([B for _, B in parts], 2)
    if form.startswith("conv"):
        # Within each group, so that a group's ranks stay together.
        groups = conv_groups(*parts[0])
        A = torch.cat([A.unflatten(0, (groups, -1)) for A, _ in parts], 1).flatten(0, 1)
        return A, torch.cat([B for _, B in parts], 1)
    return torch.cat([A for A, _ in parts], 0), torch.cat([B for _, B in parts], 1)


def cut_ranks(form: str, A: Tensor, B: Tensor, count: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the pair without its last `count` ranks, and those: the inverse of `cat_ranks` of two.

    Example:
        >>> (A, _), (A0, _) = cut_ranks("linear", torch.eye(3), torch.eye(3), 1)
        >>> A.shape, A0.shape
        (torch.Size([2, 3]), torch.Size([1, 3]))
    """
    if form.startswith("experts"):
        return (A[:, :-count], B[..., :-count]), (A[:, -count:], B[..., -count:])
    if form.startswith("conv"):
        groups = conv_groups(A, B)
        each = count // groups
        A_g = A.unflatten(0, (groups, -1))
        return (A_g[:, :-each].flatten(0, 1), B[:, :-each]), (A_g[:, -each:].flatten(0, 1), B[:, -each:])
    return (A[:-count], B[:, :-count]), (A[-count:], B[:, -count:])
