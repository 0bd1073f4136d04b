"""A training run small enough to be killed many times, in processes of its own.

python tiny_run.py continuous FOLDER     trains each setup 2k steps in one go; and k, then saves
python tiny_run.py resumed FOLDER        restores each, trains the other k steps
python tiny_run.py until-preempted FOLDER STEPS
python tiny_run.py zygote                forks a run for each line of its standard input
"""

import contextlib
import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a fork takes no threads along

import jax
import jax.numpy as jnp
import numpy as np
import optax

from loft_jax import clip_by_projected_global_norm, loft_adamw, loft_muon, loft_sgd
from loft_jax.checkpoint import Checkpoints, Preemption

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: run me again
HALVES = (1, 2, 3)  # LoFT alternates: a run may be taken up before either factor's turn

_schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, 3, 12)
SETUPS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "calibrated": lambda: loft_adamw(0.1, weight_decay=0.1),
    "factored": lambda: loft_adamw(0.1, second_moment="factored"),
    "diagonal": lambda: loft_adamw(0.1, second_moment="diagonal"),
    "scheduled": lambda: loft_adamw(_schedule, weight_decay=_schedule),
    "muon": lambda: loft_muon(_schedule),
    "momentum": lambda: loft_sgd(0.01, momentum=0.9),
    "clipped": lambda: optax.chain(clip_by_projected_global_norm(0.5), loft_adamw(_schedule)),
    "accumulated": lambda: optax.MultiSteps(loft_adamw(_schedule), 2),
    "injected": lambda: optax.inject_hyperparams(loft_adamw)(_schedule),
    "if_finite": lambda: optax.apply_if_finite(loft_adamw(0.1), 3),
}


def initial_params() -> Any:
    draw = np.random.default_rng(0).normal
    layer = lambda: {
        "lora_a": jnp.asarray(draw(size=(6, 2)), jnp.float32),
        "lora_b": jnp.zeros((2, 5), jnp.float32),
    }
    return {"layer0": layer(), "layer1": layer()}


class Trainer:
    """One run: its state, and a step that donates it."""

    def __init__(self, setup: str):
        tx = SETUPS[setup]()
        self.params = initial_params()
        self.state = jax.jit(tx.init)(self.params)
        self.key = jax.random.key(0)
        self.step = 0
        self.data = {"epoch": 0, "batch": 0}

        @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
        def update(params, state, key, batch):
            key, noise = jax.random.split(key)

            def loss_fn(params):
                x = jax.random.normal(noise, (4, 6)) + batch
                for layer in params.values():
                    x = jnp.tanh(x @ layer["lora_a"] @ layer["lora_b"]) @ jnp.ones((5, 6)) + x
                return jnp.mean((x - batch) ** 2)

            updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
            return optax.apply_updates(params, updates), state, key

        self.update = update

    def train(self, steps: int) -> "Trainer":
        for _ in range(steps):
            batch = jnp.float32(self.data["batch"] + 7 * self.data["epoch"])
            self.params, self.state, self.key = self.update(
                self.params, self.state, self.key, batch
            )
            self.step += 1
            epoch, batch = divmod(self.data["epoch"] * 5 + self.data["batch"] + 1, 5)
            self.data = {"epoch": epoch, "batch": batch}
        return self

    def save(self, checkpoints: Checkpoints, force: bool = False) -> bool:
        return checkpoints.save(
            self.step,
            adapter=self.params,
            opt_state=self.state,
            key=self.key,
            data=self.data,
            force=force,
        )

    def restore(self, checkpoints: Checkpoints) -> "Trainer":
        found = checkpoints.restore(adapter=self.params, opt_state=self.state, key=self.key)
        if found is not None:
            self.step, self.params, self.state, self.key, self.data, _ = found
        return self

    def fingerprint(self) -> str:
        """Of every bit of the state."""
        leaves = jax.tree_util.tree_leaves_with_path((self.params, self.state))
        text = json.dumps([self.step, self.data, jax.random.key_data(self.key).tolist()])
        whole = hashlib.sha256(text.encode())
        for path, leaf in leaves:
            whole.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
            whole.update(np.asarray(leaf).tobytes())
        return whole.hexdigest()


def continuous(folder: Path) -> dict[str, str]:
    """Trains in one go, and saves at half time in folders of their own."""
    found = {}
    for setup in SETUPS:
        trainer = Trainer(setup)
        for half in sorted({*HALVES, *(2 * half for half in HALVES)}):
            trainer.train(half - trainer.step)
            found[f"{setup} {half}"] = trainer.fingerprint()
            if half in HALVES:
                with Checkpoints(folder / setup / str(half)) as checkpoints:
                    trainer.save(checkpoints)
    return found


def resumed(folder: Path) -> dict[str, str]:
    """Goes on where `continuous` saved."""
    found = {}
    for setup in SETUPS:
        trainer = Trainer(setup)
        for half in HALVES:
            with Checkpoints(folder / setup / str(half), read_only=True) as checkpoints:
                trainer.restore(checkpoints)
            found[f"{setup} {2 * half}"] = trainer.train(half).fingerprint()
    return found


def until_preempted(folder: Path, until: int) -> dict[str, Any]:
    """Trains; on SIGTERM saves and ends with the exit code for it."""
    with Checkpoints(folder, save_every=1_000_000) as checkpoints, Preemption() as preemption:
        trainer = Trainer("calibrated").restore(checkpoints)
        resumed = trainer.step
        while trainer.step < until:
            trainer.train(1)
            print(json.dumps({"step": trainer.step}), flush=True)
            if preemption.reached(trainer.step):
                trainer.save(checkpoints, force=True)
                checkpoints.wait()
                print(json.dumps({"saved": checkpoints.latest_step()}), flush=True)
                sys.exit(PREEMPTED)
    return {
        "resumed": resumed,
        "fingerprint": trainer.fingerprint(),
        "uninterrupted": Trainer("calibrated").train(until).fingerprint(),
    }


def killed_run(order: dict[str, Any], tell: Callable[[str], None]) -> None:
    """A run that saves every few steps and tells what it is about to do.

    Args:
      order: folder, until, save_every, asynchronous, pause.
      tell: takes "resumed STEP", "train", "save", "saved STEP" (it is whole) and "done PRINT".
    """
    with Checkpoints(order["folder"], asynchronous=order["asynchronous"]) as checkpoints:
        trainer = Trainer("diagonal").restore(checkpoints)  # the quickest to trace
        tell(f"resumed {trainer.step}")
        while trainer.step < order["until"]:
            tell("train")
            for _ in range(min(order["save_every"], order["until"] - trainer.step)):
                trainer.train(1)
                time.sleep(order["pause"])  # waits for data
            jax.block_until_ready(trainer.params)
            tell("save")
            trainer.save(checkpoints)
            if order["asynchronous"] and trainer.step < order["until"]:
                trainer.train(1)  # which donates what is being written
            checkpoints.wait()
            tell(f"saved {checkpoints.latest_step()}")
    tell(f"done {trainer.fingerprint()}")


def zygote() -> None:
    """Forks a run for each order; a fork costs none of the seconds that the imports took."""
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads != 1:
        raise RuntimeError(f"{threads} threads: a fork would not take them along")
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 1
            with contextlib.suppress(BrokenPipeError):
                try:
                    tell = lambda text: print(text, flush=True)
                    tell(f"pid {os.getpid()}")
                    killed_run(json.loads(line), tell)
                    status = 0
                finally:
                    sys.stderr.flush()
                    if status:
                        import traceback

                        traceback.print_exc()
                    os._exit(status)
        _, status = os.waitpid(child, 0)
        print(f"ended {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    if cache := os.environ.get("TINY_RUN_CACHE"):
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    jax.config.update("jax_disable_most_optimizations", True)
    command, *arguments = sys.argv[1:]
    if command == "zygote":
        zygote()
    elif command == "until-preempted":
        print(json.dumps(until_preempted(Path(arguments[0]), int(arguments[1]))), flush=True)
    else:
        run = {"continuous": continuous, "resumed": resumed}[command]
        print(json.dumps(run(Path(arguments[0]))), flush=True)
