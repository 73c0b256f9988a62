"""The CUDA kernels' device code, run on a CPU (cuda_on_cpu/cuda_on_cpu.h): their results, not their speed."""

import json
import os
import re
import subprocess
import sys

import _bars
import kernels
import ptxas
import pytest
import simulated
import torch
from conftest import SERVERS, _server, same_bits
from gpu import UNITS

from fastddpm import backend, ops, parity

SANITIZER = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}  # neither follows fibers


def run(target, *arguments, **environment):
    return subprocess.run(
        [simulated.built(target), *arguments], env={**os.environ, **environment}, capture_output=True, text=True
    )


@pytest.fixture
def cuda():
    with simulated.cuda():
        yield


@pytest.fixture(params=["hopper", "hopper, few multiprocessors", "ampere", "blackwell consumer"])
def gpu(request, monkeypatch, cuda):
    """Set the device properties that determine how work is split: multiprocessors, clusters and the L2."""
    sms, major, l2 = {
        "hopper": (132, 9, 50 << 20),
        "hopper, few multiprocessors": (1, 9, 50 << 20),
        "ampere": (108, 8, 1 << 16),
        "blackwell consumer": (170, 12, 96 << 20),
    }[request.param]
    monkeypatch.setenv("CUDA_ON_CPU_SMS", str(sms))
    monkeypatch.setenv("CUDA_ON_CPU_MAJOR", str(major))
    monkeypatch.setenv("CUDA_ON_CPU_L2", str(l2))


@pytest.mark.parametrize(
    ("bug", "found"),
    [
        ("none", None),
        ("a missing barrier", "not always the same"),
        ("a missing cluster barrier", "not always the same"),
        ("a block gone too early", "not always the same"),
        ("a divergent barrier", "deadlock: block 0 thread 0 waits at a __syncthreads that others never reach"),
        ("a collective without a lane", "waits at a warp collective that others never reach"),
        ("an arrival without a fence", "reads its cluster's memory after an arrival without a fence"),
        ("memory nobody wrote", "not always the same"),
        ("shared memory's end", "AddressSanitizer"),
        ("an array's end", "AddressSanitizer"),
    ],
)
def test_planted_mistakes_are_found(bug, found):
    done = run("planted", bug, **SANITIZER)
    if found is None:
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        assert done.returncode != 0
        assert found in done.stdout + done.stderr


@pytest.mark.parametrize(("seed", "sms", "major"), [(0, 132, 9), (1, 132, 8), (2, 1, 9), (3, 132, 12)])
def test_driver(seed, sms, major):
    done = run("driver", CUDA_ON_CPU_SEED=str(seed), CUDA_ON_CPU_SMS=str(sms), CUDA_ON_CPU_MAJOR=str(major))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\nok") > 150


@pytest.mark.slow  # to build
@pytest.mark.parametrize("op", ["philox", "timestep", "ddpm_step", "group_norm_silu"])
def test_driver_sanitized(op):
    """No access is out of bounds or to freed memory, and none is undefined, in shared memory either."""
    done = run("driver_sanitized", op, CUDA_ON_CPU_SEED="1", **SANITIZER)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_parity(gpu):
    rows = parity.run(backends=["cuda"])
    assert len(rows) >= 30
    assert [row for row in rows if not row.share <= 1] == []


def case_outputs():
    for case in parity.cases():
        outputs = case.compute()
        yield from (outputs,) if isinstance(outputs, torch.Tensor) else outputs


def test_the_order_of_threads_does_not_matter(cuda, monkeypatch):
    """Results are bit-identical and do not depend on the order in which threads run."""
    results = []
    for seed in range(4):
        monkeypatch.setenv("CUDA_ON_CPU_SEED", str(seed))
        results.append(list(case_outputs()))
    for result in results[1:]:
        assert all(map(same_bits, result, results[0]))


def test_noise_is_the_cpus(cuda):
    """The words are identical. The normals have the same source and differ only in the last bits of a logarithm."""
    shape, arguments = (3, 5, 7, 9), {"seed": (1 << 63) + 5, "t": 17, "stream": 1, "first": (1 << 40) + 3}
    got = ops.philox_normal(shape, **arguments)
    with backend.use("reference"):
        reference = ops.philox_normal(shape, **arguments)
    torch.testing.assert_close(got, reference, rtol=0, atol=parity.NOISE)


TABLE = torch.tensor([[0.0] * 9, [1, -0.5, 0.5, 0.25, 0, 0.1, 0.5, 0, 0], [1, 0, 1, 0, 0.5, 0, 0, 0, 0]])


def in_place(state, *, o=None, x0=None, shape=(2, 3, 4, 4)):
    x = torch.randn(shape)
    o = torch.randn(shape) if o is None else o
    state = torch.tensor(state)
    before = x.clone()
    ops.ddpm_step_(x, o, TABLE, torch.tensor([5, 6, 7]), state, x0=x0)
    return before, x, state.tolist()


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 3, 5, 5), (300, 3, 32, 32)])  # whole tiles, none, many blocks
def test_the_state_moves_on(cuda, shape):
    _, _, state = in_place([7, 3, 1, -1], shape=shape)
    assert state == [7, 3, 2, -1]


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 3, 5, 5)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_first_bad_row_is_recorded(cuda, bad, shape):
    o = torch.randn(shape)
    o[1, 2, 3, 1] = bad
    assert in_place([7, 3, 1, -1], o=o, shape=shape)[2] == [7, 3, 2, 1]
    assert in_place([7, 3, 1, 0], o=o, shape=shape)[2] == [7, 3, 2, 0]  # there was one before
    assert in_place([7, 3, 0, -1], o=o, shape=shape)[2] == [7, 3, 1, -1]  # a row that doesn't read o


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 3, 5, 5)])
def test_a_row_that_cannot_be_taken_is_recorded(cuda, shape):
    """The host cannot read the device's state: a row index outside the table, or c2 without x0_last."""
    for row in (2, 3, 1000):
        before, after, state = in_place([7, 3, row, -1], shape=shape)
        assert same_bits(before, after)
        assert state == [7, 3, row + 1, row]
    assert in_place([7, 3, 2, -1], x0=torch.randn(shape), shape=shape)[2] == [7, 3, 3, -1]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", parity.DTYPES)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((1, 128, 16, 16), 32),  # split over a cluster
        ((2, 96, 9, 9), 32),  # three channels a group
        ((1, 8, 160, 160), 8),  # beyond what one block keeps
        ((2, 8, 3, 3), 1),
        ((1, 384, 4, 4), 32),  # groups of 12 that straddle the vectors
        ((1, 2056, 2, 2), 1),  # more channels than are tabled
    ],
)
def test_norm_shapes(gpu, shape, groups, dtype, layout):
    c = shape[1]
    x, dy = (parity.arranged(torch.randn(shape).to(dtype), layout) for _ in range(2))
    weight, bias, add = 1 + torch.randn(c) / 2, torch.randn(c), torch.randn(shape[:2])
    with backend.use("reference"):
        truth = ops.group_norm_silu(x.double(), groups, weight.double(), bias.double(), 1e-6, add=add.double())
    got = ops.group_norm_silu(x, groups, weight, bias, 1e-6, add=add)
    assert parity.share(got, truth, parity.norm_bound(truth, x, groups, weight, 1e-6, add=add)) <= 1
    truths, bounds = parity.norm_gradients(dy, x, groups, weight, bias, 1e-6, add=add)
    got = parity.norm_backward(dy, x, groups, weight, bias, 1e-6, add=add)
    assert max(map(parity.share, got, truths, bounds)) <= 1


def test_in_the_middle_of_a_batch(cuda, monkeypatch):
    """With two stages, a few samples at a time, every sample gets its own statistics."""
    monkeypatch.setenv("CUDA_ON_CPU_MAJOR", "8")
    x = torch.randn(5, 8, 64, 64) * torch.arange(1, 6).reshape(5, 1, 1, 1)
    weight, bias = torch.ones(8), torch.zeros(8)
    sample = 4 * 8 * 64 * 64
    for l2 in (1, 5 * sample, 1 << 30):  # 1, 2 and all of them
        monkeypatch.setenv("CUDA_ON_CPU_L2", str(l2))
        got = ops.group_norm_silu(x, 8, weight, bias, silu=False)
        expected = torch.nn.functional.group_norm(x.double(), 8)
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)


def test_too_small_a_workspace_is_refused(cuda, monkeypatch):
    monkeypatch.setenv("CUDA_ON_CPU_MAJOR", "8")
    monkeypatch.setattr(sys.modules["fastddpm.ops.group_norm_silu"], "_workspace", lambda *_: torch.empty(3))
    with pytest.raises(ValueError, match=r"workspace has 3 elements, expected at least \d+"):
        ops.group_norm_silu(torch.randn(1, 8, 64, 64), 8, torch.ones(8), torch.zeros(8))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_nothing_needs_no_workspace(cuda, channels_last, backward):
    """This also holds if the compiled module is called without Python's checks, because no size of 0 is a divisor."""
    x = backend.buffer(torch.empty(0))
    for samples, channels, pixels in ((0, 8, 9), (2, 0, 9), (2, 8, 0)):
        assert backend.native.norm_workspace(backward, x, channels_last, samples, channels, pixels, 4, 0) == 0


def test_k_cuda_takes_what_runs_on_a_gpu():
    """`pytest -k cuda` in the verification on a GPU must not run minutes of simulation."""
    for device, name in SERVERS:
        assert ("cuda" in _server(device, name).id) == (device == "cuda")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_backward_centres_anew(cuda, layout):
    """The saved mean was rounded, and large groups have large means. The rounding error is removed from the sums."""
    x, dy = (parity.arranged(torch.randn(2, 8, 17, 19), layout) for _ in range(2))
    weight, bias = 1 + torch.randn(8) / 2, torch.randn(8)
    _, mean, rstd = torch.ops.fastddpm.group_norm_silu(x, 2, weight, bias, 1e-6, None, None, None, False)
    got = torch.ops.fastddpm.group_norm_silu_backward(
        dy, x, weight, bias, None, None, None, mean + 1e-3 / rstd, rstd, 2, False, "cuda"
    )
    truths, bounds = parity.norm_gradients(dy, x, 2, weight, bias, 1e-6, silu=False)
    assert max(map(parity.share, got, truths, bounds)) <= 1


# ------------------------------------------------------------------------------- the budget, as far as it needs no nvcc

BUDGET = json.loads(ptxas.BUDGET.read_text(encoding="utf-8"))
HOT, BACKWARD = (next(name for name in ptxas.HOT if part in name) for part in ("8, 8, 4", "backward"))


def test_planned_launches_fill_the_device():
    if simulated.missing():
        pytest.skip(f"CUDA kernels on a CPU: {simulated.missing()}")
    found = ptxas.splits(ptxas.registers(BUDGET))
    assert list(ptxas.unexpected(found, BUDGET["exceptions"])) == []
    assert {launch.kernel for split in found for launch in split.launches} == set(ptxas.HOT)
    # Why a case is excepted: however it is split, its input takes more than the registers of one wave, and less than of 1.5.
    for split in found:
        if str(split.case) in BUDGET["exceptions"]["waves"]:
            elements = 2 * 384 * ptxas.HOT[split.launches[0].kernel].elements  # that a multiprocessor holds
            assert 1 < split.case.bytes_read() / 2 / (ptxas.SMS * elements) < 1.5


@pytest.mark.parametrize(
    ("blocks", "threads", "problem"),
    [
        (264, 384, None),  # two blocks of 80 registers a thread on each multiprocessor
        (265, 384, "a launch of 1.00 waves"),
        (395, 384, "a launch of 1.50 waves"),
        (396, 384, None),
        (400, 256, "a launch of 1.01 waves"),
        (130, 384, None),
        (1320, 64, None),
    ],
)
def test_a_little_more_than_a_wave_is_found(blocks, threads, problem):
    case = ptxas.Case("group_norm_silu", 64, 256, 4096)
    split = ptxas.Split(case, [ptxas.Launch(HOT, blocks, threads, 1, 4096)], {HOT: 80})
    found = list(ptxas.unexpected([split], {}))
    assert found == [] if problem is None else found[0].startswith(f"{case}: {problem}")
    unneeded = {"waves": {str(case): "a reason"}}
    assert list(ptxas.unexpected([split], unneeded)) == (
        [f"{case}: excepted from waves in budget.json without need; remove the exception"] if problem is None else []
    )


def test_few_bytes_under_way_are_found():
    case = ptxas.Case("ddpm_step_", 64, 3, 65536)
    launch = ptxas.Launch("step", 132, 128, 1, 0)  # a block of 128 x 4 pixels x 3 x 6 bytes on each multiprocessor
    found = list(ptxas.unexpected([ptxas.Split(case, [launch], {"step": 128})], {}))
    assert found == [f"{case}: 9.0 KB in flight in a multiprocessor, expected at least 32"]


def test_more_than_the_budget_is_found():
    found = {"registers": 81, "fences": {"MEMBAR": 1}, "loads": {"128": 8, "32": 1}, "passes": {"mean": 3.1}}
    budget = {"registers": 80, "fences": {"MEMBAR": 2}, "loads": {"128": 8}, "passes": {"mean": 3.1}}
    assert list(ptxas.over(found, budget, "a:")) == ["a: registers: 81, budget 80", "a: loads 32: 1, budget 0"]


def test_instructions_are_told_apart_by_the_lines_they_come_from():
    """Instructions belong to the pass that contains their innermost line in the kernel's file. Empty slots do not count."""
    source = ptxas.KERNELS / "group_norm_silu.cu"
    passes = ptxas.pass_lines(source, HOT)
    assert list(passes) == ["mean", "deviation", "result"]
    assert passes["mean"][-1] < passes["deviation"][0] <= passes["deviation"][-1] < passes["result"][0]
    header, partial = ptxas.partial()
    mean, result = passes["mean"][0], passes["result"][0]
    sass = f"""
_Zkernel:
\t//## File "/csrc/cuda/{header}", line {partial - 2} inlined at "/csrc/cuda/{source.name}", line {mean}
\t//## File "/csrc/cuda/{source.name}", line {mean}
        /*0000*/                   FADD R1, R2, R3 ;
        /*0010*/              @!P0 LDG.E.128.CONSTANT R8, [R2.64] ;
\t//## File "/csrc/cuda/{source.name}", line {result + 1} inlined at "/csrc/cuda/{source.name}", line {mean}
\t//## File "/csrc/cuda/{source.name}", line {mean}
        /*0020*/                   MUFU.EX2 R1, R2 ;
\t//## File "/csrc/cuda/{header}", line {partial} inlined at "/csrc/cuda/{source.name}", line {mean}
\t//## File "/csrc/cuda/{source.name}", line {mean}
        /*0030*/                   MEMBAR.ALL.GPU ;
"""
    code = [(what, lines) for kernel, what, lines in ptxas.instructions(sass) if kernel == "_Zkernel"]
    found = ptxas.budget_of(HOT, source, 80, code)
    assert found["instructions_per_element"] == {"mean": 0.03, "deviation": 0, "result": 0.02}  # 2, 0 and 1 of 64
    assert (found["code_bytes"], found["special_functions"], found["fences"], found["loads"]) == (
        64, 1, {"MEMBAR": 1}, {"128": 1}
    )  # fmt: skip


def test_predictions_are_of_planned_cases():
    planned = {(case["op"], case["case"]) for case in kernels.planned()}
    for prediction in BUDGET["predictions"]:
        assert prediction["low"] < prediction["high"]
        if "op" in prediction:
            assert {(prediction["op"], case) for case in prediction["cases"]} <= planned
        else:
            assert prediction["batch"] in ptxas.NETWORKS[prediction["network"]]


def test_predictions_stand_beside_what_was_measured(capsys):
    """Every case in budget.json is measured."""
    measured = {_bars.OURS: {"ms": 3.5e-3, "share_of_copy": 0.72}, _bars.BF16: {"ms": 0.7}}
    ops = [{"op": case.op, "case": case.name, "contestants": measured} for case in kernels.gpu_cases("meta")]
    ptxas.print_predictions([*ops, *({"network": n, "batch": b, "contestants": measured} for n, b in UNITS)])
    said = capsys.readouterr().out
    predictions = json.loads(ptxas.BUDGET.read_text())["predictions"]
    assert len(said.splitlines()) == 2 + sum(len(p.get("cases", [1])) for p in predictions)
    for line in ("32, 32] float32 in place.* times a copy +1.3 to 1.7 +1.39 +yes", "cifar10 256 +ms a step .* 0.7 +NO"):
        assert re.search(line, said)
