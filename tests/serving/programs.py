"""Log-probabilities from the real llama.cpp and mlx-lm, which tests skip without."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.serving import programs


def require(name: str) -> Any:
    """Returns a module, or skips the test."""
    why = f"{name} is not installed (extra serving): that it takes our files is shown by no test"
    return pytest.importorskip(name, reason=why)


def llama_cpp_log_probs(model: Path, ids: Any, adapter: Path | None = None) -> np.ndarray:
    """Returns the log-probabilities (vocabulary,) of the token after `ids`.

    Raises:
      RuntimeError: llama.cpp refuses the model or the adapter.
    """
    require("xllamacpp")
    return programs.LlamaCpp(model, adapter).log_probs(ids)


def mlx_log_probs(model: Path, ids: Any, adapter: Path | None = None) -> np.ndarray:
    """Returns the log-probabilities (length, vocabulary) of the next tokens.

    Args:
      model: a folder of transformers.
      ids: token ids.
      adapter: a folder of `save_mlx`.

    Raises:
      ValueError: mlx-lm refuses the adapter.
    """
    require("mlx.core")
    require("mlx_lm.utils")
    return programs.mlx_lm(model, adapter)(ids)
