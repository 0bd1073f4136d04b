"""Agreement between the processes of a run; with one process, nothing is to be agreed on."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def on_first_process(fn: Callable[[], Any]) -> Any:
    """Runs ``fn`` in process 0 alone; all processes return its result or raise its `OSError`.

    Any other error is raised there, and as a `RuntimeError` in the other processes.

    Args:
      fn: returns what JSON can hold.
    """
    if jax.process_count() == 1:
        return fn()
    reply, failure = b"", None
    if jax.process_index() == 0:
        try:
            reply = json.dumps({"value": fn()}).encode()
        except OSError as error:
            reply = json.dumps({"errno": error.errno, "text": str(error)}).encode()
        except Exception as error:  # told to the others first: they are waiting
            failure = error
            reply = json.dumps({"failed": f"{type(error).__name__}: {error}"}).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(reply))))
    padded = np.frombuffer(reply.ljust(size), np.uint8)
    message = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())
    if failure is not None:
        raise failure
    if "failed" in message:
        raise RuntimeError(f"process 0 could not go on: {message['failed']}")
    if "errno" in message:
        raise OSError(message["errno"], message["text"])
    return message["value"]


def worst(code: int) -> int:
    """The largest of the processes' codes."""
    if jax.process_count() == 1:
        return code
    return int(np.max(multihost_utils.process_allgather(np.int32(code))))


def differing(values: dict[str, str]) -> list[str]:
    """The keys under which the processes hold different digests; the keys must be the same."""
    if jax.process_count() == 1 or not values:
        return []
    local = np.array([[int(v[:8], 16), int(v[8:], 16)] for v in values.values()], np.uint32)
    everywhere = np.asarray(multihost_utils.process_allgather(local))
    same = (everywhere == everywhere[:1]).all(axis=(0, 2))
    return [path for path, equal in zip(values, same, strict=True) if not equal]
