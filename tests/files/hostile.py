"""Files that somebody made to break a reader: variants of good ones, drawn from a seed, of every format we write.

    python -m tests.files.hostile FOLDER SEED COUNT

writes them one after another and gives each to every reader, under a limit of memory, and prints a line of JSON before
and after each: whoever started it sees which one it was that crashed or hung.
"""

import io
import json
import os
import random
import resource
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from veneer.adapter import Adapter, AdapterMetadata, LowRank
from veneer.config import LoRAConfig
from veneer.errors import VeneerError
from veneer.files.filesystem import pieces_of
from veneer.files.format import Format, Hints
from veneer.files.formats import FORMATS, recognise
from veneer.files.peft import load_adapter
from veneer.files.shards import Checkpoint, StoredTensor
from veneer.tools.check import Report, check
from veneer.tools.summarize import summarize

MAX_MEMORY = 6 << 30
"""Of address space, most of it what torch maps to begin with."""

Files = dict[str, bytes]
Random = random.Random

REGEXES = ("(a+)+$", "(a|a)*b", "(.*a){30}$", "((x?)*)*y", "(" * 400 + ")" * 400, "a{99999}", "[", "(?=x)", r"\1")
CONFUSED: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 10**9, 10**40, 1.5, -0.0, "", "8", "x" * 70_000, [], {}, [[]], [None], {"": 0}),
    *({"a": {"b": {"c": 1}}}, [1, "a", None], ["q_proj"] * 25_000, {"q_proj": True}, {"(a+)+$": 4}, *REGEXES),
)


PATHS = tuple(f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qv")
BASE = Checkpoint(
    Path("base"),
    MappingProxyType({f"{path}.weight": StoredTensor("model.safetensors", "F32", (8, 8), 0, 256) for path in PATHS}),
    MappingProxyType({}),
    MappingProxyType(
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8}
        | {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    ),
)
HINTS = (Hints(alpha=4.0, base=BASE), Hints(alpha=4.0, base=BASE, component="transformer"))
"""What formats need to be told: the first that suffices."""


def good() -> dict[str, tuple[Files, Hints]]:
    """Return the files of one adapter in every format that is written, by format, with what it needs to be told."""
    generator = torch.Generator().manual_seed(0)
    modules = {
        path: LowRank(torch.randn(2, 8, generator=generator), torch.randn(8, 2, generator=generator), 2.0)
        for path in PATHS
    }
    config = LoRAConfig(rank=2, alpha=4.0, target_modules=("q_proj", "v_proj"))
    adapter = Adapter(modules, config, metadata=AdapterMetadata(base="org/model"))
    found: dict[str, tuple[Files, Hints]] = {}
    for row in FORMATS.values():
        for hints in HINTS if row.write is not None and not row.is_pickle else ():
            with suppress(VeneerError):  # it needs to be told more, or a package
                files = row.write(adapter, hints)
                content = {name: b"".join(pieces_of(one)) for name, one in files.items()}
                found.setdefault(row.name, (content, hints))
    return found


# Bytes of any file.


def cut(draw: Random, data: bytes) -> bytes:
    return data[: draw.randrange(len(data) or 1)]


def longer(draw: Random, data: bytes) -> bytes:
    return data + draw.choice((b"\0", b"{}", bytes(4096), data))


def flipped(draw: Random, data: bytes) -> bytes:
    held = bytearray(data)
    for _ in range(draw.choice((1, 4, 64))):
        if held:
            held[draw.randrange(min(len(held), draw.choice((16, 400, len(held)))))] ^= 1 << draw.randrange(8)
    return bytes(held)


def zero_tail(draw: Random, data: bytes) -> bytes:
    kept = draw.randrange(len(data) or 1)
    return data[:kept] + bytes(len(data) - kept)


def noise(draw: Random, data: bytes) -> bytes:
    return draw.randbytes(draw.choice((0, 1, 7, 8, 9, 4096)))


def pickle(draw: Random, data: bytes) -> bytes:
    code = b"cos\nsystem\n(S'touch /tmp/veneer-was-here'\ntR."
    return draw.choice((b"\x80\x02" + code, code, b"\x80\x04\x95" + b"\xff" * 8))


@cache
def bomb_named(name: str) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, bytes(8 << 20))
    return held.getvalue()


def bomb(draw: Random, data: bytes) -> bytes:
    return bomb_named(draw.choice(("archive/data.pkl", "../../x")))


# Headers of safetensors.


def many(count: int, size: int) -> str:
    entry = json.dumps({"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]})
    return "{" + ",".join(f'"t{number}":{entry}' for number in range(count)) + "}"


MANY_EMPTY, MANY_ON_ONE = many(25_000, 0), many(9_000, 2)


def lying_length(draw: Random, data: bytes) -> bytes:
    real = int.from_bytes(data[:8], "little")
    lie = draw.choice((0, 1, real - 1, real + 1, real + 10**6, 16 << 20, 2**31, 2**63, 2**64 - 1))
    return lie.to_bytes(8, "little") + data[8:]


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(text: str | bytes, values: bytes) -> bytes:
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return len(raw).to_bytes(8, "little") + raw + values


def bad_entry(draw: Random, data: bytes) -> bytes:
    header, values = header_of(data)
    name = draw.choice([name for name in header if name != "__metadata__"])
    entry, size = header[name], len(values)
    changes: tuple[dict[str, Any], ...] = (
        {"data_offsets": [0, size]},
        {"data_offsets": [size, size + 64]},
        {"data_offsets": [-8, 8]},
        {"data_offsets": [8, 0]},
        {"data_offsets": [0, 2**64]},
        {"data_offsets": entry["data_offsets"][:1]},
        {"data_offsets": [0.0, 64.0]},
        {"data_offsets": None},
        {"shape": [2**31, 2**31, 4]},
        {"shape": [2**53]},
        {"shape": [-2, -8]},
        {"shape": [0]},
        {"shape": []},
        {"shape": [1] * 500},
        {"shape": ["2", "8"]},
        {"shape": [*entry["shape"][::-1], 1]},
        {"shape": [True, 16]},
        {"dtype": "F8_E4M3"},
        {"dtype": "I32"},
        {"dtype": "BOOL"},
        {"dtype": 7},
        {"dtype": "F32\0"},
        {"extra": 1},
    )
    header[name] = entry | draw.choice(changes)
    return with_header(json.dumps(header), values)


def bad_names(draw: Random, data: bytes) -> bytes:
    header, values = header_of(data)
    name = draw.choice([name for name in header if name != "__metadata__"])
    other = draw.choice(
        (
            *("", ".", "../../etc/passwd", "__class__", "__metadata__", "a" * 100_000, "x\0y", "q\x1b[2J", "\ud800"),
            *(name.replace("lora", "lora_"), name + ".weight", name.upper(), f"{name}.default", "." + name),
            *(name.replace("layers.0", "layers.99999999999"), "base_model.model." + "a." * 120 + "lora_A.weight"),
        )
    )
    header[other] = header.pop(name)
    return with_header(json.dumps(header), values)


def bad_text(draw: Random, data: bytes) -> bytes:
    header, values = header_of(data)
    text = json.dumps(header)
    name = draw.choice([name for name in header if name != "__metadata__"])
    choices = (
        text[:-1] + f', "{name}": {json.dumps(header[name])}}}',
        '{"a":' * 20_000 + "1" + "}" * 20_000,
        "[" * 100_000,
        text.replace("[0,", "[NaN,").replace("[0, ", "[NaN, "),
        text.replace("0", "1e999", 1),
        text.replace("2", "9" * 5000, 1),
        " " + text,
        "\ufeff" + text,
        text.encode("utf-16"),
        text[:-1],
        "{}",
        "null",
        '{"__metadata__": 3}',
        '{"__metadata__": {"a": {"b": 1}}}',
        MANY_EMPTY,
        MANY_ON_ONE,
    )
    return with_header(draw.choice(choices), values)


def bad_values(draw: Random, data: bytes) -> bytes:
    header, values = header_of(data)
    special = draw.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f"))
    place = 4 * draw.randrange(len(values) // 4)
    count = draw.choice((1, 4, (len(values) - place) // 4))
    return with_header(json.dumps(header), values[:place] + special * count + values[place + 4 * count :])


# Configurations.


def confused(draw: Random, data: bytes) -> bytes:
    raw = json.loads(data)
    for _ in range(draw.choice((1, 1, 3))):
        raw[draw.choice([*raw, "peft_type", "rank_pattern", "alpha_pattern", "layers_pattern"])] = draw.choice(CONFUSED)
    return json.dumps(raw).encode()


def bad_json(draw: Random, data: bytes) -> bytes:
    text = data.decode().rstrip().rstrip("}").rstrip()
    return draw.choice(
        (
            (text + ', "r": 3, "r": 4}').encode(),
            (text + ', "r": NaN}').encode(),
            (text + ', "lora_alpha": 1e999}').encode(),
            (text + ', "r": ' + "9" * 5000 + "}").encode(),
            (text + ', "x": "\\ud800"}').encode(),
            (text + ', "x": ' + "[" * 60_000 + "]" * 60_000 + "}").encode(),
            b"\xef\xbb\xbf" + data,
            data.decode().encode("utf-16"),
            b"[]",
            b"",
            b"null",
            b" " * (9 << 20),
        )
    )


def patterns(draw: Random, data: bytes) -> bytes:
    raw = json.loads(data)
    key = draw.choice(("rank_pattern", "alpha_pattern"))
    regexes = [draw.choice(REGEXES) for _ in range(3)]
    raw[draw.choice(("target_modules", "exclude_modules", "layers_pattern"))] = draw.choice(regexes)
    raw[key] = {f"{regex}{count}" * draw.choice((0, 1)) or regex: 4 for count, regex in enumerate(regexes)}
    if draw.random() < 0.3:
        raw[key] = {f".*{count}.*x.*": 4 for count in range(5_000)}
    return json.dumps(raw).encode()


ANY: tuple[Callable[[Random, bytes], bytes], ...] = (cut, longer, flipped, zero_tail, noise, pickle, bomb)
HEADERS = (lying_length, bad_entry, bad_entry, bad_names, bad_text, bad_values)
CONFIGS = (confused, confused, bad_json, patterns)


# What stands in the place of a file.


def fifo(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def dangling(path: Path) -> None:
    path.symlink_to("/nowhere/at/all")


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def absent(path: Path) -> None:
    pass


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.write((1 << 20).to_bytes(8, "little") + b"{")
        file.truncate(3 << 30)


PLACES: tuple[Callable[[Path], None], ...] = (fifo, folder, loop, dangling, device, absent, sparse)


def write_variants(top: Path, seed: int, count: int) -> Iterator[tuple[str, str, Path]]:
    """Write variants one after another, each in a folder of its own: its name, its format and its path."""
    sources = good()
    for number in range(count):
        draw = Random(f"{seed}/{number}")
        kind = draw.choice(sorted(sources))
        files = dict(sources[kind][0])
        name = draw.choice(sorted(files))
        here = top / f"case-{number}"
        here.mkdir(parents=True)
        special = None
        if draw.random() < 0.15:
            special = draw.choice(PLACES)
            what = special.__name__
        else:
            own = CONFIGS if name.endswith(".json") else HEADERS if name.endswith(".safetensors") else ()
            change = draw.choice((*ANY, *own, *own))
            files[name], what = change(draw, files[name]), change.__name__
        for other, data in files.items():
            if special is None or other != name:
                (here / other).write_bytes(data)
        if special is not None:
            special(here / name)
        row: Format = FORMATS[kind]
        yield f"{number} {kind} {name} {what}", kind, here / row.file if row.file else here


def readers(kind: str, hints: Hints) -> Mapping[str, Callable[[Path], object]]:
    """Return every way in which files of a format are read."""
    row = FORMATS[kind]
    return {
        "load_adapter": load_adapter,
        "show": lambda path: summarize(load_adapter(path)).to_json(),
        "recognise": recognise,
        f"read {kind}": lambda path: row.read(path, hints),
    }


def outcome(read: Callable[[Path], object], path: Path) -> str:
    """Return what came of reading: ok, the name of a typed error, or what must not be."""
    try:
        read(path)
    except VeneerError as error:
        return type(error).__name__ if str(error).strip() else "an error without a text"
    except BaseException as error:  # whatever else is a fault of the reader
        return f"FAULT {type(error).__name__}: {str(error)[:200]}"
    return "ok"


def peak_bytes() -> int:
    """Return the most memory that this program held; `ru_maxrss` would count what its parent held as it was started."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    top, seed, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    told = {kind: hints for kind, (_, hints) in good().items()}
    for name, kind, path in write_variants(top, seed, count):
        print(json.dumps({"begins": name}), flush=True)
        here = top / f"case-{name.split()[0]}"
        before = set(here.iterdir())
        found = {reader: outcome(read, path) for reader, read in readers(kind, told[kind]).items()}
        if set(here.iterdir()) != before:
            found["left behind"] = f"FAULT {sorted(set(here.iterdir()) ^ before)}"
        reports: list[Report] = []
        found["check"] = outcome(lambda one, kept=reports: kept.append(check(one)), path)
        errors = [one.code for report in reports for one in report.errors]
        if (found["load_adapter"] != "ok") != bool(errors):
            found["arbiter"] = f"FAULT load_adapter: {found['load_adapter']}, check: {errors}"
        peak = peak_bytes()
        print(json.dumps({"name": name, "found": found, "peak": peak}), flush=True)
        shutil.rmtree(here)


if __name__ == "__main__":
    main()
