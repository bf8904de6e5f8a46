"""What tests of formats of one file share: tensors as a file that is read, an adapter as the file that is written."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from veneer.adapter import Adapter, LowRank
from veneer.files.foreign import settings_for
from veneer.files.format import Format, Hints
from veneer.files.tensors import dump_tensors


def write(kind: Format, folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    path = folder / str(kind.file)
    path.write_bytes(dump_tensors(tensors, metadata))
    return path


def read(
    kind: Format,
    folder: Path,
    tensors: Mapping[str, Tensor],
    hints: Hints | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Adapter:
    found = kind.read(write(kind, folder, tensors, metadata), hints or Hints())
    assert isinstance(found, Adapter)
    return found


def saved(kind: Format, adapter: Adapter, folder: Path, hints: Hints | None = None) -> Path:
    assert kind.write is not None
    path = folder / str(kind.file)
    path.write_bytes(b"".join(kind.write(adapter, hints or Hints())[str(kind.file)]))
    return path


def adapter_of(modules: Mapping[str, LowRank], **more: object) -> Adapter:
    return Adapter(modules, settings_for(modules), **more)
