"""What kind of machine a program is traced for: it decides how large pieces of work should be."""

from typing import Literal

import jax

Platform = Literal["cpu", "gpu", "tpu"]


def platform() -> Platform:
    """The platform of the mesh in context, else JAX's default one.

    No result depends on it but by rounding, and a wrong guess costs time alone.

    Example:
      >>> platform() in ("cpu", "gpu", "tpu")
      True
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return name if name in ("cpu", "tpu") else "gpu"
