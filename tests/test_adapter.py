"""The adapter as a value: it never changes, and its digest is what it does."""

import copy
import pickle

import pytest
import torch

from veneer.adapter import Adapter, AdapterMetadata, LowRank
from veneer.config import LoRAConfig
from veneer.errors import AdapterError


def pair(scaling: float = 1.0, value: float = 1.0) -> LowRank:
    return LowRank(torch.full((2, 3), value), torch.ones(4, 2), scaling)


def test_it_owns_its_numbers():
    A, B, bias = torch.ones(2, 3), torch.ones(4, 2), torch.ones(4)
    adapter = Adapter({"a": LowRank(A, B, 1.0)}, LoRAConfig(rank=2), {"a.bias": bias})
    digest = adapter.digest
    A.zero_(), B.zero_(), bias.zero_()
    twin = Adapter(adapter.modules, adapter.config, adapter.trained)
    assert twin.digest == digest
    with pytest.raises(AttributeError):
        adapter.config = LoRAConfig()
    with pytest.raises(TypeError):
        adapter.modules["b"] = pair()


def test_the_digest_is_what_it_does():
    def digest(modules, **rest):
        return Adapter(modules, **{"config": LoRAConfig(rank=2), **rest}).digest

    base = digest({"a": pair(), "b": pair()})
    assert digest({"b": pair(), "a": pair()}) == base, "order is no difference"
    assert digest({"a": pair(), "b": pair()}, metadata=AdapterMetadata(base="x")) == base, "names are no difference"
    others = [
        digest({"a": pair(), "c": pair()}),
        digest({"a": pair(), "b": pair(2.0)}),
        digest({"a": pair(), "b": pair(1.0, 1.5)}),
        digest({"a": pair(), "b": LowRank(torch.ones(2, 3).half(), torch.ones(4, 2).half(), 1.0)}),
        digest({"a": pair(), "b": pair()}, trained={"a.bias": torch.ones(4)}),
        digest({"a": pair()}),
    ]
    assert len({base, *others}) == len(others) + 1


@pytest.mark.parametrize(
    ("A", "B"),
    [
        (torch.ones(2, 3), torch.ones(4, 3)),
        (torch.ones(3), torch.ones(4, 3)),
        (torch.ones(0, 3), torch.ones(4, 0)),
        (torch.ones(2, 3), torch.ones(4, 2).half()),
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(4, 2, dtype=torch.int64)),
    ],
)
def test_factors_that_do_not_fit_are_refused(A, B):
    with pytest.raises(AdapterError, match="must"):
        LowRank(A, B, 1.0)


def test_an_empty_adapter_is_refused():
    with pytest.raises(AdapterError, match="at least one"):
        Adapter({}, LoRAConfig())


def test_an_adapter_is_pickled_and_copied_whole():
    pair = LowRank(torch.ones(1, 2), torch.ones(3, 1), 0.5)
    adapter = Adapter({"q": pair}, LoRAConfig(rank=1), {"q.bias": torch.ones(3)}, AdapterMetadata(base="b"))
    for other in (pickle.loads(pickle.dumps(adapter)), copy.deepcopy(adapter)):
        assert (other.digest, other.config, other.metadata) == (adapter.digest, adapter.config, adapter.metadata)
