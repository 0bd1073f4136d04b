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
        for an embedding, or (experts, in, r) for a stack of experts.
      b: (r, out), or (experts, r, out).
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

    @property
    def is_stack(self) -> bool:
        """Whether these are the factors of a stack of experts, one pair for each.

        Example:
          >>> LoraFactors(np.ones((8, 6, 3)), np.ones((8, 3, 4)), scale=2.0).is_stack
          True
        """
        return self.b.ndim == 3

    def matrices(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns views (experts, inputs, r) and (experts, r, out), with one expert if no stack.

        Example:
          >>> a, b = LoraFactors(np.ones((3, 3, 6, 2)), np.ones((2, 4)), scale=1.0).matrices()
          >>> a.shape, b.shape
          ((1, 54, 2), (1, 2, 4))
        """
        experts = len(self.b) if self.is_stack else 1
        a = self.a.reshape(experts, -1, self.rank)
        return a, self.b.reshape(experts, self.rank, self.b.shape[-1])


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


def refuse_experts(factors: Mapping[str, LoraFactors], program: str) -> None:
    """Refuses adapters of experts for a program that has none.

    Raises:
      ValueError: there is one. The message names the module.
    """
    if stacks := [module for module, one in factors.items() if one.is_stack]:
        raise ValueError(
            f"{program} has no adapters of experts ({few(stacks)}). Omit them, or use save_peft "
            "and merge them in PEFT (merge_and_unload)"
        )


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
