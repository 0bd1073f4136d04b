"""Log-probabilities from the real llama.cpp and mlx-lm, which tests skip without."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def require(name: str) -> Any:
    """Returns a module, or skips the test."""
    why = f"{name} is not installed (extra serving): that it takes our files is shown by no test"
    return pytest.importorskip(name, reason=why)


def llama_cpp_log_probs(model: Path, ids: Any, adapter: Path | None = None) -> np.ndarray:
    """Returns the log-probabilities (vocabulary,) of the token after `ids`.

    Raises:
      RuntimeError: llama.cpp refuses the model or the adapter.
    """
    xllamacpp = require("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_gpu_layers, params.n_ctx, params.n_parallel = 0, 64, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = params.fit_params = False
    # By default keys and values are rounded to float16.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(params)
    request = {
        "prompt": [int(token) for token in ids],
        "n_predict": 1,
        "n_probs": 1_000_000,
        "temperature": -1,
    }
    answer = server.handle_completions(request)
    answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
    top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    log_probs = np.full(len(top), np.nan)
    for entry in top:
        log_probs[entry["id"]] = entry["logprob"]
    return log_probs


def mlx_log_probs(model: Path, ids: Any, adapter: Path | None = None) -> np.ndarray:
    """Returns the log-probabilities (length, vocabulary) of the next tokens.

    Args:
      model: a folder of transformers.
      ids: token ids.
      adapter: a folder of `save_mlx`.

    Raises:
      ValueError: mlx-lm refuses the adapter.
    """
    mx = require("mlx.core")
    mlx_lm = require("mlx_lm.utils")
    mx.set_default_device(mx.cpu)
    loaded, _ = mlx_lm.load_model(model)
    if adapter is not None:
        loaded = mlx_lm.load_adapters(loaded, str(adapter))
    loaded.eval()
    logits = loaded(mx.array(np.asarray(ids))[None])[0].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
