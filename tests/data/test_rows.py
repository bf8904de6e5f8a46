import contextlib
import csv
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.data.rows import (
    ChatRow,
    CompletionRow,
    Message,
    Prompt,
    TextRow,
    as_prompt,
    check_rows,
    read_prompts,
    read_rows,
)
from veneer.errors import DataError

GOOD = b'{"text": "fine"}\n'
USER = {"role": "user", "content": "2 + 2?"}
ASSISTANT = {"role": "assistant", "content": "4"}


@pytest.fixture
def write(tmp_path):
    def write(content, name="a.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def lines(*values):
    return "".join(json.dumps(value) + "\n" for value in values)


def refusal(path, read=read_rows, **options):
    with pytest.raises(DataError) as caught:
        read(path, **options)
    return caught.value


# What is read


def test_chat(write):
    path = write(lines({"messages": [USER, ASSISTANT]}, {"id": 7, "messages": [USER, ASSISTANT, USER]}))
    one, two = read_rows(path).rows
    assert one == ChatRow(f"{path}:1", (Message("user", "2 + 2?"), Message("assistant", "4")))
    assert two.source == f"{path}:2"
    assert len(two.messages) == 3


def test_completion_and_text(write):
    path = write(lines({"prompt": "", "completion": "é\u2028x", "id": None}))
    assert read_rows(path).rows == [CompletionRow(f"{path}:1", "", "é\u2028x")]
    path = write(lines({"text": "a"}), "a.ndjson")
    assert read_rows(path).rows == [TextRow(f"{path}:1", "a")]


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n \n", "\r\n\r\n"])
def test_line_ends(write, end):
    separator = "\r\n" if "\r" in end else "\n"
    path = write('{"text": "a"}' + separator + '{"text": "b"}' + end)
    assert read_rows(path).rows == [TextRow(f"{path}:1", "a"), TextRow(f"{path}:2", "b")]


def test_separators_of_unicode_end_no_line(write):
    path = write('{"text": "a\u2028b\x85c"}\n{"text": "d"}\n')
    assert [row.text for row in read_rows(path).rows] == ["a\u2028b\x85c", "d"]


def test_csv(write):
    path = write('prompt,completion,id\r\n"a, ""b""","two\nlines",1\r\nc,d,2\r\n\r\n', "a.csv")
    assert read_rows(path).rows == [
        CompletionRow(f"{path}:2", 'a, "b"', "two\nlines"),
        CompletionRow(f"{path}:4", "c", "d"),
    ]
    path = write("text\nhello\n", "A.CSV")
    assert read_rows(path).rows == [TextRow(f"{path}:2", "hello")]


@given(st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"])), st.text("ab,\"\n '", min_size=1))))
def test_csv_gives_back_what_the_csv_module_writes(tmp_path_factory, pairs):
    pairs = [("p", "c"), *((prompt, "c" + completion) for prompt, completion in pairs)]
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("prompt", "completion"), *pairs])
    assert [(row.prompt, row.completion) for row in read_rows(str(path)).rows] == pairs


# Bad rows: (line, what the error says of it)

BAD_LINES = [
    (b"{'text': 'a'}", "not JSON: Expecting property name enclosed in double quotes (column 2)"),
    (b'{"text": "a"', "not JSON: Expecting ',' delimiter (column 13)"),
    (b'{"text": "a"} x', "not JSON: Extra data (column 15)"),
    (b"", "a blank line; remove it"),
    (b"  \t", "a blank line; remove it"),
    (b'{"text": "a", "text": "b"}', "key 'text' stands twice"),
    (b'{"id": {"x": 1, "x": 2}, "text": "b"}', "key 'x' stands twice"),
    (b"[" * 100_000, "JSON that cannot be used"),
    (b'["a"]', "a row must be an object, is a list"),
    (b'"a"', "a row must be an object, is a string"),
    (b"1", "a row must be an object, is a number"),
    (b"null", "a row must be an object, is null"),
    (b"true", "a row must be an object, is true or false"),
    (b"{}", "a row has 'messages', 'prompt' and 'completion', or 'text'"),
    (b'{"mesages": []}', "unknown key 'mesages'; nearest: 'messages'"),
    (b'{"prompt": "a"}', "missing key 'completion'"),
    (b'{"completion": "a"}', "missing key 'prompt'"),
    (b'{"prompt": "a", "complete": "b"}', "missing key 'completion'; unknown key 'complete'; nearest: 'completion'"),
    (b'{"text": "a", "category": "b"}', "unknown key 'category' (known: text, id)"),
    (b'{"text": "a", "messages": []}', "unknown key 'text' (known: messages, id); 'messages' must be a list"),
    (b'{"text": null}', "'text' must be a string, is null"),
    (b'{"text": ["a"]}', "'text' must be a string, is a list"),
    (
        b'{"prompt": 1, "completion": {}}',
        "'prompt' must be a string, is a number; 'completion' must be a string, is an",
    ),
    (b'{"text": ""}', "no supervised tokens: 'text' is blank"),
    (b'{"prompt": "a", "completion": " \\n"}', "no supervised tokens: 'completion' is blank"),
    (b'{"text": "\\ud83d"}', "'text' holds half a surrogate pair"),
    (b'{"messages": []}', "'messages' must be a list of at least one message, is empty"),
    (b'{"messages": {"role": "user"}}', "'messages' must be a list of at least one message, is an object"),
    (b'{"messages": ["hi"]}', "message 1: must be an object, is a string"),
    (b'{"messages": [{"role": "user"}]}', "message 1: missing key 'content'"),
    (b'{"messages": [{"content": "a"}]}', "message 1: missing key 'role'"),
    (
        b'{"messages": [{"from": "human", "value": "a"}]}',
        "message 1: missing key 'role'; message 1: missing key 'content'; message 1: unknown key 'from'; nearest: "
        "'role'; ... and 1 more",
    ),
    (b'{"messages": [{"role": "user", "content": "a", "nmae": "b"}]}', "message 1: unknown key 'nmae'"),
    (b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "message 1: 'content' must be a string, is a"),
    (b'{"messages": [{"role": null, "content": "a"}]}', "message 1: 'role' must be a string, is null"),
    (
        b'{"messages": [{"role": "asistant", "content": "a"}]}',
        "message 1: unknown role 'asistant'; nearest: 'assistant'",
    ),
    (b'{"messages": [{"role": "user", "content": "a"}]}', "no supervised tokens: no assistant message"),
    (b'{"messages": [{"role": "assistant", "content": " "}]}', "no supervised tokens: no assistant message"),
    (b'{"text": "\xff"}', "not UTF-8: byte 0xff at byte 27 of the file"),
    (b'{"text": "\xe2\x82"}', "not UTF-8: byte 0xe2 at byte 27 of the file"),
]


@pytest.mark.parametrize(("line", "expected"), BAD_LINES)
def test_bad_rows(write, line, expected):
    path = write(GOOD + line + b"\n" + GOOD)
    error = refusal(path)
    assert error.message == (
        f"{path}: 1 of 3 rows cannot be used; correct them, or leave them out with skip_bad_rows (--skip-bad-rows)"
    )
    (problem,) = error.problems
    assert problem.startswith(f"{path}:2: ")
    assert expected in problem
    assert problem.endswith(f"; row at byte {len(GOOD)}")

    found = read_rows(path, skip_bad_rows=True)
    assert [row.source for row in found.rows] == [f"{path}:1", f"{path}:3"]
    assert found.bad == [problem]


def test_all_problems_are_gathered_and_the_list_is_capped(write):
    path = write(b"".join(line + b"\n" for line, _ in BAD_LINES) + GOOD)
    error = refusal(path)
    assert len(error.problems) == 21
    assert error.problems[-1] == f"... and {len(BAD_LINES) - 20} more"

    found = read_rows(path, skip_bad_rows=True)
    assert len(found.bad) == len(BAD_LINES)
    assert [problem.split(": ")[0] for problem in found.bad] == [f"{path}:{at}" for at, _ in enumerate(BAD_LINES, 1)]


def test_skipping_keeps_the_order(write):
    draw = random.Random(0)
    good = {f"row {number}" for number in range(500)}
    every = sorted(good) + [""] * 100
    draw.shuffle(every)
    found = read_rows(write(lines(*({"text": text} for text in every))), skip_bad_rows=True)
    assert [row.text for row in found.rows] == [text for text in every if text]
    assert len(found.bad) == 100


def test_nothing_left_to_skip_to(write):
    error = refusal(write(b"oops\n\n{}\n"), skip_bad_rows=True)
    assert "3 of 3 rows cannot be used; correct them" in error.message
    assert "--skip-bad-rows" not in error.message


def test_a_key_of_any_length_is_refused_quickly(write):
    error = refusal(write(lines({"x" * 1_000_000: 1})))
    assert len(str(error)) < 1000


# Bad files: refused even where bad rows are skipped


@pytest.mark.parametrize("skip_bad_rows", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b"", ":1: the file holds no rows"),
        ("a.jsonl", b"\n \n", ":1: the file holds no rows"),
        ("a.csv", b"", ":1: the file holds no rows"),
        ("a.csv", b"text\n", ":1: the file holds no rows"),
        ("a.jsonl", b"\xef\xbb\xbf" + GOOD, ":1: begins with the byte order mark (BOM) of UTF-8"),
        ("a.csv", "text\na\n".encode("utf-16"), ":1: begins with the byte order mark (BOM) of UTF-16"),
        (
            "a.jsonl",
            GOOD + b'{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "b"}\n',
            ":2: a completion row, but {path}:1 is a text row; keep each shape of row in a file of its own",
        ),
        ("a.csv", b"text,category\na,b\n", ":1: header: unknown key 'category'"),
        ("a.csv", b"prompt;completion\na;b\n", ":1: header: a row has"),
        ("a.csv", b"prompt\na\n", ":1: header: missing key 'completion'"),
        ("a.csv", b"text,text\na,b\n", ":1: header: column 'text' stands twice"),
        ("a.csv", b"messages\n[]\n", ":1: header: dialogues cannot stand in CSV; write them as JSON Lines"),
        ("a.csv", b"te\xffxt\na\n", ":1: not UTF-8: byte 0xff at byte 2 of the file; header: "),
        ("a.csv", b'text\na\n"b" c\nd\n', ":3: broken CSV: "),
        ("a.csv", b'text\na\n"b\xff" c\nd\n', ":3: not UTF-8: byte 0xff at byte 9 of the file; broken CSV: "),
        ("a.csv", b'text\na\n"b\nd\n', ":3: broken CSV: unexpected end of data"),
        ("a.csv", b"text\na\n" + b"b" * 200_000 + b"\nc\n", ":3: broken CSV: field larger than field limit"),
        ("a.txt", GOOD, ": the file has suffix '.txt'; rows are read from .jsonl, .ndjson, .csv, .parquet, .arrow and"),
        ("rows", GOOD, ": the file has no suffix"),
    ],
)
def test_bad_files(write, name, content, expected, skip_bad_rows):
    path = write(content, name)
    assert path + expected.format(path=path) in str(refusal(path, skip_bad_rows=skip_bad_rows))


def test_csv_rows_are_named_by_the_line_where_they_start(write):
    path = write(b'prompt,completion\n"a\nb",\nc\n\n"d\n\xff\n",e\nf,g\n', "a.csv")
    found = read_rows(path, skip_bad_rows=True)
    assert found.rows == [CompletionRow(f"{path}:9", "f", "g")]
    assert found.bad == [
        f"{path}:2: no supervised tokens: 'completion' is blank; row at byte 18",
        f"{path}:4: 1 fields where the header has 2; row at byte 25",
        f"{path}:5: a blank line; remove it; row at byte 27",
        f"{path}:6: not UTF-8: byte 0xff at byte 31 of the file; row at byte 28",
    ]


def test_missing_file(write, tmp_path):
    write(GOOD, "train.jsonl")
    assert "no such file; nearest: 'train.jsonl'" in str(refusal(str(tmp_path / "trian.jsonl")))
    assert f"no such file, and no folder {tmp_path / 'x'}" in str(refusal(str(tmp_path / "x" / "train.jsonl")))


def test_folder(write, tmp_path):
    assert "a folder, not a file of rows; and no file of rows is in it" in str(refusal(str(tmp_path)))
    write(GOOD, "train.jsonl")
    assert "a folder, not a file of rows; name one of its files: train.jsonl" in str(refusal(str(tmp_path)))


# Prompts


def test_prompts_of_dialogues(write):
    path = write(lines({"messages": [USER]}, {"messages": [USER, ASSISTANT]}, {"messages": [USER, ASSISTANT, USER]}))
    user, assistant = Message("user", "2 + 2?"), Message("assistant", "4")
    assert read_prompts(path) == [
        Prompt(f"{path}:1", (user,), None),
        Prompt(f"{path}:2", (user,), "4"),
        Prompt(f"{path}:3", (user, assistant, user), None),
    ]


def test_prompts_of_completions_and_text(write):
    path = write(lines({"prompt": "a"}, {"prompt": "a", "completion": "b"}))
    assert read_prompts(path) == [Prompt(f"{path}:1", "a", None), Prompt(f"{path}:2", "a", "b")]
    path = write("prompt\na\n", "a.csv")
    assert read_prompts(path) == [Prompt(f"{path}:2", "a", None)]
    path = write("Once upon a time \r\n{x\n\n", "a.txt")
    assert [prompt.start for prompt in read_prompts(path)] == ["Once upon a time ", "{x"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"a\n\nb\n", ":2: a blank line; remove it"),
        ("a.txt", b"a\n\xff\n", ":2: not UTF-8: byte 0xff at byte 2 of the file"),
        ("a.jsonl", b'{"prompt": " "}\n', ":1: nothing to generate from"),
        ("a.jsonl", b'{"messages": [{"role": "assistant", "content": "a"}]}\n', ":1: nothing to generate from"),
        ("a.jsonl", b'{"completion": "a"}\n', ":1: missing key 'prompt'"),
        ("a.jsonl", GOOD, ":1: a row has 'messages', 'prompt' and 'completion' or no completion; unknown key 'text'"),
        ("a.orc", b"", "rows are read from .jsonl, .ndjson, .csv, .txt, .parquet, .arrow and datasets folders"),
    ],
)
def test_bad_prompts(write, name, content, expected):
    error = refusal(write(content, name), read_prompts)
    assert expected in str(error)
    assert "skip" not in str(error)


def test_a_text_row_is_no_prompt():
    with pytest.raises(DataError, match="a:1: a text row has no answer"):
        as_prompt(TextRow("a:1", "b"))


@given(st.binary(max_size=200) | st.text('{}[]":,\n\\ud8truenl "text"', max_size=80).map(str.encode))
def test_any_bytes_are_rows_or_a_data_error(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("bytes")
    for name in ("a.jsonl", "a.csv", "a.txt"):
        path = folder / name
        path.write_bytes((b"text\n" if name == "a.csv" else b"") + content)
        for read in (read_rows, read_prompts):
            with contextlib.suppress(DataError):
                assert read(str(path))


# Files of any length


def damaged(row, kind, draw):
    """A bad row: one of twenty ways, each with a choice of its own."""
    text = json.dumps(row)
    ways = [
        lambda: text[: draw.randrange(1, len(text))],  # cut short
        lambda: text + draw.choice(["}", "]", ",", '"', " x"]),
        lambda: text.replace("role", draw.choice(["rol", "rolle", "Role", "from"]), 1),
        lambda: text.replace("content", draw.choice(["contents", "value", "text"]), 1),
        lambda: text.replace("messages", draw.choice(["mesages", "conversations", "Messages"]), 1),
        lambda: text.replace('"assistant"', draw.choice(['"bot"', '"Assistant"', "null", "7", '["assistant"]']), 1),
        lambda: json.dumps({**row, draw.choice(["extra", "category", "mesage"]): 1}),
        lambda: json.dumps({"messages": row["messages"][:1]}),
        lambda: json.dumps(
            {"messages": [row["messages"][0], {"role": "assistant", "content": draw.choice(["", " ", "\n"])}]}
        ),
        lambda: json.dumps({"messages": draw.choice([[], None, "a", {}, 3, [[]], ["a"], [None]])}),
        lambda: text[:-1] + ', "messages": []}',  # a key twice
        lambda: text.replace('"role"', '"role": "user", "role"', 1),
        lambda: text.replace("hello", draw.choice(["\\ud800", "\\udfff", "\\ud83d x"]), 1),
        lambda: text.replace("hello", draw.choice(["\t", "\x00", "\x1f"]), 1),  # control characters must be escaped
        lambda: draw.choice(["", " ", "\t"]),
        lambda: draw.choice(["null", "true", "[]", "{}", "1", '"a"', "NaN", "nan", "'a'"]),
        lambda: "[" * draw.randrange(2000, 9000),
        lambda: json.dumps({**row, "id": 0})[:-2] + "1" * 5000 + "}",
        lambda: text.encode().replace(b"hello", draw.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88"]), 1),
        lambda: text.replace(":", draw.choice([";", "=", ""]), 1),
    ]
    line = ways[kind % len(ways)]()
    return line if isinstance(line, bytes) else line.encode()


def test_a_hundred_bad_rows_of_twenty_kinds_are_named_by_file_line_and_byte(tmp_path):
    draw = random.Random(0)
    row = {"messages": [USER, {"role": "assistant", "content": "hello"}]}
    good = json.dumps(row).encode()
    total, kinds = 20_000, 100
    bad = dict(zip(sorted(draw.sample(range(total), kinds)), draw.sample(range(kinds), kinds), strict=True))
    path, expected, offset = tmp_path / "a.jsonl", [], 0
    with path.open("wb") as file:
        for number in range(total):
            line = damaged(row, bad[number], draw) if number in bad else good
            if number in bad:
                expected.append((f"{path}:{number + 1}: ", f"; row at byte {offset}"))
            offset += file.write(line + b"\n")
    checked = check_rows(str(path), skip_bad_rows=True)
    found = checked.bad_lines
    assert len(found) == kinds
    for line, (start, end) in zip(found, expected, strict=True):
        assert line.startswith(start), (line, start)
        assert line.endswith(end), (line, end)
    assert checked.num_rows == total - kinds == sum(1 for _ in checked.rows())
    with pytest.raises(DataError, match=f"{kinds} of {total} rows cannot be used") as error:
        check_rows(str(path))
    assert list(error.value.problems) == [*found[:20], f"... and {kinds - 20} more"]


@given(st.lists(st.sampled_from(["good", "bad", "blank"]), max_size=40), st.integers(0, 5))
def test_what_is_skipped_and_what_stays_in_its_order(tmp_path_factory, plan, seed):
    plan = ["good", *plan, "good"]
    draw = random.Random(seed)
    lines = {
        "good": lambda n: json.dumps({"text": f"row {n}"}),
        "bad": lambda n: "{" * draw.randint(1, 3),
        "blank": lambda n: "",
    }
    path = tmp_path_factory.mktemp("skip") / "a.jsonl"
    path.write_text("".join(lines[kind](n) + "\n" for n, kind in enumerate(plan)))
    read, checked = read_rows(str(path), skip_bad_rows=True), check_rows(str(path), skip_bad_rows=True)
    kept = [n for n, kind in enumerate(plan) if kind == "good"]
    assert [row.text for row in read.rows] == [f"row {n}" for n in kept]
    assert [row for _, row in checked.rows()] == read.rows
    assert [row.source for row in read.rows] == [f"{path}:{n + 1}" for n in kept]
    assert len(read.bad) == len(plan) - len(kept) == len(checked.bad)
    assert checked.bad_lines == read.bad
    data = path.read_bytes()
    for record, row in checked.rows():
        assert json.loads(data[record.byte :].split(b"\n")[0])["text"] == row.text


def test_checking_asks_whether_to_stop(write):
    path = write(GOOD * 5000)
    shares = []
    check_rows(path, tick=shares.append)
    assert len(shares) > 5
    assert shares[-1] == 1.0
    assert all(0 <= share <= 1 for share in shares)

    def stop(share):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_rows(path, tick=stop)
