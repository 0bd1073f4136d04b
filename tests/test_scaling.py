"""The training step at scale: its formulas, compared with compiled programs of a small model.

TPU and GPU compilers take part if they are installed (`pip install libtpu`; jax's CUDA plugin with
nvidia-cuda-nvcc-cu12). docs/scaling.md has LLaMA-7B and 70B.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from optimizers import hasty_compiler as hasty_compiler

from benchmarks import records
from benchmarks.scaling import compile, one_device, predict, settings, tables
from benchmarks.scaling.collectives import Collective, collectives, total_sent
from benchmarks.scaling.formulas import loft_traffic, memory, stored, traffic
from benchmarks.scaling.step import (
    MODELS,
    OTHER_METHODS,
    Setting,
    compiled_step,
    lowered_step,
)

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.usefixtures("hasty_compiler")

MESH = {"fsdp": 4, "tensor": 2}
TINY = Setting("cpu", "tiny", MESH, rank=4, length=32, targets=("q", "down"))


def test_the_step_has_the_predicted_arguments_and_collectives():
    compiled = compiled_step(TINY)
    assert compiled.memory_analysis().argument_size_in_bytes == memory(TINY).arguments
    assert compile.shardings_kept(compiled)
    of_update = [x for x in collectives(compiled.as_text()) if compile.is_of_update(x)]
    assert {x.kind for x in of_update} == {"all-reduce"}
    assert total_sent(of_update) == pytest.approx(loft_traffic(TINY), rel=0.2)


@pytest.mark.parametrize(
    ("target", "compiler"), [("v5e:2x4", "libtpu"), ("h200:8", "jax_cuda12_plugin")]
)
def test_accelerators_compile_it_as_predicted(target, compiler):
    """In a separate process, because the library of a compiler stays loaded and needs flags."""
    if importlib.util.find_spec(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    setting = dataclasses.replace(TINY, target=target, batch=64, length=128)
    script = (
        "import json, sys\n"
        "from benchmarks.scaling.compile import Setting, measure\n"
        "print(json.dumps(measure(Setting(**json.loads(sys.argv[1])))))"
    )
    flags = {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(dataclasses.asdict(setting))],
        cwd=ROOT,
        env=os.environ | flags,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["arguments"] == memory(setting).arguments
    assert row["shardings_kept"]
    assert row["optimizer_kinds"] == ["all-reduce"]


def test_kept_rows_fit_within_ten_percent():
    every = [*settings.compiled(), *settings.in_chunks()]
    rows = tables.results(every)
    assert len(rows) == len(every) > 20
    for row in rows:
        assert memory(settings.from_row(row)).arguments == row["arguments"]
        assert row["shardings_kept"]
        total = row["arguments"] + row["temporaries"]
        assert memory(settings.from_row(row)).total == pytest.approx(total, rel=0.1)


def test_the_guide_shows_these_rows():
    guide = (ROOT / "docs" / "scaling.md").read_text()
    for shown in (settings.compiled(), settings.in_chunks()):
        assert tables.tables(tables.results(shown)) in guide
    assert predict.table(settings.predicted()) in guide


def test_what_a_step_holds_and_sends_as_the_mesh_grows():
    at = lambda **mesh: Setting("v5e:16x16", "7b", mesh, batch=256)
    whole, split = memory(at(data=256)), memory(at(fsdp=32, tensor=8))
    assert whole.base == pytest.approx(256 * split.base, rel=0.01)
    assert 2 * 6.7e9 < whole.base < 2 * 6.8e9
    assert split.state < whole.state / 8  # each factor is sharded along one axis
    assert loft_traffic(at(data=256)) == 0  # every device does the same
    assert traffic(at(data=256)).gathers == 0
    lora = dataclasses.replace(at(fsdp=32, tensor=8), method="lora")
    assert traffic(lora)[:3] == traffic(at(fsdp=32, tensor=8))[:3]
    assert loft_traffic(lora) == 0


def test_state_is_as_wide_as_documented():
    calibrated = Setting("cpu", "7b", {}, rank=16)
    config = MODELS["7b"]
    rows = config.num_hidden_layers * (6 * 4096 + 2 * (4096 + 11008))
    lora = memory(dataclasses.replace(calibrated, method="lora")).state - 4
    factored = memory(dataclasses.replace(calibrated, method="factored")).state - 12
    assert memory(calibrated).state - 12 == 4 * rows * (2 * 16 + 136)
    assert factored == 4 * rows * (2 * 16 + 2)
    assert lora == 4 * rows * 2 * 16


@pytest.mark.parametrize("method", OTHER_METHODS)
def test_other_methods_are_traced_on_one_device(method):
    setting = dataclasses.replace(TINY, mesh={}, method=method, whole_logits=False, chained=False)
    assert "optimizer" in lowered_step(setting).as_text(debug_info=True)


def test_the_cost_guide_has_the_memory_of_every_method_on_one_device():
    rows = records.read(one_device.RESULTS)
    assert {(row["method"], row["rank"]) for row in rows} == set(one_device.settings())
    assert one_device.table(rows) in (ROOT / "docs/cost.md").read_text()


def test_a_tpu_stores_in_tiles():
    assert stored((32, 1024, 16), 4, tiled=False) == 32 * 1024 * 16 * 4
    assert stored((32, 1024, 16), 4, tiled=True) == 32 * 1024 * 16 * 4  # 16 x 1024
    assert stored((80, 32, 16), 4, tiled=True) == 16 * 32 * 128 * 4  # layers padded to 128
    assert stored((32, 1024, 2), 4, tiled=True) == 32 * 1024 * 2 * 4


HLO = """\
%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %two = s32[] constant(2)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %sum = f32[8]{0} all-reduce(%x), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  %next = s32[] add(%i, %two)
  ROOT %t = (s32[], f32[8]) tuple(%next, %sum)
}

%cond.1 (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[] constant(6)
  %i.1 = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i.1, %limit), direction=LT
}

%gather (q: bf16[4]) -> bf16[8] {
  %g = bf16[8]{0} all-gather(%q), channel_id=2, replica_groups=mesh['x'=2,'y'=4] {'x'}
}

%small (q: f32[2]) -> f32[2] {
  %s = f32[2]{0} all-reduce(%q), channel_id=3, replica_groups={{0,1},{2,3}}, to_apply=%add
}

%large (q: f32[2]) -> f32[16] {
  %l = f32[16]{0} reduce-scatter(%q), channel_id=4, replica_groups={{0,1},{2,3}}, to_apply=%add
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%a), condition=%cond.1, body=%body.1, metadata={op_name="loop"}
  %async-collective-start.1 = bf16[8] fusion(%b), kind=kCustom, calls=%gather
  %fusion.7 = bf16[8] fusion(%b), kind=kCustom, calls=%gather
  %c = f32[2] conditional(%turn, %d, %e), branch_computations={%small, %large}
}
"""


def test_collectives_are_counted_in_loops_branches_and_once_where_asynchronous():
    assert collectives(HLO) == [
        Collective("all-reduce", "f32[8]", 32, group=4, trips=3, source="loop"),
        Collective("all-gather", "bf16[8]", 16, group=2, trips=1, source=""),
        Collective("reduce-scatter", "f32[16]", 128, group=2, trips=1, source=""),
    ]
    assert total_sent(collectives(HLO)) == 2 * 3 * 32 * 3 / 4 + 16 / 2 + 128 / 2
