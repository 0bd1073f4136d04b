"""check_servable: what each server refuses or computes differently, and that our remedy helps."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import readers

from loft_jax import LoraPairs
from loft_jax.adapters import check_servable, load_peft, save_gguf, save_mlx, save_peft

CONFIG = "adapter_config.json"
SERVERS = ("vllm", "sglang", "llama.cpp", "ollama", "openvino")
BASE = {"model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 2}


def factors(rank: int = 4, magnitude: bool = False) -> dict:
    made = {
        "lora_a": np.ones((32, rank), np.float32),
        "lora_b": np.ones((rank, 32), np.float32),
    }
    return made | ({"lora_magnitude": np.ones(32, np.float32)} if magnitude else {})


def adapter(*names: str, ranks: tuple[int, ...] = (), **options: Any) -> dict:
    """One layer of attention with the projections q and v, or others."""
    names = names or ("q_proj", "v_proj")
    ranks = ranks or (4,) * len(names)
    pairs = {name: factors(rank, **options) for name, rank in zip(names, ranks, strict=True)}
    return {"layers": {"0": {"self_attn": pairs}}}


def edit(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def messages(path: Path, server: str, **options: Any) -> list[tuple[bool, str]]:
    return [(silent, message) for silent, message in check_servable(path, server, **options)]


@pytest.mark.parametrize("server", SERVERS)
def test_folded_scales_are_right_everywhere(tmp_path, server):
    """Mixed ranks and scales, which most servers compute differently."""
    tree, pairs = adapter(ranks=(2, 4)), LoraPairs(scale=((".*/q_proj/.*", 0.5), (".*", 3.0)))
    save_peft(tmp_path / "mixed", tree, family="llama", pairs=pairs)
    save_peft(tmp_path / "folded", tree, family="llama", pairs=pairs, fold_scales=True)
    assert messages(tmp_path / "folded", server) == []
    found = messages(tmp_path / "mixed", server)
    assert found == [] if server == "vllm" else found and found[0][0]


def test_a_plain_adapter_has_no_problem(tmp_path):
    save_peft(tmp_path / "peft", adapter(), family="llama", pairs=LoraPairs(scale=2.0))
    for server in ("vllm", "sglang", "llama.cpp"):
        assert messages(tmp_path / "peft", server) == []
    assert messages(save_mlx(tmp_path / "mlx", adapter(), family="llama"), "mlx") == []
    file = save_gguf(tmp_path / "a.gguf", adapter(), family="llama", base=BASE)
    assert messages(file, "llama.cpp") == messages(file, "ollama") == []


HEAD = {"score": {"kernel": np.ones((32, 3), np.float32)}}
LM_HEAD = {"lm_head": {"kernel": np.ones((32, 5), np.float32)}}
SAVED: dict[str, tuple[dict, dict, dict, dict[str, tuple[bool, str]]]] = {
    "rsLoRA": (
        adapter(),
        {"use_rslora": True, "pairs": LoraPairs(scale=2.0)},
        {},
        {
            "sglang": (True, "lora_alpha / r, here 1.*fold_scales=True"),
            "llama.cpp": (True, "without patterns and rsLoRA.*Use save_gguf"),
            "openvino": (True, r"AdapterConfig\(adapter, alpha=2\)"),
        },
    ),
    "rank": (adapter(ranks=(32, 32)), {}, {}, {"vllm": (False, "--max-lora-rank 32")}),
    "DoRA": (
        adapter(magnitude=True),
        {},
        {},
        {
            "vllm": (False, "no DoRA"),
            "sglang": (False, "no DoRA"),
            "llama.cpp": (False, "no place for .*lora_magnitude_vector"),
            "openvino": (True, "ignores .*lora_magnitude_vector"),
        },
    ),
    "head of a classifier": (
        adapter() | HEAD,
        {},
        {},
        {"sglang": (True, "ignores score.weight"), "llama.cpp": (False, "score.weight")},
    ),
    "head of a language model": (
        adapter() | LM_HEAD,
        {},
        {},
        {"vllm": (False, r"saved in full \(lm_head\)"), "llama.cpp": (False, "lm_head.weight")},
    ),
    "q alone": (adapter("q_proj"), {}, {}, {"sglang": (False, "without .*v_proj.*Adapt both")}),
    "v alone": (adapter("v_proj"), {}, {}, {"sglang": (True, "without .*q_proj: SGLang ignores")}),
    "PiSSA": (
        adapter(),
        {},
        {"init_lora_weights": "pissa"},
        {
            "vllm": (False, r"'pissa'.*load_peft\(path, base="),
            "sglang": (True, "ignores init_lora_weights"),
        },
    ),
    "aLoRA": (adapter(), {}, {"alora_invocation_tokens": [1]}, {"vllm": (False, "alora")}),
    "bias": (adapter(), {}, {"bias": "all"}, {"vllm": (False, "no trained biases")}),
}


@pytest.mark.parametrize("case", SAVED)
def test_each_server_is_told_apart(tmp_path, case):
    tree, options, fields, expected = SAVED[case]
    save_peft(tmp_path, tree, family="llama", **options)
    edit(tmp_path, **fields)
    for server, (silent, message) in expected.items():
        found = messages(tmp_path, server)
        assert [one for one, _ in found] == [silent], (server, found)
        assert re.search(message, found[0][1]), (server, found)


def products(folder: Path) -> dict[str, np.ndarray]:
    """What PEFT computes, and the parameters saved in full."""
    loaded = load_peft(folder)
    changes = {
        module: (one.scale * one.a.astype(np.float64) @ one.b).T
        for module, one in loaded.factors.items()
    }
    return changes | dict(loaded.saved)


READABLE: dict[str, tuple[dict, dict]] = {
    **{case: SAVED[case][:2] for case in SAVED if not SAVED[case][2]},
    "plain": (adapter(), {"pairs": LoraPairs(scale=2.0)}),
    "k too": (adapter("q_proj", "k_proj", "v_proj"), {}),
    "o and MLP": (adapter("q_proj", "v_proj", "o_proj"), {"pairs": LoraPairs(scale=0.5)}),
    "mixed ranks": (adapter(ranks=(2, 4)), {}),
    "mixed ranks, folded": (adapter(ranks=(2, 4)), {"fold_scales": True}),
    "mixed scales": (adapter(), {"pairs": LoraPairs(scale=((".*/q_proj/.*", 0.5), (".*", 2.0)))}),
    "mixed scales, folded": (
        adapter(),
        {"pairs": LoraPairs(scale=((".*/q_proj/.*", 0.5), (".*", 2.0))), "fold_scales": True},
    ),
}


@pytest.mark.parametrize("server", ["vllm", "sglang"])
@pytest.mark.parametrize("case", READABLE)
def test_check_servable_agrees_with_the_rules_of_the_server(tmp_path, case, server):
    """The rules are restated from the sources (`readers`), as neither server is installed."""
    tree, options = READABLE[case]
    save_peft(tmp_path, tree, family="llama", **options)
    problems = check_servable(tmp_path, server)
    refused = [one.message for one in problems if not one.silent]
    try:
        served = getattr(readers, server)(tmp_path)
    except readers.RefusedError:
        assert refused, problems
        return
    assert not refused
    expected = products(tmp_path) if case != "DoRA" else {}
    same = served.keys() == expected.keys() and all(
        np.allclose(served[name], expected[name], rtol=1e-6) for name in expected
    )
    assert same == (problems == []), problems


def test_a_raised_limit_is_taken_into_account(tmp_path):
    save_peft(tmp_path, adapter(ranks=(32, 32)), family="llama")
    assert messages(tmp_path, "vllm", max_rank=32) == []
    assert messages(tmp_path, "sglang", max_rank=16) == [
        (False, "the rank is 32, above 16. Raise --max-lora-rank")
    ]


def test_files_of_mlx_and_llama_cpp_are_examined(tmp_path):
    save_mlx(tmp_path / "mlx", adapter(), family="llama")
    config = json.loads((tmp_path / "mlx" / CONFIG).read_text())
    del config["lora_parameters"]["dropout"], config["num_layers"]
    config["lora_parameters"]["rank"] = 8
    (tmp_path / "mlx" / CONFIG).write_text(json.dumps(config))
    found = " ".join(message for _, message in messages(tmp_path / "mlx", "mlx"))
    for part in ("no dropout", "num_layers is missing", "has one rank, 8"):
        assert part in found
    save_peft(tmp_path / "peft", adapter(), family="llama")
    with pytest.raises(FileNotFoundError, match="A folder of PEFT is not read by mlx-lm"):
        check_servable(tmp_path / "peft", "mlx")
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_type("adapter")
    writer.add_float32("adapter.lora.alpha", 0.0)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(4, np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = messages(tmp_path / "a.gguf", "llama.cpp")
    assert [silent for silent, _ in found] == [True, True, False]
    assert "a scale of 1" in found[0][1] and "ignores blk.0.attn_norm" in found[1][1]


def test_unknown_servers_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown server 'tgi'. Use one of vllm, sglang"):
        check_servable(tmp_path, "tgi")
    with pytest.raises(FileNotFoundError, match="adapter_config.json is missing"):
        check_servable(tmp_path, "vllm")
    save_peft(tmp_path, adapter(), family="llama")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        check_servable(tmp_path, "vllm")
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        check_servable(tmp_path, "vllm")
