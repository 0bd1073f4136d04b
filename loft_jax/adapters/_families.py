"""Maps modules and parameters of a model to the names and layouts of Hugging Face transformers.

A family is a table with our module paths on one side and the module names of transformers on the
other. It also knows the layout of each weight in transformers, so that tensors can be converted in
both directions.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LAYER = "{layer}"

# Names of Flax parameters in transformers; other names do not change.
_PARAMETERS = {"kernel": "weight", "scale": "weight", "embedding": "weight"}

# Keys that the wrapper of an adapter adds between a module and its parameters.
_WRAPPERS = ("lora", "base", "base_module")

_KINDS = ("linear", "conv1d", "conv2d", "embedding")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Maps the module paths of one kind of model to the names of Hugging Face transformers.

    Attributes:
      name: the name in messages.
      prefix: the attribute that contains the backbone in models with a task head. It is empty for
        the backbone alone: ``dataclasses.replace(FAMILIES["bert"], prefix="")`` is for `BertModel`.
      modules: ``(regex, template)`` entries, of which the first that matches is used. The regex
        matches the whole path of our module, keys joined by ``/``, without leading ``params/``,
        ``model/`` and ``prefix/``. The template is the name in transformers. In it ``{group}`` is
        a named group of the regex and ``{prefix}`` the prefix with its dot. ``{layer}`` is the
        group ``layer``, or each index of the stack if layers are stacked and the path has no
        number.
      kinds: ``(regex, kind)`` entries over names in transformers, for modules whose weight is not
        (out, in): ``conv1d`` for GPT-2's (in, out), ``conv2d`` for (out, in, height, width), and
        ``embedding``.

    Raises:
      ValueError: an entry is not a pair of a valid regex and a template, or a kind is unknown.
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
          "linear", "conv1d", "conv2d" or "embedding".

        Example:
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
        if dims == 2 and kind == "linear":
            return (1, 0)
        if dims == 4 and kind == "conv2d":
            return (3, 2, 0, 1)  # (height, width, in, out) to (out, in, height, width)
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


def as_family(family: Family | str) -> Family:
    """Returns a family, given itself or the name of a built-in one.

    Raises:
      ValueError: the name is unknown.
      TypeError: it is neither a family nor a name.
    """
    if isinstance(family, Family):
        return family
    if not isinstance(family, str):
        raise TypeError(f"family must be a name or a Family, got {family!r}")
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}. Use one of {', '.join(FAMILIES)}")
    return FAMILIES[family]


def _family(
    name: str,
    prefix: str,
    backbone: Sequence[Sequence[str]],
    heads: Sequence[str],
    kinds: tuple[tuple[str, str], ...] = (),
    column: int = 0,
) -> Family:
    """Builds a family from a table of names.

    Args:
      name, prefix, kinds: as in `Family`.
      backbone: for each module its names. All of them are recognized in our paths.
      heads: names of modules outside of the backbone.
      column: which of the names to write.
    """
    entries = [
        (_regex(known), "{prefix}" + names[min(column, len(names) - 1)])
        for names in backbone
        for known in names
    ]
    entries += [(_regex(head), head) for head in heads]
    return Family(name=name, prefix=prefix, modules=tuple(dict(entries).items()), kinds=kinds)


def _regex(name: str) -> str:
    """Returns a regex of our paths of a module: layers have a number after / or _, or none."""
    # Split before escaping, because re.escape also escapes the braces.
    parts = [re.escape(part.replace(".", "/")) for part in name.split("." + LAYER)]
    return r"(?:[/_](?P<layer>\d+))?".join(parts)


def _rows(*names: Any) -> tuple[tuple[str, ...], ...]:
    return tuple((name,) if isinstance(name, str) else name for name in names)


_LLAMA = _rows(
    "embed_tokens",
    "layers.{layer}.input_layernorm",
    *(f"layers.{LAYER}.self_attn.{part}_proj" for part in "qkvo"),
    "layers.{layer}.post_attention_layernorm",
    *(f"layers.{LAYER}.mlp.{part}_proj" for part in ("gate", "up", "down")),
    "norm",
)
_GPT2 = _rows(
    "wte",
    "wpe",
    "h.{layer}.ln_1",
    "h.{layer}.attn.c_attn",
    "h.{layer}.attn.c_proj",
    "h.{layer}.ln_2",
    "h.{layer}.mlp.c_fc",
    "h.{layer}.mlp.c_proj",
    "ln_f",
)
_BERT = _rows(
    *(f"embeddings.{part}_embeddings" for part in ("word", "position", "token_type")),
    "embeddings.LayerNorm",
    *(f"encoder.layer.{LAYER}.attention.self.{part}" for part in ("query", "key", "value")),
    "encoder.layer.{layer}.attention.output.dense",
    "encoder.layer.{layer}.attention.output.LayerNorm",
    "encoder.layer.{layer}.intermediate.dense",
    "encoder.layer.{layer}.output.dense",
    "encoder.layer.{layer}.output.LayerNorm",
    "pooler.dense",
)
# The name in transformers 5, then the one in version 4 if it differs. Our paths may use either.
_VIT = _rows(
    "embeddings",
    "embeddings.patch_embeddings.projection",
    ("layers.{layer}.layernorm_before", "encoder.layer.{layer}.layernorm_before"),
    ("layers.{layer}.attention.q_proj", "encoder.layer.{layer}.attention.attention.query"),
    ("layers.{layer}.attention.k_proj", "encoder.layer.{layer}.attention.attention.key"),
    ("layers.{layer}.attention.v_proj", "encoder.layer.{layer}.attention.attention.value"),
    ("layers.{layer}.attention.o_proj", "encoder.layer.{layer}.attention.output.dense"),
    ("layers.{layer}.layernorm_after", "encoder.layer.{layer}.layernorm_after"),
    ("layers.{layer}.mlp.fc1", "encoder.layer.{layer}.intermediate.dense"),
    ("layers.{layer}.mlp.fc2", "encoder.layer.{layer}.output.dense"),
    "layernorm",
    "pooler.dense",
)
_DINO = "encoder.layer.{layer}."
_DINOV2 = _rows(
    "embeddings",
    "embeddings.patch_embeddings.projection",
    _DINO + "norm1",
    (_DINO + "attention.q_proj", _DINO + "attention.attention.query"),
    (_DINO + "attention.k_proj", _DINO + "attention.attention.key"),
    (_DINO + "attention.v_proj", _DINO + "attention.attention.value"),
    (_DINO + "attention.o_proj", _DINO + "attention.output.dense"),
    _DINO + "layer_scale1",
    _DINO + "norm2",
    _DINO + "mlp.fc1",
    _DINO + "mlp.fc2",
    *(f"{_DINO}mlp.{part}_proj" for part in ("gate", "up", "down")),  # giant, in transformers 5
    _DINO + "layer_scale2",
    "layernorm",
)

_PATCHES = ((r".*\.projection", "conv2d"),)
_BERT_HEADS = (
    "classifier",
    "qa_outputs",
    "cls.predictions",
    "cls.predictions.decoder",
    "cls.predictions.transform.dense",
    "cls.predictions.transform.LayerNorm",
    "cls.seq_relationship",
)

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _family(
            "llama",
            "model",
            _LLAMA,
            ("lm_head", "score"),
            kinds=((r".*embed_tokens", "embedding"),),
        ),
        _family(
            "gpt2",
            "transformer",
            _GPT2,
            ("lm_head", "score", "classifier", "qa_outputs"),
            kinds=((r".*\.c_(attn|proj|fc)", "conv1d"), (r".*w[tp]e", "embedding")),
        ),
        _family("bert", "bert", _BERT, _BERT_HEADS, kinds=((r".*_embeddings", "embedding"),)),
        _family("vit", "vit", _VIT, ("classifier",), kinds=_PATCHES),
        _family("dinov2", "dinov2", _DINOV2, ("classifier",), kinds=_PATCHES),
        _family("vit_transformers4", "vit", _VIT, ("classifier",), kinds=_PATCHES, column=1),
        _family(
            "dinov2_transformers4", "dinov2", _DINOV2, ("classifier",), kinds=_PATCHES, column=1
        ),
    )
}
"""The built-in families, by name.

``vit`` and ``dinov2`` use the module names of transformers 5. For adapters and models made with
transformers 4 use ``vit_transformers4`` and ``dinov2_transformers4``.
"""
