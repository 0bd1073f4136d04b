"""The options that give a state its meaning, as a part of the state.

Two states of equal shapes may mean different things: squares of coordinates or cross terms of rank
one, moments in an orthonormal basis or in raw coordinates. `Options` says which. It has no arrays,
only types, so that it is known under `jax.jit`, in abstract states and in checkpoints.
"""

from typing import Any, NamedTuple

import jax

from loft_jax.algorithm.pair import Blocks


class CalibratedMoment(NamedTuple):
    """``nu`` holds packed cross terms."""


class FactoredMoment(NamedTuple):
    """``nu`` holds row sums and a Gram matrix."""


class DiagonalMoment(NamedTuple):
    """``nu`` holds squares of coordinates."""


class On(NamedTuple):
    """The building block is on."""


class Off(NamedTuple):
    """The building block is off, an ablation."""


class Options(NamedTuple):
    """The options of a state of `scale_by_loft_adam`.

    Attributes:
      second_moment: which second moment ``nu`` holds.
      scale_gradient, calibrate, reconstruct: blocks 2, 3 with 4, and 5.
    """

    second_moment: CalibratedMoment | FactoredMoment | DiagonalMoment
    scale_gradient: On | Off
    calibrate: On | Off
    reconstruct: On | Off

    def __str__(self) -> str:
        moment = type(self.second_moment).__name__.removesuffix("Moment").lower()
        off = [name for name in self._fields[1:] if isinstance(getattr(self, name), Off)]
        return ", ".join([f"second_moment={moment!r}", *(f"{name}=False" for name in off)])


_MOMENTS = {
    "calibrated": CalibratedMoment(),
    "factored": FactoredMoment(),
    "diagonal": DiagonalMoment(),
}


def make_options(second_moment: str, blocks: Blocks) -> Options:
    """Returns the options of a state.

    Example:
      >>> print(make_options("factored", Blocks(calibrate=False)))
      second_moment='factored', calibrate=False
    """
    flag = lambda on: On() if on else Off()
    return Options(
        _MOMENTS[second_moment],
        flag(blocks.scale_gradient),
        flag(blocks.calibrate),
        flag(blocks.reconstruct),
    )


def check_options(found: Any, expected: Options) -> None:
    """Raises ValueError unless a state was made with these options."""
    # By structure: types without fields are equal as tuples.
    if jax.tree.structure(found) != jax.tree.structure(expected):
        raise ValueError(
            f"The state was made with {found}, the optimizer has {expected}. Use the same options, "
            "or make the state anew with init"
        )


def second_moment_name(options: Options) -> str:
    """Returns the name of the second moment of a state.

    Example:
      >>> second_moment_name(make_options("factored", Blocks()))
      'factored'
    """
    return next(
        name for name, kind in _MOMENTS.items() if type(kind) is type(options.second_moment)
    )
