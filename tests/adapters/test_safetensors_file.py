"""Our writer of safetensors files gives the bytes of the package safetensors."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from loft_jax.adapters._safetensors import read_tensors, write_tensors

TYPES = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)


@settings(deadline=None, max_examples=60)
@given(
    entries=st.dictionaries(
        st.text(min_size=1, max_size=8),
        st.tuples(st.sampled_from(TYPES), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    )
)
def test_the_bytes_are_those_of_the_package(tmp_path_factory, entries):
    draw = np.random.default_rng(0)
    tensors = {
        name: np.asarray(draw.normal(size=shape)).astype(dtype)
        for name, (dtype, shape) in entries.items()
        if name != "__metadata__"
    }
    path = tmp_path_factory.mktemp("file") / "a.safetensors"
    write_tensors(path, tensors)
    assert path.read_bytes() == save(tensors, metadata={"format": "pt"})
    for name, tensor in read_tensors(path).items():
        np.testing.assert_array_equal(tensor, tensors[name])


def test_strides_do_not_matter(tmp_path):
    a = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    tensors = {"t": a.transpose(2, 0, 1), "sliced": a[:, ::2], "reversed": a[::-1]}
    write_tensors(tmp_path / "a.safetensors", tensors, {"mine": "yes"})
    for name, tensor in read_tensors(tmp_path / "a.safetensors").items():
        np.testing.assert_array_equal(tensor, tensors[name])
    assert (
        b'"__metadata__":{"format":"pt","mine":"yes"}' in (tmp_path / "a.safetensors").read_bytes()
    )


def test_other_dtypes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="x has dtype int64. Cast it to one of float64"):
        write_tensors(tmp_path / "a.safetensors", {"x": np.arange(3)})
