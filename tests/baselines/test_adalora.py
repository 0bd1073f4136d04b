"""AdaLoRA against a NumPy oracle of the paper's Algorithm 1, and what it owes to Optax and JAX."""

import dataclasses
import fractions
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optimizers import assert_trees_close, assert_trees_identical, random_like, train, types
from optimizers import hasty_compiler as hasty_compiler

from loft_jax import LoraAxes, LoraPairs
from loft_jax.baselines._adalora import adalora, orthogonality_penalty
from loft_jax.baselines._budget import budget_schedule

STEPS = 40
NAMES = ("lora_a", "lora_e", "lora_b")
SHAPES = {"first": (9, 7, 4), "second": (6, 8, 4), "third": (5, 5, 3)}  # 11 ranks
SCALE, GAMMA, RATE, DECAY = 0.8, 0.05, 0.03, 0.1


@dataclasses.dataclass(frozen=True)
class Plan:
    target_rank: float = 2  # of 3 adapters: 6 ranks
    total_step: int = STEPS
    t_init: int = 5
    t_final: int = 8
    delta_t: int = 1
    beta1: float = 0.85
    beta2: float = 0.85

    def optimizer(self, inner=None, **options):
        inner = optax.adamw(RATE, weight_decay=DECAY) if inner is None else inner
        return adalora(inner, **dataclasses.asdict(self), **options)


PLANS = {
    "every step": Plan(),
    "every third step": Plan(delta_t=3, t_init=4, t_final=9),
    "no warm-up, no end": Plan(t_init=0, t_final=0),
    "to one rank": Plan(target_rank=1 / 3, delta_t=2),
    "nothing to prune": Plan(target_rank=11 / 3),
    "other decays": Plan(beta1=0.3, beta2=0.6),
}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())


def budget_oracle(plan, initial, t):
    """Eq. (12) in exact fractions."""
    target = round(plan.target_rank * len(SHAPES))
    if t <= plan.t_init:
        return initial
    if t >= plan.total_step - plan.t_final:
        return target
    steps = plan.total_step - plan.t_final - plan.t_init
    rest = 1 - fractions.Fraction(t - plan.t_init, steps)
    return int(target + (initial - target) * rest**3)


class Problem:
    """A smooth loss of three adapted weights, its gradients by hand, and Algorithm 1."""

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.w0 = {k: rng.normal(size=(m, n)) for k, (m, n, _) in SHAPES.items()}
        self.x = {k: rng.normal(size=(STEPS, 5, m)) for k, (m, _, _) in SHAPES.items()}
        self.y = {k: 2 * rng.normal(size=(STEPS, 5, n)) for k, (_, n, _) in SHAPES.items()}
        self.params = {
            k: {
                "lora_a": 0.3 * rng.normal(size=(m, r)),
                "lora_e": np.zeros(r),
                "lora_b": 0.3 * rng.normal(size=(r, n)),
            }
            for k, (m, n, r) in SHAPES.items()
        }

    def loss(self, params, t):
        """Differentiated by JAX."""
        total = GAMMA * orthogonality_penalty(params)
        for k, p in params.items():
            w = self.w0[k] + SCALE * (p["lora_a"] * p["lora_e"]) @ p["lora_b"]
            total += jnp.sum(
                jnp.log(jnp.cosh(jnp.asarray(self.x[k])[t] @ w - jnp.asarray(self.y[k])[t]))
            )
        return total

    def gradients(self, params, t):
        out = {}
        for k, p in params.items():
            a, e, b = (p[name] for name in NAMES)
            x, y = self.x[k][t], self.y[k][t]
            g = SCALE * x.T @ np.tanh(x @ (self.w0[k] + SCALE * a @ np.diag(e) @ b) - y)
            eye = np.eye(len(e))
            out[k] = {
                "lora_a": g @ b.T @ np.diag(e) + GAMMA * 4 * a @ (a.T @ a - eye),
                "lora_e": np.diag(a.T @ g @ b.T),
                "lora_b": np.diag(e) @ a.T @ g + GAMMA * 4 * (b @ b.T - eye) @ b,
            }
        return out

    def oracle(self, plan):
        """Yields the parameters after every step, the budget and the smoothed moments."""
        params = {k: dict(p) for k, p in self.params.items()}
        zeros = lambda: {k: {name: 0.0 * p[name] for name in NAMES} for k, p in params.items()}
        m, v, sensitivity, uncertainty = zeros(), zeros(), zeros(), zeros()
        initial = sum(r for _, _, r in SHAPES.values())
        for t in range(STEPS):
            gradients, scores = self.gradients(params, t), []
            last = t >= plan.total_step - plan.t_final
            for k, p in params.items():
                for name in NAMES:
                    g, importance = gradients[k][name], np.abs(p[name] * gradients[k][name])
                    if not last:
                        old = sensitivity[k][name]
                        smooth = plan.beta1 * old + (1 - plan.beta1) * importance
                        away = np.abs(importance - smooth)
                        old, sensitivity[k][name] = uncertainty[k][name], smooth
                        uncertainty[k][name] = plan.beta2 * old + (1 - plan.beta2) * away
                    m[k][name] = 0.9 * m[k][name] + 0.1 * g
                    v[k][name] = 0.999 * v[k][name] + 0.001 * g**2
                    m_hat, v_hat = (
                        m[k][name] / (1 - 0.9 ** (t + 1)),
                        v[k][name] / (1 - 0.999 ** (t + 1)),
                    )
                    p[name] = p[name] - RATE * (m_hat / (np.sqrt(v_hat) + 1e-8) + DECAY * p[name])
                s = {name: sensitivity[k][name] * uncertainty[k][name] for name in NAMES}
                for i in range(len(p["lora_e"])):
                    of_vectors = s["lora_a"][:, i].mean() + s["lora_b"][i].mean()
                    scores.append((s["lora_e"][i] + of_vectors, k, i))
            budget = budget_oracle(plan, initial, t)
            if last or (t > plan.t_init and t % plan.delta_t == 0):
                for _, k, i in sorted(scores, reverse=True)[budget:]:
                    params[k]["lora_e"] = params[k]["lora_e"].copy()
                    params[k]["lora_e"][i] = 0.0
            yield {k: dict(p) for k, p in params.items()}, budget, (sensitivity, uncertainty)


def as_arrays(tree):
    return jax.tree.map(jnp.asarray, tree)


def scan(problem, tx, params, state=None, steps=range(STEPS)):
    """The whole training in one compiled loop; returns all parameters on the way."""

    def step(carry, t):
        params, state = carry
        updates, state = tx.update(jax.grad(problem.loss)(params, t), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    state = tx.init(params) if state is None else state
    return jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.asarray(steps)))((params, state))


@pytest.mark.usefixtures("x64")
@every_plan
def test_a_training_is_algorithm_1(plan, assert_close):
    problem = Problem()
    (_, state), path = scan(problem, plan.optimizer(), as_arrays(problem.params))
    pruned, steps = 0, list(problem.oracle(plan))
    for t, (expected, budget, _) in enumerate(steps):
        for k, p in expected.items():
            for name in NAMES:
                assert_close(path[k][name][t], p[name])
            zero = np.asarray(path[k]["lora_e"][t]) == 0
            assert (zero == (p["lora_e"] == 0)).all()
        values = np.concatenate([path[k]["lora_e"][t] for k in SHAPES])
        if t >= plan.total_step - plan.t_final or (t > plan.t_init and t % plan.delta_t == 0):
            assert (values != 0).sum() == budget
            pruned += 1
    assert pruned >= 5
    for got, of_oracle in zip((state.sensitivity, state.uncertainty), steps[-1][2], strict=True):
        for k in SHAPES:
            for name in NAMES:
                assert_close(got[k][name], of_oracle[k][name])
    total = round(3 * plan.target_rank)
    assert plan.t_final == 0 or (values != 0).sum() == total


@pytest.mark.usefixtures("x64")
def test_a_triplet_may_come_back_before_the_end():
    """Between allocations the zeros train on, the paper's reason to mask and not to cut."""
    problem, plan = Problem(), PLANS["every third step"]
    _, path = scan(problem, plan.optimizer(), as_arrays(problem.params))
    alive = np.concatenate([np.asarray(path[k]["lora_e"]) != 0 for k in SHAPES], axis=1)
    start = plan.t_init + 1
    assert (alive[start + 2 : -plan.t_final] & ~alive[start + 1 : -plan.t_final - 1]).any()
    end = alive[-plan.t_final :]
    assert (end == end[0]).all()


@pytest.mark.usefixtures("x64")
def test_leaves_outside_adapters_get_the_inner_update(assert_close):
    problem, plan = Problem(), Plan()
    params = {**as_arrays(problem.params), "head": jnp.ones((3, 2))}
    gradients = [random_like(params, t) for t in range(8)]
    got, state = train(plan.optimizer(), params, gradients)
    expected, _ = train(optax.adamw(RATE, weight_decay=DECAY), params, gradients)
    assert_close(got["head"], expected["head"])
    assert isinstance(state.sensitivity["head"], optax.MaskedNode)
    assert (got["first"]["lora_a"] == expected["first"]["lora_a"]).all()


# The budget.


@pytest.mark.parametrize(
    ("initial", "target", "total", "t_init", "t_final"),
    [(11, 6, 40, 5, 8), (27, 0, 3, 0, 0), (432, 288, 3000, 500, 1500), (8, 8, 9, 2, 2)],
)
def test_the_budget_is_the_cubic_schedule_exactly(initial, target, total, t_init, t_final):
    """Also where floating point would round a whole number down."""
    budget = jax.jit(jax.vmap(budget_schedule(initial, target, total, t_init, t_final)))
    got = np.asarray(budget(jnp.arange(total + 10)))
    steps = total - t_init - t_final
    for t in range(total + 10):
        done = min(max(t - t_init, 0), steps)
        rest = fractions.Fraction(steps - done, steps)
        assert got[t] == int(target + (initial - target) * rest**3)
    assert (got[: t_init + 1] == initial).all() and (got[total - t_final :] == target).all()
    assert (np.diff(got) <= 0).all()


def test_equal_scores_keep_exactly_the_budget():
    """Where nothing has a gradient: the released code would prune all of them."""
    params = jax.tree.map(lambda x: jnp.ones(x.shape), Problem().params)
    tx = adalora(optax.sgd(0.1), target_rank=2, total_step=2)
    got, _ = train(tx, params, [jax.tree.map(jnp.zeros_like, params)] * 3)
    assert sum(int((got[k]["lora_e"] != 0).sum()) for k in SHAPES) == 6


# The regulariser.


@pytest.mark.usefixtures("x64")
def test_the_penalty_is_the_papers(assert_close):
    params, expected = Problem().params, 0.0
    for p in params.values():
        for gram in (p["lora_a"].T @ p["lora_a"], p["lora_b"] @ p["lora_b"].T):
            expected += ((gram - np.eye(len(gram))) ** 2).sum()
    assert_close(orthogonality_penalty(as_arrays(params)), expected)
    stacked = {name: jnp.stack([params["first"][name]] * 2) for name in NAMES}
    one = orthogonality_penalty({k: jnp.asarray(v) for k, v in params["first"].items()})
    assert_close(orthogonality_penalty(stacked), 2 * one)


# Optax and JAX.


def small_params():
    layer = {"lora_a": jnp.zeros((6, 3)), "lora_e": jnp.zeros(3), "lora_b": jnp.zeros((3, 5))}
    return random_like({"head": jnp.zeros((5, 3)), "layer0": layer, "layer1": layer}, 0)


def make(inner=None, steps=4, **options):
    inner = optax.adamw(0.1) if inner is None else inner
    return adalora(inner, target_rank=2, total_step=steps, t_final=1, **options)


def small_gradients(params, steps=5):
    return [random_like(params, seed) for seed in range(1, steps + 1)]


EXPECTED_NONZERO = 4


def nonzero(params):
    return sum(int((params[k]["lora_e"] != 0).sum()) for k in ("layer0", "layer1"))


def test_masked_values_are_zero_to_the_bit_in_every_dtype():
    for dtype, of_gradient in [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16",) * 2]:
        params = jax.tree.map(lambda x, d=dtype: x.astype(d), small_params())
        gradients = [
            jax.tree.map(lambda x, d=of_gradient: x.astype(d), g) for g in small_gradients(params)
        ]
        got, state = train(make(optax.sgd(0.1)), params, gradients)
        assert nonzero(got) == EXPECTED_NONZERO
        assert {x.dtype for x in jax.tree.leaves(state.sensitivity)} == {np.dtype("float32")}
        assert types(jax.tree.map(jnp.zeros_like, got)) == types(params)


def test_chain_masked_and_partition_equal_the_plain_optimizer():
    params, gradients = small_params(), small_gradients(small_params())
    expected, _ = train(make(), params, gradients)
    clipped = optax.chain(optax.identity(), make(optax.chain(optax.identity(), optax.adamw(0.1))))
    assert_trees_close(train(clipped, params, gradients)[0], expected)
    is_adapter = lambda tree: {
        k: jax.tree.map(lambda _, k=k: k != "head", x) for k, x in tree.items()
    }
    got, _ = train(optax.masked(make(), is_adapter), params, gradients)
    assert_trees_close({**got, "head": expected["head"]}, expected)
    labels = lambda tree: jax.tree.map(lambda x: "adapters" if x else "head", is_adapter(tree))
    tx = optax.partition({"adapters": make(), "head": optax.adamw(0.1)}, labels)
    assert_trees_close(train(tx, params, gradients)[0], expected)


def test_extra_arguments_reach_the_inner_optimizer():
    def update(updates, state, params=None, *, factor, **extra):
        return jax.tree.map(lambda g: factor * g, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    params, gradients = small_params(), small_gradients(small_params(), 1)
    got, _ = train(optax.chain(make(inner)), params, gradients, factor=jnp.float32(-0.5))
    assert_trees_close(got["head"], params["head"] - 0.5 * gradients[0]["head"])


def test_a_compiled_scan_equals_a_loop_and_a_step_is_traced_once():
    params, gradients, tx, traces = small_params(), small_gradients(small_params()), make(), []
    expected, last = train(tx, params, gradients)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)

    @jax.jit
    def step(carry, gradient):
        traces.append(None)
        updates, state = tx.update(gradient, carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    carry = (params, tx.init(params))
    for gradient in gradients:
        carry, _ = step(carry, gradient)
    assert len(traces) == 1
    assert_trees_close(carry, (expected, last))
    scanned, _ = jax.lax.scan(step, (params, tx.init(params)), stacked)
    assert_trees_close(scanned, (expected, last))


def test_vmap_over_models_equals_separate_runs():
    models = [random_like(small_params(), seed) for seed in (11, 12)]
    gradients = [[random_like(p, 10 * k + i) for k in range(5)] for i, p in enumerate(models)]
    stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    tx = optax.GradientTransformation(jax.vmap(make().init), jax.vmap(make().update))
    together, _ = train(tx, stack(models), [stack(g) for g in zip(*gradients, strict=True)])
    apart = [train(make(), p, g)[0] for p, g in zip(models, gradients, strict=True)]
    assert_trees_close(together, stack(apart))


def test_stacked_layers_equal_separate_ones():
    layers = [random_like(small_params()["layer0"], seed) for seed in range(4)]

    def stacked(tree):
        names = ("lora_a", "lora_e", "lora_b")
        both = lambda pair, axes: {
            name: jnp.stack([layer[name] for layer in pair], axis)
            for name, axis in zip(names, axes, strict=True)
        }
        return {"leading": both(tree[:2], (0, 0, 0)), "second": both(tree[2:], (1, 0, 1))}

    gradients = small_gradients(layers)
    expected, _ = train(make(), layers, gradients)
    pairs = LoraPairs(axes=(("second/.*", LoraAxes(batch=(1,))),))
    got, _ = train(make(pairs=pairs), stacked(layers), [stacked(g) for g in gradients])
    assert_trees_close(got, stacked(expected))


def test_init_takes_shapes_and_is_all_zeros():
    params = small_params()
    state = make().init(params)
    assert types(jax.eval_shape(make().init, params)) == types(state)
    assert_trees_identical(make().init(jax.eval_shape(lambda: params)), state)
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(state))
    arrays = jax.tree.leaves((params, make().init(params)))
    assert len({x.unsafe_buffer_pointer() for x in arrays}) == len(arrays)


def test_tree_map_params_reaches_every_leaf_of_the_state():
    params = small_params()
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    specs = jax.tree.map_with_path(lambda path, _: jax.tree_util.keystr(path), params)
    mapped = optax.tree_map_params(
        make(),
        lambda leaf, spec: leaf if is_masked(leaf) else spec,
        make().init(params),
        specs,
        transform_non_params=lambda _: "scalar",
        is_leaf=is_masked,
    )
    for path, label in jax.tree_util.tree_leaves_with_path(mapped):
        where = jax.tree_util.keystr(path)
        assert label == "scalar" or where.endswith(label), where
    assert mapped.count == "scalar"


def test_a_saved_state_goes_on_to_the_bit():
    params, gradients = small_params(), small_gradients(small_params())
    middle = train(make(), params, gradients[:2])
    leaves, treedef = jax.tree.flatten(middle)
    saved = [(np.asarray(x).tobytes(), x.dtype, x.shape) for x in leaves]
    restored = [jnp.asarray(np.frombuffer(b, d).reshape(s)) for b, d, s in saved]
    params_, state = treedef.unflatten(restored)
    got = train(make(), params_, gradients[2:], state)
    assert_trees_identical(got, train(make(), params, gradients))


def test_nnx_optimizer_equals_a_plain_tree():
    class Model(nnx.Module):
        def __init__(self):
            self.head = nnx.Param(jnp.zeros((5, 3)))
            self.layer0, self.layer1 = nnx.Module(), nnx.Module()
            for layer in (self.layer0, self.layer1):
                layer.lora_a = nnx.Param(jnp.zeros((6, 3)))
                layer.lora_e, layer.lora_b = nnx.Param(jnp.zeros(3)), nnx.Param(jnp.zeros((3, 5)))

    params, gradients = small_params(), small_gradients(small_params())
    model = Model()
    nnx.update(model, params)
    optimizer = nnx.Optimizer(model, make(), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, gradient):
        variables = nnx.state(model, nnx.Param)
        nnx.replace_by_pure_dict(variables, gradient)
        optimizer.update(model, variables)

    for gradient in gradients:
        step(model, optimizer, gradient)
    expected, _ = train(make(), params, gradients)
    assert_trees_close(nnx.to_pure_dict(nnx.state(model)), expected)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_adapters_equal_whole_ones(axis_type):
    layer = {"lora_a": jnp.zeros((8, 4)), "lora_e": jnp.zeros(4), "lora_b": jnp.zeros((4, 6))}
    params = random_like({"layer0": layer, "layer1": layer}, 0)
    gradients = small_gradients(params)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))
    spec = {"lora_a": ("x", None), "lora_e": ("y",), "lora_b": (None, "y")}
    put = lambda tree: {
        k: {
            name: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec[name])))
            for name, x in layer.items()
        }
        for k, layer in tree.items()
    }
    tx = make()
    sharded = put(params)
    state = tx.init(sharded)
    step = jax.jit(lambda g, s, p: tx.update(g, s, p))
    for gradient in gradients:
        updates, state = step(put(gradient), state, sharded)
        sharded = optax.apply_updates(sharded, updates)
    expected, _ = train(tx, params, gradients)
    assert_trees_close(sharded, expected)
    assert nonzero(sharded) == EXPECTED_NONZERO
    assert sharded["layer0"]["lora_a"].sharding.spec[0] == "x"


# Names and errors.


def test_other_names_of_the_singular_values():
    a, e, b = jnp.ones((4, 2)), jnp.ones(2), jnp.ones((2, 3))
    for params in (
        {"kernel_lora_a": a, "kernel_lora_e": e, "kernel_lora_b": b},
        {"lora": {"a": a, "e": e, "b": b}},
        {name: {"kernel": x} for name, x in {"lora_a": a, "lora_e": e, "lora_b": b}.items()},
        {"q": {"lora_kernel_a": a, "lora_kernel_e": e, "lora_kernel_b": b}},
    ):
        make(optax.sgd(0.1)).init(params)
    pairs = LoraPairs(rules=((r"(.*)/down", r"(.*)/up"),))
    named = functools.partial(make, pairs=pairs, values=((r"(.*)/down", r"\1/gain"),))
    named().init({"q": {"down": a, "gain": e, "up": b}})
    with pytest.raises(ValueError, match="q/down: no singular values at q/gain"):
        named().init({"q": {"down": a, "up": b}})
    with pytest.raises(ValueError, match="no singular values at any path of values="):
        make(pairs=pairs).init({"q": {"down": a, "gain": e, "up": b}})


def test_what_does_not_fit_is_refused():
    params = small_params()
    with pytest.raises(ValueError, match=r"layer1/lora_a: no singular values at layer1/lora_e"):
        make().init({**params, "layer1": {k: params["layer1"][k] for k in ("lora_a", "lora_b")}})
    wrong = {**params, "layer1": {**params["layer1"], "lora_e": jnp.ones((3, 1))}}
    with pytest.raises(ValueError, match=r"layer1/lora_e has shape \(3, 1\), not \(3,\)"):
        make().init(wrong)
    with pytest.raises(ValueError, match="target_rank 4 is above the initial rank, 6 in all of 2"):
        adalora(optax.sgd(0.1), target_rank=4, total_step=3).init(params)
    with pytest.raises(ValueError, match="with params|state, params"):
        make().update(params, make().init(params))
    with pytest.raises(ValueError, match="gradients do not have the structure"):
        make().update({"head": params["head"]}, make().init(params), params)
    layer = {"lora_a": jnp.ones((6, 2)), "lora_e": jnp.ones(2), "lora_b": jnp.ones((2, 5))}
    other = {**params, "layer1": layer}
    tx = adalora(optax.set_to_zero(), target_rank=1, total_step=3)
    with pytest.raises(ValueError, match="The state of layer1/lora_a is not for shape"):
        tx.update(other, tx.init(params), other)


@pytest.mark.parametrize(
    "options",
    [
        {"target_rank": 0},
        {"total_step": 4, "t_init": 2, "t_final": 2},
        {"t_init": -1},
        {"delta_t": 0},
        {"beta1": 1.0},
        {"beta2": -0.1},
    ],
)
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="adalora: "):
        adalora(optax.sgd(0.1), **{"target_rank": 1, "total_step": 4, **options})
