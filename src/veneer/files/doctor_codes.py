"""What `check` can find: every code, how bad it is, what it means. Codes are never given to something else."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

ERROR, WARNING, NOTE = "error", "warning", "note"
MAX_OF_A_CODE = 20


@dataclass(frozen=True)
class Code:
    """One kind of finding.

    Args:
        code: Its name, which stays; the first digit is what it is about.
        severity: error (it cannot be used as it is), warning (it can, and is likely not what was meant) or note.
        title: What is found, in a few words.
        meaning: What follows from it.
    """

    code: str
    severity: str
    title: str
    meaning: str


@dataclass(frozen=True)
class Finding:
    """One thing that is found.

    Args:
        code: A key of `CODES`.
        where: The file, key or module path.
        what: What is there, and what was expected.
        command: What mends it, where a command does.
        count: For how many it stands.

    Example:
        >>> Finding("V102", "runs/a", "adapter_config.json: missing").severity
        'error'
    """

    code: str
    where: str
    what: str
    command: str | None = None
    count: int = 1

    @property
    def severity(self) -> str:
        """How bad it is."""
        return CODES[self.code].severity

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values, with what its code means."""
        row = CODES[self.code]
        return {
            "code": self.code,
            "severity": row.severity,
            "title": row.title,
            "where": _text(self.where),
            "what": _text(self.what),
            "meaning": row.meaning,
            "command": None if self.command is None else _text(self.command),
        }


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return each finding once, errors first, then by code.

    Example:
        >>> [one.code for one in in_order([Finding("V401", "a", "b"), Finding("V102", "a", "b")])]
        ['V102', 'V401']
    """
    order = {ERROR: 0, WARNING: 1, NOTE: 2}
    return tuple(sorted(dict.fromkeys(findings), key=lambda one: (order[one.severity], one.code)))


def limited(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return the findings in order, of each code at most twenty, with how many more there are.

    Example:
        >>> found = limited(Finding("V304", f"key {count}", "of no use") for count in range(25))
        >>> len(found), found[-1].what
        (21, '... and 5 more')
    """
    kept: list[Finding] = []
    counts: dict[str, int] = {}
    for one in in_order(findings):
        counts[one.code] = counts.get(one.code, 0) + 1
        if counts[one.code] <= MAX_OF_A_CODE:
            kept.append(one)
    more = {code: count - MAX_OF_A_CODE for code, count in counts.items() if count > MAX_OF_A_CODE}
    return in_order([*kept, *(Finding(code, "", f"... and {count} more", count=count) for code, count in more.items())])


def _text(text: str) -> str:
    """Return a text that has UTF-8: the name of a file may be any bytes."""
    return text.encode("utf-8", "backslashreplace").decode()


_ROWS = (
    # Files.
    Code("V100", ERROR, "cannot be read", "`load_adapter` refuses it, for this reason."),
    Code("V101", ERROR, "not there", "There is no file or folder of this name, or none that may be read."),
    Code(
        "V102",
        ERROR,
        "file missing",
        "An adapter in PEFT's layout is a configuration and a file of tensors; one alone says too little.",
    ),
    Code(
        "V103",
        ERROR,
        "not a regular file",
        "A folder, pipe, device or broken link stands where a file is expected, or it is longer than is read.",
    ),
    Code(
        "V104",
        ERROR,
        "pickle",
        "Opening a pickle can run any code, so it is never opened here. Convert it in a restricted process of its own.",
    ),
    Code(
        "V105",
        WARNING,
        "pickle beside the tensors",
        "Other programs may open it; if it holds other values, they see another adapter.",
    ),
    Code("V106", ERROR, "another format", "Another program's files: whole, perhaps, but not in PEFT's layout."),
    Code(
        "V107",
        ERROR,
        "not what the manifest vouches for",
        "The files were changed after they were written, or damaged.",
    ),
    Code(
        "V108",
        WARNING,
        "other files changed",
        "The adapter itself is whole, but other files of its folder are not as they were written.",
    ),
    Code(
        "V109",
        ERROR,
        "another method",
        "LoHa, LoKr, VeRA and AdaLoRA are read by `read_other` and become LoRA by `convert`.",
    ),
    Code(
        "V110",
        ERROR,
        "method not supported",
        "PEFT has methods that are no low-rank update of weights, or that are not read here.",
    ),
    # adapter_config.json.
    Code(
        "V201",
        ERROR,
        "not strict JSON",
        "Duplicate keys, NaN, a byte order mark or deep nesting: two readers would see two configurations.",
    ),
    Code("V202", ERROR, "not a configuration", "The file holds JSON, but no object."),
    Code(
        "V203",
        ERROR,
        "value cannot be used",
        "A setting has the wrong type or is out of range; PEFT would fail, or take it for something else.",
    ),
    Code(
        "V204",
        ERROR,
        "unknown key with a value",
        "Its meaning would be lost: PEFT drops such keys with a warning, and then computes something else.",
    ),
    Code(
        "V205",
        ERROR,
        "setting not supported",
        "The setting changes what the adapter does, in a way that is not built here.",
    ),
    Code(
        "V206",
        ERROR,
        "made for a changed base",
        "PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change the base's weights at the start; this file alone is wrong on "
        "the base as it was.",
    ),
    Code("V207", ERROR, "hostile pattern", "A regular expression in the file could take for ever to match."),
    Code(
        "V208",
        ERROR,
        "tied adapters",
        "`ensure_weight_tying` ties the adapters of the input table and the head; here each is its own.",
    ),
    Code(
        "V210",
        WARNING,
        "pattern without a module",
        "A key of rank_pattern or alpha_pattern stands for no module of the file: a typing error there trains another"
        " rank than was meant.",
    ),
    Code(
        "V211",
        WARNING,
        "target without a module",
        "target_modules names something of which the file has no factors: it was not trained, or was lost.",
    ),
    Code(
        "V212",
        WARNING,
        "unusual scaling",
        "The factor alpha / rank is far from what people use (1/128 to 16); an alpha may have been lost or applied "
        "twice.",
    ),
    Code(
        "V213",
        NOTE,
        "rsLoRA",
        "The scaling is alpha / √rank; a program that does not know `use_rslora` applies alpha / rank.",
    ),
    Code("V214", NOTE, "base not named", "Nothing says which base it was made for."),
    Code(
        "V215",
        NOTE,
        "base named by a local path",
        "The path is of the machine that trained it; pass the base by hand.",
    ),
    # adapter_model.safetensors.
    Code(
        "V300",
        ERROR,
        "tensors do not fit the configuration",
        "What the file holds is not what the configuration says.",
    ),
    Code(
        "V301",
        ERROR,
        "header does not fit the file",
        "Truncated, overlapping or lying offsets: nothing in the file can be trusted.",
    ),
    Code(
        "V302",
        ERROR,
        "header is not strict JSON",
        "Duplicate names or other JSON that two readers read differently.",
    ),
    Code(
        "V303",
        ERROR,
        "names of another layout",
        "No name begins as PEFT's do; PEFT would load nothing, and say so with a warning at most.",
    ),
    Code(
        "V304",
        ERROR,
        "tensor of no use",
        "A name stands for nothing that an adapter has, or a factor lacks its partner; loaders that skip it lose it.",
    ),
    Code(
        "V305",
        ERROR,
        "empty or flat tensor",
        "Weights sharded by DeepSpeed ZeRO-3 or FSDP were not gathered before saving; the values are not in this file.",
    ),
    Code(
        "V306",
        ERROR,
        "other rank than configured",
        "The scaling follows from the rank: with another one the adapter would act too strongly or too weakly.",
    ),
    Code(
        "V307",
        ERROR,
        "not finite",
        "NaN or infinity in the weights: the training broke. There is nothing to mend; take an earlier checkpoint.",
    ),
    Code(
        "V308",
        ERROR,
        "dtype cannot be used",
        "A dtype that is no floating point number, or that differs between the two factors of a module.",
    ),
    Code(
        "V309",
        NOTE,
        "several dtypes",
        "Tensors are of different dtypes; programs that cast to one round some of them.",
    ),
    Code(
        "V310",
        NOTE,
        "base weights carried along",
        "PEFT saves the input table and the head along where one is adapted or the vocabulary grew; they take room, "
        "and are compared with the base when attached.",
    ),
    Code(
        "V311",
        NOTE,
        "base weights carried along unchanged",
        "They equal the base's own: the file is larger than it need be.",
    ),
    Code(
        "V312",
        WARNING,
        "input table or head",
        "Bases that tie the two share one matrix: an adapter on one, or a trained copy of it, acts on one use alone, "
        "and many programs drop it at merge or load.",
    ),
    Code(
        "V314",
        ERROR,
        "DoRA in part",
        "`use_dora` without magnitudes, or magnitudes without `use_dora`: PEFT would silently compute plain LoRA.",
    ),
    Code(
        "V315",
        NOTE,
        "experts laid out by PEFT before 0.19",
        "Which axis is the input only the base tells; it is settled when attached to it.",
    ),
    Code(
        "V316",
        ERROR,
        "trained whole, and not said so",
        "A parameter is there that neither `bias` nor `modules_to_save` accounts for, or the reverse.",
    ),
    Code("V317", ERROR, "rows of tokens", "`trainable_token_indices` and the rows in the file do not fit each other."),
    # Values.
    Code("V401", WARNING, "never trained", "Every lora_B is zero: the adapter changes nothing."),
    Code("V402", WARNING, "trained in part", "The lora_B of some modules is zero: they got no gradient."),
    Code("V403", WARNING, "no effect", "The products of the factors are zero though lora_B is not: lora_A is zero."),
    Code(
        "V404",
        NOTE,
        "rank to spare",
        "Fewer directions than the rank hold all of the update but for a millionth of its energy; a lower rank does "
        "the same.",
    ),
    Code("V405", WARNING, "out of range", "The products of the factors leave the range of numbers."),
    Code(
        "V406",
        WARNING,
        "magnitude not positive",
        "A DoRA magnitude is a length; one of zero or below switches an output off or turns it around.",
    ),
    # With a base.
    Code(
        "V501",
        ERROR,
        "module not in the base",
        "The base has no module of this name: another model, or another version of its code. Loaders that skip it "
        "give the base's answers.",
    ),
    Code("V502", ERROR, "shape of another base", "The layer has another size: a base of another size or family."),
    Code(
        "V503",
        WARNING,
        "another fingerprint",
        "The base's weights are not those that the adapter was made for: another revision, or other quantisation.",
    ),
    Code(
        "V504",
        WARNING,
        "other base weights carried along",
        "The file carries base weights that are not this base's: another model, or a vocabulary that grew.",
    ),
    Code("V505", ERROR, "cannot be attached", "The base's layer cannot take this update."),
    Code(
        "V506",
        WARNING,
        "tied in this base",
        "The base computes its head with the input table: the adapter acts on one use of the matrix alone.",
    ),
    Code(
        "V507",
        NOTE,
        "trained whole, and as it was",
        "It equals the base's own value: it did not train, and takes room.",
    ),
    Code("V508", ERROR, "outputs not finite", "With the adapter the base computes NaN or infinity."),
    Code(
        "V509",
        ERROR,
        "no effect on the base",
        "The base computes the same with the adapter and without, on the probe: the adapter does nothing.",
    ),
    Code("V510", NOTE, "effect not probed", "The base could not be asked, for this reason."),
    Code(
        "V511",
        WARNING,
        "effect next to nothing",
        "The largest change of an output is below a ten-thousandth of the largest output.",
    ),
)

CODES: Mapping[str, Code] = {row.code: row for row in _ROWS}
"""Every code, in order."""


def codes_page() -> str:
    """Return `docs/findings.md`: every code, by what it is about."""
    about = {
        "1": "Files",
        "2": "The configuration",
        "3": "The tensors",
        "4": "The values",
        "5": "With a base",
    }
    lines = [
        "# What `veneer check` finds",
        "",
        "Written by `make findings` from `src/veneer/files/doctor_codes.py`; codes stay what they are. An error means",
        "that the adapter cannot be used as it is (`veneer check` then ends with exit code 1), a warning that it is",
        "likely not what was meant, a note that there is something to know.",
    ]
    for digit, title in about.items():
        lines += ["", f"## {title}", "", "| code | severity | what is found | what it means |", "|---|---|---|---|"]
        rows = [row for row in CODES.values() if row.code[1] == digit]
        lines += [f"| {row.code} | {row.severity} | {row.title} | {row.meaning} |" for row in rows]
    return "\n".join(lines) + "\n"
