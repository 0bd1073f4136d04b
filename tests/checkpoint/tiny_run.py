"""A training run small enough to be killed many times, in processes of its own.

`tiny_run.py CACHE` reads orders from its standard input, one JSON object a line, and forks a
process for each. A fork costs none of the seconds that imports take. JAX's backend starts after the
fork, so each process is as new as one from the command line. The commands of an order:

  continuous FOLDER     trains each setup 2k steps without interruption, and saves after k
  resumed FOLDER        restores each setup and trains the other k steps
  until_preempted FOLDER UNTIL
  killed_run FOLDER UNTIL SAVE_EVERY ASYNCHRONOUS PAUSE
"""

import contextlib
import hashlib
import json
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a fork does not copy threads

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from loft_jax import clip_by_projected_global_norm, loft_adamw, loft_muon, loft_sgd
from loft_jax.checkpoint import Checkpoints, Preemption

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: run me again
HALVES = (1, 2, 3)  # LoFT alternates: the run resumes with either factor active

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


def use_cache_of_jax(use: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", use)
    compilation_cache.reset_cache()  # it remembers whether it is in use


def compiled(path: Path, fn: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """Returns the compiled function. The first process stores it for the others.

    Tracing takes most of the time of a run this short.
    """
    with contextlib.suppress(FileNotFoundError):
        return serialize_executable.deserialize_and_load(*pickle.loads(path.read_bytes()))
    # A program that JAX read from its own cache cannot be serialized.
    use_cache_of_jax(False)
    program = jax.jit(fn, donate_argnums=tuple(range(1, len(args)))).lower(*args).compile()
    use_cache_of_jax(True)
    unfinished = path.with_suffix(f".{os.getpid()}")  # this process may be killed here
    unfinished.write_bytes(pickle.dumps(serialize_executable.serialize(program)))
    unfinished.rename(path)
    return program


class Trainer:
    """One run: its state, and a step that donates it."""

    def __init__(self, setup: str):
        tx = SETUPS[setup]()
        self.params = initial_params()
        self.state = compiled(CACHE / f"{setup}.init", tx.init, self.params)(self.params)
        self.key = jax.random.key(0)
        self.step = 0
        self.data = {"epoch": 0, "batch": 0}

        def update(batch, params, state, key):
            key, noise = jax.random.split(key)

            def loss_fn(params):
                x = jax.random.normal(noise, (4, 6)) + batch
                for layer in params.values():
                    x = jnp.tanh(x @ layer["lora_a"] @ layer["lora_b"]) @ jnp.ones((5, 6)) + x
                return jnp.mean((x - batch) ** 2)

            updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
            return optax.apply_updates(params, updates), state, key

        args = (self.batch(), self.params, self.state, self.key)
        self.update = compiled(CACHE / f"{setup}.update", update, *args)

    def batch(self) -> np.float32:
        return np.float32(self.data["batch"] + 7 * self.data["epoch"])

    def train(self, steps: int) -> "Trainer":
        for _ in range(steps):
            self.params, self.state, self.key = self.update(
                self.batch(), self.params, self.state, self.key
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
        """Returns a hash of every bit of the state."""
        leaves = jax.tree_util.tree_leaves_with_path((self.params, self.state))
        text = json.dumps([self.step, self.data, jax.random.key_data(self.key).tolist()])
        whole = hashlib.sha256(text.encode())
        for path, leaf in leaves:
            whole.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
            whole.update(np.asarray(leaf).tobytes())
        return whole.hexdigest()


def continuous(tell: Callable[[str], None], folder: str) -> None:
    """Trains without interruption, and saves each half to a folder of its own."""
    found = {}
    for setup in SETUPS:
        trainer = Trainer(setup)
        for half in sorted({*HALVES, *(2 * half for half in HALVES)}):
            trainer.train(half - trainer.step)
            found[f"{setup} {half}"] = trainer.fingerprint()
            if half in HALVES:
                with Checkpoints(Path(folder) / setup / str(half)) as checkpoints:
                    trainer.save(checkpoints)
    tell(json.dumps(found))


def resumed(tell: Callable[[str], None], folder: str) -> None:
    """Resumes where `continuous` saved."""
    found = {}
    for setup in SETUPS:
        trainer = Trainer(setup)
        for half in HALVES:
            with Checkpoints(Path(folder) / setup / str(half), read_only=True) as checkpoints:
                trainer.restore(checkpoints)
            found[f"{setup} {2 * half}"] = trainer.train(half).fingerprint()
    tell(json.dumps(found))


def until_preempted(tell: Callable[[str], None], folder: str, until: int) -> None:
    """Trains. On SIGTERM it saves and exits with the code for it."""
    with Checkpoints(folder, save_every=1_000_000) as checkpoints, Preemption() as preemption:
        trainer = Trainer("calibrated").restore(checkpoints)
        tell(f"resumed {trainer.step}")
        while trainer.step < until:
            trainer.train(1)
            tell(f"step {trainer.step}")
            if preemption.reached(trainer.step):
                trainer.save(checkpoints, force=True)
                checkpoints.wait()
                tell(f"saved {checkpoints.latest_step()}")
                sys.exit(PREEMPTED)
    tell(f"resumed run {trainer.fingerprint()}")
    tell(f"uninterrupted run {Trainer('calibrated').train(until).fingerprint()}")


def killed_run(
    tell: Callable[[str], None],
    folder: str,
    until: int,
    save_every: int,
    asynchronous: bool,
    pause: float,
) -> None:
    """Saves every few steps and tells what it is about to do.

    It tells "resumed STEP", "train", "save", "saved STEP" (the save is complete) and "done
    FINGERPRINT".
    """
    with Checkpoints(folder, asynchronous=asynchronous) as checkpoints:
        trainer = Trainer("diagonal").restore(checkpoints)
        tell(f"resumed {trainer.step}")
        while trainer.step < until:
            tell("train")
            for _ in range(min(save_every, until - trainer.step)):
                trainer.train(1)
                time.sleep(pause)  # as a run that waits for data
            jax.block_until_ready(trainer.params)
            tell("save")
            trainer.save(checkpoints)
            if asynchronous and trainer.step < until:
                trainer.train(1)  # donates what is being written
            checkpoints.wait()
            tell(f"saved {checkpoints.latest_step()}")
    tell(f"done {trainer.fingerprint()}")


COMMANDS = {f.__name__: f for f in (continuous, resumed, until_preempted, killed_run)}


def run_order(order: dict[str, Any]) -> int:
    """Runs an order in this process and returns its exit code."""
    try:
        tell = lambda text: print(text, flush=True)
        tell(f"pid {os.getpid()}")
        COMMANDS[order.pop("command")](tell, **order)
    except SystemExit as error:
        return int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    return 0


def main() -> None:
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads != 1:
        raise RuntimeError(f"{threads} threads, which a fork does not copy")
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(run_order(json.loads(line)))
        _, status = os.waitpid(child, 0)
        print(f"ended {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    CACHE = Path(sys.argv[1])
    jax.config.update("jax_compilation_cache_dir", str(CACHE / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    jax.config.update("jax_disable_most_optimizations", True)
    main()
