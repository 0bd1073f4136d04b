"""Digests detect every change of an array and do not depend on where it is."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loft_jax.checkpoint import _digest, base_reference, digests


def digest(x) -> str:
    return digests({"x": x})["x"]


DTYPES = "bool int4 int8 uint16 int32 float8_e5m2 bfloat16 float16 float32 complex64"


@pytest.mark.parametrize("dtype", [*DTYPES.split(), "float64", "int64", "complex128"])
def test_one_algorithm_on_the_device_and_on_the_host(dtype, x64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)) * 2, dtype)
    if dtype == "bool":
        x = x.at[1, 2].set(False)
    assert digest(x) == digest(np.asarray(x)) == digest(np.asfortranarray(np.asarray(x)))
    assert digest(x) != digest(jnp.roll(x, 1))


@pytest.mark.parametrize("dtype", ["uint8", "bfloat16", "float32", "float64", "complex64"])
def test_every_single_bit_counts(dtype):
    x = np.random.default_rng(0).normal(size=7)
    x = (x * 50).astype(np.uint8) if dtype == "uint8" else x.astype(dtype)
    seen = {digest(x)}
    for bit in range(8 * x.nbytes):
        flipped = np.frombuffer(bytearray(x.tobytes()), np.uint8).copy()
        flipped[bit // 8] ^= 1 << bit % 8
        seen.add(digest(flipped.view(x.dtype)))
    assert len(seen) == 1 + 8 * x.nbytes


def test_places_lengths_and_zeros_count():
    x = np.random.default_rng(0).integers(0, 3, 40).astype(np.float32)
    seen = {digest(x)}
    changed = 0
    for i in range(40):
        for j in range(i):
            y = x.copy()
            y[[i, j]] = y[[j, i]]
            changed += x[i] != x[j]
            seen.add(digest(y))
    assert len(seen) == 1 + changed
    lengths = [digest(np.zeros(n, np.float32)) for n in range(100)]
    assert len(set(lengths)) == 100 and lengths[0] == "0" * 16


def test_both_halves_are_independent():
    """Neither half of 6000 digests of close values has more collisions than expected by chance."""
    found = [digest(np.array([k & 1, k >> 1], np.uint32)) for k in range(6000)]
    assert len(set(found)) == len(found)
    for half in (slice(0, 8), slice(8, 16)):
        assert len({f[half] for f in found}) > len(found) - 5
    joint = np.array([[int(f[:8], 16), int(f[8:], 16)] for f in found], np.float64)
    assert abs(np.corrcoef(joint.T)[0, 1]) < 0.05


def test_a_base_is_told_by_its_name_and_by_each_weight():
    params = {"w": jnp.ones((2, 3)), "q": {"i4": jnp.ones(3, jnp.int4), "key": jax.random.key(0)}}
    base = base_reference("tiny", params)
    assert set(base.leaves) == {"w", "q/i4", "q/key"}
    assert base == base_reference("tiny", jax.device_get(params) | {"q": params["q"]})
    assert base_reference("tiny", params | {"w": params["w"].at[0, 0].add(1e-7)}) != base
    assert base.checksum == base_reference("other", params).checksum
    assert type(base).from_json(base.to_json()) == base


def test_sums_over_several_cpu_devices_are_not_under_way_at_once(monkeypatch):
    """Their programs share threads, and on a busy machine many of them wait for good."""
    waited = []
    wait = lambda x: waited.append(x) or jax.block_until_ready(x)
    watched = types.SimpleNamespace(**vars(jax) | {"block_until_ready": wait})
    monkeypatch.setattr(_digest, "jax", watched)
    x, mesh = jnp.arange(16.0), jax.make_mesh((8,), ("x",))
    sharded = jax.device_put(x, jax.NamedSharding(mesh, jax.P("x")))
    finish = _digest.begin_digests({"x": sharded, "y": sharded + 1, "z": x})
    assert len(waited) == 2
    assert finish()["x"] == finish()["z"]
