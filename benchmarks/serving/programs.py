"""The real llama.cpp and mlx-lm (extra `serving`), as functions of token ids.

The tests in `tests/serving` and the comparison in `compare.py` use them. Each program computes on
one thread of the CPU and in float32, as far as it can.
"""

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class LlamaCpp:
    """A server of llama.cpp.

    Args:
      model: the GGUF file of the base.
      adapter: the GGUF file of an adapter.
      context: how many tokens a prompt and its continuation have at most.

    Raises:
      RuntimeError: llama.cpp refuses the model or the adapter. The reason is on stderr.
      ImportError: xllamacpp is not installed.
    """

    def __init__(self, model: Path, adapter: Path | None = None, *, context: int = 64):
        xllamacpp: Any = importlib.import_module("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_gpu_layers, params.n_ctx, params.n_parallel = 0, context, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.warmup = params.fit_params = False
        # By default keys and values are rounded to float16.
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if adapter is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self._server = xllamacpp.Server(params)

    def log_probs(self, ids: Sequence[int]) -> np.ndarray:
        """Returns the log-probabilities (vocabulary,) of the token after a prompt."""
        top = self._complete(ids, tokens=1, probabilities=1_000_000)[0]["top_logprobs"]
        log_probs = np.full(len(top), np.nan)
        for entry in top:
            log_probs[entry["id"]] = entry["logprob"]
        return log_probs

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """Returns the most probable continuation of a prompt, also after the end of a text."""
        return [entry["id"] for entry in self._complete(ids, tokens=count, probabilities=1)]

    def _complete(self, ids: Sequence[int], *, tokens: int, probabilities: int) -> list[dict]:
        request = {"prompt": [int(k) for k in ids], "n_predict": tokens, "n_probs": probabilities}
        answer = self._server.handle_completions(request | {"temperature": -1, "ignore_eos": True})
        answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
        return answer["choices"][0]["logprobs"]["content"]


def mlx_lm(model: Path, adapter: Path | None = None) -> Callable[[Sequence[int]], np.ndarray]:
    """Returns a function from token ids to log-probabilities (length, vocabulary), by mlx-lm.

    Args:
      model: a folder of transformers.
      adapter: a folder of `save_mlx`.

    Raises:
      ValueError: mlx-lm refuses the adapter.
      ImportError: mlx-lm is not installed.
    """
    mx: Any = importlib.import_module("mlx.core")
    utils: Any = importlib.import_module("mlx_lm.utils")
    mx.set_default_device(mx.cpu)
    loaded, _ = utils.load_model(model)
    if adapter is not None:
        loaded = utils.load_adapters(loaded, str(adapter))
    loaded.eval()

    def log_probs(ids: Sequence[int]) -> np.ndarray:
        logits = loaded(mx.array(np.asarray(ids))[None])[0].astype(mx.float32)
        return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))

    return log_probs
