"""Tells what a server refuses in an adapter, or computes differently without a message.

Each statement was read in the source of the version named, or seen by running it:

- vLLM 0.33.0: ``vllm/lora/peft_helper.py``, ``vllm/lora/utils.py``, ``vllm/config/lora.py``
- SGLang 0.5.23: ``sglang/srt/lora/lora.py``, ``lora_config.py``, ``lora_manager.py``
- llama.cpp (2026-10): ``convert_lora_to_gguf.py``, ``src/llama-adapter.cpp``
- mlx-lm 0.32.2: ``mlx_lm/tuner/utils.py``
- openvino-genai 2026.4.1: ``AdapterConfig``, which reads the safetensors file alone
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from loft_jax.adapters import _gguf, _mlx
from loft_jax.adapters._gguf_base import open_gguf, read_field
from loft_jax.adapters._loaded import few
from loft_jax.adapters._peft_config import initialization, rank_of, scale_of, with_defaults
from loft_jax.adapters._peft_load import CONFIG, PREFIX, WEIGHTS
from loft_jax.adapters._peft_parameters import parameter_names
from loft_jax.adapters._safetensors import tensor_shapes

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_FOLD = "Write it with save_peft(..., fold_scales=True)"
_EXPERTS = "Merge it in PEFT (merge_and_unload) and serve the merged model"


class ServingProblem(NamedTuple):
    """One reason why a server does not serve an adapter correctly.

    Attributes:
      silent: whether the server loads the adapter and computes something else, without a message.
        Otherwise it refuses the adapter.
      message: the reason and the remedy.
    """

    silent: bool
    message: str


class _Adapter(NamedTuple):
    """What the checks look at: the configuration, and the shapes of the tensors by name."""

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def modules(self) -> list[str]:
        """The modules with factors."""
        end = ".lora_A.weight"
        return [name.removesuffix(end) for name in self.shapes if name.endswith(end)]

    @property
    def parameters(self) -> dict[str, str]:
        """The names that patterns refer to, by module: the module's, or that of a parameter."""
        modules, targets = self.modules, self.config["target_parameters"] or ()
        return {module: module for module in modules} | parameter_names(
            modules, targets, Path(WEIGHTS)
        )

    @property
    def scales(self) -> dict[str, float]:
        """The scales that PEFT computes."""
        return {module: scale_of(self.config, name) for module, name in self.parameters.items()}

    @property
    def experts(self) -> list[str]:
        """The modules whose factors are those of a stack of experts."""
        names = self.parameters.items()
        return [module for module, name in names if name not in (module, f"{module}.weight")]


def check_servable(
    path: str | os.PathLike[str], server: str, *, max_rank: int | None = None
) -> list[ServingProblem]:
    """Returns what a server would refuse or compute differently. An empty list is good.

    Args:
      path: a folder of PEFT; for ``mlx`` a folder of mlx-lm; for ``llama.cpp`` and ``ollama`` a
        GGUF file, or a folder of PEFT that is to be converted with convert_lora_to_gguf.py.
      server: ``vllm``, ``sglang``, ``llama.cpp``, ``ollama``, ``mlx`` or ``openvino``.
      max_rank: the largest rank that the server is started with (``--max-lora-rank``). None is the
        server's default.

    Returns:
      The problems. Only adapters are examined, not whether the base model is the right one.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the server is unknown, or a file is damaged.
      ImportError: safetensors or gguf is not installed.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> from loft_jax.adapters import save_peft
      >>> up = {"lora_a": np.ones((64, 32)), "lora_b": np.ones((32, 64))}
      >>> adapter = {"layers": {"0": {"mlp": {"up_proj": up}}}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = save_peft(folder, adapter, family="llama")
      ...     for problem in check_servable(folder, "vllm"):
      ...         print(problem.message)
      the rank is 32, above vLLM's limit of 16. Start it with --max-lora-rank 32
    """
    if server not in _CHECKS:
        raise ValueError(f"unknown server {server!r}. Use one of {', '.join(_CHECKS)}")
    path = Path(path)
    if server in ("llama.cpp", "ollama") and path.is_file():
        return list(_gguf_file(path))
    adapter = _read(path, server)
    return list(_CHECKS[server](adapter, max_rank))


def _read(folder: Path, server: str) -> _Adapter:
    weights = folder / (_mlx.WEIGHTS if server == "mlx" else WEIGHTS)
    for file in (folder / CONFIG, weights):
        if not file.is_file():
            remedy = "A folder of PEFT is not read by mlx-lm; use save_mlx"
            remedy = remedy if server == "mlx" else "Pass a folder of PEFT"
            raise FileNotFoundError(f"{file} is missing. {remedy}")
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / CONFIG}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG}: expected a JSON object")
    shapes = {name.removeprefix(PREFIX): shape for name, shape in tensor_shapes(weights).items()}
    return _Adapter(config if server == "mlx" else with_defaults(config), shapes)


def _vllm(adapter: _Adapter, max_rank: int | None) -> Iterator[ServingProblem]:
    config, refuse = adapter.config, lambda message: ServingProblem(False, message)
    merge = "Merge the adapter and use save_merged"
    saved = [
        name for name in config["modules_to_save"] or () if name not in ("classifier", "score")
    ]
    if saved:
        yield refuse(f"vLLM loads no modules saved in full ({few(saved)}). {merge}")
    if config["use_dora"]:
        yield refuse(f"vLLM has no DoRA. {merge}")
    if config["bias"] != "none" or config["lora_bias"]:
        yield refuse(f"vLLM loads no trained biases. {merge}")
    if initialization(config) not in (
        True,
        False,
        "gaussian",
        "eva",
        "orthogonal",
        "mica",
        "lora_ga",
    ):
        yield refuse(
            f"vLLM refuses init_lora_weights={config['init_lora_weights']!r}, which changed the "
            "base. Convert it: load_peft(path, base=...), then save_peft"
        )
    for field in ("alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora"):
        if config[field]:
            yield refuse(f"vLLM refuses {field}")
    rank = max([config["r"], *(config["rank_pattern"] or {}).values()])
    limit = max_rank or 16
    if rank > limit:
        needed = next((value for value in VLLM_RANKS if value >= rank), None)
        remedy = f"Start it with --max-lora-rank {needed}" if needed else "No setting allows it"
        yield refuse(f"the rank is {rank}, above vLLM's limit of {limit}. {remedy}")
    if adapter.experts:
        yield ServingProblem(
            True,
            f"vLLM reads experts ({few(adapter.experts)}) in PEFT's layout only for models that it "
            "marks is_3d_moe_weight, or with --enable-mixed-moe-lora-format and a request that "
            "sets is_3d_lora_weight. For others it takes the rows of gate and up as alternating "
            f"and the ranks as the inner axis. {_EXPERTS}",
        )
    known = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
    allowed = (*known, ".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
    heads = ("score.weight", "score.bias", "classifier.weight", "classifier.bias")
    odd = [name for name in adapter.shapes if not f".{name}".endswith(allowed + heads)]
    if odd and not saved and config["bias"] == "none" and not config["use_dora"]:
        yield refuse(f"vLLM knows no tensors such as {few(odd)}. {merge}")


def _sglang(adapter: _Adapter, max_rank: int | None) -> Iterator[ServingProblem]:
    config = adapter.config
    if config["use_dora"]:
        yield ServingProblem(False, "SGLang has no DoRA. Merge the adapter and use save_merged")
    yield from _one_scale(adapter, "SGLang", config["lora_alpha"] / config["r"])
    ranks = {rank_of(config, name) for name in adapter.parameters.values()}
    if ranks - {config["r"]}:
        yield ServingProblem(
            False,
            f"SGLang has one rank, r={config['r']}, and the adapter has {sorted(ranks)}. {_FOLD}",
        )
    if adapter.experts:
        yield ServingProblem(
            False, f"SGLang has no place for experts ({few(adapter.experts)}). {_EXPERTS}"
        )
    if max_rank is not None and config["r"] > max_rank:
        yield ServingProblem(
            False, f"the rank is {config['r']}, above {max_rank}. Raise --max-lora-rank"
        )
    ends = {module: module.rpartition(".")[2] for module in adapter.modules}
    for module, end in ends.items():
        sibling = module.removesuffix(end)
        if end == "q_proj" and sibling + "v_proj" not in ends:
            yield ServingProblem(
                False,
                f"{module} is adapted without {sibling}v_proj: SGLang stacks them. Adapt both",
            )
        if end in ("k_proj", "v_proj") and sibling + "q_proj" not in ends:
            yield ServingProblem(
                True, f"{module} is adapted without {sibling}q_proj: SGLang ignores it. Adapt both"
            )
    factors = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
    others = [
        name for name in adapter.shapes if not name.endswith((*factors, ".base_layer.weight"))
    ]
    if others and not config["use_dora"]:
        yield ServingProblem(
            True, f"SGLang ignores {few(others)}. Merge the adapter and use save_merged"
        )
    if initialization(config) in ("pissa", "olora", "loftq", "corda"):
        yield ServingProblem(True, f"SGLang ignores init_lora_weights. {_CONVERT}")


_CONVERT = "The base has changed; convert it: load_peft(path, base=...), then save_peft"


def _llama_cpp(adapter: _Adapter, max_rank: int | None) -> Iterator[ServingProblem]:
    config, save = adapter.config, "Use save_gguf"
    wrong = {
        module: scale
        for module, scale in adapter.scales.items()
        if not _close(scale, config["lora_alpha"] / rank_of(config, adapter.parameters[module]))
    }
    if wrong:
        yield ServingProblem(
            True,
            f"convert_lora_to_gguf.py reads lora_alpha alone, without patterns and rsLoRA, so that "
            f"{few(wrong)} get another scale. {save}",
        )
    factors = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
    skipped = (*factors, ".base_layer.weight")
    if others := [name for name in adapter.shapes if not name.endswith(skipped)]:
        yield ServingProblem(
            False,
            f"llama.cpp has no place for {few(others)}. Merge the adapter and use save_merged",
        )


def _gguf_file(path: Path) -> Iterator[ServingProblem]:
    reader = open_gguf(path)
    if read_field(reader, "adapter.lora.alpha") in (None, 0):
        yield ServingProblem(
            True, "alpha is 0 or missing, which llama.cpp reads as a scale of 1. Use save_gguf"
        )
    if read_field(reader, "general.type") != "adapter":
        yield ServingProblem(False, "general.type is not 'adapter'. Pass the file of an adapter")
    names = [tensor.name for tensor in reader.tensors]
    norms = [name for name in names if name.endswith("_norm.weight")]
    if norms:
        yield ServingProblem(True, f"llama.cpp ignores {few(norms)}. Merge and use save_merged")
    odd = [n for n in names if n not in norms and not _gguf.FACTOR.fullmatch(n)]
    if odd:
        yield ServingProblem(False, f"llama.cpp refuses tensors such as {few(odd)}")


def _openvino(adapter: _Adapter, max_rank: int | None) -> Iterator[ServingProblem]:
    scales = set(adapter.scales.values())
    if len(scales) == 1 and not _close(scale := scales.pop(), 1.0):
        yield ServingProblem(
            True,
            f"openvino-genai reads no lora_alpha. Pass AdapterConfig(adapter, alpha={scale:g}), or "
            f"{_FOLD[0].lower()}{_FOLD[1:]}",
        )
    elif scales and not all(_close(scale, 1.0) for scale in scales):
        yield ServingProblem(True, f"openvino-genai has one scale for all modules. {_FOLD}")
    factors = (".lora_A.weight", ".lora_B.weight")
    if others := [name for name in adapter.shapes if not name.endswith(factors)]:
        yield ServingProblem(
            True, f"openvino-genai ignores {few(others)}. Merge the adapter and use save_merged"
        )


def _mlx_lm(adapter: _Adapter, max_rank: int | None) -> Iterator[ServingProblem]:
    config, refuse = adapter.config, lambda message: ServingProblem(False, message)
    parameters = config.get("lora_parameters") or {}
    for field in ("rank", "scale", "dropout"):
        if field not in parameters:
            yield refuse(f"lora_parameters has no {field}, which mlx-lm requires. Use save_mlx")
    if "num_layers" not in config:
        yield refuse(
            "num_layers is missing, which mlx-lm requires. Use save_mlx, or add -1 for all"
        )
    rank = parameters.get("rank")
    wrong = [
        name
        for name, shape in adapter.shapes.items()
        if name.endswith(".lora_a") and shape[-1] != rank
    ]
    if wrong:
        yield refuse(f"mlx-lm has one rank, {rank}, and {few(wrong)} differ. Use save_mlx")
    odd = [name for name in adapter.shapes if not name.endswith((".lora_a", ".lora_b", ".m"))]
    if odd:
        yield refuse(f"mlx-lm refuses {few(odd)}. Merge the adapter and use save_merged")


def _one_scale(adapter: _Adapter, server: str, scale: float) -> Iterator[ServingProblem]:
    if wrong := [module for module, own in adapter.scales.items() if not _close(own, scale)]:
        yield ServingProblem(
            True,
            f"{server} computes every scale as lora_alpha / r, here {scale:g}, without patterns "
            f"and rsLoRA, which is wrong for {few(wrong)}. {_FOLD}",
        )


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-6)


_CHECKS: dict[str, Callable[[_Adapter, int | None], Iterator[ServingProblem]]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "llama.cpp": _llama_cpp,
    "ollama": _llama_cpp,
    "mlx": _mlx_lm,
    "openvino": _openvino,
}
