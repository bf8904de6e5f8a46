"""Texts tokenised together have the ids that they have one by one."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from veneer.data.encode import TogetherDiffersError, encode_rows, encode_stream
from veneer.data.rows import ChatRow, CompletionRow, Message, TextRow
from veneer.data.tokens import OneByOne, Together

SPECIAL = ["<|start|>", "<|end|>", "<|pad|>"]
LETTERS = [*"abcdefghijklmnopqrstuvwxyz", "▁", "<", ">", "|", "\n", " ", "."]


def sentencepiece_like(scheme: str, **options: bool) -> PreTrainedTokenizerFast:
    """A tokenizer that treats the beginning of a text otherwise than what follows, as Llama's does."""
    merges = [("a", "b"), ("▁", "a"), ("▁", "t"), ("\n", "a"), ("ab", "c"), ("\n", "\n")]
    words = [*SPECIAL, "<unk>", *LETTERS, *("".join(pair) for pair in merges)]
    vocabulary = {token: index for index, token in enumerate(words)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    if scheme == "normalizer":
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    raw.decoder = decoders.Metaspace()
    raw.add_special_tokens([AddedToken(one, special=True, **options) for one in SPECIAL])
    ends = [("<|start|>", 0), ("<|end|>", 1)]
    raw.post_processor = processors.TemplateProcessing(single="<|start|> $A <|end|>", special_tokens=ends)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|end|>", pad_token="<|pad|>", additional_special_tokens=["<|start|>"]
    )
    tokenizer.chat_template = tiny_tokenizer().chat_template
    return tokenizer


TOKENIZERS = {
    "bytes": tiny_tokenizer(),
    "first": sentencepiece_like("first"),
    "always": sentencepiece_like("always"),
    "normalizer": sentencepiece_like("normalizer"),
    "strips": sentencepiece_like("first", lstrip=True, rstrip=True),
    "whole words": sentencepiece_like("first", single_word=True),
    "normalized": sentencepiece_like("first", normalized=True),
}

texts = st.lists(st.sampled_from([*SPECIAL, *"abct \n.", "  ", "abc", "<|", "|>", "é"]), max_size=12).map("".join)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(learned=st.lists(texts, max_size=6), openings=st.lists(texts, max_size=3), other=texts)
def test_together_is_one_by_one(name, learned, openings, other):
    tokenizer = TOKENIZERS[name]
    plain, together = OneByOne(tokenizer), Together(tokenizer)
    for _ in range(2):  # short pieces are remembered
        together.learn(learned, openings)
        for text in (*learned, *openings, other):
            assert together.ids(text) == plain.ids(text), text
            assert together.opening(text) == plain.opening(text), text


def rows_of(seed: int, count: int):
    draw = random.Random(seed)
    words = ["abc", "the cat", " ", "\n", "\n\n", "é", "日本", "a.b", "  t", "<|start", "1 + 1"]

    def text() -> str:
        return "".join(draw.choices(words, k=draw.randint(1, 6))) + "a"

    def chat(number: int) -> ChatRow:
        roles = [role for _ in range(draw.randint(1, 4)) for role in ("user", "assistant")]
        roles = ["system"] * draw.randint(0, 1) + roles + ["user"] * draw.randint(0, 1)
        if draw.random() < 0.1:
            roles[0] = "tool"  # the template rejects it
        turns = [Message(role, text() + "<|end|>" * (draw.random() < 0.02)) for role in roles]
        return ChatRow(f"a:{number}", tuple(turns))

    return {
        "chat": [chat(number) for number in range(count)],
        "completion": [CompletionRow(f"a:{n}", text(), text()) for n in range(count)],
        "text": [TextRow(f"a:{n}", text() * draw.randint(1, 9)) for n in range(count)],
    }


@pytest.mark.parametrize("kind", ["chat", "completion", "text"])
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("max_length", [120, 4000])
def test_rows_encoded_together_are_those_encoded_one_by_one(name, kind, max_length):
    rows, tokenizer = rows_of(3, 150)[kind], TOKENIZERS[name]
    options = {"max_length": max_length, "skip_bad_rows": True}
    together = encode_rows(rows, tokenizer, **options)
    plain = encode_rows(rows, tokenizer, **options, one_by_one=True)
    assert (len(together), together.bad, together.findings) == (len(plain), plain.bad, plain.findings)
    for one, other in zip(together, plain, strict=True):
        assert one.source == other.source
        assert torch.equal(one.token_ids, other.token_ids)
        assert torch.equal(one.supervised, other.supervised)


class Liar(PreTrainedTokenizerFast):
    """Gives other ids for one text than for several."""

    def __call__(self, text, *args, **options):
        return super().__call__(text.upper() if isinstance(text, str) and text else text, *args, **options)


def test_a_tokenizer_that_differs_is_found_out():
    tokenizer = tiny_tokenizer()
    liar = Liar(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    rows = [TextRow("a:1", "hello there")]
    with pytest.raises(TogetherDiffersError, match="a:1"):
        list(encode_stream([((0, 1, 0), rows[0])], liar, 100))
    found = encode_rows(rows, liar, max_length=100)
    assert tokenizer.decode(found[0].token_ids) == "HELLO THERE<|end|>"


def test_chats_whose_ids_asking_would_not_give_are_named():
    tokenizer = TOKENIZERS["first"]
    plain = ChatRow("a:1", (Message("user", "a"), Message("assistant", "abc")))
    # The line ends of the template and of the answer make one token once the next turn is asked.
    turns = [("user", "a"), ("assistant", "\nabc"), ("user", "t"), ("assistant", "c")]
    reaching = ChatRow("a:2", tuple(Message(role, content) for role, content in turns))
    found = encode_rows([plain, reaching], tokenizer, max_length=100).findings
    assert (found.num_compared, found.unequal) == (2, ("a:2",))
