"""Veneer: LoRA adapters for PyTorch models, from the first row of data to adapters that are proved and served.

The public names are imported when they are first asked for, so that `import veneer` and `veneer --help` cost nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.adapter import Adapter, AdapterMetadata, LowRank, TokenRows
    from veneer.base.load import (
        check_storage,
        load_base,
        load_config,
        load_model,
        load_tokenizer,
        named_dtype,
        num_positions,
        quantise_base,
    )
    from veneer.base.source import Source, base_folder, find_source, gguf_of
    from veneer.config import DataConfig, LoRAConfig, RunConfig, SamplingConfig, TrainConfig
    from veneer.data.answers import generate
    from veneer.data.encode import check_template
    from veneer.data.rows import check_rows, read_prompts, read_rows
    from veneer.demo.run import run_demo
    from veneer.errors import VeneerError
    from veneer.files.doctor_codes import CODES, Finding
    from veneer.files.format import Format, Hints
    from veneer.files.formats import list_formats, recognise
    from veneer.files.manifest import unknown_files
    from veneer.files.peft import load_adapter, save_adapter
    from veneer.files.peft_other import OtherAdapter, read_other
    from veneer.files.shards import read_checkpoint
    from veneer.nn.attach import attach, current_adapter, detach, disabled
    from veneer.nn.fingerprint import fingerprint
    from veneer.nn.plan import Plan, plan
    from veneer.scoring.evaluate import Evaluation, PreparedRows, evaluate, prepare_evaluation
    from veneer.scoring.merge_checkpoint import merge_checkpoint
    from veneer.scoring.merge_gguf import gguf_proof
    from veneer.tools.check import Report, check, check_adapter
    from veneer.tools.check_base import weight_norms
    from veneer.tools.check_effect import Effect
    from veneer.tools.combine import Combination, combine
    from veneer.tools.convert import Converted, convert
    from veneer.tools.draw import draw_summary
    from veneer.tools.extract import Extraction, extract
    from veneer.tools.merge import merge, unmerge
    from veneer.tools.merge_checkpoint import merge_files
    from veneer.tools.merge_checkpoint_record import CheckpointMerge
    from veneer.tools.merge_gguf import GgufExport, check_gguf, export_gguf
    from veneer.tools.merge_record import MergeRecord
    from veneer.tools.relate import Relation, relate
    from veneer.tools.resize import Resizing, resize
    from veneer.tools.summarize import Summary, summarize
    from veneer.tools.to_lora import Conversion, dora_to_lora, to_lora
    from veneer.train.initialise import observe
    from veneer.train.loop import TrainResult
    from veneer.train.run import finetune, run
    from veneer.train.runfile import read_run_file

__version__ = "0.1.0"

_HOME = {
    "Adapter": "veneer.adapter",
    "AdapterMetadata": "veneer.adapter",
    "CODES": "veneer.files.doctor_codes",
    "CheckpointMerge": "veneer.tools.merge_checkpoint_record",
    "Combination": "veneer.tools.combine",
    "Conversion": "veneer.tools.to_lora",
    "Converted": "veneer.tools.convert",
    "DataConfig": "veneer.config",
    "Effect": "veneer.tools.check_effect",
    "Evaluation": "veneer.scoring.evaluate",
    "Extraction": "veneer.tools.extract",
    "Finding": "veneer.files.doctor_codes",
    "Format": "veneer.files.format",
    "GgufExport": "veneer.tools.merge_gguf",
    "Hints": "veneer.files.format",
    "LoRAConfig": "veneer.config",
    "LowRank": "veneer.adapter",
    "MergeRecord": "veneer.tools.merge_record",
    "OtherAdapter": "veneer.files.peft_other",
    "Plan": "veneer.nn.plan",
    "PreparedRows": "veneer.scoring.evaluate",
    "Relation": "veneer.tools.relate",
    "Report": "veneer.tools.check",
    "Resizing": "veneer.tools.resize",
    "RunConfig": "veneer.config",
    "SamplingConfig": "veneer.config",
    "Source": "veneer.base.source",
    "Summary": "veneer.tools.summarize",
    "TokenRows": "veneer.adapter",
    "TrainConfig": "veneer.config",
    "TrainResult": "veneer.train.loop",
    "VeneerError": "veneer.errors",
    "attach": "veneer.nn.attach",
    "base_folder": "veneer.base.source",
    "check": "veneer.tools.check",
    "check_adapter": "veneer.tools.check",
    "check_gguf": "veneer.tools.merge_gguf",
    "check_rows": "veneer.data.rows",
    "check_storage": "veneer.base.load",
    "check_template": "veneer.data.encode",
    "combine": "veneer.tools.combine",
    "convert": "veneer.tools.convert",
    "current_adapter": "veneer.nn.attach",
    "detach": "veneer.nn.attach",
    "disabled": "veneer.nn.attach",
    "dora_to_lora": "veneer.tools.to_lora",
    "draw_summary": "veneer.tools.draw",
    "evaluate": "veneer.scoring.evaluate",
    "export_gguf": "veneer.tools.merge_gguf",
    "extract": "veneer.tools.extract",
    "find_source": "veneer.base.source",
    "finetune": "veneer.train.run",
    "fingerprint": "veneer.nn.fingerprint",
    "generate": "veneer.data.answers",
    "gguf_of": "veneer.base.source",
    "gguf_proof": "veneer.scoring.merge_gguf",
    "list_formats": "veneer.files.formats",
    "load_adapter": "veneer.files.peft",
    "load_base": "veneer.base.load",
    "load_config": "veneer.base.load",
    "load_model": "veneer.base.load",
    "load_tokenizer": "veneer.base.load",
    "merge": "veneer.tools.merge",
    "merge_checkpoint": "veneer.scoring.merge_checkpoint",
    "merge_files": "veneer.tools.merge_checkpoint",
    "named_dtype": "veneer.base.load",
    "num_positions": "veneer.base.load",
    "observe": "veneer.train.initialise",
    "plan": "veneer.nn.plan",
    "prepare_evaluation": "veneer.scoring.evaluate",
    "quantise_base": "veneer.base.load",
    "read_checkpoint": "veneer.files.shards",
    "read_other": "veneer.files.peft_other",
    "read_prompts": "veneer.data.rows",
    "read_rows": "veneer.data.rows",
    "read_run_file": "veneer.train.runfile",
    "recognise": "veneer.files.formats",
    "relate": "veneer.tools.relate",
    "resize": "veneer.tools.resize",
    "run": "veneer.train.run",
    "run_demo": "veneer.demo.run",
    "save_adapter": "veneer.files.peft",
    "summarize": "veneer.tools.summarize",
    "to_lora": "veneer.tools.to_lora",
    "unknown_files": "veneer.files.manifest",
    "unmerge": "veneer.tools.merge",
    "weight_norms": "veneer.tools.check_base",
}

__all__ = [
    "CODES",
    "Adapter",
    "AdapterMetadata",
    "CheckpointMerge",
    "Combination",
    "Conversion",
    "Converted",
    "DataConfig",
    "Effect",
    "Evaluation",
    "Extraction",
    "Finding",
    "Format",
    "GgufExport",
    "Hints",
    "LoRAConfig",
    "LowRank",
    "MergeRecord",
    "OtherAdapter",
    "Plan",
    "PreparedRows",
    "Relation",
    "Report",
    "Resizing",
    "RunConfig",
    "SamplingConfig",
    "Source",
    "Summary",
    "TokenRows",
    "TrainConfig",
    "TrainResult",
    "VeneerError",
    "__version__",
    "attach",
    "base_folder",
    "check",
    "check_adapter",
    "check_gguf",
    "check_rows",
    "check_storage",
    "check_template",
    "combine",
    "convert",
    "current_adapter",
    "detach",
    "disabled",
    "dora_to_lora",
    "draw_summary",
    "evaluate",
    "export_gguf",
    "extract",
    "find_source",
    "finetune",
    "fingerprint",
    "generate",
    "gguf_of",
    "gguf_proof",
    "list_formats",
    "load_adapter",
    "load_base",
    "load_config",
    "load_model",
    "load_tokenizer",
    "merge",
    "merge_checkpoint",
    "merge_files",
    "named_dtype",
    "num_positions",
    "observe",
    "plan",
    "prepare_evaluation",
    "quantise_base",
    "read_checkpoint",
    "read_other",
    "read_prompts",
    "read_rows",
    "read_run_file",
    "recognise",
    "relate",
    "resize",
    "run",
    "run_demo",
    "save_adapter",
    "summarize",
    "to_lora",
    "unknown_files",
    "unmerge",
    "weight_norms",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module 'veneer' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
