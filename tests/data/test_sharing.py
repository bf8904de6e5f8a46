"""Rows that begin alike share a beginning where that saves most; every row keeps its tokens and its marks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.data import sharing
from veneer.data.batches import pack
from veneer.data.encode import EncodedRow
from veneer.data.sharing import Group, gather_sharers, make_shared_batch, saved_tokens, shared_groups


def row(ids: list[int], first: int | None) -> EncodedRow:
    """A row that is supervised from one token on, or not at all."""
    marks = torch.arange(len(ids)) >= (len(ids) if first is None else first)
    return EncodedRow(f"a:{len(ids)}", torch.tensor(ids, dtype=torch.int32), marks)


def chat(prompt: int, length: int, question: int = 5, answer: int = 3) -> EncodedRow:
    """A row that begins with `length` tokens of a prompt, then its own."""
    own = [1000 + 7 * prompt + 13 * question + place for place in range(question + answer)]
    return row([100 * prompt + place % 90 for place in range(length)] + own, length + question)


@st.composite
def some_rows(draw):
    """Rows of two words, so that many begin alike."""
    found = []
    for _ in range(draw(st.integers(1, 8))):
        ids = draw(st.lists(st.sampled_from([1, 2]), min_size=2, max_size=12))
        found.append(row(ids, draw(st.one_of(st.none(), st.integers(1, len(ids) - 1)))))
    return found


@pytest.fixture
def free_groups(monkeypatch):
    monkeypatch.setattr(sharing, "GROUP_COST", 0)


def told(one: EncodedRow) -> tuple[list[int], list[bool]]:
    return one.token_ids.tolist(), one.supervised.tolist()


@settings(max_examples=200)
@given(some_rows(), st.sampled_from([0, 3]))
def test_expanded_it_has_the_same_rows(rows, cost):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "GROUP_COST", cost)
        batch, groups = make_shared_batch(rows), shared_groups(rows)
    whole = batch.expanded()
    parts = zip(whole.token_ids.split(whole.lengths), whole.supervised.split(whole.lengths), strict=True)
    assert sorted((ids.tolist(), marks.tolist()) for ids, marks in parts) == sorted(told(one) for one in rows)
    total = sum(len(one.token_ids) for one in rows)
    assert len(batch.token_ids) == total - sum(group.saved for group in groups)
    assert all(group.saved > cost for group in groups)
    # What predicts a supervised token stands right before it in the same sequence.
    starts = torch.tensor([0, *batch.lengths[:-1]]).cumsum(0)
    assert not batch.supervised[starts].any()


def most(rows: list[EncodedRow]) -> int:
    """What may be saved at most, by trying every way to cut the sorted rows into runs."""
    heads = sorted(sharing._shareable(one).tolist() for one in rows)

    def common(run) -> int:
        return next((n for n, tokens in enumerate(zip(*run, strict=False)) if len(set(tokens)) > 1), min(map(len, run)))

    best = [0]
    for stop in range(1, len(heads) + 1):
        ways = [best[start] + max(0, (stop - start - 1) * common(heads[start:stop]) - 3) for start in range(stop)]
        best.append(max(ways))
    return best[-1]


@settings(max_examples=200)
@given(some_rows())
def test_no_way_to_cut_saves_more(rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "GROUP_COST", 3)
        assert sum(group.saved - 3 for group in shared_groups(rows)) == most(rows)


def test_several_prompts_and_rows_without_any(monkeypatch):
    rows = [chat(1, 40, 5), chat(2, 60, 6), chat(3, 8, 7), chat(1, 40, 8), chat(2, 60, 9), chat(1, 40, 10)]
    assert shared_groups(rows) == [Group((0, 3, 5), 40), Group((1, 4), 60)]
    batch = make_shared_batch(rows)
    assert batch.prefixes == (None, 0, 0, 0, None, 4, 4, None)
    assert batch.lengths == (40, 13, 11, 8, 60, 12, 9, 18)


def test_what_is_supervised_or_predicts_it_is_not_shared(free_groups):
    ids = list(range(10))
    assert shared_groups([row(ids, 6), row(ids, 9)]) == [Group((0, 1), 5)]
    assert shared_groups([row(ids, None), row(ids, None)]) == [Group((0, 1), 9)]  # each keeps a token
    assert shared_groups([row(ids, 1), row(ids, 1)]) == []


def test_little_is_not_shared():
    rows = [chat(1, 16, 5), chat(1, 16, 6)]
    assert shared_groups(rows) == []
    assert make_shared_batch(rows).prefixes is None
    assert make_shared_batch([*rows, chat(1, 16, 7), chat(1, 16, 8)]).prefixes == (None, 0, 0, 0, 0)


def test_sharers_meet_within_the_budget():
    rows = [chat(number % 3, 50, question=5 + number) for number in range(12)]
    lengths = [len(one.token_ids) for one in rows]
    step = pack(range(12), lengths, 300)
    found = gather_sharers(step, rows)
    assert sorted(number for micro in found for number in micro) == list(range(12))
    assert len(found) <= len(step)
    budget = max(sum(lengths[number] for number in micro) for micro in step)
    assert all(sum(lengths[number] for number in micro) <= budget for micro in found)
    assert saved_tokens(found, rows) > saved_tokens(step, rows)
    assert gather_sharers(step, rows) == found


@settings(max_examples=100)
@given(some_rows(), st.integers(2, 30))
def test_gathering_keeps_rows_and_budgets(rows, budget):
    lengths = [len(one.token_ids) for one in rows]
    step = pack(range(len(rows)), lengths, budget)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "GROUP_COST", 0)
        found = gather_sharers(step, rows)
        assert saved_tokens(found, rows) >= saved_tokens(step, rows)
    assert sorted(number for micro in found for number in micro) == list(range(len(rows)))
    assert len(found) <= len(step)
    assert all(sum(lengths[number] for number in micro) <= budget or len(micro) == 1 for micro in found)
