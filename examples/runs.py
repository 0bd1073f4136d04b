"""A run's folder: its settings, its metrics and its checkpoints, and how it is taken up again.

The folder holds `settings.json`, what the run was asked to do; `metrics.jsonl`, one JSON object a
line; `checkpoints/STEP`, the training state for --resume (`loft_jax.checkpoint`); and, once the run
has ended, `adapter/`, the trained parameters alone (Orbax), and for adapters `peft/`, the same as
Hugging Face PEFT writes and loads it.

In a run of several processes all of them use the folder, which they share; the first one writes
what is not a checkpoint.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from errors import UserError
from jax.experimental import multihost_utils
from training import TrainState

from loft_jax.adapters import save_peft
from loft_jax.checkpoint import BaseReference, Checkpoints


class Run:
    """An output folder in use; close it to be sure that the checkpoints are whole."""

    def __init__(self, folder: Path, base: BaseReference | None = None):
        """Opens the folder, which `create` or `settings` has found to be good."""
        self.folder = folder.resolve()
        self._metrics = self.folder / "metrics.jsonl"
        self._checkpoints = Checkpoints(self.folder / "checkpoints", base=base, best="eval_loss")

    @staticmethod
    def create(
        folder: Path, settings: Mapping[str, Any], base: BaseReference | None = None
    ) -> "Run":
        """Starts a run in a folder that has none."""
        problem = ""
        if jax.process_index() == 0:
            problem = _begin(folder, settings)
        if jax.process_count() > 1:  # all of them stop if the first one cannot begin
            failed = multihost_utils.broadcast_one_to_all(jnp.int32(bool(problem)))
            problem = problem or ("The first process could not begin the run." if failed else "")
        if problem:
            raise UserError(problem)
        return Run(folder, base)

    @staticmethod
    def settings(folder: Path) -> dict[str, Any]:
        """The settings of the run in `folder`."""
        path = folder / "settings.json"
        if not path.is_file():
            raise UserError(f"{folder} holds no run to resume: there is no {path}.")
        return json.loads(path.read_text())

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends a line to the metrics."""
        if jax.process_index() == 0:
            with self._metrics.open("a") as file:
                file.write(json.dumps(record) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """All whole lines of the metrics (a killed run may have left half a line)."""
        if not self._metrics.exists():
            return []
        lines = self._metrics.read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def save(self, state: TrainState, metrics: Mapping[str, float] | None = None) -> None:
        """Keeps the training state, in the background; the step may reuse its buffers."""
        self._checkpoints.save(
            int(state.step),
            adapter=state.params,
            opt_state={"step": state.step, "optimizer": state.opt_state},
            data={"batches": int(state.step)},
            metrics=metrics,
        )

    def restore(self, template: TrainState) -> TrainState:
        """The newest good state, laid out as `template`, with the metrics cut back to its step."""
        restored = self._checkpoints.restore(
            adapter=template.params,
            opt_state={"step": template.step, "optimizer": template.opt_state},
        )
        if restored is None:
            raise UserError(
                f"{self.folder} has no checkpoint: the run stopped before its first one. Delete "
                "the folder and start again."
            )
        if jax.process_index() == 0:
            # A run killed between checkpoints has logged steps that will now be made again.
            kept = [record for record in self.records() if record["step"] <= restored.step]
            shorter = self._metrics.with_suffix(".new")
            shorter.write_text("".join(json.dumps(record) + "\n" for record in kept))
            shorter.replace(self._metrics)
        state = restored.opt_state
        return TrainState(state["step"], restored.adapter, state["optimizer"])

    def save_adapter(self, params: Any) -> Path:
        """Saves the trained parameters alone, replacing what is there."""
        path = self.folder / "adapter"
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, params, force=True)
        return path

    def save_peft(self, params: Any, **options: Any) -> Path:
        """Saves the adapter for PEFT: adapter_model.safetensors and adapter_config.json.

        Args:
            params: the trained parameters.
            options: those of `loft_jax.adapters.save_peft`.
        """
        return save_peft(self.folder / "peft", params, **options)

    def close(self) -> None:
        """Waits for what is being written."""
        self._checkpoints.close()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def open_run(
    settings: Any,
    output: Path | None,
    resume: bool,
    *,
    what: str,
    examples: Any,
    base: BaseReference | None = None,
) -> Run:
    """The run's folder, new or taken up again; a resumed run must see the same data and weights.

    Args:
        settings: a dataclass, with the method's name as `method`.
        output: the folder; None for the next free one of this method, for a new run.
        resume: whether to take up the run in it.
        what: what the run is trained on, "text" say, for messages.
        examples: that data, an array or a tree of arrays.
        base: what identifies the frozen weights.
    """
    digest = hashlib.sha256()
    for array in jax.tree.leaves(examples):
        digest.update(np.asarray(array).tobytes())
    name = f"{what}_sha256"
    if resume:
        assert output is not None
        if Run.settings(output).get(name) != digest.hexdigest():
            raise UserError(
                f"The training {what} of the run in {output} has changed since it began: put the "
                f"old {what} back, or start a new run in another --output."
            )
        return Run(output, base)
    if output is None:
        numbered = (Path("runs") / f"{settings.method}-{n}" for n in range(1, 10_000))
        output = next(path for path in numbered if not path.exists())
    described = {"settings": dataclasses.asdict(settings), name: digest.hexdigest()}
    return Run.create(output, described, base)


def _begin(folder: Path, settings: Mapping[str, Any]) -> str:
    """Makes the folder and its settings.json; what is wrong, if anything."""
    if (folder / "settings.json").exists():
        return (
            f"{folder} already holds a run: add --resume to continue it, or name another folder "
            "with --output."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")
    except OSError as error:
        return f"Cannot write to {folder} ({error}): name another --output."
    return ""
