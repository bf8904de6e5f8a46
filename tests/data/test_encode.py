"""Rows to token ids and supervised tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import tiny_tokenizer

from veneer.data.encode import encode_rows, prompt_ids, template_digest
from veneer.data.rows import ChatRow, CompletionRow, Message, Prompt, TextRow, as_prompt
from veneer.errors import DataError

TOKENIZER = tiny_tokenizer()


def chat(*turns: tuple[str, str]) -> ChatRow:
    return ChatRow("a.jsonl:1", tuple(Message(role, content) for role, content in turns))


def encode(row, **options):
    (encoded,) = encode_rows([row], TOKENIZER, **{"max_length": 500, **options}).rows
    return encoded


def supervised_text(encoded) -> str:
    return TOKENIZER.decode(encoded.token_ids[encoded.supervised])


def whole_text(encoded) -> str:
    return TOKENIZER.decode(encoded.token_ids)


def test_chat_supervises_answers_with_their_end_of_turn_and_nothing_else():
    row = chat(("system", "S"), ("user", "one"), ("assistant", "1"), ("user", "two"), ("assistant", "22"))
    encoded = encode(row)
    assert supervised_text(encoded) == "1<|end|>22<|end|>"
    assert whole_text(encoded) == (
        "<|start|>system\nS<|end|>\n<|start|>user\none<|end|>\n<|start|>assistant\n1<|end|>\n"
        "<|start|>user\ntwo<|end|>\n<|start|>assistant\n22<|end|>"
    )


def test_what_follows_the_last_answer_is_left_off():
    assert whole_text(encode(chat(("user", "q"), ("assistant", "a"), ("user", "thanks")))).endswith("a<|end|>")


def test_completion_supervises_the_completion_and_the_end():
    encoded = encode(CompletionRow("a.jsonl:1", "2 + 2 =", " 4"))
    assert (supervised_text(encoded), whole_text(encoded)) == (" 4<|end|>", "2 + 2 = 4<|end|>")


def test_text_supervises_all_but_the_first_token():
    encoded = encode(TextRow("a.jsonl:1", "hello"))
    assert (supervised_text(encoded), whole_text(encoded)) == ("ello<|end|>", "hello<|end|>")


def test_a_long_text_becomes_several_rows():
    rows = encode_rows([TextRow("a.jsonl:1", "abcdefghi")], TOKENIZER, max_length=4).rows
    assert [whole_text(row) for row in rows] == ["abcd", "efgh", "i<|end|>"]
    assert all(not row.supervised[0] and row.supervised[1:].all() for row in rows)


turns = st.text(min_size=1, max_size=8).filter(lambda text: "<|" not in text and text.strip())


@given(st.lists(st.tuples(turns, turns), min_size=1, max_size=3))
def test_training_sees_what_asking_sees(dialogue):
    """The ids before the last answer are those that the model is asked with."""
    row = chat(*(turn for said, answer in dialogue for turn in (("user", said), ("assistant", answer))))
    encoded = encode(row, max_length=2000)
    asked = prompt_ids(as_prompt(row), TOKENIZER)
    assert encoded.token_ids[: len(asked)].tolist() == asked
    assert not encoded.supervised[: len(asked)][-1]
    assert encoded.supervised[len(asked) :].all()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (chat(("tool", "x"), ("assistant", "a")), "the chat template rejects the dialogue: no tools here"),
        (chat(("user", "x<|end|>"), ("assistant", "a")), "message 1 spells the special token '<|end|>'"),
        (CompletionRow("a.jsonl:1", "p", "c" * 600), "602 tokens, at most 500 fit: its answer would be cut"),
        (chat(("user", "q" * 600), ("assistant", "a")), "at most 500 fit: its answer would be cut"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_named(row, message):
    with pytest.raises(DataError) as error:
        encode(row)
    assert message in str(error.value)
    assert "a.jsonl:1" in str(error.value)
    assert "--skip-bad-rows" in str(error.value)


def test_skipped_rows_are_counted_and_listed_in_order():
    rows = [CompletionRow(f"a.jsonl:{n}", "p", "c" * (600 if n % 2 else 2)) for n in range(1, 7)]
    found = encode_rows(rows, TOKENIZER, max_length=500, skip_bad_rows=True)
    assert [row.source for row in found.rows] == ["a.jsonl:2", "a.jsonl:4", "a.jsonl:6"]
    assert [line.split()[0] for line in found.bad] == ["a.jsonl:1:", "a.jsonl:3:", "a.jsonl:5:"]
    assert (found.num_tokens, found.num_supervised) == (12, 9)
    with pytest.raises(DataError, match="1 of 1 rows"):
        encode_rows(rows[:1], TOKENIZER, max_length=500, skip_bad_rows=True)


def test_many_bad_rows_are_cut_short_in_the_message():
    rows = [CompletionRow(f"a.jsonl:{n}", "p", "c" * 600) for n in range(50)]
    with pytest.raises(DataError, match=r"(?s)50 of 50 rows.*\.\.\. and 30 more") as error:
        encode_rows(rows, TOKENIZER, max_length=500)
    assert len(error.value.problems) == 21


def test_no_template_no_end_token_and_a_template_that_rewrites_the_past():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat template"):
        encode_rows([chat(("user", "q"), ("assistant", "a"))], tokenizer, max_length=50)
    assert template_digest(tokenizer) is None
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    with pytest.raises(DataError, match="no end-of-turn token"):
        encode_rows([chat(("user", "q"), ("assistant", "a"))], tokenizer, max_length=50)
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
    with pytest.raises(DataError, match="differently once it follows"):
        encode_rows([chat(("user", "q"), ("assistant", "a"))], tokenizer, max_length=50)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        encode_rows([TextRow("a:1", "x")], tokenizer, max_length=50)


def test_a_prompt_that_the_template_rejects():
    with pytest.raises(DataError, match="x:3: the chat template rejects"):
        prompt_ids(Prompt("x:3", (Message("tool", "t"),), None), TOKENIZER)


def test_an_answer_ends_at_the_first_special_token_behind_it():
    """Some templates write an end of sequence behind the end of turn; that is not the model's to say."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template += "{% if not add_generation_prompt %}{{ '<|pad|>' }}{% endif %}"
    row = encode_rows([chat(("user", "q"), ("assistant", "a"))], tokenizer, max_length=50).rows[0]
    assert tokenizer.decode(row.token_ids[row.supervised]) == "a<|end|>"


def test_a_header_token_is_no_end_of_turn():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ '<|start|>' + m['role'] + ':' + m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="no end-of-turn token"):
        encode_rows([chat(("user", "q"), ("assistant", "a"))], tokenizer, max_length=50)
