"""A whole LoFT training step of a LLaMA, compiled ahead of time for a mesh that need not exist.

The model consists of shapes with shardings; nothing is allocated. The frozen base is sharded as in
Megatron and FSDP (`weight_spec`), adapters and state by `loft_jax.sharding`, the batch over "data"
and "fsdp". The frozen base and the activations are bfloat16, the adapters and their state float32.
The step is forward, backward, clipping, optimizer and update, with adapters and state donated. The
backward pass recomputes the layers, so the step keeps one residual stream per layer.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.common.losses import cross_entropy, token_losses
from examples.common.methods import adapt
from examples.common.models import llama
from examples.common.models.stacking import scan_layers
from loft_jax import clip_by_projected_global_norm, loft_adamw, loft_muon
from loft_jax.adapters import lora_pairs
from loft_jax.sharding import adapter_shardings, state_shardings

AXES = ("data", "fsdp", "tensor")
TOKENS = ("data", "fsdp")
"""The axes that shard the batch."""
METHODS = ("calibrated", "factored", "lora")
"""The methods that `formulas` predicts."""
OTHER_METHODS = ("calibrated-bfloat16", "simple", "muon", "dora")


def _config(
    vocabulary: int, hidden: int, inner: int, layers: int, heads: int, keys: int
) -> llama.LlamaConfig:
    return llama.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=hidden // heads,
        tie_word_embeddings=False,
    )


MODELS: dict[str, llama.LlamaConfig] = {
    "tiny": _config(256, 128, 384, layers=3, heads=8, keys=4),
    "7b": _config(32000, 4096, 11008, layers=32, heads=32, keys=32),
    "70b": _config(128256, 8192, 28672, layers=80, heads=64, keys=8),
}

# The description that the compiler needs of an absent GPU: public figures of the H200 SXM.
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
    """What is trained, and on which devices.

    Attributes:
      target: a TPU topology ("v5e:2x4"), "h200:8", or "cpu" for the devices of this process.
      model: one of `MODELS`.
      mesh: sizes of the axes of `AXES`; an axis that is missing has size 1.
      rank: the rank of the adapters.
      method: LoFT's second moment; "lora" for `optax.adamw` on the same adapters; or one of
        `OTHER_METHODS`.
      batch, length: sequences per step, and tokens of a sequence.
      targets: the projections with adapters.
      stacked: layers are stacked and scanned; otherwise each layer has its own arrays.
      chained: LoFT's clipping is a transformation of its own, as when the kept rows were compiled;
        otherwise it is the optimizer's ``max_norm``.
      whole_logits: the logits of all tokens are held at a time, as when most rows were compiled;
        otherwise those of a chunk, as in the examples.
    """

    target: str
    model: str
    mesh: Mapping[str, int]
    rank: int = 16
    method: str = "calibrated"
    batch: int = 16
    length: int = 256
    targets: tuple[str, ...] = ("q", "k", "v", "up", "down")
    stacked: bool = True
    chained: bool = True
    whole_logits: bool = True

    @property
    def config(self) -> llama.LlamaConfig:
        return MODELS[self.model]

    def size(self, *axes: str) -> int:
        """The number of devices along these axes of the mesh."""
        return int(np.prod([self.mesh.get(axis, 1) for axis in axes]))


class RematLlama(llama.Llama):
    """The example's model for large scale: bfloat16, layers recomputed, sharded."""

    def __init__(self, config: llama.LlamaConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.embed_tokens.dtype = jnp.bfloat16  # otherwise all activations are float32

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> jax.Array:
        assert positions is None and segments is None
        run = lambda layer, x: _shard_batch(layer(x, jnp.arange(tokens.shape[1])[None]))
        x = _shard_batch(self.embed_tokens(tokens))
        return self.norm(scan_layers(self.layers, x, run, keeps="input"))

    def head(self, x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(super().head(x), P(TOKENS, None, "tensor"))


class UnstackedLlama(RematLlama):
    """The same with separate arrays for each layer; the program contains each layer."""

    def __init__(self, config: llama.LlamaConfig, *, rngs: nnx.Rngs):
        super().__init__(dataclasses.replace(config, num_hidden_layers=1), rngs=rngs)
        self.config = config
        count = config.num_hidden_layers
        self.layers = nnx.List([llama.Layer(config, rngs=rngs) for _ in range(count)])

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> jax.Array:
        assert positions is None and segments is None
        places = jnp.arange(tokens.shape[1])[None]
        x = _shard_batch(self.embed_tokens(tokens))
        for layer in self.layers:
            graphdef, weights = nnx.split(layer)
            run = lambda x, weights, graphdef=graphdef: nnx.merge(graphdef, weights)(x, places)
            x = _shard_batch(jax.checkpoint(run)(x, weights))
        return self.norm(x)


def _shard_batch(x: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, P(TOKENS, None, None))


def weight_spec(path: str, ndim: int) -> P:
    """The sharding of a frozen weight: over "tensor" as in Megatron, and over "fsdp"."""
    if "embed_tokens" in path:
        return P("tensor", "fsdp")
    if "lm_head" in path:
        return P("fsdp", "tensor")
    if "norm" in path:
        return P()
    row_parallel = re.search(r"(o|down)_proj", path)
    spec = ("tensor", "fsdp") if row_parallel else ("fsdp", "tensor")
    return P(*[None] * (ndim - 2), *spec)


def without_accelerators() -> None:
    """Runs this process on the CPU; libtpu and the CUDA plugin then only compile."""
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def devices(target: str) -> list[Any]:
    """The devices to compile for, which need not exist.

    Raises:
      RuntimeError, NotImplementedError: the compiler for these devices is not installed.
    """
    if target == "cpu":
        return jax.devices("cpu")
    if target.startswith("h200"):
        count = target.partition(":")[2]
        topology = {"topology": f"1x1x{count}", "target_config": _H200}
        return list(topologies.get_topology_desc("h200", "cuda", **topology).devices)
    # Otherwise libtpu queries a TPU's metadata server.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    return list(topologies.get_topology_desc(target, "tpu").devices)


def compiled_step(setting: Setting) -> Any:
    """Traces and compiles the training step."""
    return compile_lowered(setting, lowered_step(setting))


def compile_lowered(setting: Setting, lowered: Any) -> Any:
    """Compiles the result of `lowered_step`."""
    # Autotuning needs the GPU.
    is_gpu = setting.target.startswith("h200")
    options: dict[str, str | bool] = {"xla_gpu_autotune_level": "0"} if is_gpu else {}
    return lowered.compile(compiler_options=options)


def lowered_step(setting: Setting) -> Any:
    """Traces the training step."""
    found = devices(setting.target)
    if setting.target == "cpu":  # a topology must be used whole
        found = found[: setting.size(*AXES)]
    mesh = Mesh(np.array(found).reshape([setting.size(axis) for axis in AXES]), AXES)
    rule = llama.lora_rule(setting.targets, setting.rank, alpha=2 * setting.rank)
    if not setting.stacked:
        rule = dataclasses.replace(
            rule, path=rule.regex.replace("layers/", r"layers/\d+/"), batch=()
        )
    tx = optimizer(setting, rule)

    def make() -> Any:
        kind = RematLlama if setting.stacked else UnstackedLlama
        method = "dora" if setting.method == "dora" else "lora"
        return adapt(kind(setting.config, rngs=nnx.Rngs(0)), method, rule, nnx.Rngs(1))

    graphdef, adapter, base = nnx.split(nnx.eval_shape(make), nnx.LoRAParam, ...)
    base = _placed(nnx.as_pure(base), mesh)
    adapter = nnx.as_pure(adapter)
    adapter = _with(adapter, adapter_shardings(adapter, base, lora_pairs(rule)))
    state = _with(jax.eval_shape(tx.init, adapter), state_shardings(tx, adapter))
    shape, sharding = (setting.batch, setting.length), NamedSharding(mesh, P(TOKENS, None))
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)

    def step(adapter: Any, state: Any, base: Any, tokens: jax.Array) -> Any:
        loss_fn = lambda adapter: loss(nnx.merge(graphdef, adapter, base), tokens, setting)
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
    """Clipping and AdamW: those of LoFT, or those of Optax on the same adapters."""
    if setting.method in ("lora", "dora"):
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    pairs = lora_pairs(rule)
    if setting.method == "muon":
        return loft_muon(1e-3, max_norm=1.0, pairs=pairs)
    if setting.method == "calibrated-bfloat16":
        return loft_adamw(1e-3, max_norm=1.0, nu_dtype="bfloat16", pairs=pairs)
    second: Any = "diagonal" if setting.method == "simple" else setting.method
    if not setting.chained:
        return loft_adamw(1e-3, second_moment=second, max_norm=1.0, pairs=pairs)
    return optax.chain(
        clip_by_projected_global_norm(1.0, pairs=pairs),
        loft_adamw(1e-3, second_moment=second, pairs=pairs),
    )


def loss(model: RematLlama, tokens: jax.Array, setting: Setting) -> jax.Array:
    """Mean cross-entropy of the next token, with the vocabulary sharded over "tensor"."""
    labels = jnp.roll(tokens, -1, axis=1)
    if setting.whole_logits:
        return cross_entropy(model(tokens), labels).mean()
    # Gathered once, not for each chunk.
    kernel = model.lm_head.kernel
    kernel[...] = jax.lax.with_sharding_constraint(kernel[...], P(None, "tensor"))
    return token_losses(model, tokens, labels).mean()


def _placed(base: Any, mesh: Mesh) -> Any:
    def place(path: Any, x: Any) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        sharding = NamedSharding(mesh, weight_spec(name, x.ndim))
        return jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, base)


def _with(tree: Any, shardings: Any) -> Any:
    on = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(on, tree, shardings)
