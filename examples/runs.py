"""A run's folder: its settings, its metrics and its checkpoints, and how it is taken up again.

The folder holds `settings.json`, what the run was asked to do; `metrics.jsonl`, one JSON object a
line; `checkpoints/STEP`, the training state for --resume (Orbax); and, once the run has ended,
`adapter/`, the trained parameters alone (Orbax), and for adapters `peft/`, the same as Hugging Face
PEFT writes and loads it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from errors import UserError

from loft_jax import LoraPairs
from loft_jax.adapters import save_peft


class Run:
    """An output folder in use; close it to be sure that the checkpoints are whole."""

    def __init__(self, folder: Path):
        """Opens the folder, which `create` or `settings` has found to be good."""
        self.folder = folder.resolve()
        self._metrics = self.folder / "metrics.jsonl"
        # Synchronous saves: the training step donates the buffers that are being saved.
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.folder / "checkpoints", options=options)

    @staticmethod
    def create(folder: Path, settings: Mapping[str, Any]) -> "Run":
        """Starts a run in a folder that has none."""
        if (folder / "settings.json").exists():
            raise UserError(
                f"{folder} already holds a run: add --resume to continue it, or name another "
                "folder with --output."
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")
        except OSError as error:
            raise UserError(
                f"Cannot write to {folder} ({error}): name another --output."
            ) from error
        return Run(folder)

    @staticmethod
    def settings(folder: Path) -> dict[str, Any]:
        """The settings of the run in `folder`."""
        path = folder / "settings.json"
        if not path.is_file():
            raise UserError(f"{folder} holds no run to resume: there is no {path}.")
        return json.loads(path.read_text())

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends a line to the metrics."""
        with self._metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """All whole lines of the metrics (a killed run may have left half a line)."""
        if not self._metrics.exists():
            return []
        lines = self._metrics.read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def save(self, step: int, state: Any) -> None:
        """Keeps the training state after `step` updates."""
        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, template: Any) -> Any:
        """The newest saved state, shaped as `template`, with the metrics cut back to its step."""
        step = self._manager.latest_step()
        if step is None:
            raise UserError(
                f"{self.folder} has no checkpoint: the run stopped before its first one. Delete "
                "the folder and start again."
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
        state = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        # A run killed between checkpoints has logged steps that will now be made again.
        kept = [record for record in self.records() if record["step"] <= step]
        self._metrics.write_text("".join(json.dumps(record) + "\n" for record in kept))
        return state

    def save_adapter(self, params: Any) -> Path:
        """Saves the trained parameters alone, replacing what is there."""
        path = self.folder / "adapter"
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, params, force=True)
        return path

    def save_peft(self, params: Any, pairs: LoraPairs, base_model: str) -> Path:
        """Saves the adapter for PEFT: adapter_model.safetensors and adapter_config.json."""
        return save_peft(
            self.folder / "peft",
            params,
            family="llama",
            pairs=pairs,
            base_model=base_model,
            task_type="CAUSAL_LM",
        )

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.close()
