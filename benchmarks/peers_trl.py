"""TRL's SFTTrainer with PEFT, plain or as unsloth sets it up for a CPU, as a contender of `train_chat.py`.

Runs in the peer's own environment and imports nothing of Veneer. Options:
- `arguments`: what goes to `SFTConfig` beside what all contenders share; empty: TRL's defaults.
- `model`: what goes to `from_pretrained`: dtype, attn_implementation, use_kernels.
- `pack_tokens`: with packing, the tokens of a row, so that about as many tokens make a step as without.
- `unsloth`: load and adapt through unsloth; then `model` goes to its `from_pretrained`, `checkpointing` to its
  `get_peft_model`.
"""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))
from turns import Turns, work

warnings.filterwarnings("ignore")
IGNORED = -100


def contend(turns: Turns, task: dict[str, Any], options: dict[str, Any]) -> None:
    """Train as `SFTTrainer.train` does, held at the border of every step until it is our turn."""
    if options.get("unsloth"):
        import unsloth  # noqa: F401 (before transformers and trl: it changes them)
    import datasets
    import trl

    model, tokenizer, peft_config = (unsloth_model if options.get("unsloth") else plain_model)(turns, task, options)
    rows = [{"input_ids": row["ids"], "labels": labels(row["ids"], row["marks"])} for row in task["rows"]]
    shared = {
        "use_cpu": True,  # without it the defaults stop: "Your setup doesn't support bf16/gpu"
        "output_dir": f"{task['folder']}/{'unsloth' if options.get('unsloth') else 'trl'}",
        "num_train_epochs": task["rounds"],
        "learning_rate": task["learning_rate"],
        "lr_scheduler_type": "constant",
        "max_grad_norm": task["max_grad_norm"],
        "weight_decay": 0.0,
        "seed": task["seed"],
        "train_sampling_strategy": "sequential",  # the rows in the order of the other contenders
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    arguments = dict(options.get("arguments", {}))
    if arguments.get("packing"):
        arguments["max_length"] = options["pack_tokens"]
    trainer = counting(trl.SFTTrainer)(
        model=model,
        args=trl.SFTConfig(**(shared | arguments)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.take_turns(turns, options)
    trainer.train()


def labels(ids: list[int], marks: list[bool]) -> list[int]:
    """Return the ids of the marked tokens, and what transformers leaves out of the loss for the others."""
    return [id_ if mark else IGNORED for id_, mark in zip(ids, marks, strict=True)]


def plain_model(turns: Turns, task: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Load as SFTTrainer does when it is given a path (float32 unless told), and adapt through its `peft_config`."""
    import peft
    import transformers

    how = {"dtype": "float32", **options.get("model", {})}
    model = transformers.AutoModelForCausalLM.from_pretrained(task["model"], **how)
    assert all(parameter.isfinite().all() for parameter in model.parameters())  # looked at, so it counts as loaded
    turns.loaded()
    tokenizer = transformers.AutoTokenizer.from_pretrained(task["model"])
    config = peft.LoraConfig(
        r=task["rank"], lora_alpha=task["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return model, tokenizer, config


def unsloth_model(turns: Turns, task: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any, None]:
    """Load and adapt as unsloth's notebooks do; a 16-bit or float32 base, as the other contenders have."""
    import unsloth

    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        task["model"], max_seq_length=task["longest"], load_in_4bit=False, **options.get("model", {})
    )
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    turns.loaded()
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=task["rank"],
        lora_alpha=task["alpha"],
        use_gradient_checkpointing=options.get("checkpointing", "unsloth"),
        random_state=task["seed"],
    )
    return model, tokenizer, None


def counting(trainer_class: Any) -> Any:
    """Return a trainer that waits for its turn before each step, and knows how many tokens a step supervised."""
    import transformers

    class Holder(transformers.TrainerCallback):
        """What happens at the borders of steps.

        A step's time runs from when it may begin until the next would: its logging and the making of the next batch
        belong to it.
        """

        def __init__(self, turns: Turns, counts: list[int]) -> None:
            self.turns, self.counts = turns, counts
            self.loss: float | None = None

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.finish()
            self.turns.wait()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            self.loss = logs.get("loss", self.loss)

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.finish()

        def finish(self) -> None:
            if self.loss is not None:
                self.turns.done(float(self.loss), self.counts.pop(0))
                self.loss = None

    class Counting(trainer_class):  # type: ignore[misc]
        def take_turns(self, turns: Turns, options: dict[str, Any]) -> None:
            self.counts: list[int] = []
            self.add_callback(Holder(turns, self.counts))
            self.remove_callback(transformers.PrinterCallback)
            args = self.args
            per_round = -(-len(self.get_train_dataloader()) // args.gradient_accumulation_steps)
            weights = next(one for one in self.model.parameters() if not one.requires_grad)
            found = {
                "weights": str(weights.dtype),
                "attention": self.model.config._attn_implementation,
                "bf16_autocast": args.bf16,
                "gradient_checkpointing": args.gradient_checkpointing,
                "optimizer": str(args.optim),
                "per_device_train_batch_size": args.per_device_train_batch_size,
                "gradient_accumulation_steps": args.gradient_accumulation_steps,
                "packing": args.packing,
                "padding_free": bool(self.padding_free),
                "sampling": args.train_sampling_strategy,
                "trained_parameters": sum(one.numel() for one in self.model.parameters() if one.requires_grad),
            }
            packages = ["torch", "transformers", "peft", "trl", "accelerate"]
            packages += ["unsloth", "unsloth_zoo"] if options.get("unsloth") else []
            turns.ready(steps=per_round * int(args.num_train_epochs), packages=packages, found=found)

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            batches, count = super().get_batch_samples(*args, **kwargs)
            if batches:
                self.counts.append(sum(int((one["labels"][:, 1:] != IGNORED).sum()) for one in batches))
            return batches, count

    return Counting


if __name__ == "__main__":
    work(contend)
