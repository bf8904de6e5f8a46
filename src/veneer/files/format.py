"""What a format of adapter files is: how it is recognised, read and written."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from veneer.adapter import Adapter
from veneer.files.filesystem import Content
from veneer.files.peft_other import OtherAdapter
from veneer.files.shards import Checkpoint


@dataclass(frozen=True)
class Hints:
    """What an adapter's files leave out, as far as somebody says it; a format that needs more says which.

    Args:
        base: The base's tensors and configuration: names, shapes, heads. Some formats cannot be read without.
        alpha: For formats that do not store it.
        component: The part of a pipeline that is meant, such as `unet`: it alone is read, and its paths are those of
            that model; what is written is said to be of it.
        fused: For layers that were trained in parts and stored as one (a packed qkv): whether their alpha counts for
            the `part` or for the `whole`. Files do not tell.
        style: Which of its namings a format writes, where it has several; None is the newest. Of diffusers `new`, `old`
            or `oldest`, of kohya `flux` or `sd3`: the names that sd-scripts and ComfyUI have for those models.
        enabled: For loralib's MergedLinear, of which only some parts may have factors: its `enable_lora`, such as
            (True, False, True).

    Example:
        >>> Hints(alpha=16.0).base is None
        True
    """

    base: Checkpoint | None = None
    alpha: float | None = None
    component: str | None = None
    fused: str | None = None
    style: str | None = None
    enabled: tuple[bool, ...] | None = None


@dataclass(frozen=True)
class Sight:
    """What can be seen of files without reading their values: enough to tell whose they are.

    Args:
        path: The file or folder.
        files: Names in the folder, or the file's own.
        keys: Names of the tensors in the one safetensors file that is meant, sorted; empty where there is none.
        metadata: What that file's header says besides.
        config: What `adapter_config.json` says; empty without one.
    """

    path: Path
    files: tuple[str, ...]
    keys: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    config: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class Format:
    """One format of adapter files.

    Args:
        name: What the command line calls it.
        title: What it is, in a few words.
        recognise: Tells whether files are of this format by what can be seen of them.
        read: Returns the adapter in a file or folder; every tensor of it is used, or an error names it.
        write: Returns the files, by name, that say what an adapter does; what the format cannot carry is an error that
            lists all of it. None where we only read.
        file: The name of its only file, where it is a single one; None for a folder of several.
        is_pickle: Whether its files are pickles, which only an explicit command opens, in a process of their own.
        has_components: Whether its tensors' names begin with a part of a pipeline.
        needs: Options that `veneer convert` cannot read its files without, as they are typed.
    """

    name: str
    title: str
    recognise: Callable[[Sight], bool]
    read: Callable[[Path, Hints], Adapter | OtherAdapter]
    write: Callable[[Adapter, Hints], Mapping[str, Content]] | None = None
    file: str | None = None
    is_pickle: bool = False
    has_components: bool = False
    needs: tuple[str, ...] = ()
