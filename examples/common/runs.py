"""The folder of a run: settings, metrics, checkpoints and results.

The folder contains `settings.json`; `metrics.jsonl`, one JSON object per line;
`checkpoints/STEP`, the training state for --resume (`loft_jax.checkpoint`); and at the end
`adapter/`, the trained parameters (Orbax).

All processes of a run share the folder. The first process writes everything but the checkpoints.
"""

import dataclasses
import hashlib
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from loft_jax.checkpoint import BaseReference, Checkpoints

from .errors import UserError
from .trackers import Tracker, numbers_of, open_tracker
from .training import TrainState

SETTINGS = "settings.json"


class Run:
    """An open run folder; closing it waits until all checkpoints are written."""

    def __init__(self, folder: Path, base: BaseReference | None = None):
        """Opens a folder that `open_run` has checked or created."""
        self.folder = folder.resolve()
        self._trackers: list[Tracker] | None = None
        self._first_step = 0
        self._metrics = self.folder / "metrics.jsonl"
        self._checkpoints = Checkpoints(self.folder / "checkpoints", base=base, best="eval_loss")

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends a line to the metrics, and its numbers to those of the trackers."""
        if jax.process_index() > 0:
            return
        with self._metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if numbers := numbers_of(record):
            for tracker in self._open_trackers():
                tracker.log(numbers, step=record["step"])

    def _open_trackers(self) -> list[Tracker]:
        # Not before the first record: a resumed run knows its step after `restore` only.
        if self._trackers is None:
            saved = read_settings(self.folder)
            settings, identity = saved["settings"], saved.get("id", "")
            self._trackers = [
                open_tracker(name, self.folder, identity, settings, self._first_step)
                for name in settings.get("log_to", ())
            ]
        return self._trackers

    def records(self) -> list[dict[str, Any]]:
        """All complete lines of the metrics; a killed run may leave an incomplete one."""
        return read_records(self.folder)

    def save(self, state: TrainState, metrics: Mapping[str, float] | None = None) -> None:
        """Saves the training state in the background; the next step may reuse its buffers."""
        self._checkpoints.save(
            int(state.step),
            adapter=state.params,
            opt_state={"step": state.step, "optimizer": state.opt_state},
            data={"batches": int(state.step)},
            metrics=metrics,
        )

    def restore(self, template: TrainState) -> TrainState:
        """The newest intact state, with the layout of `template`; truncates later metrics."""
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
            # A killed run has logged steps after its last checkpoint, which will be repeated.
            kept = [record for record in self.records() if record["step"] <= restored.step]
            shorter = self._metrics.with_suffix(".new")
            shorter.write_text("".join(json.dumps(record) + "\n" for record in kept))
            shorter.replace(self._metrics)
        self._first_step = restored.step + 1
        state = restored.opt_state
        return TrainState(state["step"], restored.adapter, state["optimizer"])

    def wait(self) -> None:
        """Waits until all checkpoints are written."""
        self._checkpoints.wait()

    @property
    def resumable(self) -> Path:
        """The folder that --resume takes: for a method that a run is compared with, that run's."""
        parent = self.folder.parent
        if not (parent / SETTINGS).is_file():
            return self.folder
        compared = read_settings(parent).get("settings", {}).get("compare") or ()
        return parent if self.folder.name in compared else self.folder

    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to resume from; does not wait for other processes."""
        return any(path.name.isdigit() for path in (self.folder / "checkpoints").glob("*"))

    def save_adapter(self, params: Any) -> None:
        """Saves the trained parameters, replacing an earlier version."""
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(self.folder / "adapter", params, force=True)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: Any) -> None:
        try:
            for tracker in self._trackers or ():
                tracker.finish()
        finally:
            self._checkpoints.close()


def open_run(
    settings: Any,
    output: Path | None,
    resume: bool,
    *,
    examples: Any,
    base: BaseReference | None = None,
) -> Run:
    """Creates or reopens the folder of a run.

    Args:
        settings: a dataclass with the name of the method as `method`.
        output: the folder; None for the next free one of this method.
        resume: whether to reopen a run, which must have the same data and frozen weights.
        examples: the training data, an array or a tree of arrays.
        base: identifies the frozen weights.
    """
    digest = hashlib.sha256()
    for array in jax.tree.leaves(examples):
        digest.update(np.asarray(array).tobytes())
    if resume:
        assert output is not None
        if read_settings(output).get("data_sha256") != digest.hexdigest():
            raise UserError(
                f"The training data of the run in {output} have changed since it started: restore "
                "the old data, or start a new run in another --output."
            )
        return Run(output, base)
    if output is None:
        numbered = (Path("runs") / f"{settings.method}-{n}" for n in range(1, 10_000))
        output = next(path for path in numbered if not path.exists())
    described = {
        "id": uuid.uuid4().hex,
        "settings": dataclasses.asdict(settings),
        "data_sha256": digest.hexdigest(),
    }
    problem = _begin(output, described) if jax.process_index() == 0 else ""
    if jax.process_count() > 1:  # all processes stop if the first one cannot start the run
        failed = multihost_utils.broadcast_one_to_all(jnp.int32(bool(problem)))
        problem = problem or ("The first process could not start the run." if failed else "")
    if problem:
        raise UserError(problem)
    return Run(output, base)


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All complete lines of the metrics of the run in a folder."""
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        return []
    return [json.loads(line) for line in metrics.read_text().split("\n")[:-1]]


def next_steps(folder: Path, script: str) -> str:
    """What a user can do with the results of a finished run."""
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    lines = []
    if (folder / "merged").is_dir():
        lines.append(f"load the trained model: from_pretrained({str(shown / 'merged')!r})")
    if (folder / "peft").is_dir():
        lines.append(f"load the adapter: PeftModel.from_pretrained(base, {str(shown / 'peft')!r})")
    if lines and script == "finetune_llm.py":
        lines.append("serve it: docs/howto/serve_transformers.md, and beside it the other programs")
    config = shown / SETTINGS
    lines.append(f"change a setting: python examples/{script} --config {config} --seed 1")
    return "\nnext:\n" + "\n".join(f"  {line}" for line in lines)


def read_settings(folder: Path) -> dict[str, Any]:
    """The content of a run's settings.json."""
    path = folder / SETTINGS
    if not path.is_file():
        raise UserError(f"{folder} contains no run to resume: there is no {path}.")
    return json.loads(path.read_text())


def _begin(folder: Path, described: Mapping[str, Any]) -> str:
    """Creates the folder and its settings.json; returns an error message, or ''."""
    if (folder / SETTINGS).exists():
        return (
            f"{folder} already contains a run: add --resume to continue it, or choose another "
            "--output."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SETTINGS).write_text(json.dumps(described, indent=2) + "\n")
    except OSError as error:
        return f"Cannot write to {folder} ({error}): choose another --output."
    return ""
