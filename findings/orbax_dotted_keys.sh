#!/usr/bin/env bash
# orbax-checkpoint 0.12.8 joins the keys of a path with dots to name an array. So {"a.b": x, "a": {"b": y}}
# has one name for two arrays, and if they have the same shape, saving gives no error. Both are restored as
# the same array, with or without a target, and the other is lost. Which one survives differs from save to
# save. A list collides too: "layer.0" with the first item of "layer".
#
# Seen, without and with a target: "saved 0 1 2 3", "a.b is a[b]: True, layer.0 is layer[0]: True".
# Fails if that changes. CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check orbax-checkpoint==0.12.8 jax==0.10.2
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - "$folder/checkpoint" <<'PY' 2>/dev/null
import sys

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp


def values(tree):
    arrays = tree["a.b"], tree["a"]["b"], tree["layer.0"], tree["layer"][0]
    return [int(x[0]) for x in arrays]


tree = {
    "a.b": jnp.full(3, 0),
    "a": {"b": jnp.full(3, 1)},
    "layer.0": jnp.full(3, 2),
    "layer": [jnp.full(3, 3)],
}
abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(sys.argv[1], tree)
    checkpointer.wait_until_finished()
    for target in (None, abstract):
        print("saved", *values(tree))
        a_b, a_of_b, layer_0, first_layer = values(checkpointer.restore(sys.argv[1], target))
        print(f"a.b is a[b]: {a_b == a_of_b}, layer.0 is layer[0]: {layer_0 == first_layer}")
        assert a_b == a_of_b and layer_0 == first_layer
PY
