"""The Triton kernels: under the interpreter where there is no GPU, and compiled for GPUs that need not be there.

The interpreter has no fused multiply-add and cuts bfloat16 off instead of rounding it, so that its results are not the
GPU's to the last bit; test_parity.py holds it to the same bounds as every backend. On a GPU the ops' own tests run on
triton too, by the `device` fixture.
"""

import contextlib
import json
import os
import subprocess
import sys

import pytest
import test_ddpm_step
import test_group_norm_silu
import test_philox_normal
import torch
from conftest import same_bits
from test_ddpm_step import (  # noqa: F401  (run here with this file's device)
    test_a_bad_variance_is_recorded,
    test_a_nan_in_x_stays,
    test_a_row_outside_the_table,
    test_a_row_that_wants_the_last_x0,
    test_a_table_is_walked_row_by_row,
    test_an_output_that_is_not_finite_is_recorded,
    test_last_step_needs_no_noise,
    test_learned_variance,
    test_nothing_outside_is_written,
    test_opcheck_in_place,
    test_terms_with_a_zero_coefficient_are_not_read,
)
from test_group_norm_silu import (  # noqa: F401
    test_a_constant_gives_the_bias_exactly,
    test_a_nan_stays_in_its_group,
    test_gradients_of_what_needs_none,
    test_hard_gradients,
    test_hot_pixel,
    test_large_add,
    test_large_add_that_cancels,
    test_large_mean,
    test_misaligned_memory,
    test_opcheck_backward,
    test_silu_far_out,
    test_strides_are_kept_where_a_size_is_1,
)
from test_philox_normal import (  # noqa: F401
    test_known_normals,
    test_opcheck,
    test_sample_replaces_first,
    test_t_per_sample,
    test_the_batch_split_does_not_matter,
)
from test_timestep_embedding import (  # noqa: F401
    test_close_to_float64_over_the_range,
    test_exact_values,
    test_strided_and_misaligned_t,
)

from fastddpm import backend, ops, parity

triton = pytest.importorskip("triton", minversion="3.6")
tl = triton.language

from fastddpm.ops._triton import group_norm_silu as norm_kernels  # noqa: E402
from fastddpm.ops._triton import launch  # noqa: E402
from fastddpm.ops._triton.philox import words  # noqa: E402

# What lies beyond a tile's end, and the NaNs of a test.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"  # as conftest.py found possible


@pytest.fixture
def device():
    """Return the CPU device, with the Triton kernels running under the interpreter."""
    if not INTERPRETING:
        pytest.skip("triton's interpreter: there is a GPU, or no triton from 3.6 on")
    with backend.use("triton"):
        yield "cpu"


# ------------------------------------------------------------------------------------------------- noise


@triton.jit
def words_kernel(names, out):
    seed, quad, t = tl.load(names), tl.load(names + 1), tl.load(names + 2)
    w0, w1, w2, w3 = words(seed, quad + tl.arange(0, 2), t, tl.load(names + 3), tl.load(names + 4))
    to = out + 4 * tl.arange(0, 2)
    tl.store(to, w0)
    tl.store(to + 1, w1)
    tl.store(to + 2, w2)
    tl.store(to + 3, w3)


@pytest.mark.parametrize(
    ("seed", "quad", "t", "sample", "stream"),
    [
        (0, 0, 0, 0, 0),
        ((1 << 64) - 1, 0xFFFFFFFF, 0xFFFFFFFF, (1 << 64) - 1, 0),
        (0x299F31D0A4093822, 0x243F6A88, 0x85A308D3, 0x0070734413198A2E, 3),  # the known answers, as counters of ours
        ((1 << 63) + 5, 191, 17, (1 << 40) + 3, 1),
        (42, 3, 999, 7, 255),
    ],
)
def test_words(device, seed, quad, t, sample, stream):
    names = [v - (1 << 64) if v >= 1 << 63 else v for v in (seed, quad, t, sample, stream)]
    out = torch.empty(2, 4, dtype=torch.int64)
    words_kernel[(1,)](torch.tensor(names), out)
    for i in range(2):
        counter = ((quad + i) & 0xFFFFFFFF, t, sample & 0xFFFFFFFF, (sample >> 32) ^ (stream << 24))
        expected = test_philox_normal.words_in_python(counter, (seed & 0xFFFFFFFF, seed >> 32))
        assert out[i].tolist() == expected


# ------------------------------------------------------------------------------------------- reverse step


def step_arguments(n=2, pixels=400):
    """Each sample has several programs, and the last of them is not full."""
    x, o, last = (torch.randn(n, 3, 2, pixels) for _ in range(3))
    rows = torch.stack((test_ddpm_step.EVERY_TERM,) * 3).float()
    return x, o, last, rows, torch.tensor([999, 500, 7])


@pytest.mark.parametrize("index", [3, 5, (1 << 31) - 2, -1, -7])
def test_a_row_outside_the_table_is_recorded(device, index):
    """Only the state is written, and it advances, because a graph cannot raise."""
    x, o, last, rows, timesteps = step_arguments()
    state, next_input = torch.tensor([5, 6, index, -1]), x.clone()
    kept = x.clone(), last.clone()
    ops.ddpm_step_(x, o, rows, timesteps, state, x0=last, next_input=next_input)
    assert state.tolist() == [5, 6, index + 1, index]
    assert same_bits(x, kept[0])
    assert same_bits(last, kept[1])
    assert same_bits(next_input, kept[0])


def test_a_row_that_wants_x0_last_is_recorded(device):
    x, o, _, rows, timesteps = step_arguments()
    state, kept = torch.tensor([5, 6, 1, -1]), x.clone()
    ops.ddpm_step_(x, o, rows, timesteps, state)
    assert state.tolist() == [5, 6, 2, 1]
    assert same_bits(x, kept)
    rows[:, 4] = 0
    ops.ddpm_step_(x, o, rows, timesteps, state)
    assert state.tolist() == [5, 6, 3, 1]
    assert not same_bits(x, kept)


def test_every_program_takes_the_row_before_it_changes(device):
    """Each step has many programs, and only the last one reads a NaN."""
    x, o, last, rows, timesteps = step_arguments()
    state, expected = torch.tensor([5, 6, 0, -1]), x.clone()
    o[-1, -1, -1, -1] = torch.nan
    rows[0, 1] = rows[0, 5] = 0  # where o is not used, and its NaN is not bad
    for index, t in enumerate(timesteps.tolist()):
        expected, x0 = ops.ddpm_step(expected, o, rows[index], seed=5, t=t, first=6, x0_last=last)
        ops.ddpm_step_(x, o, rows, timesteps, state, x0=last)
        assert state.tolist() == [5, 6, index + 1, -1 if index == 0 else 1]
        assert same_bits(x, expected)
        assert same_bits(last, x0)


def test_layouts_and_batch_splits_give_the_same_bits(device):
    """Programs draw whole quads. With odd sizes each element picks one value of its quad."""
    for shape in ((2, 3, 4, 6), (2, 3, 5, 7)):
        x, o = torch.randn(shape), torch.randn(shape)
        expected = test_ddpm_step.step(x, o)
        for x_layout in test_ddpm_step.LAYOUTS:
            for o_layout in test_ddpm_step.LAYOUTS:
                got = test_ddpm_step.step(parity.arranged(x, x_layout), parity.arranged(o, o_layout))
                assert same_bits(got[0], expected[0])
                assert same_bits(got[1], expected[1])
        part = test_ddpm_step.step(x[1:], o[1:], first=test_ddpm_step.FIRST + 1)
        assert same_bits(part[0], expected[0][1:])


# --------------------------------------------------------------------------------------------------- norm


@pytest.fixture
def in_chunks(device, monkeypatch):
    """Make small tensors use the chunked kernels, and yield the names of the kernels that ran."""
    for name, value in {"RESIDENT": 0, "RESIDENT_BACKWARD": 0, "TILE": 256, "CHUNKS": 3}.items():
        monkeypatch.setattr(norm_kernels, name, value)
    names, launch = [], norm_kernels._Plan.launch
    monkeypatch.setattr(
        norm_kernels._Plan,
        "launch",
        lambda self, kernel, *a, **k: (names.append(kernel.__name__), launch(self, kernel, *a, **k)),
    )
    norm_kernels._plan_of.cache_clear()
    yield names
    norm_kernels._plan_of.cache_clear()


GROUPS = 2
MAKES = ["every input", "mean 1e4", "large add", "hot first", "hot last", "constant"]


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_chunks_whatever_the_default_dtype(in_chunks, default):
    x, weight, bias, _ = test_group_norm_silu.inputs((1, 4, 11, 19))
    expected = (
        ops.group_norm_silu(x, GROUPS, weight, bias, 1e-6),
        *parity.norm_backward(x, x, GROUPS, weight, bias, 1e-6),
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        got = (
            ops.group_norm_silu(x, GROUPS, weight, bias, 1e-6),
            *parity.norm_backward(x, x, GROUPS, weight, bias, 1e-6),
        )
    finally:
        torch.set_default_dtype(before)
    assert all(map(same_bits, got, expected))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("make", "dtype"),
    [(make, torch.float32) for make in MAKES] + [(MAKES[0], torch.bfloat16), (MAKES[3], torch.float16)],
)
def test_chunks(in_chunks, make, dtype, layout):
    """A chunk has several tiles, the last contiguous chunk a part of a tile, and there is more than one slice."""
    x, weight, bias, optional = test_group_norm_silu.inputs((2, 10, 11, 19), layout=layout)
    optional = optional if make == "every input" else {"add": 1e3 * optional["add"]} if make == "large add" else {}
    if make == "large add":
        x -= optional["add"][..., None, None]
    elif make == "mean 1e4":
        x += 1e4
    elif make == "constant":
        x.fill_(3.3)
    elif make.startswith("hot"):
        x[(0, 0, 0, 0) if make == "hot first" else (-1, -1, -1, -1)] = 1e4
    x, dy = x.to(dtype), torch.randn_like(x).to(dtype)
    got = ops.group_norm_silu(x, GROUPS, weight, bias, 1e-6, **optional)
    test_group_norm_silu.assert_close(got, x, GROUPS, weight, bias, **optional)
    if make == "constant":
        got = ops.group_norm_silu(x, GROUPS, weight, bias, 1e-6, silu=False)
        assert same_bits(got, bias[:, None, None].expand(x.shape))
    truth, bound = parity.norm_gradients(dy, x, GROUPS, weight, bias, 1e-6, **optional)
    got = parity.norm_backward(dy, x, GROUPS, weight, bias, 1e-6, **optional)
    assert max(map(parity.share, got, truth, bound)) <= 1
    assert set(in_chunks) == {
        "group_norm_silu_partials_kernel", "group_norm_silu_merge_kernel", "group_norm_silu_apply_kernel",
        "group_norm_silu_centre_kernel", "group_norm_silu_backward_partials_kernel",
        "group_norm_silu_backward_merge_kernel", "group_norm_silu_backward_apply_kernel",
    }  # fmt: skip


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("way", ["device", "in_chunks"])
def test_the_backward_centres_anew(request, way, layout):
    """The saved mean is a float32, which is coarse if a group's first element is far from all other elements."""
    request.getfixturevalue(way)
    x, weight, bias, _ = test_group_norm_silu.inputs((2, 10, 11, 19), layout=layout)
    x[0, 0, 0, 0] = 1e4
    dy, none = torch.randn_like(x), (None, None, None)
    truth, bound = parity.norm_gradients(dy, x, GROUPS, weight, bias, 1e-6)
    _, mean, rstd = torch.ops.fastddpm.group_norm_silu(x, GROUPS, weight, bias, 1e-6, *none, True)
    assert (mean * rstd).abs().argmax() == 0
    mean[0, 0] += 0.01 / rstd[0, 0]
    got = torch.ops.fastddpm.group_norm_silu_backward(dy, x, weight, bias, *none, mean, rstd, GROUPS, True, "triton")
    assert max(map(parity.share, got, truth, bound)) <= 1


def everything(layout):
    shape = (2, 12, 9, 7)
    x, weight, bias, optional = test_group_norm_silu.inputs(shape, layout=layout)
    dy = torch.randn_like(x)

    def compute(part):
        return test_group_norm_silu.everything(
            x[part], 4, weight, bias, {k: v[part] for k, v in optional.items()}, dy[part]
        )

    whole, again, second = compute(slice(None)), compute(slice(None)), compute(slice(1, 2))
    for a, b, c in zip(whole, again, second, strict=True):
        assert same_bits(a, b)
        assert same_bits(a[1:2], c)


class Driver:
    """A stand-in for libcuda, which has a capture mode per thread. test_gpu.py performs real captures."""

    GLOBAL = 0  # a thread's mode by itself: what loads a kernel fails while a stream is being captured

    def __init__(self):
        self.mode, self.result = self.GLOBAL, 0

    def cuThreadExchangeStreamCaptureMode(self, pointer):
        mode = pointer._obj
        mode.value, self.mode = self.mode, mode.value
        return self.result


def test_kernels_may_load_while_a_stream_is_captured(monkeypatch):
    """The thread's mode is relaxed during a launch and restored after it, even if the launch fails."""
    driver, gpu = Driver(), torch.device("cuda", 0)
    monkeypatch.setattr(launch, "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    with launch.on(gpu):
        assert driver.mode == launch.RELAXED
    assert driver.mode == Driver.GLOBAL
    with pytest.raises(ValueError, match="compiler"), launch.on(gpu):
        raise ValueError("from the compiler")
    assert driver.mode == Driver.GLOBAL
    driver.result = 3
    with pytest.raises(RuntimeError, match="cuThreadExchangeStreamCaptureMode: CUDA error 3"), launch.on(gpu):
        pass


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_reruns_and_batch_splits_give_the_same_bits(device, layout):
    everything(layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_reruns_and_batch_splits_in_chunks(in_chunks, layout):
    everything(layout)


# --------------------------------------------------------------------------------------- ahead of time

# Calls every kernel the way the ops do, for a GPU that is not there: the launches compile and stop there. Prints what
# came out, one line of JSON for each kernel.
COMPILE = r"""
import json, pathlib, re, subprocess, sys, tempfile
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

class Driver:
    def get_current_target(self): return GPUTarget("cuda", int(sys.argv[1]), 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

driver.set_active(Driver())
run, compiled = JITFunction.run, []

def compile_only(self, *args, grid, warmup, **options):
    compiled.append((self.fn.__name__, grid, run(self, *args, grid=grid, warmup=True, **options)))

JITFunction.run = compile_only
from fastddpm.ops._triton import ddpm_step, group_norm_silu, philox_normal, timestep_embedding
from fastddpm.ops._operands import StepOperands
from fastddpm.ops._operands import Norm

def registers(ptx):
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as f:
        f.write(ptx)
        f.flush()
        arch = re.search(r"\.target (\w+)", ptx)[1]
        for tool in ("ptxas", "ptxas-blackwell"):  # from 3.9 on, the latter serves what is newer than sm_80
            command = [pathlib.Path(triton.__file__).parent / "backends/nvidia/bin" / tool]
            command += ["-v", "--fmad=false", f"-arch={arch}", f.name, "-o", "/dev/null"]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode == 0:
                break
    spilled, used = re.search(r"(\d+) bytes spill stores[^$]*Used (\d+) registers", result.stderr).groups()
    return {"spilled": int(spilled), "registers": int(used)}

def report(case):
    for name, grid, kernel in compiled:
        ptx = kernel.asm["ptx"]
        facts = {"case": case, "kernel": name, "fused": kernel.metadata.enable_fp_fusion, "shared": kernel.metadata.shared}
        tiles = re.findall(r"tt\.addptr.*: tensor<([\dx]+)x!tt\.ptr<\w+>[^>]*>, tensor<\1x(i\d+)", kernel.asm["ttir"])
        facts["min_max"] = re.findall(r"\b(?:min|max)[.\w]*\.f32\b", ptx)
        facts["tile_offsets"] = sorted({i for shape, i in tiles if "x" in shape or name == "philox_normal_kernel"})
        if case in ("hot", "wide", "chunks", "extreme"):
            facts |= registers(ptx)
        print(json.dumps(facts))
    compiled.clear()

def last(x): return x.contiguous(memory_format=torch.channels_last)
def index(*values): return torch.tensor(values or [0])

def norm(case, shape, groups, dtype, channels_last, *names):
    x, (n, c) = torch.empty(shape, dtype=dtype), shape[:2]
    x = last(x) if channels_last else x
    w, statistics, sums = torch.empty(c), torch.empty(n, groups), torch.empty(n, c)
    optional = [torch.empty(n, c, dtype=dtype) if name in names else None for name in ("add", "scale", "shift")]
    operands = Norm(groups, w, w, *optional, True)
    group_norm_silu.forward(x, x, channels_last, (statistics, statistics), operands, 1e-6)
    group_norm_silu.backward(x, x, x, channels_last, (statistics, statistics), operands, (sums, sums, sums))
    report(case)

def step(case, x, o, *, x0=None, noise=None, clip=1.0, host=False):
    rows, state = torch.zeros(9 if host else (5, 9)), index(1 << 40, 3, 0, -1)
    times = index(0) if host else torch.zeros(5, dtype=torch.int64)
    operands = StepOperands(x, x, o, x0, x0, None if host else o[:, :x.shape[1]].clone(), noise)
    ddpm_step.ddpm_step(operands, (rows, times, state), clip, host)
    report(case)

bf16, f16, image = torch.bfloat16, torch.float16, torch.empty(64, 3, 32, 32)
step("hot", image, last(image.to(bf16)))
step("hot", last(image), last(image.to(bf16)))
step("hot", last(image), last(torch.empty(64, 6, 32, 32, dtype=bf16)), x0=last(image))
step("all contiguous", image, image, x0=image)
step("by value", image, image.to(f16), x0=image, host=True)
step("odd", torch.empty(2, 3, 5, 7), last(torch.empty(2, 6, 5, 7)), noise=torch.empty(2, 3, 5, 7), clip=None)
step("odd", last(torch.empty(2, 3, 5, 7)), last(torch.empty(2, 3, 5, 7)))
philox_normal.philox_normal(image, -5, 1, None, 3, None, 1 << 40)
philox_normal.philox_normal(torch.empty(2, 7), 5, 1, index(1, 2), 0, index(1, 2), 0)
timestep_embedding.timestep_embedding(torch.empty(64, 128), torch.zeros(64), 0.1, False)
timestep_embedding.timestep_embedding(torch.empty(1, 33), index(7), 0.1, True)
report("small")
norm("hot", (64, 128, 32, 32), 32, bf16, True, "add")
norm("hot", (64, 128, 32, 32), 32, torch.float32, True, "add")
norm("hot", (64, 128, 32, 32), 32, bf16, False, "add")
norm("wide", (64, 384, 32, 32), 32, bf16, True, "add")
norm("chunks", (1, 128, 256, 256), 32, bf16, True)
norm("extreme", (1, 2048, 32, 32), 1, bf16, True)  # a group so wide that its chunks' sums don't fit at once
norm("extreme", (64, 256, 1, 1), 256, bf16, False)  # many groups of one element: as many in a slice as its table bears
norm("chunks", (1, 32, 256, 256), 1, f16, False, "add", "scale", "shift")
norm("odd", (3, 37, 5, 7), 37, torch.float32, True, "add", "scale", "shift")
norm("odd", (3, 12), 3, f16, False)
for module in (ddpm_step, group_norm_silu, philox_normal):
    module.needs_int64 = lambda elements: True
step("large", image, last(image.to(bf16)))
philox_normal.philox_normal(image, 5, 1, None, 3, None, 7)
norm("large", (1, 128, 32, 32), 32, torch.float32, True)
norm("large", (1, 32, 256, 256), 1, f16, False)
report("large")
"""


# Each takes twenty seconds, and what is wrong with a kernel is mostly wrong on both.
@pytest.fixture(scope="module", params=[pytest.param(80, marks=pytest.mark.slow), 90])
def compiled(request, tmp_path_factory):
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        pytest.skip("triton is older than 3.6")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    environment.pop("TRITON_INTERPRET", None)
    script = tmp_path_factory.mktemp("compile")  # where the installed package is what imports
    result = subprocess.run(
        [sys.executable, "-c", COMPILE, str(request.param)], cwd=script, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_every_kernel_compiles(compiled):
    assert {facts["kernel"] for facts in compiled} == {
        "ddpm_step_kernel", "philox_normal_kernel", "timestep_embedding_kernel", "group_norm_silu_kernel",
        "group_norm_silu_backward_kernel", "group_norm_silu_partials_kernel", "group_norm_silu_merge_kernel",
        "group_norm_silu_apply_kernel", "group_norm_silu_centre_kernel", "group_norm_silu_backward_partials_kernel",
        "group_norm_silu_backward_merge_kernel", "group_norm_silu_backward_apply_kernel",
    }  # fmt: skip
    assert not any(facts["fused"] for facts in compiled)


def test_nothing_swallows_a_nan(compiled):
    """A GPU's min and max drop NaN, which the interpreter's do not show."""
    assert not any(facts["min_max"] for facts in compiled)


def test_registers_hold_what_they_should(compiled):
    """The hot norms do not spill, other kernels spill a few words, and no tile of a norm passes through shared memory."""
    for facts in compiled:
        hot_norm = facts["case"] == "hot" and facts["kernel"].startswith("group_norm_silu")
        assert facts.get("spilled", 0) <= (0 if hot_norm else 64), facts
        if facts["kernel"].startswith("group_norm_silu"):
            # Of a slice of 2048 channels the vectors alone do, on their way from one place to the other.
            assert facts["shared"] <= (4096 if facts["case"] != "extreme" else 16384), facts


def test_large_tensors_are_indexed_with_64_bits(compiled):
    for facts in compiled:
        if facts["case"] == "large":
            assert "i32" not in facts["tile_offsets"], facts
    # What this looks for is there in tensors of ordinary size.
    small = {facts["kernel"] for facts in compiled if "i32" in facts["tile_offsets"]}
    assert {
        "ddpm_step_kernel",
        "philox_normal_kernel",
        "group_norm_silu_kernel",
        "group_norm_silu_apply_kernel",
    } <= small
