"""The platform that a program is traced for, which decides the sizes of blocks and chunks."""

from collections.abc import Callable
from typing import Any, Literal

import jax

Platform = Literal["cpu", "gpu", "tpu"]


def traced_platform() -> Platform:
    """Returns the platform of the mesh in context, else JAX's default one.

    It decides sizes of blocks and chunks, and which of two equal operations is the faster: a wrong
    guess changes results by rounding and costs time. To compile ahead of time for another platform
    than the host's, put a mesh of its devices in context (`jax.set_mesh`), or its abstract mesh.
    A choice between two algorithms belongs to `by_platform`.

    Example:
      >>> traced_platform() in ("cpu", "gpu", "tpu")
      True
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return name if name in ("cpu", "tpu") else "gpu"


def by_platform(*args: Any, default: Callable[..., Any], **branches: Callable[..., Any]) -> Any:
    """Calls the function of the platform that the program is compiled for.

    The choice is made when the program is lowered. So it also holds where a program is compiled
    ahead of time for another platform than the host's.

    Args:
      *args: arguments of the functions, pytrees of arrays.
      default: the function of all other platforms.
      **branches: functions by platform, such as ``cpu=...`` or ``tpu=...``.

    Example:
      >>> import jax.numpy as jnp
      >>> by_platform(jnp.ones(()), cpu=lambda x: x + 1, default=lambda x: x + 1)
      Array(2., dtype=float32)
    """
    return jax.lax.platform_dependent(*args, default=default, **branches)
