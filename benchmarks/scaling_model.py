"""Memory and communication of a LoFT training step on a mesh, on paper.

Pure functions of the model's shape, the rank, the batch and the mesh; docs/scaling.md explains the
terms. All sizes are bytes on one device, all traffic bytes that one device sends in a step.

A weight of ``m`` inputs and ``n`` outputs has an adapter of rank ``r``, and ``t = r (r + 1) / 2``.
``F`` and ``T`` are the sizes of the mesh axes "fsdp" and "tensor"; ``tokens`` those of one device.
"""

import itertools
import math
from typing import NamedTuple

from scaling_step import Setting

FLOAT, HALF = 4, 2  # bytes of float32 and of bfloat16
MIB = 2**20

FAST_MEMORY = {"v5e": 128 * MIB, "v5p": 64 * MIB, "v6e": 128 * MIB}
"""On-chip memory of a TPU core (VMEM), where the compiler keeps what lives for a short while."""


class Weight(NamedTuple):
    """An adapted or frozen projection of every layer, ``m`` inputs and ``n`` outputs.

    Attributes:
      split_m, split_n: over how many devices the inputs and outputs are split.
      row_parallel: whether it is the inputs that lie on "tensor".
      adapted: whether it has an adapter.
    """

    m: int
    n: int
    split_m: int
    split_n: int
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
        splits = (tensor, fsdp) if row_parallel else (fsdp, tensor)
        found.append(Weight(m, n, *splits, row_parallel, name in setting.targets))
    return found


def tokens(setting: Setting) -> float:
    """Tokens of a step on one device."""
    return setting.batch * setting.length / setting.size("data", "fsdp")


def stored(shape: tuple[int, ...], item: int, tiled: bool) -> int:
    """Bytes of an array; a TPU stores two of its axes, whichever pad least, in tiles of 8 x 128.

    Where the first of the two is 4 or less, tiles are as short as that. Vectors and scalars take
    up multiples of 512 bytes.
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
    """Numbers that an optimizer keeps of each row of a factor, by field."""
    packed = r * (r + 1) // 2
    return {
        "calibrated": (r, r, packed),  # basis, first moment, packed cross terms
        "factored": (r, r, 1 + -(-packed // rows)),  # row sums, and a part of the Gram matrix
        "lora": (r, r),  # Adam's two moments
    }[method]


class Memory(NamedTuple):
    """Bytes on one device.

    Attributes:
      base, adapter, state, batch: the arguments of the step.
      forward: temporaries from the first layer to the last one's gradient.
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
        """The two do not live at the same time."""
        return max(self.forward, self.update)

    @property
    def total(self) -> float:
        return self.arguments + self.temporaries


def memory(setting: Setting) -> Memory:
    """Predicts the memory of one device."""
    config, r = setting.config, setting.rank
    fsdp, tensor = setting.size("fsdp"), setting.size("tensor")
    layers, hidden, tiled = config.num_hidden_layers, config.hidden_size, is_tpu(setting)
    local = lambda w: (layers, w.m // w.split_m, w.n // w.split_n)

    base = sum(stored(local(w), HALF, tiled) for w in weights(setting))
    base += 2 * stored((config.vocab_size // tensor, hidden // fsdp), HALF, tiled)
    base += 2 * stored((layers, hidden), HALF, tiled) + stored((hidden,), HALF, tiled)

    adapter = state = new_state = largest = 0
    for w in weights(setting):
        if not w.adapted:
            continue
        for rows, split in ((w.m, w.split_m), (w.n, w.split_n)):
            fields = [
                stored((layers, rows // split, width), FLOAT, tiled)
                for width in state_widths(setting.method, rows, r)
            ]
            adapter += stored((layers, rows // split, r), FLOAT, tiled)
            state += sum(fields)
            largest = max(largest, *fields)
    if setting.method != "lora":
        # Layers take turns in a loop, which writes its results beside what it reads. The largest
        # field is at work meanwhile: as it comes and, where layouts are fixed as on GPUs, turned
        # over, since factors `b` lie along their other axis, and joined from its turns.
        new_state = state + (1 if tiled else 3) * largest

    batch = tokens(setting) * FLOAT
    scalars = 1 if setting.method == "lora" else 3  # steps; LoFT's and the clipping's turn
    state += scalars * stored((), FLOAT, tiled)
    forward = _forward(setting, adapter)
    return Memory(base, adapter, state, batch, forward, adapter + new_state)


def _forward(setting: Setting, adapter: float) -> float:
    """Temporaries of forward and backward: what is kept, and the larger of two working sets."""
    config = setting.config
    fsdp, tensor = setting.size("fsdp"), setting.size("tensor")
    here, hidden = tokens(setting), config.hidden_size
    residuals = config.num_hidden_layers * here * hidden * HALF
    half_adapter = adapter / 2  # the factors in bfloat16, of all layers
    bases = 0 if setting.method == "lora" else adapter  # they need no gradient, and are made early

    # A layer: its weights gathered; the MLP's two inner products, queries, keys and values, each
    # with its gradient; the residual stream, its two norms and its gradient; what q, k and v give
    # to that, where it is summed over "tensor" each by itself; the attention's weights.
    each = weights(setting)
    gathered = sum(w.m * w.n for w in each) / tensor * HALF if fsdp > 1 else 0
    queries = config.num_attention_heads * config.head_dim
    keys = 2 * config.num_key_value_heads * config.head_dim
    wide = (4 * config.intermediate_size + 2 * (queries + keys)) / tensor + 4 * hidden
    wide += 3 * hidden if tensor > 1 else 0
    scores = here * setting.length * config.num_attention_heads / tensor
    layer = gathered + here * wide * HALF + scores * (FLOAT + HALF)
    # The head: its weight gathered, the logits in float32.
    head = hidden * config.vocab_size / tensor * HALF if fsdp > 1 else 0
    head += here * config.vocab_size / tensor * FLOAT
    fast = FAST_MEMORY.get(setting.target.partition(":")[0], 0)
    working = max(adapter + layer, head)
    kept = residuals + half_adapter + bases + max(0, working - fast)
    if not is_tpu(setting) and fsdp > 1:
        # GPUs gather along the major axis only: weights split along the other are turned over.
        turned = sum(w.m * w.n for w in each if w.row_parallel)
        kept += config.num_hidden_layers * turned * HALF / fsdp / tensor
    return kept


class Traffic(NamedTuple):
    """Bytes that one device sends in a step, groups of devices being rings.

    Attributes:
      gathers: FSDP's, of the base and the adapters.
      gradients: sums of the adapters' gradients over the batch.
      tensor: sums of activations over "tensor".
      loft: what the optimizer adds.
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

    # Each weight forward, and again backward where the layer is recomputed; the head once.
    of_layer = sum(w.m * w.n / tensor for w in each) + sum(r * _on_fsdp(w) for w in adapted)
    head = hidden * config.vocab_size / tensor
    gathers = _gather(fsdp) * HALF * (2 * layers * of_layer + head)

    # Summed whole along the axis that "fsdp" splits, then cut.
    of_gradients = sum(r * (_on_fsdp(w) + _on_tensor(w) / tensor) for w in adapted)
    gradients = 2 * _gather(setting.size("data", "fsdp")) * HALF * layers * of_gradients

    # Forward after o and down, recomputed after o; backward the inputs of q, k, v, gate and up,
    # each by itself; embedding and head once. Each adapter adds the product with one factor.
    sums = layers * (8 * hidden + r * len(adapted)) + 2 * hidden
    of_tensor = 2 * _gather(tensor) * HALF * here * sums
    return Traffic(gathers, gradients, of_tensor, loft_traffic(setting))


def loft_traffic(setting: Setting) -> float:
    """What LoFT sums: a few r x r matrices a factor, and the update of the factor that moves.

    The matrices are three Gram matrices and a transport for each factor, over the devices that
    split its rows; the factored second moment adds its own and twice reads what it keeps, and has
    no update to sum. The calibrated one's is summed over the devices that split the partner's rows;
    of the two turns the dearer counts.
    """
    if setting.method == "lora":
        return 0.0
    r, layers = setting.rank, setting.config.num_hidden_layers
    small, moved_a, moved_b = 0.0, 0.0, 0.0
    for w in weights(setting):
        if w.adapted:
            matrices = 7 if setting.method == "factored" else 4
            small += 2 * matrices * r * r * (_gather(w.split_m) + _gather(w.split_n))
            moved_a += 2 * _gather(w.split_n) * r * w.m / w.split_m
            moved_b += 2 * _gather(w.split_m) * r * w.n / w.split_n
    moved = 0 if setting.method == "factored" else max(moved_a, moved_b)
    return layers * FLOAT * (small + moved)


def _gather(group: int) -> float:
    """What a device sends of an array that a ring gathers, or scatters the sum of."""
    return (group - 1) / group


def _on_fsdp(w: Weight) -> int:
    return w.n if w.row_parallel else w.m


def _on_tensor(w: Weight) -> int:
    return w.m if w.row_parallel else w.n


def is_tpu(setting: Setting) -> bool:
    """Whether arrays are tiled and short-lived ones may lie on the chip."""
    return setting.target.partition(":")[0] in FAST_MEMORY
