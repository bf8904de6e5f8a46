"""Adapters drawn at random, and what two of them differ by: shared by the tests of formats."""

import torch
from hypothesis import strategies as st

from veneer.adapter import Adapter, LowRank
from veneer.files.foreign import foreign_adapter

SCALINGS = st.sampled_from([0.25, 0.5, 1.0, 2.0, 1 / 3, 16 / 12**0.5, 20.0])
SIZES = st.integers(1, 9)


def pair_of(out_size: int, in_size: int, rank: int, scaling: float, seed: int, **more) -> LowRank:
    """Random factors of a layer; `form`, `experts`, `kernel`, `dtype` and `dora` say of which kind."""
    form, dtype = more.get("form", "linear"), more.get("dtype", torch.float32)
    generator = torch.Generator().manual_seed(seed)
    stack = (more["experts"],) if form == "experts" else ()
    kernel = (more.get("kernel", 3),) * 2 if form == "conv" else ()
    A = torch.randn(*stack, rank, in_size, *kernel, generator=generator)
    B = torch.randn(*stack, out_size, rank, *(1,) * len(kernel), generator=generator)
    magnitude = torch.rand(out_size, generator=generator) + 0.5 if more.get("dora") else None
    return LowRank(A.to(dtype), B.to(dtype), scaling, form, magnitude)


@st.composite
def adapters(draw, layers: dict[str, dict], *, dora: bool = False, dtypes=(torch.float32, torch.bfloat16)) -> Adapter:
    """An adapter of some layers: path to further settings of `pair_of`, and to `sizes` where they are fixed."""
    chosen = draw(st.lists(st.sampled_from(sorted(layers)), min_size=1, unique=True))
    with_magnitudes = dora and draw(st.booleans())
    modules = {}
    for index, path in enumerate(chosen):
        kind = dict(layers[path])
        out_size, in_size = kind.pop("sizes", None) or (2 * draw(SIZES), draw(SIZES))
        modules[path] = pair_of(
            out_size, in_size, draw(st.integers(1, 4)), draw(SCALINGS), index,
            dora=with_magnitudes, dtype=draw(st.sampled_from(dtypes)), **kind,
        )  # fmt: skip
    return foreign_adapter(modules)


def error_between(found: Adapter, expected: Adapter) -> float:
    """The largest relative error of a module's delta; the modules and magnitudes must be the same."""
    assert found.modules.keys() == expected.modules.keys()
    worst = 0.0
    for path, pair in expected.modules.items():
        other, delta = found.modules[path], pair.delta()
        assert other.form == pair.form, path
        worst = max(worst, float((other.delta() - delta).norm() / delta.norm()))
        assert (other.magnitude is None) == (pair.magnitude is None), path
        if pair.magnitude is not None:
            assert torch.equal(other.magnitude, pair.magnitude), path
    return worst
