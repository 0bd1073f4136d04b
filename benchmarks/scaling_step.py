"""A whole LoFT training step of a LLaMA, compiled ahead of time for a mesh that need not exist.

Nothing is allocated: the model is shapes with shardings. The base lies as Megatron and FSDP have it
(`weight_spec`), adapters and their state where `loft_jax.sharding` puts them, the batch over "data"
and "fsdp". The frozen base and the activations are bfloat16, the adapters and their state float32.
The step is forward, backward, clipping, the optimizer and the update, with adapters and state
donated; layers are recomputed in the backward pass, so that one residual stream a layer is kept.
"""

import dataclasses
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.common.models import llama
from loft_jax import clip_by_projected_global_norm, loft_adamw
from loft_jax.adapters import add_lora, lora_pairs
from loft_jax.sharding import adapter_shardings, state_shardings

AXES = ("data", "fsdp", "tensor")
TOKENS = ("data", "fsdp")
"""The axes over which the batch is split."""

MODELS: dict[str, llama.LlamaConfig] = {
    "tiny": llama.LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        tie_word_embeddings=False,
    ),
    "7b": llama.LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        tie_word_embeddings=False,
    ),
    "70b": llama.LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
    ),
}

# What the compiler must know of a GPU that is not there; public figures of the H200 SXM.
_H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 4800000000000
  device_memory_size: 150109880320
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H200"
"""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained, and on what.

    Attributes:
      target: a TPU topology ("v5e:2x4"), "h200:8", or "cpu" for this process's own devices.
      model: one of `MODELS`.
      mesh: sizes of the axes of `AXES`.
      rank: of the adapters.
      method: LoFT's second moment, or "lora" for `optax.adamw` on the same adapters.
      batch, length: sequences a step, and their tokens.
      targets: which projections have adapters.
      apart: each layer has arrays of its own; else layers are stacked and scanned.
    """

    target: str
    model: str
    mesh: Mapping[str, int]
    rank: int = 16
    method: str = "calibrated"
    batch: int = 16
    length: int = 256
    targets: tuple[str, ...] = ("q", "k", "v", "up", "down")
    apart: bool = False

    @property
    def config(self) -> llama.LlamaConfig:
        return MODELS[self.model]

    def size(self, *axes: str) -> int:
        """Devices along these axes of the mesh."""
        return int(np.prod([self.mesh.get(axis, 1) for axis in axes]))


class RematLlama(llama.Llama):
    """The example's model as it is trained at scale: bfloat16, layers recomputed, sharded."""

    def __init__(self, config: llama.LlamaConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.embed_tokens.dtype = jnp.bfloat16  # else its output, and every layer's, is float32

    def hidden(self, tokens: jax.Array) -> jax.Array:
        graphdef, weights = nnx.split(self.layers)

        @jax.checkpoint
        def run(x: jax.Array, weights: nnx.State) -> tuple[jax.Array, None]:
            return _batch_split(nnx.merge(graphdef, weights)(x)), None

        x, _ = jax.lax.scan(run, _batch_split(self.embed_tokens(tokens)), weights)
        return self.norm(x)


class ApartLlama(RematLlama):
    """The same with arrays of its own for each layer: the program has every layer written out."""

    def __init__(self, config: llama.LlamaConfig, *, rngs: nnx.Rngs):
        super().__init__(dataclasses.replace(config, num_hidden_layers=1), rngs=rngs)
        self.config = config
        count = config.num_hidden_layers
        self.layers = nnx.List([llama.Layer(config, rngs=rngs) for _ in range(count)])

    def hidden(self, tokens: jax.Array) -> jax.Array:
        x = _batch_split(self.embed_tokens(tokens))
        for layer in self.layers:
            graphdef, weights = nnx.split(layer)
            run = lambda x, weights, graphdef=graphdef: nnx.merge(graphdef, weights)(x)
            x = _batch_split(jax.checkpoint(run)(x, weights))
        return self.norm(x)


def _batch_split(x: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, P(TOKENS, None, None))


def weight_spec(path: str, ndim: int) -> P:
    """How a frozen weight is split: over "tensor" as Megatron does, over "data" not."""
    if "embed_tokens" in path:
        return P("tensor", "fsdp")
    if "lm_head" in path:
        return P("fsdp", "tensor")
    if "norm" in path:
        return P()
    row_parallel = re.search(r"(o|down)_proj", path)
    spec = ("tensor", "fsdp") if row_parallel else ("fsdp", "tensor")
    return P(*[None] * (ndim - 2), *spec)


def devices(target: str) -> list[Any]:
    """The devices to compile for. They need not exist.

    Raises:
      RuntimeError, NotImplementedError: the compiler for them is not installed.
    """
    if target == "cpu":
        return jax.devices("cpu")
    if target.startswith("h200"):
        count = target.partition(":")[2]
        topology = {"topology": f"1x1x{count}", "target_config": _H200}
        return list(topologies.get_topology_desc("h200", "cuda", **topology).devices)
    # libtpu wants to know that there is no TPU to ask.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    return list(topologies.get_topology_desc(target, "tpu").devices)


def compiled_step(setting: Setting) -> Any:
    """Compiles the training step; returns jax's compiled object."""
    return compile_lowered(setting, lowered_step(setting))


def compile_lowered(setting: Setting, lowered: Any) -> Any:
    """Compiles what `lowered_step` returns."""
    # A GPU that is not there cannot try which kernel is fastest.
    is_gpu = setting.target.startswith("h200")
    options: dict[str, str | bool] = {"xla_gpu_autotune_level": "0"} if is_gpu else {}
    return lowered.compile(compiler_options=options)


def lowered_step(setting: Setting) -> Any:
    """Traces the training step; returns jax's lowered object."""
    found = devices(setting.target)
    if setting.target == "cpu":  # of a topology no part can be compiled for
        found = found[: setting.size(*AXES)]
    mesh = Mesh(np.array(found).reshape([setting.size(axis) for axis in AXES]), AXES)
    rule = llama.lora_rule(setting.targets, setting.rank, alpha=2 * setting.rank)
    if setting.apart:
        rule = dataclasses.replace(
            rule, path=rule.path.replace("layers/", r"layers/\d+/"), batch=()
        )
    tx = optimizer(setting, rule)

    def make() -> Any:
        kind = ApartLlama if setting.apart else RematLlama
        return add_lora(kind(setting.config, rngs=nnx.Rngs(0)), rule, rngs=nnx.Rngs(1))

    graphdef, adapter, base = nnx.split(nnx.eval_shape(make), nnx.LoRAParam, ...)
    base = _placed(nnx.as_pure(base), mesh)
    adapter = nnx.as_pure(adapter)
    adapter = _with(adapter, adapter_shardings(adapter, base, lora_pairs(rule)))
    state = _with(jax.eval_shape(tx.init, adapter), state_shardings(tx, adapter))
    shape, split = (setting.batch, setting.length), NamedSharding(mesh, P(TOKENS, None))
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=split)

    def step(adapter: Any, state: Any, base: Any, tokens: jax.Array) -> Any:
        loss_fn = lambda adapter: loss(nnx.merge(graphdef, adapter, base), tokens)
        value, gradients = jax.value_and_grad(loss_fn)(adapter)
        with jax.named_scope("optimizer"):
            updates, state = tx.update(gradients, state, adapter)
            adapter = optax.apply_updates(adapter, updates)
        return adapter, state, value

    shardings = jax.tree.map(lambda x: x.sharding, (adapter, state))
    jitted = jax.jit(
        step,
        donate_argnums=(0, 1),
        out_shardings=(*shardings, NamedSharding(mesh, P())),
    )
    with jax.set_mesh(mesh):
        return jitted.lower(adapter, state, base, tokens)


def optimizer(setting: Setting, rule: Any) -> optax.GradientTransformation:
    """Clipping and AdamW: LoFT's, or Optax's on the same adapters."""
    if setting.method == "lora":
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    pairs = lora_pairs(rule)
    second: Any = setting.method
    return optax.chain(
        clip_by_projected_global_norm(1.0, pairs=pairs),
        loft_adamw(1e-3, second_moment=second, pairs=pairs),
    )


def loss(model: Any, tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy of the next token, with the vocabulary split over "tensor"."""
    logits = model(tokens).astype(jnp.float32)
    logits = jax.lax.with_sharding_constraint(logits, P(TOKENS, None, "tensor"))
    labels = jnp.roll(tokens, -1, axis=1)
    # A comparison, since taking the label's logit would gather them.
    is_label = jnp.arange(logits.shape[-1]) == labels[..., None]
    of_label = jnp.where(is_label, logits, 0).sum(-1)
    return (jax.nn.logsumexp(logits, -1) - of_label).mean()


def _placed(base: Any, mesh: Mesh) -> Any:
    def place(path: Any, x: Any) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        sharding = NamedSharding(mesh, weight_spec(name, x.ndim))
        return jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, base)


def _with(tree: Any, shardings: Any) -> Any:
    on = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(on, tree, shardings)
