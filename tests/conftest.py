"""Shared by all tests: eight CPU devices, programs compiled once, a table of largest errors."""

import os
import shutil
import tempfile
import types
from importlib.metadata import version
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests compile far more than they compute: these make machine code cheaply. What a program
# computes and sends between devices is decided before.
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_parallel_codegen_split_count=1",  # one LLVM module a program, not many
]
# The former emitter of loops takes a third of the time. Newer versions reject this flag: there the
# tests run the emitter that users have.
if version("jaxlib").startswith("0.10."):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
# The last of two settings counts: that of whoever starts the tests.
os.environ["XLA_FLAGS"] = " ".join([*FLAGS, os.environ.get("XLA_FLAGS", "")])

# The workers of one session, and the processes that tests start, compile no large program twice.
PROGRAMS = "JAX_COMPILATION_CACHE_DIR"
MADE_HERE = PROGRAMS not in os.environ
if MADE_HERE:
    os.environ[PROGRAMS] = tempfile.mkdtemp(prefix="programs")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"

import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook

# Checks every `Float[Array, "m r"]` of the package, at run time and under jit.
install_import_hook("loft_jax", "beartype.beartype")

# `pytest -m quick`: a sample of each kind of claim, for the inner loop.
QUICK = (
    "loft_jax/algorithm",
    "loft_jax/execution",
    "loft_jax/pairs",
    "tests/test_algorithm_docs.py",
    "tests/test_alternation.py",
    "tests/test_contract.py::test_a_chain_passes_params_and_extra_arguments[loft_adamw]",
    "tests/test_contract.py::test_init_takes_shapes_alone",
    "tests/test_exactness.py::test_at_full_rank_loft_adamw_is_the_adamw_of_optax",
    "tests/test_exactness.py::test_loft_is_algorithm_1[tall-weight decay",
    "tests/test_exactness.py::test_loft_is_the_dense_method[scaled-default",
    "tests/test_exactness.py::test_loft_is_the_dense_method[zero init-default",
    "tests/test_momentum.py::test_at_full_rank_loft_muon_is_the_muon_of_optax",
    "tests/test_momentum.py::test_lemma",
    "tests/test_pairs.py",
    "tests/test_robustness.py::test_the_basis",
)

LARGEST_ERRORS = pytest.StashKey[dict]()
TABLES = pytest.StashKey[list]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LARGEST_ERRORS] = {}
    config.stash[TABLES] = []


@pytest.fixture(autouse=True)
def forget_declared_adapters():
    """Forgets the adapters that earlier tests have made, so that no test warns of them."""
    from loft_jax.pairs.declared import forget_scales  # after the import hook

    forget_scales()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(QUICK):
            item.add_marker(pytest.mark.quick)


@pytest.fixture
def x64():
    """Runs a test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def assert_close(request: pytest.FixtureRequest):
    """Asserts a largest absolute difference and keeps it for the summary, by the test's name."""

    def check(got, expected, tolerance: float = 1e-10, name: str | None = None) -> None:
        got, expected = np.asarray(got), np.asarray(expected)
        assert got.shape == expected.shape
        error = float(np.abs(got - expected).max())
        errors = request.config.stash[LARGEST_ERRORS]
        key = name or request.node.originalname
        known = errors.get(key, (0.0, tolerance))
        errors[key] = (max(known[0], error), max(known[1], tolerance))
        assert error <= tolerance, f"largest difference {error:.2e}"

    return check


@pytest.fixture
def report(request: pytest.FixtureRequest):
    """Adds a line to the tables printed after the tests."""
    return request.config.stash[TABLES].append


@pytest.fixture
def close(report):
    """Asserts closeness, and reports the largest difference after the tests."""

    def check(what: str, got: Any, expected: Any, tolerance: float) -> None:
        largest = float(np.abs(np.asarray(got) - np.asarray(expected)).max())
        report(f"{what}: largest difference {largest:.1e} (at most {tolerance:.0e})")
        assert largest <= tolerance

    return check


@pytest.fixture(scope="module")
def hf():
    """The real libraries."""
    why = "not installed: that PEFT and transformers take our files is shown by no test here"
    modules = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        for name in ("torch", "transformers", "peft"):
            modules[name] = pytest.importorskip(name, reason=f"{name} is {why}")
        modules["torch"].set_num_threads(1)
        yield types.SimpleNamespace(**modules)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands its tables to the process that prints them."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["errors"] = {k: list(v) for k, v in session.config.stash[LARGEST_ERRORS].items()}
        output["tables"] = session.config.stash[TABLES]


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node) -> None:
    output = getattr(node, "workeroutput", {})  # a worker that crashed has none
    errors = node.config.stash[LARGEST_ERRORS]
    for name, (error, tolerance) in output.get("errors", {}).items():
        known = errors.get(name, (0.0, tolerance))
        errors[name] = (max(known[0], error), max(known[1], tolerance))
    node.config.stash[TABLES] += output.get("tables", [])


def pytest_unconfigure() -> None:
    if MADE_HERE:
        shutil.rmtree(os.environ[PROGRAMS], ignore_errors=True)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    errors = config.stash[LARGEST_ERRORS]
    if errors:
        terminalreporter.section("largest errors against the oracles (tolerance)")
        for name, (error, tolerance) in sorted(errors.items()):
            terminalreporter.line(f"{error:8.1e} ({tolerance:.0e})  {name}")
    if config.stash[TABLES]:
        terminalreporter.section("tables")
        for line in config.stash[TABLES]:
            terminalreporter.line(line)
