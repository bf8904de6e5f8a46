"""How do time and memory of a training step grow with its tokens, with the vocabulary, and past what memory would hold?

For each model a row for each number of tokens a step, in sequences of 512 (one of 256 for the smallest), every token
supervised, LoRA of rank 8 on all linear layers, float32 or `--dtype bfloat16`: seconds, tokens a second, peak memory
above the loaded model, and what the formula says that a step keeps. PEFT 0.21 on transformers beside it, at its
strongest on a CPU (sdpa, no padding, no mask), as far as its memory goes. Each measurement is a process of its own:
one step to warm up, then the best of N. `3b-int8` is a Llama of 3.2 billion parameters with random weights in int8,
one optimiser step of 1,024 tokens with its layers computed again in the backward.

    python benchmarks/train_scale.py --models smollm2 gemma qwen 3b-int8 --gguf-dir DIR
    python benchmarks/train_scale.py --models gemma --gguf-dir DIR --dtype bfloat16 --tokens 2048
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import veneer
from veneer.base.ragged import RaggedBatch
from veneer.config import TrainConfig
from veneer.scoring.loss import summed_loss
from veneer.storage.int8 import Int8Linear
from veneer.train.optimizer import FlatAdamW
from veneer.train.ways import computing, gates_again_from

sys.path.insert(0, str(Path(__file__).parent))
from common import bytes_held, memory, save, table

LENGTH, RANK, RATE = 512, 8, 1e-4
MEMORY_LIMIT = 20e9
FILES = {"gemma": "gemma-3-270m-q4_k_m.gguf", "qwen": "qwen2.5-coder-0.5b-instruct-q4.gguf"}
TOKENS = {
    "smollm2": (256, 512, 1024, 2048, 4096, 8192, 16_384),
    "gemma": (512, 2048, 4096),
    "qwen": (512, 2048, 4096),
    "3b-int8": (1024,),
}


def random_3b() -> PreTrainedModel:
    """Llama-3.2-3B's shape; linear layers are int8 from the start, so that no more is ever held."""
    config = LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128_256,
        tie_word_embeddings=True,
        dtype="float32",
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    for path, module in list(model.model.named_modules()):
        if type(module) is nn.Linear:
            layer = Int8Linear(module.in_features, module.out_features)
            layer.codes_OI.random_(-127, 128, generator=generator)
            layer.scale_bits_O.copy_(torch.full((module.out_features,), 0.02 / 127).view(torch.int32))
            parent, _, name = path.rpartition(".")
            setattr(model.model.get_submodule(parent), name, layer)
    table_VD = torch.empty(config.vocab_size, config.hidden_size).normal_(std=0.02, generator=generator)
    model.model.embed_tokens.weight = nn.Parameter(table_VD)
    model.lm_head.weight = model.model.embed_tokens.weight
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(torch.ones(parameter.shape)))
    rotary = type(model.model.rotary_emb)(config)
    model.model.rotary_emb = rotary
    return model.requires_grad_(False).eval()


def loaded(name: str, folder: str, dtype: str) -> PreTrainedModel:
    if name == "3b-int8":
        return random_3b()
    model, _ = veneer.load_base(name if name == "smollm2" else str(Path(folder, FILES[name])), dtype=dtype)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    return model


def lengths_of(tokens: int) -> tuple[int, ...]:
    return (LENGTH,) * (tokens // LENGTH) if tokens >= LENGTH else (tokens,)


def ids_of(tokens: int) -> torch.Tensor:
    return torch.randint(3, 49_000, (tokens,), generator=torch.Generator().manual_seed(0))


def formula_bytes(model: PreTrainedModel, tokens: int, parameters: int, settings: TrainConfig) -> int:
    """What a step keeps: tensors of all tokens for backward, one chunk of logits, 12 bytes a trained parameter.

    In each layer its input and the sum behind attention (D each), queries and attention's output (A each), keys and
    values, gate and up (F each); with norms behind the halves D more for each, with norms of heads those before them.
    What is computed again is there for one layer at a time.
    """
    config = model.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    gates = 2 * config.intermediate_size
    width = 2 * config.hidden_size + 2 * queries + 2 * keys + gates
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    width += 2 * config.hidden_size * ("post_feedforward_layernorm" in names)
    width += (queries + keys) * ("q_norm" in names)
    of_all, of_one = width, 0
    if settings.checkpoint_activations is True:
        of_all, of_one = config.hidden_size, width
    elif (start := gates_again_from(model, settings)) is not None and tokens >= start:
        of_all, of_one = width - gates, gates
    kept = tokens * (of_all * config.num_hidden_layers + of_one)
    rows = min(veneer.ops.loss.chunk_rows(config.vocab_size, 4), tokens)
    bytes_each = model.dtype.itemsize
    logits = rows * config.vocab_size * (4 if bytes_each == 4 else 4 + bytes_each)
    return bytes_each * kept + logits + 12 * parameters


def ours(name: str, tokens: int, folder: str, dtype: str, steps: int) -> dict:
    model = loaded(name, folder, dtype)
    before, settings = memory("VmRSS"), TrainConfig(checkpoint_activations=name == "3b-int8" or "auto")
    attachment = veneer.attach(model, veneer.LoRAConfig(rank=RANK, alpha=2 * RANK))
    model.train()
    optimizer = FlatAdamW(attachment.parameters(), weight_decay=0.0, max_grad_norm=1.0)
    supervised = torch.ones(tokens, dtype=torch.bool)
    lengths = lengths_of(tokens)
    supervised[:: lengths[0]] = False
    batch = RaggedBatch(ids_of(tokens), supervised, lengths)
    seconds, losses = [], []
    with ExitStack() as stack:
        stack.enter_context(computing(model, settings))
        for _ in range(steps):
            start = time.perf_counter()
            loss = summed_loss(model, batch) / supervised.sum()
            loss.backward()
            optimizer.step(RATE)
            seconds.append(time.perf_counter() - start)
            losses.append(loss.item())
    parameters = sum(one.numel() for one in attachment.parameters().values())
    formula = formula_bytes(model, tokens, parameters, settings)
    return {
        "seconds": seconds,
        "losses": losses,
        "above": memory("VmHWM") - before,
        "peak": memory("VmHWM"),
        "formula": formula,
        "held": bytes_held(model),
    }


def pefts(name: str, tokens: int, folder: str, dtype: str, steps: int) -> dict:
    import peft

    model = loaded(name, folder, dtype)
    before = memory("VmRSS")
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    # In 16 bits PEFT would keep the factors in 32 and cast around each of them.
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    ids = ids_of(tokens).view(-1, lengths_of(tokens)[0])
    seconds, losses = [], []
    for _ in range(steps):
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    return {"seconds": seconds, "losses": losses, "above": memory("VmHWM") - before, "peak": memory("VmHWM")}


CONTENDERS = {"veneer": ours, "peft": pefts}


def work(pipe: Connection, who: str, *arguments: object) -> None:
    pipe.send(CONTENDERS[who](*arguments))


def measure(who: str, name: str, tokens: int, folder: str, dtype: str, steps: int) -> dict | None:
    """Run a contender in a process of its own; None where it does not live to the end."""
    spawn = multiprocessing.get_context("spawn")
    mine, theirs = spawn.Pipe()
    process = spawn.Process(target=work, args=(theirs, who, name, tokens, folder, dtype, steps))
    process.start()
    theirs.close()
    try:
        return mine.recv()
    except EOFError:
        return None
    finally:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=TOKENS, default=["smollm2"])
    parser.add_argument("--gguf-dir", default=".", help="where get_models.sh put Gemma and Qwen")
    parser.add_argument("--steps", type=int, default=3, help="steps of each, the first of which warms up")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base, for both")
    parser.add_argument("--tokens", type=int, nargs="+", help="steps of so many tokens; all by default")
    arguments = parser.parse_args()
    for name in arguments.models:
        results, rows = {}, []
        per_token: float | None = 0.0
        for tokens in arguments.tokens or TOKENS[name]:
            how = arguments.gguf_dir, arguments.dtype, arguments.steps if name != "3b-int8" else 1
            mine = measure("veneer", name, tokens, *how)
            fits = name != "3b-int8" and per_token is not None and per_token * tokens < MEMORY_LIMIT
            theirs = measure("peft", name, tokens, *how) if fits else None
            per_token = theirs["peak"] / tokens if theirs else None
            results[tokens] = {"veneer": mine, "peft": theirs}
            rows.append(row(tokens, mine, theirs))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        kind = "" if arguments.dtype == "float32" else f"_{arguments.dtype}"
        facts = {"rank": RANK, "length": LENGTH, "dtype": arguments.dtype, "results": results}
        path = save(f"train_scale_{name}{kind}", facts)
        print(f"\n{name}\n\n{table(rows)}\n\n{path}", flush=True)


def row(tokens: int, mine: dict | None, theirs: dict | None) -> dict[str, str]:
    if mine is None:
        return {"tokens a step": f"{tokens:,}", "Veneer": "did not end"}
    best = min(mine["seconds"])
    found = {
        "tokens a step": f"{tokens:,}",
        "Veneer": f"{best:.2f} s",
        "tokens/s": f"{tokens / best:.0f}",
        "above the loaded model": f"{mine['above'] / 1e6:,.0f} MB",
        "formula": f"{mine['formula'] / 1e6:,.0f} MB",
        "peak": f"{mine['peak'] / 1e6:,.0f} MB",
        "PEFT": "–",
        "above": "–",
        "speed": "–",
        "memory": "–",
    }
    if theirs is not None:
        other = min(theirs["seconds"])
        found |= {
            "PEFT": f"{other:.2f} s",
            "above": f"{theirs['above'] / 1e6:,.0f} MB",
            "speed": f"{other / best:.2f} x",
            "memory": f"{mine['above'] / theirs['above']:.2f}",
        }
    return found


if __name__ == "__main__":
    main()
