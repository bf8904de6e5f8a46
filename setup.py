"""What pyproject.toml cannot say: the kernels in C, compiled where a compiler is, done without elsewhere."""

import hashlib
from pathlib import Path

from setuptools import Extension, setup

OPS = Path("src/veneer/ops")
SOURCES, HEADERS = (sorted(map(str, OPS.glob(f"*.{end}"))) for end in "ch")
digest = hashlib.sha256(b"".join(Path(source).read_bytes() for source in sorted(SOURCES + HEADERS))).hexdigest()

setup(
    ext_modules=[
        Extension(
            "veneer.ops.kernels",
            SOURCES,
            depends=HEADERS,
            define_macros=[("SOURCE", f'"{digest}"')],
            # Functions of OpenMP are left open: they are found in the one that torch has loaded.
            extra_compile_args=["-O3", "-std=gnu11", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"],
            optional=True,
        )
    ]
)
