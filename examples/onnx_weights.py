"""The weights in an ONNX file, read without the onnx package.

ONNX is a protocol buffer: fields of a number and a value, messages nested in messages. Of its
hundred kinds of fields six are needed to get at the weights.
https://protobuf.dev/programming-guides/encoding, https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_NAME = 1, 3
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 8, 9
_FLOAT = 1


@dataclasses.dataclass(frozen=True)
class OnnxGraph:
    """What is needed of a graph to find its weights."""

    tensors: dict[str, np.ndarray]
    """The float32 initializers by name; their names need not say what they are."""
    inputs: dict[str, list[str]]
    """Node name -> the names of what goes into it; exporters name nodes after the modules."""


def read_graph(data: bytes) -> OnnxGraph:
    """The graph of a serialised ONNX model.

    Raises:
        ValueError: the bytes are no ONNX model, or are truncated.
    """
    tensors, inputs = {}, {}
    for number, model_value in _fields(memoryview(data)):
        if number != _MODEL_GRAPH:
            continue
        for kind, message in _fields(_message(model_value)):
            if kind == _GRAPH_NODE:
                node = list(_fields(_message(message)))
                name = "".join(_text(value) for key, value in node if key == _NODE_NAME)
                inputs[name] = [_text(value) for key, value in node if key == _NODE_INPUT]
            elif kind == _GRAPH_INITIALIZER:
                name, tensor = _tensor(_message(message))
                if tensor is not None:
                    tensors[name] = tensor
    if not tensors:
        raise ValueError("it holds no float32 weights: is it an ONNX model?")
    return OnnxGraph(tensors, inputs)


def _tensor(message: memoryview) -> tuple[str, np.ndarray | None]:
    """A tensor's name and values; None for values that are not float32 in the usual place."""
    name, dims, kind, raw = "", [], 0, None
    for number, value in _fields(message):
        if number == _TENSOR_NAME:
            name = _text(value)
        elif number == _TENSOR_DIMS:
            # Repeated numbers may be packed into one field or not.
            dims += [value] if isinstance(value, int) else list(_varints(value))
        elif number == _TENSOR_TYPE:
            kind = value
        elif number == _TENSOR_RAW:
            raw = _message(value)
    if kind != _FLOAT or raw is None:
        return name, None
    return name, np.frombuffer(raw, "<f4").reshape(dims)


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a message: number, and a whole number or the bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(message, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"a field of wire type {wire} at byte {at}")
        if at + size > len(message):
            raise ValueError(f"it ends within a field of {size} bytes")
        yield number, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and the position behind it."""
    value = shift = 0
    while at < len(message):
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("it ends within a number")


def _varints(packed: memoryview) -> Iterator[int]:
    at = 0
    while at < len(packed):
        value, at = _varint(packed, at)
        yield value


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message is expected")
    return value


def _text(value: int | memoryview) -> str:
    return str(_message(value), "utf-8")
