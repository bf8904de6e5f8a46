r"""Who takes part in `train_chat.py`, in which environment, with which options.

Each peer has a Python environment of its own, found through a variable or a default; one that is not there is a row
that says so. How they were made:

    python3.11 -m venv $VENEER_BENCH_TRL && $VENEER_BENCH_TRL/bin/pip install torch==2.13.0 transformers==5.23.0 \
        peft==0.21.2 trl==1.16.0 datasets psutil
    python3.11 -m venv $VENEER_BENCH_MLX && $VENEER_BENCH_MLX/bin/pip install mlx mlx-cpu mlx-lm scipy-openblas32
    python3.11 -m venv $VENEER_BENCH_UNSLOTH && $VENEER_BENCH_UNSLOTH/bin/pip install torch==2.13.0 \
        transformers==5.17.0 trl==1.15.0 peft==0.21.2 'datasets<5' torchao bitsandbytes einops tyro hf_transfer \
        sentencepiece protobuf psutil msgspec json5 nest-asyncio structlog typer diffusers cut_cross_entropy
    $VENEER_BENCH_UNSLOTH/bin/pip install --no-deps unsloth unsloth_zoo
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib import util
from pathlib import Path
from typing import Any

from common import RESULTS
from turns import Contender

VENVS = {
    "trl": ("VENEER_BENCH_TRL", "/tmp/w/venv_trl"),
    "mlx": ("VENEER_BENCH_MLX", "/tmp/w/venv_mlx"),
    "unsloth": ("VENEER_BENCH_UNSLOTH", "/tmp/w/venv_unsloth"),
}
SEARCHED = {
    "trl": RESULTS / "train_chat_search.json",
    "unsloth": RESULTS / "train_chat_search_unsloth.json",
    "mlx": RESULTS / "train_chat_search_mlx.json",
}
ALONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}  # nothing to pad
BEST: Mapping[str, Mapping[str, Any]] = {
    "trl": {
        "model": {"dtype": "bfloat16"},
        "arguments": {**ALONE, "gradient_checkpointing": False, "bf16": False, "torch_compile": True},
    },
    "unsloth": {
        "unsloth": True,
        "arguments": {**ALONE, "gradient_checkpointing": False},
        "checkpointing": False,
        "environment": {"UNSLOTH_CPU_COMPILE": "1"},
    },
    "mlx": {"rows": 2, "grad_checkpoint": False, "dtype": "float32"},
}
"""What is taken for a peer's best where no search has been run to its end: the best of those tried (docs/log.md)."""
SAME_LOSS: Mapping[str, Any] = {
    "model": {"dtype": "float32"},
    "arguments": {**ALONE, "gradient_checkpointing": False, "bf16": True, "torch_compile": True},
}

# mlx links the reference BLAS; PyPI's OpenBLAS gives its functions a prefix.
BLAS_SHIM = r"""
#define FORWARD(name, real) \
    void scipy_##name(int, int, int, int, int, int, real, const real *, int, const real *, int, real, real *, int); \
    void name(int order, int ta, int tb, int m, int n, int k, real alpha, const real *a, int lda, \
              const real *b, int ldb, real beta, real *c, int ldc) \
    { scipy_##name(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc); }
FORWARD(cblas_sgemm, float)
FORWARD(cblas_dgemm, double)
"""


def contenders(folder: Path, pack_tokens: int) -> dict[str, Contender]:
    """Return everyone by name; `pack_tokens` is how long a packed row is, where the best setting packs."""
    trl, source = best_options("trl")
    same, _ = best_options("trl", "best_same_loss")
    unsloth, unsloth_source = best_options("unsloth")
    mlx, mlx_source = best_options("mlx")
    every = [
        Contender("veneer", sys.executable, "chat_veneer.py"),
        Contender("Veneer over a bfloat16 base", sys.executable, "chat_veneer.py", {"dtype": "bfloat16"}),
        trl_contender("TRL, defaults", {}),
        trl_contender(f"TRL, best ({source})", {**trl, "pack_tokens": pack_tokens}),
        trl_contender(f"TRL, same loss ({source})", {**same, "pack_tokens": pack_tokens}),
        mlx_contender(f"mlx-lm ({mlx_source})", mlx, folder),
        unsloth_contender(f"unsloth ({unsloth_source})", unsloth),
    ]
    if same == trl:
        every.pop(3)
    return {one.name: one for one in every}


def best_options(peer: str, kind: str = "best") -> tuple[dict[str, Any], str]:
    """Return the winner of a peer's search, or our guess where none was run, and which of the two it is.

    Args:
        peer: Whose.
        kind: "best": the fastest; "best_same_loss": the fastest whose loss falls as float32's does.
    """
    path = SEARCHED[peer]
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))[kind]["options"], "found by --search"
    return {**BEST[peer], **(SAME_LOSS if (peer, kind) == ("trl", "best_same_loss") else {})}, "of those tried"


def trl_contender(name: str, options: Mapping[str, Any]) -> Contender:
    """TRL in this interpreter where it is installed, else in its own environment."""
    if util.find_spec("trl") is not None and VENVS["trl"][0] not in os.environ:
        return Contender(name, sys.executable, "peers_trl.py", options)
    python, missing = interpreter("trl")
    return Contender(name, python, "peers_trl.py", options, missing=missing)


def unsloth_contender(name: str, options: Mapping[str, Any]) -> Contender:
    """unsloth, with the variables that its options are set by; it compiles into the folder that it runs in."""
    python, missing = interpreter("unsloth")
    environment = {**options.get("environment", {}), "UNSLOTH_DISABLE_STATISTICS": "1"}
    return Contender(name, python, "peers_trl.py", options, environment, missing)


def mlx_contender(name: str, options: Mapping[str, Any], folder: Path) -> Contender:
    """mlx-lm with OpenBLAS in place of the reference BLAS that its Linux build links."""
    python, missing = interpreter("mlx")
    environment: dict[str, str | None] = {"OPENBLAS_CORETYPE": None, "OPENBLAS_L2_SIZE": None}
    shim = None if missing else openblas(Path(python).parents[1], folder)
    if shim is None:
        name += ", reference BLAS"
    else:
        environment["LD_PRELOAD"] = str(shim)
    return Contender(name, python, "peers_mlx.py", options, environment, missing)


def interpreter(peer: str) -> tuple[str, str]:
    """Return a peer's Python and, where there is none, what to say of it."""
    variable, default = VENVS[peer]
    venv = Path(os.environ.get(variable, default))
    python = venv / "bin" / "python"
    missing = "" if python.exists() else f"no environment at {venv}; {variable} names another (see chat_peers.py)"
    return str(python), missing


def openblas(venv: Path, folder: Path) -> Path | None:
    """Build what gives OpenBLAS's products their plain names, or return None where it cannot be."""
    libraries = sorted(venv.glob("lib/python*/site-packages/scipy_openblas32/lib/libscipy_openblas*.so"))
    if not libraries:
        return None
    source, shim = folder / "blas_shim.c", folder / "blas_shim.so"
    source.write_text(BLAS_SHIM, encoding="ascii")
    command = ["gcc", "-O2", "-shared", "-fPIC", "-o", str(shim), str(source), str(libraries[0])]
    command += [f"-Wl,-rpath,{libraries[0].parent}"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return shim
