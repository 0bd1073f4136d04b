"""An adapter under the names of Hugging Face transformers, as files of other programs store it."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class LoraFactors(NamedTuple):
    """One adapter, which adds ``scale * a @ b`` to a kernel (in, out).

    Attributes:
      a: (in, r), or (height, width, in, r) for a two-dimensional convolution, or (vocabulary, r)
        for an embedding.
      b: (r, out).
      scale: ``lora_alpha / r`` in PEFT, or ``lora_alpha / sqrt(r)`` with rsLoRA.
      magnitude: (out,), the norms of DoRA; None for LoRA. With it the kernel becomes
        `loft_jax.baselines.dora_weight`.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        """The number of columns of ``a``.

        Example:
          >>> LoraFactors(np.ones((6, 3)), np.ones((3, 4)), scale=2.0).rank
          3
        """
        return self.a.shape[-1]


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter read from a file of PEFT, llama.cpp or MLX.

    Attributes:
      path: the folder or file.
      config: the configuration in the file: adapter_config.json of PEFT with its defaults, that of
        MLX, or the keys of a GGUF file.
      factors: `LoraFactors` by the name of the module in transformers, in the file's dtype.
      saved: the parameters saved in full, by name and in the layout of transformers.
    """

    path: Path
    config: Mapping[str, Any]
    factors: Mapping[str, LoraFactors]
    saved: Mapping[str, np.ndarray]

    def scale_of(self, module: str) -> float:
        """Returns the scale of a module's adapter.

        Args:
          module: the name of the module in transformers, or the end of it such as ``q_proj``.

        Returns:
          The factor that multiplies ``a @ b``.

        Raises:
          KeyError: there is no such module, or there are several with different scales.

        Example:
          >>> factors = LoraFactors(np.ones((6, 3)), np.ones((3, 4)), scale=2.0)
          >>> adapter = LoadedAdapter(Path("out"), {}, {"model.layers.0.q_proj": factors}, {})
          >>> adapter.scale_of("q_proj")
          2.0
        """
        ends = [f for name, f in self.factors.items() if f".{name}".endswith(f".{module}")]
        scales = {factors.scale for factors in ends}
        if len(scales) != 1:
            found = f"different scales {sorted(scales)}" if scales else "no adapter"
            raise KeyError(
                f"{self.path}: {found} for {module!r}. The modules are {few(self.factors)}"
            )
        return scales.pop()


def sorted_by_layer(names: Iterable[str]) -> list[str]:
    """Returns the names in order, with layer 10 after layer 9.

    Example:
      >>> sorted_by_layer(["h.10.up", "h.9.up"])
      ['h.9.up', 'h.10.up']
    """
    key = lambda name: [(int(k), "") if k.isdecimal() else (-1, k) for k in name.split(".")]
    return sorted(names, key=key)


def few(names: Iterable[str]) -> str:
    """Returns the first names of many, for a message."""
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
