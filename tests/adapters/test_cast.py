"""Casts of adapters to float16 and bfloat16, against the product in float64."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from loft_jax import LoraAxes, LoraPairs
from loft_jax.adapters import cast_factors, load_peft, save_peft
from loft_jax.adapters._cast import spread_factors

BFLOAT16, FLOAT16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
LOW = pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)


def factors(m=48, n=36, r=8, falls_by=1.0, seed=0, stack=()):
    """Orthonormal bases of a product with these singular values; the condition is all in ``a``."""
    draw = np.random.default_rng(seed)
    basis = lambda size: np.linalg.qr(draw.normal(size=(*stack, size, r)))[0]
    return basis(m) * falls_by ** np.arange(r), basis(n).swapaxes(-1, -2)


def ill_conditioned(a, b, condition=1e6, seed=1):
    """The same product, from columns that nearly cancel."""
    r = a.shape[-1]
    draw = np.random.default_rng(seed)
    left, right = (np.linalg.qr(draw.normal(size=(r, r)))[0] for _ in range(2))
    scales = np.geomspace(1, condition, r)
    return a @ (left * scales) @ right, right.T @ (left / scales).T @ b


def error(a, b, cast):
    """The relative error of the product, from the whole matrices."""
    product = a @ b
    new = cast["lora_a"].astype(np.float64) @ cast["lora_b"].astype(np.float64)
    return np.linalg.norm(new - product, axis=(-2, -1)) / np.linalg.norm(product, axis=(-2, -1))


@LOW
@pytest.mark.parametrize("falls_by", [1.0, 0.5, 0.01])
def test_nearly_dependent_columns_lose_no_more_than_orthogonal_ones(dtype, falls_by):
    a, b = ill_conditioned(*factors(falls_by=falls_by))
    bound = 0.8 * float(ml_dtypes.finfo(dtype).eps) / 2
    with np.errstate(over="ignore", invalid="ignore"):
        naive = error(a, b, {"lora_a": a.astype(dtype), "lora_b": b.astype(dtype)})
    assert not naive < 20 * bound
    cast = cast_factors({"lora_a": a, "lora_b": b}, dtype)
    assert cast.adapter["lora_a"].dtype == cast.adapter["lora_b"].dtype == dtype
    found = error(a, b, cast.adapter)
    assert found < bound
    # The difference is the rounding of the cancelling columns to float64.
    assert cast.errors == {"lora_a": pytest.approx(found, rel=1e-6)}


@pytest.mark.parametrize("r", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("rank", [1, 2, None], ids=lambda x: f"rank {x}")
def test_spread_factors_have_the_same_product_and_equal_columns(r, rank):
    a, b = factors(r=min(r, 36), falls_by=0.9)  # at r = 40 wider than the smaller dimension
    a, b = (np.pad(a, ((0, 0), (0, r - a.shape[1]))), np.pad(b, ((0, r - len(b)), (0, 0))))
    a[:, rank:] = 0
    left, right = spread_factors(a, b.T)
    np.testing.assert_allclose(left @ right.T, a @ b, rtol=0, atol=1e-14)
    if rank == 1:
        shares = np.linalg.norm(left, axis=0) * np.linalg.norm(right, axis=0)
        np.testing.assert_allclose(shares, shares.mean(), rtol=0.1)


@LOW
def test_one_large_singular_value_is_rounded_in_all_columns(dtype):
    """The errors of the columns average out, so 16 columns lose a quarter of what one loses."""
    a, b = factors(r=16, falls_by=1e-3)
    cast = cast_factors({"lora_a": a, "lora_b": b}, dtype)
    one = cast_factors({"lora_a": a[:, :1], "lora_b": b[:1]}, dtype)
    assert cast.largest_error < 0.4 * one.largest_error


@LOW
def test_what_the_dtype_represents_is_kept_to_the_last_bit(dtype):
    a, b = (x.astype(dtype) for x in ill_conditioned(*factors(), condition=100))
    cast = cast_factors({"lora_a": a, "lora_b": b}, dtype)
    assert cast.largest_error == 0
    np.testing.assert_array_equal(cast.adapter["lora_a"], a)
    np.testing.assert_array_equal(cast.adapter["lora_b"], b)
    fresh = {"lora_a": a, "lora_b": np.zeros_like(b)}
    np.testing.assert_array_equal(cast_factors(fresh, dtype).adapter["lora_a"], a)
    float32 = {"lora_a": np.float32(a), "lora_b": np.float32(b) / 3}
    wide = cast_factors(float32, jnp.float32)
    assert wide.largest_error == 0
    np.testing.assert_array_equal(wide.adapter["lora_b"], float32["lora_b"])


def test_layers_on_the_last_axis_and_other_leaves():
    a, b = ill_conditioned(*factors(stack=(3,)))
    moved = {"lora_a": np.moveaxis(a, 0, -1), "lora_b": np.moveaxis(b, 0, -1)}
    adapter = {"q": {name: jnp.asarray(x, jnp.float32) for name, x in moved.items()}}
    adapter["head"] = jnp.ones(3)
    pairs = LoraPairs(axes=LoraAxes(batch=(-1,), rank_a=1, rank_b=0))
    cast = cast_factors(adapter, "bfloat16", pairs)
    assert cast.adapter["head"] is adapter["head"]
    back = {name: np.moveaxis(x, -1, 0) for name, x in cast.adapter["q"].items()}
    start = {name: np.moveaxis(np.float64(x), -1, 0) for name, x in adapter["q"].items()}
    found = error(start["lora_a"], start["lora_b"], back)
    assert cast.errors == {"q/lora_a": pytest.approx(found.max(), rel=1e-6)}
    assert found.max() < 0.0032


def test_large_factors_of_a_small_product_fit_float16_and_large_products_do_not():
    a, b = factors()
    cast = cast_factors({"lora_a": 1e6 * a, "lora_b": b / 1e6}, "float16")
    assert error(a, b, cast.adapter) < 4e-4
    with pytest.raises(ValueError, match="q/lora_a: .* too large for float16.*bfloat16"):
        cast_factors({"q": {"lora_a": 1e12 * a, "lora_b": b}}, "float16")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_and_other_dtypes_are_refused(value):
    a, b = factors()
    with pytest.raises(TypeError, match="dtype must be one of float32, float16, bfloat16"):
        cast_factors({"lora_a": a, "lora_b": b}, "float64")
    b[0, 0] = value
    with pytest.raises(ValueError, match="q/lora_b contains a NaN or an infinity"):
        cast_factors({"q": {"lora_a": a, "lora_b": b}}, "float16")


@LOW
def test_a_file_of_peft_states_its_error(tmp_path, dtype):
    a, b = ill_conditioned(*factors())
    adapter = {"h": {"0": {"mlp": {"c_fc": {"lora_a": np.float32(a), "lora_b": np.float32(b)}}}}}
    folder = save_peft(tmp_path, adapter, family="gpt2", dtype=dtype)
    (read,) = load_peft(folder).factors.values()
    assert read.a.dtype == read.b.dtype == dtype
    with safe_open(folder / "adapter_model.safetensors", "np") as file:
        stated = float(file.metadata()["largest_product_error"])
    start = adapter["h"]["0"]["mlp"]["c_fc"]
    found = error(
        *(x.astype(np.float64) for x in start.values()), {"lora_a": read.a, "lora_b": read.b}
    )
    assert stated == pytest.approx(found, rel=0.05)


def test_a_product_below_the_numbers_of_float16_is_warned_of(tmp_path):
    a, b = factors()
    layer = {"lora_a": 1e-8 * a, "lora_b": 1e-8 * b}
    adapter = {"h": {"0": {"mlp": {"c_fc": layer}}}}
    with pytest.warns(
        UserWarning, match="float16 loses .* of the product of transformer.h.0.mlp.c_fc"
    ):
        save_peft(tmp_path, adapter, family="gpt2", dtype="float16")
