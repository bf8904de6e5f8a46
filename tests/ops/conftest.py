"""What has kernels in C is tested with them, and as torch computes it where they are missing."""

import pytest

from veneer.ops import native

BOTH_WAYS = (
    "test_norm",
    "test_rotary",
    "test_gates",
    "test_projections",
    "test_lora",
    "test_experts",
    "test_attention",
)


def pytest_generate_tests(metafunc):
    if metafunc.module.__name__.rpartition(".")[2] in BOTH_WAYS:
        metafunc.fixturenames.append("computed_by")
        metafunc.parametrize("computed_by", ["kernels", "torch"], indirect=True)


@pytest.fixture
def computed_by(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native, "kernels", lambda: None)
    elif native.kernels() is None:
        pytest.skip("the kernels were not compiled: no C compiler")
