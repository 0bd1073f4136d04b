"""What the modules and tensors of a model are called by Hugging Face transformers.

A family is a table: paths of our modules on one side, names of transformers' modules on the other.
It also knows how transformers lays out each weight, so that a tensor can go either way.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LAYER = "{layer}"

# What the parameters of Flax layers are called there; other names stay.
_PARAMETERS = {"kernel": "weight", "scale": "weight", "embedding": "weight"}

# Components that an adapter's wrapper adds between a module and its parameters.
_WRAPPERS = ("lora", "base", "base_module")

_KINDS = ("linear", "conv1d", "conv2d", "embedding")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How the modules of one kind of model are called in Hugging Face transformers.

    Attributes:
      name: for messages.
      prefix: the attribute under which models with a task head hold their backbone; empty for
        the backbone alone (``dataclasses.replace(FAMILIES["bert"], prefix="")`` is `BertModel`).
      modules: ``(regex, template)`` entries, the first that matches counts. The regex matches the
        whole path of our module, keys joined by ``/``, without leading ``params/``, ``model/`` and
        ``prefix/``. The template is transformers' name; ``{group}`` stands for a named group of
        the regex and ``{prefix}`` for the prefix and its dot. ``{layer}`` stands for the group
        ``layer``, or for each index of the stack where layers are stacked and the path has none.
      kinds: ``(regex, kind)`` entries over transformers' names, for the modules whose weight is
        not (out, in): ``conv1d`` for GPT-2's (in, out), ``conv2d`` for (out, in, height, width),
        ``embedding``.

    Raises:
      ValueError: an entry that is no pair of a valid regex and a template, or an unknown kind.
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
            raise TypeError(f"Family: modules and kinds are tuples of pairs, got {self}") from error
        for entry in (*self.modules, *self.kinds):
            if not isinstance(entry, tuple) or len(entry) != 2:
                raise ValueError(f"Family: an entry is a pair with a regex first, got {entry!r}")
            try:
                re.compile(entry[0])
            except re.error as error:
                raise ValueError(
                    f"Family: {entry[0]!r} is no regular expression: {error}"
                ) from error
        for _, kind in self.kinds:
            if kind not in _KINDS:
                raise ValueError(f"Family: unknown kind {kind!r}; choose from {', '.join(_KINDS)}")

    def hf_module(self, path: str) -> str:
        """Transformers' name of our module; ``{layer}`` is left in it for stacked layers.

        Raises:
          ValueError: a path that the family does not know.

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
            f"{path or 'the root'}: the family {self.name!r} has no such module. Pass another "
            "family, or extend it: dataclasses.replace(family, modules=((regex of the path, name "
            "in transformers), *family.modules))"
        )

    def kind(self, module: str) -> str:
        """What transformers' module of that name is: linear, conv1d, conv2d or embedding."""
        return next((kind for regex, kind in self.kinds if re.fullmatch(regex, module)), "linear")

    def hf_tensors(self, path: str, shape: Sequence[int]) -> tuple[str, ...]:
        """Transformers' names of one of our parameters: several where layers are stacked (axis 0).

        Raises:
          ValueError: a path that the family does not know.

        Example:
          >>> FAMILIES["gpt2"].hf_tensors("h/0/ln_1/scale", (64,))
          ('transformer.h.0.ln_1.weight',)
          >>> FAMILIES["gpt2"].hf_tensors("h/ln_1/scale", (2, 64))
          ('transformer.h.0.ln_1.weight', 'transformer.h.1.ln_1.weight')
        """
        module, parameter, stack = self._place(path, shape)
        names = each_layer(module, stack, path)
        return tuple(f"{name}.{parameter}" for name in names)

    def to_hf(self, path: str, value: np.ndarray) -> dict[str, np.ndarray]:
        """One of our parameters as transformers has it: tensors by name.

        Raises:
          ValueError: an unknown path, or a kernel that is no matrix and no convolution's.
        """
        module, _, stack = self._place(path, value.shape)
        order = self._axes(path, module, value.ndim - len(stack))
        values = [one.transpose(order) for one in (value if stack else [value])]
        return dict(zip(self.hf_tensors(path, value.shape), values, strict=True))

    def from_hf(
        self, path: str, shape: Sequence[int], tensors: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """Our parameter of that path and shape, from transformers' tensors; inverse of `to_hf`.

        Raises:
          KeyError: a tensor that is missing.
          ValueError: a tensor of another shape, and as `to_hf`.
        """
        module, _, stack = self._place(path, shape)
        order = self._axes(path, module, len(shape) - len(stack))
        values = []
        for name in self.hf_tensors(path, shape):
            wanted = tuple(shape[len(stack) :][axis] for axis in order)
            if tensors[name].shape != wanted:
                raise ValueError(f"{name}: {tensors[name].shape}, the template wants {wanted}")
            values.append(tensors[name].transpose(np.argsort(order)))
        return np.stack(values) if stack else values[0]

    def _place(self, path: str, shape: Sequence[int]) -> tuple[str, str, tuple[int, ...]]:
        """Transformers' module and parameter, and the sizes of the stack."""
        parent, _, parameter = path.rpartition("/")
        module = self.hf_module(parent)
        stack = tuple(shape[:1]) if LAYER in module else ()
        return module, _PARAMETERS.get(parameter, parameter), stack

    def _axes(self, path: str, module: str, dims: int) -> tuple[int, ...]:
        """The axes of our parameter in the order in which transformers has them."""
        kind = self.kind(module)
        if path.rpartition("/")[2] != "kernel" or (kind == "conv1d" and dims == 2):
            return tuple(range(dims))
        if dims == 2 and kind == "linear":
            return (1, 0)
        if dims == 4 and kind == "conv2d":
            return (3, 2, 0, 1)  # (height, width, in, out) to (out, in, height, width)
        raise ValueError(
            f"{path}: a kernel of {dims} axes in one layer; reshape it to what {module} has: "
            "(in, out), of a convolution (height, width, in, out)"
        )


def each_layer(module: str, stack: Sequence[int], path: str) -> tuple[str, ...]:
    """The names of the modules that one parameter is for: one, or each of its stacked layers.

    Raises:
      ValueError: the name has an open layer and the parameter no stack, or the reverse.

    Example:
      >>> each_layer("h.{layer}.mlp", (2,), "h/mlp/kernel")
      ('h.0.mlp', 'h.1.mlp')
    """
    if LAYER not in module and not stack:
        return (module,)
    if LAYER in module and len(stack) == 1:
        return tuple(module.replace(LAYER, str(index)) for index in range(stack[0]))
    raise ValueError(
        f"{path}: is {module} there, with {len(stack)} axes of stacked layers. A path without the "
        "number of its layer has one such axis, and a path with it none: say which axes are "
        "stacked with LoraPairs(axes=LoraAxes(batch=(0,))), or name the layer in the path"
    )


def as_family(family: Family | str) -> Family:
    """A family, or the built-in one of that name.

    Raises:
      ValueError: an unknown name.
      TypeError: neither a family nor a name.
    """
    if isinstance(family, Family):
        return family
    if not isinstance(family, str):
        raise TypeError(f"family is a name or a Family, got {family!r}")
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}: choose from {', '.join(FAMILIES)}")
    return FAMILIES[family]


def _family(
    name: str,
    prefix: str,
    backbone: Sequence[Sequence[str]],
    heads: Sequence[str],
    kinds: tuple[tuple[str, str], ...] = (),
    column: int = 0,
) -> Family:
    """A family of models whose modules go by one of several names; `column` is the one written."""
    entries = [
        (_regex(known), "{prefix}" + names[min(column, len(names) - 1)])
        for names in backbone
        for known in names
    ]
    entries += [(_regex(head), head) for head in heads]
    return Family(name=name, prefix=prefix, modules=tuple(dict(entries).items()), kinds=kinds)


def _regex(name: str) -> str:
    """Our path of a module by its name: layers are counted in it or not, with / or with _."""
    # Apart, because re.escape escapes the braces too.
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
# The name in transformers 5, and that in 4 where it differs. Either is understood in our paths.
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
    *(f"{_DINO}mlp.{part}_proj" for part in ("gate", "up", "down")),  # of the giant, transformers 5
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

``vit`` and ``dinov2`` are called as in transformers 5, which renamed them; adapters and models made
with transformers 4 go by the names of ``vit_transformers4`` and ``dinov2_transformers4``.
"""
