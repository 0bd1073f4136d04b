"""Maps modules and parameters of a model to the names and layouts of Hugging Face transformers.

A family is a table from our module paths to the module names of transformers. It also knows the
layout of each weight in transformers, so that tensors can be converted in both directions. The
built-in families are in `_families`.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

LAYER = "{layer}"

# Names of Flax parameters in transformers; other names do not change.
_PARAMETERS = {"kernel": "weight", "scale": "weight", "embedding": "weight"}

# Keys that the wrapper of an adapter adds between a module and its parameters.
_WRAPPERS = ("lora", "base", "base_module")

_KINDS = ("linear", "conv1d", "conv2d", "embedding", "experts", "parameter")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Maps the module paths of one kind of model to the names of Hugging Face transformers.

    Attributes:
      name: the name in messages.
      prefix: the attribute that contains the backbone in models with a task head, such as
        ``model``, without a dot. It is empty for the backbone alone:
        ``dataclasses.replace(FAMILIES["bert"], prefix="")`` is for `BertModel`.
      modules: ``(regex, template)`` entries, of which the first that matches is used. The regex
        matches the whole path of our module, keys joined by ``/``, without leading ``params/``,
        ``model/`` and ``prefix/``. The template is the name in transformers. In it ``{group}`` is
        a named group of the regex and ``{prefix}`` the prefix with its dot. ``{layer}`` is the
        group ``layer``, or each index of the stack if layers are stacked and the path has no
        number.
      kinds: ``(regex, kind)`` entries over names in transformers, for modules whose weight is not
        (out, in): ``conv1d`` for GPT-2's (in, out), ``conv2d`` for (out, in, height, width),
        ``embedding``, ``experts`` for a parameter (experts, out, in), and ``parameter`` for a
        weight (out, in) of a module that is no linear layer, such as a router.

    Raises:
      ValueError: an entry is not a pair of a valid regex and a template, a kind is unknown, or the
        prefix begins or ends with a dot.
      TypeError: a field is not hashable; use tuples.

    Example:
      >>> mine = Family(
      ...     name="mine",
      ...     prefix="model",
      ...     modules=((r"block_(?P<layer>[0-9]+)/(?P<side>up|down)",
      ...               "{prefix}layers.{layer}.mlp.{side}_proj"),),
      ... )
      >>> mine.hf_module("block_3/up")
      'model.layers.3.mlp.up_proj'
    """

    name: str
    prefix: str
    modules: tuple[tuple[str, str], ...]
    kinds: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        try:
            hash((self.modules, self.kinds))
        except TypeError as error:
            raise TypeError(
                f"Family: modules and kinds must be tuples of pairs, got {self}"
            ) from error
        if self.prefix != self.prefix.strip("."):
            raise ValueError(
                f"Family: prefix {self.prefix!r} begins or ends with a dot. Omit it: {{prefix}} "
                "adds the dot between the names"
            )
        for entry in (*self.modules, *self.kinds):
            if not isinstance(entry, tuple) or len(entry) != 2:
                raise ValueError(
                    f"Family: each entry must be a pair with a regex first, got {entry!r}"
                )
            try:
                re.compile(entry[0])
            except re.error as error:
                raise ValueError(
                    f"Family: {entry[0]!r} is not a valid regular expression: {error}"
                ) from error
        for _, kind in self.kinds:
            if kind not in _KINDS:
                raise ValueError(f"Family: unknown kind {kind!r}. Use one of {', '.join(_KINDS)}")

    def hf_module(self, path: str) -> str:
        """Returns the name in transformers of a module.

        Args:
          path: the path of our module, keys joined by ``/``.

        Returns:
          The name. It still contains ``{layer}`` if the path has no number of a layer.

        Raises:
          ValueError: the family has no such module.

        Example:
          >>> from loft_jax.adapters import FAMILIES
          >>> FAMILIES["llama"].hf_module("model/layers/3/self_attn/q_proj")
          'model.layers.3.self_attn.q_proj'
          >>> FAMILIES["llama"].hf_module("layers/self_attn/q_proj/base")  # stacked, wrapped
          'model.layers.{layer}.self_attn.q_proj'
        """
        keys = path.split("/")
        while keys and keys[-1] in _WRAPPERS:
            keys.pop()
        for leading in ("params", "model", self.prefix):
            if keys[:1] == [leading]:
                keys.pop(0)
        for regex, template in self.modules:
            if match := re.fullmatch(regex, "/".join(keys)):
                groups = {key: value for key, value in match.groupdict().items() if value}
                prefix = self.prefix and self.prefix + "."
                return template.format_map({"layer": LAYER, **groups, "prefix": prefix})
        raise ValueError(
            f"{path or 'the root'}: the family {self.name!r} has no such module. Use another "
            "family, or extend this one: dataclasses.replace(family, modules=((regex of the path, "
            "name in transformers), *family.modules))"
        )

    def kind(self, module: str) -> str:
        """Returns the kind of a module, by its name in transformers.

        Returns:
          "linear", "conv1d", "conv2d", "embedding", "experts" or "parameter".

        Example:
          >>> from loft_jax.adapters import FAMILIES
          >>> FAMILIES["gpt2"].kind("transformer.h.0.attn.c_attn")
          'conv1d'
        """
        return next((kind for regex, kind in self.kinds if re.fullmatch(regex, module)), "linear")

    def hf_tensors(self, path: str, shape: Sequence[int]) -> tuple[str, ...]:
        """Returns the names in transformers of one parameter.

        Args:
          path: the path of our parameter, keys joined by ``/``.
          shape: its shape. Stacked layers are stacked on axis 0.

        Returns:
          One name, or one for each stacked layer.

        Raises:
          ValueError: the family has no such module.

        Example:
          >>> from loft_jax.adapters import FAMILIES
          >>> FAMILIES["gpt2"].hf_tensors("h/0/ln_1/scale", (64,))
          ('transformer.h.0.ln_1.weight',)
          >>> FAMILIES["gpt2"].hf_tensors("h/ln_1/scale", (2, 64))
          ('transformer.h.0.ln_1.weight', 'transformer.h.1.ln_1.weight')
        """
        module, parameter, stack = self._locate(path, shape)
        names = each_layer(module, stack, path)
        return tuple(f"{name}.{parameter}" for name in names)

    def to_hf(self, path: str, value: np.ndarray) -> dict[str, np.ndarray]:
        """Converts one of our parameters to tensors of transformers.

        Args:
          path: the path of our parameter, keys joined by ``/``.
          value: its value.

        Returns:
          Tensors by their names in transformers.

        Raises:
          ValueError: the family has no such module, or the kernel is neither a matrix nor that of a
            two-dimensional convolution.

        Example:
          >>> from loft_jax.adapters import FAMILIES
          >>> kernel = np.ones((64, 8), np.float32)
          >>> tensors = FAMILIES["llama"].to_hf("layers/3/mlp/up_proj/kernel", kernel)
          >>> {name: tensor.shape for name, tensor in tensors.items()}
          {'model.layers.3.mlp.up_proj.weight': (8, 64)}
        """
        module, _, stack = self._locate(path, value.shape)
        order = self._axes(path, module, value.ndim - len(stack))
        values = [one.transpose(order) for one in (value if stack else [value])]
        return dict(zip(self.hf_tensors(path, value.shape), values, strict=True))

    def from_hf(
        self, path: str, shape: Sequence[int], tensors: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """Converts tensors of transformers to one of our parameters; the inverse of `to_hf`.

        Args:
          path: the path of our parameter, keys joined by ``/``.
          shape: its shape.
          tensors: tensors by their names in transformers.

        Returns:
          The value of our parameter.

        Raises:
          KeyError: a tensor is missing.
          ValueError: a tensor has another shape; otherwise as `to_hf`.

        Example:
          >>> from loft_jax.adapters import FAMILIES
          >>> tensors = {"lm_head.weight": np.ones((8, 64), np.float32)}
          >>> FAMILIES["llama"].from_hf("lm_head/kernel", (64, 8), tensors).shape
          (64, 8)
        """
        module, _, stack = self._locate(path, shape)
        order = self._axes(path, module, len(shape) - len(stack))
        values = []
        for name in self.hf_tensors(path, shape):
            required = tuple(shape[len(stack) :][axis] for axis in order)
            if tensors[name].shape != required:
                raise ValueError(
                    f"{name}: the shape is {tensors[name].shape}, the template needs {required}"
                )
            values.append(tensors[name].transpose(np.argsort(order)))
        return np.stack(values) if stack else values[0]

    def _locate(self, path: str, shape: Sequence[int]) -> tuple[str, str, tuple[int, ...]]:
        """Returns the module and the parameter in transformers, and the sizes of the stack."""
        parent, _, parameter = path.rpartition("/")
        module = self.hf_module(parent)
        stack = tuple(shape[:1]) if LAYER in module else ()
        return module, _PARAMETERS.get(parameter, parameter), stack

    def _axes(self, path: str, module: str, dims: int) -> tuple[int, ...]:
        """Returns the axes of our parameter in the order of transformers."""
        kind = self.kind(module)
        if path.rpartition("/")[2] != "kernel" or (kind == "conv1d" and dims == 2):
            return tuple(range(dims))
        if dims == 2 and kind in ("linear", "parameter"):
            return (1, 0)
        if dims == 4 and kind == "conv2d":
            return (3, 2, 0, 1)  # (height, width, in, out) to (out, in, height, width)
        if kind == "experts":
            raise ValueError(
                f"{path}: {module} is a stack of experts, which transformers saves one by one, "
                "under names of each architecture. Write the adapter with save_peft, and merge it "
                "in PEFT (merge_and_unload, save_pretrained)"
            )
        raise ValueError(
            f"{path}: the kernel has {dims} axes in one layer. Reshape it to (in, out), or for a "
            f"convolution to (height, width, in, out), as {module} needs it"
        )


def each_layer(module: str, stack: Sequence[int], path: str) -> tuple[str, ...]:
    """Returns the module names of one parameter: a single one, or one for each stacked layer.

    Args:
      module: a name, which may contain ``{layer}``.
      stack: the sizes of the stacked axes of the parameter.
      path: the path of the parameter, for the message.

    Raises:
      ValueError: the name contains ``{layer}`` and there is no stacked axis, or the reverse.

    Example:
      >>> each_layer("h.{layer}.mlp", (2,), "h/mlp/kernel")
      ('h.0.mlp', 'h.1.mlp')
    """
    if LAYER not in module and not stack:
        return (module,)
    if LAYER in module and len(stack) == 1:
        return tuple(module.replace(LAYER, str(index)) for index in range(stack[0]))
    raise ValueError(
        f"{path}: its name in transformers is {module}, and it has {len(stack)} axes of stacked "
        "layers. A path without a layer number needs one such axis, and a path with a number none. "
        "Specify the stacked axes with LoraPairs(axes=LoraAxes(batch=(0,))), or put the number of "
        "the layer into the path"
    )
