"""Formulas for memory and communication of a LoFT training step on a mesh.

They are pure functions of the model's shape, the rank, the batch and the mesh; docs/scaling.md
explains the terms. Sizes are bytes on one device; traffic is bytes that one device sends per step.

A weight of ``m`` inputs and ``n`` outputs has an adapter of rank ``r``, and ``t = r (r + 1) / 2``.
``F`` and ``T`` are the sizes of the mesh axes "fsdp" and "tensor"; ``tokens`` those of one device.
"""

import itertools
import math
from typing import NamedTuple

from benchmarks.scaling.step import Setting
from examples.common.losses import CHUNK

FLOAT, HALF = 4, 2  # bytes of float32 and of bfloat16
MIB = 2**20

FAST_MEMORY = {"v5e": 128 * MIB, "v5p": 64 * MIB, "v6e": 128 * MIB}
"""On-chip memory of a TPU core (VMEM); the compiler keeps short-lived arrays there."""


class Weight(NamedTuple):
    """A projection of every layer, with ``m`` inputs and ``n`` outputs.

    Attributes:
      shards_m, shards_n: the number of devices that shard the inputs and the outputs.
      row_parallel: whether "tensor" shards the inputs.
      adapted: whether the weight has an adapter.
    """

    m: int
    n: int
    shards_m: int
    shards_n: int
    row_parallel: bool
    adapted: bool


def weights(setting: Setting) -> list[Weight]:
    """The projections of a layer."""
    config = setting.config
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    shapes = {
        "q": (hidden, queries),
        "k": (hidden, keys),
        "v": (hidden, keys),
        "o": (queries, hidden),
        "gate": (hidden, inner),
        "up": (hidden, inner),
        "down": (inner, hidden),
    }
    fsdp, tensor = setting.size("fsdp"), setting.size("tensor")
    found = []
    for name, (m, n) in shapes.items():
        row_parallel = name in ("o", "down")
        shards = (tensor, fsdp) if row_parallel else (fsdp, tensor)
        found.append(Weight(m, n, *shards, row_parallel, name in setting.targets))
    return found


def tokens(setting: Setting) -> float:
    """Tokens per step on one device."""
    return setting.batch * setting.length / setting.size("data", "fsdp")


def stored(shape: tuple[int, ...], item: int, tiled: bool) -> int:
    """Bytes of an array. A TPU stores the two axes that need least padding in tiles of 8 x 128.

    If the first of the two is 4 or less, tiles have 1, 2 or 4 rows. Vectors and scalars take
    multiples of 512 bytes.
    """
    size = math.prod(shape)
    if not tiled:
        return size * item
    if len(shape) < 2:
        return -(-size * item // 512) * 512

    def padded(rows: int, lanes: int) -> int:
        short = next(x for x in (1, 2, 4, 8) if rows <= x or x == 8)
        return -(-rows // short) * short * -(-lanes // 128) * 128

    pairs = itertools.permutations(shape, 2)
    return min(size // (x * y) * padded(x, y) for x, y in pairs) * item


def state_widths(method: str, rows: int, r: int) -> tuple[int, ...]:
    """The numbers per row of a factor in each field of the state."""
    packed = r * (r + 1) // 2
    return {
        "calibrated": (r, r, packed),  # basis, first moment, packed cross terms
        "factored": (r, r, 1 + -(-packed // rows)),  # row sums, a part of the Gram matrix
        "lora": (r, r),  # Adam's two moments
    }[method]


class Memory(NamedTuple):
    """Bytes on one device.

    Attributes:
      base, adapter, state, batch: the arguments of the step.
      forward: temporaries of the forward and backward pass.
      update: temporaries of the optimizer.
    """

    base: float
    adapter: float
    state: float
    batch: float
    forward: float
    update: float

    @property
    def arguments(self) -> float:
        return self.base + self.adapter + self.state + self.batch

    @property
    def temporaries(self) -> float:
        """The larger of the two: they are not live at the same time."""
        return max(self.forward, self.update)

    @property
    def total(self) -> float:
        return self.arguments + self.temporaries


def memory(setting: Setting) -> Memory:
    """Predicts the memory of one device."""
    config, r = setting.config, setting.rank
    fsdp, tensor = setting.size("fsdp"), setting.size("tensor")
    layers, hidden, tiled = config.num_hidden_layers, config.hidden_size, is_tpu(setting)
    local = lambda w: (layers, w.m // w.shards_m, w.n // w.shards_n)

    base = sum(stored(local(w), HALF, tiled) for w in weights(setting))
    base += 2 * stored((config.vocab_size // tensor, hidden // fsdp), HALF, tiled)
    base += 2 * stored((layers, hidden), HALF, tiled) + stored((hidden,), HALF, tiled)

    adapter = state = new_state = largest = 0
    for w in weights(setting):
        if not w.adapted:
            continue
        for rows, shards in ((w.m, w.shards_m), (w.n, w.shards_n)):
            fields = [
                stored((layers, rows // shards, width), FLOAT, tiled)
                for width in state_widths(setting.method, rows, r)
            ]
            adapter += stored((layers, rows // shards, r), FLOAT, tiled)
            state += sum(fields)
            largest = max(largest, *fields)
    if setting.method != "lora":
        # A loop over chunks of layers writes the new state to new arrays. It also needs copies of
        # the largest field: one, and where layouts are fixed, as on GPUs, two more for the
        # transposed factors `b` and for joining the chunks.
        new_state = state + (1 if tiled else 3) * largest

    batch = tokens(setting) * FLOAT
    # The step; LoFT's active factor, once more where clipping is a transformation of its own.
    scalars = 1 if setting.method == "lora" else 3 if setting.chained else 2
    state += scalars * stored((), FLOAT, tiled)
    forward = _forward(setting, adapter)
    return Memory(base, adapter, state, batch, forward, adapter + new_state)


def _forward(setting: Setting, adapter: float) -> float:
    """Temporaries of forward and backward: residuals, and the larger of two working sets."""
    config = setting.config
    fsdp, tensor = setting.size("fsdp"), setting.size("tensor")
    here, hidden = tokens(setting), config.hidden_size
    residuals = config.num_hidden_layers * here * hidden * HALF
    half_adapter = adapter / 2  # the factors of all layers in bfloat16
    bases = 0 if setting.method == "lora" else adapter  # compilers compute them early

    # A layer: its gathered weights; the two hidden activations of the MLP, queries, keys and
    # values, each with its gradient; the residual stream, its two norms and its gradient; the
    # contributions of q, k and v to it, each summed over "tensor"; the attention weights.
    each = weights(setting)
    gathered = sum(w.m * w.n for w in each) / tensor * HALF if fsdp > 1 else 0
    queries = config.num_attention_heads * config.head_dim
    keys = 2 * config.num_key_value_heads * config.head_dim
    wide = (4 * config.intermediate_size + 2 * (queries + keys)) / tensor + 4 * hidden
    wide += 3 * hidden if tensor > 1 else 0
    scores = here * setting.length * config.num_attention_heads / tensor
    layer = gathered + here * wide * HALF + scores * (FLOAT + HALF)
    # The head: its gathered weight, and the logits in float32.
    head = hidden * config.vocab_size / tensor * HALF if fsdp > 1 else 0
    at_a_time = here if setting.whole_logits else min(here, CHUNK / setting.size("data", "fsdp"))
    head += at_a_time * config.vocab_size / tensor * FLOAT
    fast = FAST_MEMORY.get(setting.target.partition(":")[0], 0)
    working = max(adapter + layer, head)
    kept = residuals + half_adapter + bases + max(0, working - fast)
    if not is_tpu(setting) and fsdp > 1:
        # GPUs gather along the major axis only; weights sharded along the other are transposed.
        transposed = sum(w.m * w.n for w in each if w.row_parallel)
        kept += config.num_hidden_layers * transposed * HALF / fsdp / tensor
    return kept


class Traffic(NamedTuple):
    """Bytes that one device sends in a step, with groups of devices as rings.

    Attributes:
      gathers: gathers of the base and the adapters over "fsdp".
      gradients: sums of the adapters' gradients over the batch.
      tensor: sums of activations over "tensor".
      loft: the traffic of the optimizer.
    """

    gathers: float
    gradients: float
    tensor: float
    loft: float


def traffic(setting: Setting) -> Traffic:
    """Predicts the traffic of one device."""
    config, r = setting.config, setting.rank
    fsdp, tensor = setting.size("fsdp"), setting.size("tensor")
    each, adapted = weights(setting), [w for w in weights(setting) if w.adapted]
    layers, hidden, here = config.num_hidden_layers, config.hidden_size, tokens(setting)

    # Each weight once forward and once in the recomputation; the head once.
    of_layer = sum(w.m * w.n / tensor for w in each) + sum(r * _on_fsdp(w) for w in adapted)
    head = hidden * config.vocab_size / tensor
    gathers = _gather(fsdp) * HALF * (2 * layers * of_layer + head)

    # Summed whole along the axis that "fsdp" shards, then sliced.
    of_gradients = sum(r * (_on_fsdp(w) + _on_tensor(w) / tensor) for w in adapted)
    gradients = 2 * _gather(setting.size("data", "fsdp")) * HALF * layers * of_gradients

    # Forward after o and down, recomputed after o; backward the inputs of q, k, v, gate and up,
    # separately; embedding and head once. Each adapter adds the product with one factor.
    sums = layers * (8 * hidden + r * len(adapted)) + 2 * hidden
    of_tensor = 2 * _gather(tensor) * HALF * here * sums
    return Traffic(gathers, gradients, of_tensor, loft_traffic(setting))


def loft_traffic(setting: Setting) -> float:
    """The traffic of LoFT: sums of r x r matrices, and of the update of the active factor.

    The matrices of a factor are three Gram matrices and a calibration, summed over the devices that
    shard its rows. The factored second moment adds its own Gram matrix and reads the stored one
    twice; it has no update to sum. The calibrated update is summed over the devices that shard the
    partner's rows; the more expensive of the two active factors counts.
    """
    if setting.method == "lora":
        return 0.0
    r, layers = setting.rank, setting.config.num_hidden_layers
    small, update_a, update_b = 0.0, 0.0, 0.0
    for w in weights(setting):
        if w.adapted:
            matrices = 7 if setting.method == "factored" else 4
            small += 2 * matrices * r * r * (_gather(w.shards_m) + _gather(w.shards_n))
            update_a += 2 * _gather(w.shards_n) * r * w.m / w.shards_m
            update_b += 2 * _gather(w.shards_m) * r * w.n / w.shards_n
    update = 0 if setting.method == "factored" else max(update_a, update_b)
    return layers * FLOAT * (small + update)


def _gather(group: int) -> float:
    """The share of an array that a device sends when a ring gathers or reduce-scatters it."""
    return (group - 1) / group


def _on_fsdp(w: Weight) -> int:
    return w.n if w.row_parallel else w.m


def _on_tensor(w: Weight) -> int:
    return w.m if w.row_parallel else w.n


def is_tpu(setting: Setting) -> bool:
    """Whether arrays are tiled and short-lived ones may stay on the chip."""
    return setting.target.partition(":")[0] in FAST_MEMORY
