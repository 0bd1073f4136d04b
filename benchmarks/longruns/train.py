"""Fine-tunes the model of a task with chosen methods and rates.

    python -m benchmarks.longruns train --text wikitext2-train.txt.gz --method full --rate 3e-3
    python -m benchmarks.longruns train --task vision --method lora loft --rate 1e-2

The model is first trained on other data, once; --cache keeps it. Then all kernels of its layers are
fine-tuned, or adapters on all of them. A run that the results have already is skipped. `suite` runs
all that docs/longruns.md reports. The tasks:

language    from prose to the sources of Python's standard library (needs --text)
arithmetic  the same model from prose to sums (needs --text)
vision      from digits to Fashion-MNIST, which Debian's dataset-fashion-mnist has
cifar10     from digits to CIFAR-10 (needs --images)
"""

import argparse
import itertools

from benchmarks.longruns.bench import Bench, Run, add_task
from benchmarks.longruns.methods import METHODS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", choices=METHODS, nargs="+", required=True, metavar="METHOD")
    parser.add_argument("--rate", type=float, nargs="+", required=True, help="peak learning rates")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    add_task(parser)


def run(options: argparse.Namespace) -> None:
    bench = Bench(options)
    for seed, method, rate in itertools.product(options.seed, options.method, options.rate):
        rank = None if METHODS[method].full else options.rank
        bench.result(Run(method, rank, rate, seed))
