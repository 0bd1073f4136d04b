"""Benchmarks of loft_jax. Each folder is a package with one command line, run from the repository:

    python -m benchmarks.cost --help          # time, memory and precision of the optimizers
    python -m benchmarks.scaling --help       # memory and communication on meshes of devices
    python -m benchmarks.factorization --help # matrix factorization and the paper's lemmas
    python -m benchmarks.accuracy --help      # the accuracy study

`results/` in a folder keeps what was measured, as JSON lines.
"""
