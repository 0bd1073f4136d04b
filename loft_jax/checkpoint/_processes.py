"""Agreement between the processes of a run. In a single-process run these are no-ops."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def on_first_process(fn: Callable[[], Any]) -> Any:
    """Calls ``fn`` in process 0 and returns its result in all processes.

    An `OSError` of ``fn`` is raised in all processes. Any other error is raised in process 0, and
    as a `RuntimeError` in the others.

    Args:
      fn: a function whose result is JSON-serializable.
    """
    if jax.process_count() == 1:
        return fn()
    reply, failure = b"", None
    if jax.process_index() == 0:
        try:
            reply = json.dumps({"value": fn()}).encode()
        except OSError as error:
            reply = json.dumps({"errno": error.errno, "text": str(error)}).encode()
        except Exception as error:  # raised after the broadcast: the other processes are waiting
            failure = error
            reply = json.dumps({"failed": f"{type(error).__name__}: {error}"}).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(reply))))
    padded = np.frombuffer(reply.ljust(size), np.uint8)
    message = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())
    if failure is not None:
        raise failure
    if "failed" in message:
        raise RuntimeError(f"process 0 failed: {message['failed']}")
    if "errno" in message:
        raise OSError(message["errno"], message["text"])
    return message["value"]


def worst(code: int) -> int:
    """Returns the largest code of all processes."""
    if jax.process_count() == 1:
        return code
    return int(np.max(multihost_utils.process_allgather(np.int32(code))))


def differing(values: dict[str, str]) -> list[str]:
    """Returns the keys whose digests differ between processes. All must pass the same keys."""
    if jax.process_count() == 1 or not values:
        return []
    local = np.array([[int(v[:8], 16), int(v[8:], 16)] for v in values.values()], np.uint32)
    everywhere = np.asarray(multihost_utils.process_allgather(local))
    same = (everywhere == everywhere[:1]).all(axis=(0, 2))
    return [path for path, equal in zip(values, same, strict=True) if not equal]
