"""The budgets of the code itself: size, depth, imports. Raising one is a decision page."""

import ast
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import veneer
from veneer.config import Settings

SOURCE = Path(veneer.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# The only places where something is imported inside a function: optional packages, in the one function that needs
# them, and the root's public names.
IN_FUNCTION_IMPORTS = {
    ("scoring/scores.py", "_sacrebleu"),
    ("demo/dates.py", "_babel"),
    ("data/tables.py", "_pyarrow"),
    ("files/gguf_container.py", "gguf_package"),
}


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in FILES:
        yield path.relative_to(SOURCE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    body = node.body
    docstring = ast.get_docstring(node) is not None
    start = body[1].lineno if docstring and len(body) > 1 else body[0].lineno
    return (node.end_lineno or start) - start + 1 + (body[0].lineno - node.lineno)


def test_files_are_small():
    assert [path for path in FILES if len(path.read_text().splitlines()) > 500] == []


def test_functions_are_short_and_take_few_parameters():
    long, wide = [], []
    for name, tree in trees():
        for node in functions(tree):
            arguments = node.args
            count = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs)
            if code_lines(node) > 60:
                long.append(f"{name}:{node.name} {code_lines(node)}")
            most = 16 if name.startswith("cli/") else 8  # a command's options: docs/decisions/0007
            if count > most + ("self" in [one.arg for one in arguments.args]):
                wide.append(f"{name}:{node.name} {count}")
    assert (long, wide) == ([], [])


def test_nothing_is_imported_in_functions_by_star_or_made_global():
    inside, stars, made_global = set(), [], []
    for name, tree in trees():
        for node in functions(tree):
            if any(isinstance(inner, (ast.Import, ast.ImportFrom)) for inner in ast.walk(node)):
                inside.add((name, node.name))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
                stars.append(name)
            if isinstance(node, ast.Global):
                made_global.append(name)
    assert inside <= IN_FUNCTION_IMPORTS
    assert (stars, made_global) == ([], [])


def test_no_attribute_is_probed_for():
    probes = [
        f"{name}:{node.lineno}"
        for name, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr"
    ]
    assert probes == []


# What changes the disk, by the name of the call.
WRITES = {
    *(
        "write_text",
        "write_bytes",
        "append_bytes",
        "mkdir",
        "makedirs",
        "rmdir",
        "unlink",
        "remove",
        "rename",
        "replace",
    ),
    *("rmtree", "copy", "copyfile", "copytree", "move", "touch", "symlink_to", "hardlink_to", "truncate", "ftruncate"),
    *("savefig", "save_file", "save_pretrained", "mkstemp", "mkdtemp", "NamedTemporaryFile", "TemporaryFile"),
    *("TemporaryDirectory", "memmap", "open_memmap", "tofile"),
}
MODULES_OF_FILES = {"os", "shutil", "tempfile", "pathlib"}
"""Where `remove`, `copy` and the like are about files, and not about lists, strings or tensors."""
ALIKE = {"remove", "rename", "replace", "copy", "move", "truncate"}
WRITERS = {
    ("base/gguf.py", "save_pretrained"),  # transformers writes into a folder that commit_folder made
    ("train/report.py", "savefig"),  # into memory
    ("tools/draw.py", "savefig"),  # into memory
    *(("data/store.py", name) for name in ("TemporaryDirectory", "save_pretrained")),  # only to be hashed, then gone
}


def disk_writes(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield the calls that change the disk other than through a `FileSystem`, with their lines."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        if owner.rpartition(".")[2] in ("fs", "_fs", "REAL"):
            continue
        values = [*node.args, *(one.value for one in node.keywords)]
        modes = [one.value for one in values if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        opens = name == "open" and (
            owner == "os" or any(re.fullmatch(r"[rbt]*[wax+][wax+rbt]*", mode) for mode in modes)
        )
        if opens or (name in WRITES and (name not in ALIKE or owner in MODULES_OF_FILES)):
            yield name, node.lineno


def test_the_disk_is_changed_through_the_file_system_alone():
    found = [
        f"{path}:{line}: {name}"
        for path, tree in trees()
        if path != "files/filesystem.py"
        for name, line in disk_writes(tree)
        if (path, name) not in WRITERS
    ]
    assert found == []


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("Path('a').write_text('x')", 1),
        ("open('a', 'w')", 1),
        ("path.open(mode='ab')", 1),
        ("path.open('r+b')", 1),
        ("os.replace(a, b)", 1),
        ("shutil.rmtree(a)", 1),
        ("figure.savefig(path)", 1),
        ("fs.write_bytes(a, b)", 0),
        ("self._fs.unlink(a)", 0),
        ("path.open('rb')", 0),
        ("open(path)", 0),
        ("text.replace('a', 'b')", 0),
        ("names.remove(1)", 0),
    ],
)
def test_a_write_past_the_file_system_is_seen(code, count):
    assert len(list(disk_writes(ast.parse(code)))) == count


def test_packages_hold_a_docstring_only():
    for path in SOURCE.glob("*/__init__.py"):
        body = ast.parse(path.read_text()).body
        assert len(body) == 1, path
        assert isinstance(body[0], ast.Expr), path


def modules() -> Iterator[str]:
    for path in FILES:
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__")


def test_classes_are_flat_and_settings_small():
    for name in modules():
        for _, one in inspect.getmembers(import_module(name), inspect.isclass):
            if one.__module__ != name:
                continue
            own = [parent for parent in one.__mro__ if parent.__module__.startswith("veneer")]
            assert len(own) <= 2, f"{name}.{one.__name__} is {len(own)} deep"
            if issubclass(one, Settings):
                assert len(one.model_fields) <= 20, one  # docs/decisions/0008


def test_public_names_are_listed_once_and_documented():
    assert sorted(veneer._HOME) == sorted(set(veneer.__all__) - {"__version__"})
    assert dir(veneer) == sorted(veneer.__all__)
    for name in veneer.__all__:
        assert getattr(veneer, name).__doc__, name


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="atach"):
        veneer.atach  # noqa: B018
