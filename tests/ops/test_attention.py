"""Attention over ragged rows equals the reference of each sequence alone, gradients included."""

from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from veneer.ops import attention, attention_blocks, attention_layout, attention_tiles, native, reference
from veneer.ops.attention import causal_attention
from veneer.ops.attention_blocks import cuts_of
from veneer.ops.attention_layout import buckets_of, runs_of, spans_of


def drawn(tokens: int, heads: int, keys: int, size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, heads, size), (tokens, keys, size), (tokens, keys, size), (tokens, heads, size))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def results(function, q, k, v, slope) -> list[torch.Tensor]:
    leaves = [one.clone().requires_grad_() for one in (q, k, v)]
    out = function(*leaves)
    out.backward(slope)
    return [out.detach(), *(one.grad for one in leaves)]


def each_alone(lengths, scaling, window):
    def function(q, k, v):
        parts = zip(*(one.split(lengths) for one in (q, k, v)), strict=True)
        return torch.cat([reference.causal_attention(*part, scaling, window) for part in parts])

    return function


def behind_prefixes(lengths, prefixes, window=None):
    """The reference, at a scaling of 0.3, of sequences behind what they continue, of which their own rows are kept."""
    places = torch.arange(sum(lengths)).split(lengths)
    befores = [places[prefix] if prefix is not None else places[0][:0] for prefix in prefixes]
    rows = torch.cat([torch.cat(pair) for pair in zip(befores, places, strict=True)])
    own = torch.cat([torch.arange(len(p) + len(b)) >= len(b) for b, p in zip(befores, places, strict=True)])
    sizes = [len(before) + len(part) for before, part in zip(befores, places, strict=True)]
    return lambda *given: each_alone(sizes, 0.3, window)(*(one[rows] for one in given))[own]


@pytest.fixture(params=["blocks", "torch's kernel forward", "torch's kernel both ways"])
def way(request, monkeypatch):
    """Who computes what has no window: a processor's maker decides it, and the length."""
    monkeypatch.setattr(attention, "KERNEL_DTYPES", () if request.param == "blocks" else (torch.float32, torch.float64))
    monkeypatch.setattr(attention, "KERNEL_LENGTH", 1 if "both" in request.param else 1000)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=6),
    st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3)]),
    st.sampled_from([None, 1, 5, 64, 70]),
    st.sampled_from([torch.float32, torch.float64]),
)
@pytest.mark.usefixtures("way")
def test_equals_the_reference_of_each_sequence(lengths, heads, window, dtype):
    q, k, v, slope = drawn(sum(lengths), *heads, 4, dtype)
    expected = results(each_alone(lengths, 0.3, window), q, k, v, slope)
    got = results(lambda *x: causal_attention(*x, lengths, scaling=0.3, window=window), q, k, v, slope)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@st.composite
def trees(draw):
    """Lengths, and for some sequences an earlier one that they continue, which continues none."""
    lengths = draw(st.lists(st.integers(1, 90), min_size=2, max_size=6))
    prefixes, roots = [None], [0]
    for index in range(1, len(lengths)):
        prefixes.append(draw(st.sampled_from([None, *roots])))
        roots += [index] if prefixes[-1] is None else []
    return lengths, prefixes


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    trees(),
    st.sampled_from([(1, 1), (4, 2), (6, 2)]),
    st.sampled_from([None, 1, 5, 64, 70]),
    st.sampled_from([torch.float32, torch.float64]),
)
@pytest.mark.usefixtures("way")
def test_sequences_that_continue_another_equal_whole_ones(tree, heads, window, dtype):
    lengths, prefixes = tree
    given = drawn(sum(lengths), *heads, 4, dtype)
    expected = results(behind_prefixes(lengths, prefixes, window), *given)
    got = results(lambda *x: causal_attention(*x, lengths, prefixes, scaling=0.3, window=window), *given)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(got, expected, **tolerance)


@pytest.mark.usefixtures("way")
def test_what_continues_the_same_does_not_feel_each_other():
    lengths, prefixes, first = (70, 60, 50, 40), (None, 0, 0, 0), slice(70, 130)  # one bucket of the three, padded
    given = drawn(sum(lengths), 2, 1, 4, torch.float32)
    calm = results(lambda *x: causal_attention(*x, lengths, prefixes, scaling=1.0), *given)
    for one in given:
        one[first] = float("nan")
    felt = results(lambda *x: causal_attention(*x, lengths, prefixes, scaling=1.0), *given)
    for ours, before in zip(felt, calm, strict=True):
        assert torch.equal(ours[130:], before[130:])
        assert ours[first].isnan().any()
    assert torch.equal(felt[0][:70], calm[0][:70])


@pytest.mark.parametrize("bytes_at_a_time", [1, 1 << 12, 1 << 30])
def test_how_it_is_cut_changes_nothing_but_rounding(monkeypatch, bytes_at_a_time):
    lengths = (130, 128, 70)
    given = drawn(sum(lengths), 4, 2, 8, torch.float64)
    expected = results(each_alone(lengths, 0.5, None), *given)
    monkeypatch.setattr(attention_blocks, "SCORE_BYTES", bytes_at_a_time)
    got = results(lambda *x: causal_attention(*x, lengths, scaling=0.5), *given)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("way")
def test_takes_heads_first():
    q, k, v, _ = (one.transpose(0, 1).contiguous().transpose(0, 1) for one in drawn(20, 4, 2, 8, torch.float64))
    torch.testing.assert_close(
        causal_attention(q, k, v, (20,), scaling=1.0), reference.causal_attention(q, k, v, 1.0), rtol=1e-9, atol=1e-9
    )


@pytest.mark.usefixtures("way")
def test_large_scores_do_not_overflow():
    q, k, v, slope = drawn(70, 2, 1, 4, torch.float32)
    expected = results(each_alone((70,), 1.0, None), 1e3 * q.double(), k.double(), v.double(), slope.double())
    got = results(lambda *x: causal_attention(*x, (70,), scaling=1.0), 1e3 * q, k, v, slope)
    assert all(one.isfinite().all() for one in got)
    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-3, atol=1e-3)


@given(trees())
def test_a_bucket_continues_one_sequence_which_stands_in_a_bucket_before(tree):
    lengths, prefixes = tree
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    done: set[int] = set()
    for bucket in buckets_of(spans_of(*tree)):
        members = {starts.index(rows.start) for rows in bucket.rows}
        found = {prefixes[index] for index in members}
        assert len(found) == 1
        if (prefix := found.pop()) is None:
            assert bucket.before is None
        else:
            assert (bucket.before.start, bucket.before.stop) == (starts[prefix], starts[prefix + 1])
            assert prefix in done
        done |= members
    assert done == set(range(len(lengths)))


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=30))
def test_buckets_hold_every_token_once_and_little_padding(lengths):
    buckets = buckets_of(spans_of(lengths))
    stops = torch.tensor(lengths).cumsum(0).tolist()
    expected = [slice(stop - length, stop) for stop, length in zip(stops, lengths, strict=True)]
    found = [rows for bucket in buckets for rows in bucket.rows]
    assert sorted(found, key=lambda rows: rows.start) == expected
    for bucket in buckets:
        own = [rows.stop - rows.start for rows in bucket.rows]
        assert bucket.lengths == own
        assert own == sorted(own, reverse=True)
        near = own[0] - own[-1] <= attention_layout.BLOCK
        assert near or own[-1] >= attention_layout.PADDING * own[0]
        if bucket.run is not None:
            assert len(set(own)) == 1
            assert [place for rows in bucket.rows for place in range(rows.start, rows.stop)] == list(
                range(bucket.run.start, bucket.run.stop)
            )


@pytest.mark.usefixtures("way")
def test_nothing_of_a_sequence_reaches_another_in_its_bucket():
    lengths, first = (60, 50, 40), slice(0, 60)  # one bucket, padded
    given = drawn(sum(lengths), 2, 1, 4, torch.float32)
    calm = results(lambda *x: causal_attention(*x, lengths, scaling=1.0), *given)
    for one in given:
        one[first] = float("nan")
    for ours, before in zip(results(lambda *x: causal_attention(*x, lengths, scaling=1.0), *given), calm, strict=True):
        assert torch.equal(ours[60:], before[60:])
        assert ours[first].isnan().any()


@pytest.mark.parametrize("kernel_length", [1, 1000], ids=["torch's kernel", "blocks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 20, 1000])
@pytest.mark.parametrize("lengths", [(70, 70), (70, 60, 64, 3), (20,)], ids=["alike", "padded", "one"])
def test_16_bits_are_computed_in_32(monkeypatch, kernel_length, dtype, window, lengths):
    monkeypatch.setattr(attention, "KERNEL_LENGTH", kernel_length)
    given = drawn(sum(lengths), 4, 2, 16, dtype)
    expected = results(each_alone(lengths, 0.3, window), *(one.double() for one in given))
    got = results(lambda *x: causal_attention(*x, lengths, scaling=0.3, window=window), *given)
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for ours, exact in zip(got, expected, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - exact).norm() <= 3 * unit * exact.norm()


def test_sequences_do_not_feel_each_other_in_torchs_kernel(monkeypatch):
    monkeypatch.setattr(attention, "KERNEL_LENGTH", 1)
    lengths, first = (70, 60), slice(0, 70)
    given = drawn(sum(lengths), 2, 1, 16, torch.bfloat16)
    calm = results(lambda *x: causal_attention(*x, lengths, scaling=1.0), *given)
    for one in given:
        one[first] = float("nan")
    felt = results(lambda *x: causal_attention(*x, lengths, scaling=1.0), *given)
    for ours, before in zip(felt, calm, strict=True):
        assert torch.equal(ours[70:], before[70:])
        assert ours[first].isnan().any()


@pytest.mark.parametrize("kernel_length", [1, 1000], ids=["torch's kernel", "blocks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 20, 1000])
def test_16_bits_behind_a_prefix(monkeypatch, kernel_length, dtype, window):
    """A prefix shorter than what continues it goes to torch's kernel, a longer one does not; two make a run."""
    monkeypatch.setattr(attention, "KERNEL_LENGTH", kernel_length)
    lengths, prefixes = (30, 50, 50, 40, 10, 25), (None, 0, 0, 0, 0, None)
    given = drawn(sum(lengths), 4, 2, 16, dtype)
    expected = results(behind_prefixes(lengths, prefixes, window), *(one.double() for one in given))
    got = results(lambda *x: causal_attention(*x, lengths, prefixes, scaling=0.3, window=window), *given)
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for ours, exact in zip(got, expected, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - exact).norm() <= 3 * unit * exact.norm()


@pytest.mark.parametrize(
    ("dtype", "window", "expected"),
    [
        (torch.bfloat16, None, "kernel kernel kernel blocks | kernel blocks blocks blocks"),
        (torch.bfloat16, 600, "kernel blocks blocks blocks | blocks blocks blocks"),
        (torch.bfloat16, 400, "blocks blocks blocks | blocks blocks blocks"),
        (torch.float64, None, "blocks blocks blocks | blocks blocks blocks"),
    ],
)
def test_what_goes_to_torchs_kernel(monkeypatch, dtype, window, expected):
    """What fits a window and is no shorter than its prefix: forward all of it, backward what is long."""
    asked = []
    monkeypatch.setattr(native, "kernels", lambda: None)
    for way in ("forward", "backward"):
        for name in ("kernel", "blocks"):
            own = getattr(attention, f"_{name}_{way}")
            note = lambda *x, name=name, own=own: asked.append(name) or own(*x)  # noqa: E731
            monkeypatch.setattr(attention, f"_{name}_{way}", note)
    long = attention.KERNEL_LENGTH
    lengths, prefixes = (long, long - 200, 100, long - 100), (None, None, 1, 1)
    q, k, v, d = drawn(sum(lengths), 1, 1, 8, dtype)
    for one in (q, k, v):
        one.requires_grad_()
    out = causal_attention(q, k, v, lengths, prefixes, scaling=1.0, window=window)
    asked.append("|")
    out.backward(d)
    assert " ".join(asked) == expected


@pytest.mark.parametrize(
    ("lengths", "heads", "threads", "even"),
    [
        ((100,), 2, 2, True),
        ((100,), 1, 2, False),
        ((100,), 3, 2, True),
        ((100, 10, 10), 1, 2, False),
        ((9,), 1, 1, True),
    ],
)
def test_threads_do_not_wait_for_one_of_them(lengths, heads, threads, even):
    scores = tuple(attention_tiles._scores(span) for span in spans_of(lengths))
    assert (attention_tiles._unevenness(scores, heads, threads) <= attention_tiles.MOST_UNEVEN) is even


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=30))
def test_cuts_leave_no_block_larger_than_asked(lengths):
    longest_first = sorted(lengths, reverse=True)
    cuts = cuts_of(longest_first)
    assert (cuts[0], cuts[-1]) == (0, longest_first[0])
    assert all(0 < stop - start <= attention_layout.BLOCK for start, stop in pairwise(cuts))


@given(trees())
def test_a_run_has_no_padding_and_one_prefix(tree):
    runs = runs_of(spans_of(*tree))
    assert [rows for run in runs for rows in run.rows] == [span.rows for span in spans_of(*tree)]
    prefix = {span.rows.start: span.before for span in spans_of(*tree)}
    for run in runs:
        assert run.run == slice(run.rows[0].start, run.rows[-1].stop)
        assert {str(prefix[rows.start]) for rows in run.rows} == {str(run.before)}
