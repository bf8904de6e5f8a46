"""The rows of `train_chat.py`: real chats at their real lengths, encoded once, the same ids for every contender."""

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import veneer
from veneer.data.batches import row_order
from veneer.data.encode import EncodedRow, encode_rows
from veneer.data.rows import read_rows

ROWS = Path(__file__).parents[1].parent / "shared" / "data" / "rows" / "instruct"
LONGEST = 1024  # TRL's default `max_length`; it would cut longer rows
SEED = 0
SPEAKERS = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}

Messages = list[dict[str, str]]


def alpaca_messages(row: dict[str, Any]) -> Messages:
    """An instruction, perhaps with an input, and its answer."""
    asked = "\n\n".join(part for part in (row["instruction"], row["input"]) if part)
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]


def sharegpt_messages(row: dict[str, Any]) -> Messages:
    """Turns with a speaker each; calls of tools are the assistant's, their results the tool's."""
    return [{"role": SPEAKERS[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]


def parts_messages(row: dict[str, Any]) -> Messages:
    """Messages whose content is a list of parts of text."""
    return [
        {"role": one["role"], "content": "".join(part["value"] for part in one["content"])} for one in row["messages"]
    ]


FILES = {
    "alpaca_en_demo.json": alpaca_messages,
    "dummy_conversation.json": sharegpt_messages,
    "glaive_toolcall_en_demo.json": sharegpt_messages,
    "v1_sft_demo.jsonl": parts_messages,
}


def chats() -> Iterator[Messages]:
    """Every chat of the files, in their order."""
    for name, as_messages in FILES.items():
        text = (ROWS / name).read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)
        yield from map(as_messages, rows)


def make_model(folder: Path) -> None:
    """Write SmolLM2 as a folder that transformers reads, for the peers; once."""
    if (folder / "model.safetensors").exists():
        return
    model, tokenizer = veneer.load_base("smollm2")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_task(folder: Path, model: Path, *, steps: int, rows_per_step: int, rounds: int) -> tuple[Path, dict[str, Any]]:
    """Write what every contender is given, and return where it lies and what is to be said of it.

    The rows are drawn from all chats that fit; the ids and the mark on each supervised token are those of
    `veneer.data.encode`, whose cut behind the last answer drops nothing that is learned.
    """
    _, tokenizer = veneer.load_base(str(model))
    chat_file = folder / "chats.jsonl"
    chat_file.write_text("".join(json.dumps({"messages": one}) + "\n" for one in chats()), encoding="utf-8")
    read = read_rows(str(chat_file), skip_bad_rows=True)
    pool = encode_rows(read.rows, tokenizer, max_length=LONGEST, skip_bad_rows=True)
    order = row_order(len(pool.rows), SEED, epoch=0)[: steps * rows_per_step]
    rows = [pool.rows[index] for index in order]
    task = {
        "model": str(model),
        "folder": str(folder),
        "rows": [{"ids": row.token_ids.tolist(), "marks": row.supervised.tolist()} for row in rows],
        "rows_per_step": rows_per_step,
        "rounds": rounds,
        "rank": 16,
        "alpha": 32,
        "learning_rate": 2e-4,
        "max_grad_norm": 1.0,
        "longest": LONGEST,
        "seed": SEED,
    }
    path = folder / "task.json"
    path.write_text(json.dumps(task), encoding="utf-8")
    facts = {
        "files": list(FILES),
        "rows_in_files": len(read.rows) + len(read.bad),
        "rows_left_out": {"bad": len(read.bad), f"longer than {LONGEST} or not encodable": len(pool.bad)},
        "pool": _facts(pool.rows),
        "drawn": _facts(rows),
        "padding_in_order": _padding(rows, rows_per_step),
        "padding_sorted": _padding(sorted(rows, key=lambda row: len(row.token_ids)), rows_per_step),
        **{name: task[name] for name in ("rows_per_step", "rounds", "rank", "alpha", "learning_rate", "max_grad_norm")},
        "steps_per_round": steps,
    }
    return path, facts


def _facts(rows: Sequence[EncodedRow]) -> dict[str, Any]:
    lengths = [len(row.token_ids) for row in rows]
    return {
        "rows": len(rows),
        "tokens": sum(lengths),
        "supervised": sum(int(row.supervised.sum()) for row in rows),
        "shortest": min(lengths),
        "median": statistics.median(lengths),
        "longest": max(lengths),
    }


def _padding(rows: Sequence[EncodedRow], size: int) -> float:
    """Return the share of a padded batch that is padding."""
    lengths = [len(row.token_ids) for row in rows]
    padded = sum(size * max(lengths[start : start + size]) for start in range(0, len(lengths), size))
    return round(1 - sum(lengths) / padded, 3)
