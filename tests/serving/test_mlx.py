"""Adapters for mlx-lm: compared with the real program, round trips, and refusals."""

import copy
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from serving import tiny_models
from serving.adapters import log_probs, merged, random_adapter
from serving.programs import mlx_log_probs, require

from loft_jax import LoraPairs
from loft_jax.adapters import load_into, load_mlx, save_merged, save_mlx
from loft_jax.baselines import dora_weight

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
IDS = np.array([3, 9, 27, 5, 40, 11])

others_warn = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Returns the tiny model of a name and its folder."""
    for name in ("torch", "transformers", "mlx", "mlx_lm"):
        require(name)
    made = {}

    def get(name: str) -> tuple[tiny_models.TinyModel, Path]:
        if name not in made:
            made[name] = tiny_models.make_model(name), tmp_path_factory.mktemp(name)
            tiny_models.save_folder(*made[name])
        return made[name]

    return get


@others_warn
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_mlx_computes_our_adapter(model, close, tmp_path, name, same):
    """Scales that differ are folded, and ranks are padded, into the one pair of the folder."""
    base, folder = model(name)
    adapter, pairs = random_adapter(base, same=same)
    family = "gpt2" if name == "gpt2" else "llama"
    save_mlx(tmp_path, adapter, family=family, pairs=pairs)
    expected = log_probs(merged(base, adapter, pairs), IDS)
    assert np.abs(expected - log_probs(base, IDS)).max() > 0.3  # the adapter does something
    got = mlx_log_probs(folder, IDS, tmp_path)
    # mlx-lm computes another GELU in Gemma than transformers.
    tolerance = 5e-3 if name == "gemma" else 1e-4
    close(f"mlx-lm with our adapter of {name}", got, expected, tolerance)


@others_warn
def test_layers_without_an_adapter_and_the_head(model, close, tmp_path):
    base, folder = model("llama")
    adapter, pairs = random_adapter(base)
    del adapter["model"]["layers"]["1"], adapter["model"]["layers"]["0"]["mlp"]["up_proj"]
    draw = np.random.default_rng(2)
    adapter["lm_head"] = {
        "lora_a": draw.normal(size=(32, 2)).astype(np.float32) / 3,
        "lora_b": draw.normal(size=(2, 64)).astype(np.float32) / 3,
    }
    kept = tuple(entry for entry in pairs.scale if "/0/" in entry[0] and "up_proj" not in entry[0])
    pairs = LoraPairs(scale=(*kept, ("lm_head/lora_a", 0.5)))
    save_mlx(tmp_path, adapter, family="llama", pairs=pairs)
    expected = log_probs(merged(base, adapter, pairs), IDS)
    got = mlx_log_probs(folder, IDS, tmp_path)
    close("mlx-lm with an adapter of some modules", got, expected, 1e-4)


@others_warn
def test_mlx_computes_our_dora(model, close, tmp_path):
    base, folder = model("llama")
    adapter, pairs = random_adapter(base, same=True)
    after, draw = copy.deepcopy(base.torch), np.random.default_rng(4)
    for module, (_, fan_out) in base.targets.items():
        place = adapter
        for key in module.split("."):
            place = place[key]
        place["lora_magnitude"] = draw.uniform(1, 2, fan_out).astype(np.float32)
        weight = after.get_submodule(module).weight
        factors = (place["lora_magnitude"], place["lora_a"], place["lora_b"])
        kernel = dora_weight(*map(jnp.asarray, (weight.detach().numpy().T, *factors)), scale=0.75)
        weight.data.copy_(type(weight.data)(np.asarray(kernel.T)))
    save_mlx(tmp_path, adapter, family="llama", pairs=pairs)
    expected = log_probs(tiny_models.TinyModel("llama", after), IDS)
    assert np.abs(expected - log_probs(base, IDS)).max() > 0.3
    close("mlx-lm with our DoRA", mlx_log_probs(folder, IDS, tmp_path), expected, 1e-4)
    loaded = load_mlx(tmp_path, family="llama")
    again = load_into(adapter, loaded, family="llama", pairs=pairs)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(adapter), strict=True):
        np.testing.assert_array_equal(one, other)


@others_warn
def test_alpha_instead_of_the_scale_gives_another_result(model, tmp_path):
    """So the comparison can fail: mlx-lm multiplies by ``scale`` as it stands."""
    base, folder = model("llama")
    adapter, pairs = random_adapter(base, same=True)
    save_mlx(tmp_path, adapter, family="llama", pairs=pairs)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["lora_parameters"]["scale"] == 0.75
    config["lora_parameters"]["scale"] *= config["lora_parameters"]["rank"]
    (tmp_path / CONFIG).write_text(json.dumps(config))
    expected = log_probs(merged(base, adapter, pairs), IDS)
    assert np.abs(mlx_log_probs(folder, IDS, tmp_path) - expected).max() > 0.1


@others_warn
def test_mlx_loads_merged_weights(model, close, tmp_path):
    base, folder = model("llama")
    adapter, pairs = random_adapter(base)
    after = merged(base, adapter, pairs)
    weights = {}
    for name, tensor in after.tensors.items():
        *keys, _ = name.split(".")
        place = weights
        for key in keys:
            place = place.setdefault(key, {})
        if keys[-1] == "embed_tokens":
            place["embedding"] = tensor
        else:
            place["kernel" if tensor.ndim == 2 else "scale"] = tensor.T
    save_merged(tmp_path, weights, family="llama")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    close("mlx-lm with merged weights", mlx_log_probs(tmp_path, IDS), log_probs(after, IDS), 1e-4)


# ------------------------------------------------------------------ without MLX


def factors(fan_in: int, fan_out: int, rank: int, *stack: int, seed: int = 0) -> dict:
    draw = np.random.default_rng(seed)
    return {
        "lora_a": draw.normal(size=(*stack, fan_in, rank)).astype(np.float32),
        "lora_b": draw.normal(size=(*stack, rank, fan_out)).astype(np.float32),
    }


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_round_trip_is_exact(tmp_path, family):
    adapter: Any = {"layers": {"self_attn": {"q_proj": factors(16, 8, 4, 2)}}}
    if family == "gpt2":
        adapter = {"h": {"attn": {"c_attn": factors(16, 48, 4, 2)}}}
    save_mlx(tmp_path, adapter, family=family, pairs=LoraPairs(scale=1.75))
    loaded = load_mlx(tmp_path, family=family)
    again = load_into(adapter, loaded, family=family, pairs=LoraPairs(scale=1.75))
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(adapter), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    assert loaded.config["num_layers"] == -1
    assert sorted(file.name for file in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    name = "model.h.1.attn.c_attn" if family == "gpt2" else "model.layers.1.self_attn.q_proj"
    assert load_file(tmp_path / WEIGHTS)[f"{name}.lora_a"].shape == (16, 4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_dtype_is_chosen(tmp_path, dtype):
    q = factors(16, 8, 4)
    adapter = {"layers": {"0": {"self_attn": {"q_proj": q}}}}
    save_mlx(tmp_path, adapter, family="llama", pairs=LoraPairs(scale=1.75), dtype=dtype)
    (one,) = load_mlx(tmp_path, family="llama").factors.values()
    assert one.a.dtype == one.b.dtype == dtype
    wide = [x.astype(np.float64) for x in (one.a, one.b)]
    expected = q["lora_a"] @ q["lora_b"]
    assert np.abs(wide[0] @ wide[1] - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"embed_tokens": factors(64, 16, 2)}, "model.embed_tokens: only the blocks"),
        ({"score": factors(16, 3, 2)}, "score: only the blocks of a language model"),
        ({"norm": {"scale": np.ones(16, np.float32)}}, r"saved in full \(model.norm.weight\)"),
    ],
)
def test_what_mlx_cannot_load_is_refused_by_name(tmp_path, adapter, message):
    adapter = adapter | {"layers": {"0": {"self_attn": {"q_proj": factors(16, 16, 2)}}}}
    with pytest.raises(ValueError, match=message):
        save_mlx(tmp_path, adapter, family="llama")
    assert not any(tmp_path.iterdir())


def edit(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def parameters(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    edit(folder, lora_parameters=config["lora_parameters"] | fields)


Q = "model.layers.0.self_attn.q_proj"


def tensors(folder: Path, **new: Any) -> None:
    """Replaces tensors of the one module in the file, and removes those that are None."""
    merged = load_file(folder / WEIGHTS) | {f"{Q}.{key}": value for key, value in new.items()}
    save_file({k: v for k, v in merged.items() if v is not None}, folder / WEIGHTS)


BAD_FILES: dict[str, tuple[Any, str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), f"{CONFIG} is missing"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
    "no JSON": (lambda f: (f / CONFIG).write_text("{"), "not valid JSON"),
    "a list": (lambda f: (f / CONFIG).write_text("[]"), "expected a JSON object"),
    "full": (lambda f: edit(f, fine_tune_type="full"), "fine_tune_type is 'full'"),
    "no parameters": (lambda f: edit(f, lora_parameters=None), "lora_parameters must be an object"),
    "rank text": (lambda f: parameters(f, rank="2"), "rank must be an integer"),
    "another rank": (lambda f: parameters(f, rank=3), rf"{Q}: lora_a \(16, 2\).*rank 3"),
    "scale 0": (lambda f: parameters(f, scale=0), "scale must be a finite number other than zero"),
    "lost b": (lambda f: tensors(f, lora_b=None), f"{Q}: lora_b is missing"),
    "dora": (lambda f: edit(f, fine_tune_type="dora"), f"{Q}: m is missing"),
    "unknown": (lambda f: tensors(f, what=np.ones(1, np.float32)), f"{Q}.what: neither lora_a"),
    "truncated": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1]),
        "not a complete safetensors file",
    ),
    "empty": (lambda f: save_file({}, f / WEIGHTS), "the file contains no lora_a and lora_b"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_by_name(tmp_path, case):
    adapter = {"layers": {"0": {"self_attn": {"q_proj": factors(16, 16, 2)}}}}
    save_mlx(tmp_path, adapter, family="llama")
    spoil, message = BAD_FILES[case]
    spoil(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_mlx(tmp_path, family="llama")
    assert str(tmp_path) in str(caught.value)
