"""benchmarks/gpu.py and the GPU half of kernels.py, as far as they can be checked without a GPU."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import _bars  # noqa: E402
import _cases  # noqa: E402
import _graphs  # noqa: E402
import gpu  # noqa: E402
import kernels  # noqa: E402

# ------------------------------------------------------------------------------------------------ the record

HEADER = {"commit": "abc", "sources": "1", "versions": {"torch": "2"}, "device": {"name": "NVIDIA H200"}}


def read(path):
    return json.loads(path.read_text())


def test_slug():
    assert gpu.slug("NVIDIA H200") == "nvidia-h200"
    assert gpu.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert gpu.slug(" NVIDIA GeForce RTX 5090 (x) ") == "nvidia-geforce-rtx-5090-x"


def test_each_step_keeps_the_others_results(tmp_path):
    path = tmp_path / "gpu.json"
    gpu.Record(path, HEADER, "parity").put(parity={"passed": True})
    gpu.Record(path, HEADER, "benchmarks").put(benchmarks=[1], bars=[2])
    record = gpu.Record(path, HEADER, "sanitize")
    record.put(sanitize={"tools": {}})
    assert read(path) == {
        **HEADER,
        "parity": {"passed": True},
        "benchmarks": [1],
        "bars": [2],
        "sanitize": {"tools": {}},
    }
    again = gpu.Record(path, HEADER, "benchmarks")
    assert again.earlier == {"benchmarks": [1], "bars": [2]}  # for --resume
    again.put(benchmarks=[3])
    assert read(path) == {**HEADER, "parity": {"passed": True}, "benchmarks": [3], "sanitize": {"tools": {}}}


@pytest.mark.parametrize("changed", [{"commit": "abd"}, {"sources": "2"}, {"versions": {"torch": "3"}}])
def test_results_of_another_commit_are_not_kept(tmp_path, changed):
    path = tmp_path / "gpu.json"
    gpu.Record(path, HEADER, "parity").put(parity=1)
    record = gpu.Record(path, {**HEADER, **changed}, "benchmarks")
    record.put(benchmarks=2)
    assert read(path) == {**HEADER, **changed, "benchmarks": 2}
    assert gpu.Record(path, HEADER, "benchmarks").earlier == {}


def test_a_damaged_file_is_replaced(tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text('{"commit": "abc", "sour')
    gpu.Record(path, HEADER, "parity").put(parity=1)
    assert read(path) == {**HEADER, "parity": 1}


def test_the_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"
    record = gpu.Record(path, HEADER, "parity")
    record.put(parity=1)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastddpm.files.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        record.put(parity=2)
    assert read(path)["parity"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_sources_tell_what_was_measured(tmp_path):
    (tmp_path / "csrc").mkdir()
    kernel = tmp_path / "csrc" / "kernel.cu"
    kernel.write_text("a")
    first = gpu.sources(tmp_path)
    (tmp_path / "csrc" / "kernel.o").write_text("compiled")
    (tmp_path / "README.md").write_text("text")
    assert gpu.sources(tmp_path) == first
    kernel.write_text("b")
    changed = gpu.sources(tmp_path)
    kernel.rename(tmp_path / "csrc" / "other.cu")
    assert len({first, changed, gpu.sources(tmp_path)}) == 3
    assert gpu.sources() == gpu.sources()


# -------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("step", gpu.STEPS)
def test_without_a_gpu(monkeypatch, tmp_path, step):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", step, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert str(ended.value).startswith(f"gpu.py: PyTorch {torch.__version__} ")
    assert "finds no CUDA device; run this on a machine with an NVIDIA GPU" in str(ended.value)
    assert not list(tmp_path.iterdir())


def test_kernels_still_runs_on_a_cpu(tmp_path):
    json_file = tmp_path / "kernels.json"
    options = [
        "--device",
        "cpu",
        "--quick",
        "--only",
        "timestep",
        "--seconds",
        "0.1",
        "--force",
        "--json",
        str(json_file),
    ]
    result = subprocess.run(
        [sys.executable, str(BENCHMARKS / "kernels.py"), *options], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    (case,) = read(json_file)["results"]
    assert (case["op"], case["case"]) == ("timestep_embedding", "[256] -> 128")
    assert list(case["contestants"]) == ["copy", "fastddpm op", "torch", "torch, float64 inside"]


def test_a_command_ends_with_its_time():
    sleeping = "import subprocess, sys; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    start = time.monotonic()
    status, output, seconds = gpu.limited([sys.executable, "-c", sleeping], 1)
    assert (status, output) == (None, "begun\n")  # what it had said is there
    assert 1 <= seconds <= time.monotonic() - start < 10
    status, output, _ = gpu.limited([sys.executable, "-c", "import sys; sys.exit('no')"], 30)
    assert (status, output) == (1, "no\n")
    assert not gpu.LIVE


def test_jobs_run_together_and_are_told_as_they_end():
    seen = {}
    jobs = {name: lambda name=name: time.sleep(0.2 * (name == "late")) or {"is": name} for name in ("late", "early")}
    gpu.together(jobs, 2, seen.__setitem__)
    assert list(seen.items()) == [("early", {"is": "early"}), ("late", {"is": "late"})]


def test_an_interruption_ends_what_was_started():
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    results = {}

    def job(seconds):
        return lambda: results.setdefault(seconds, gpu.limited(sleeping, seconds)) and {}

    def interrupted(*_):
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        gpu.together({"short": job(1), "long": job(60)}, 2, interrupted)
    assert time.monotonic() - start < 20
    assert results[60][0] == -9


def test_command_lines(tmp_path):
    compiling = gpu.compiling("nvcc", "90", Path("a/kernel.cu"), tmp_path / "kernel.o")
    assert compiling[:3] == ["nvcc", "-gencode=arch=compute_90,code=sm_90", "-std=c++17"]
    assert {"-fmad=false", "-DFASTDDPM_CUDA", "-lineinfo", f"-I{gpu.ROOT / 'csrc'}"} <= set(compiling)
    assert compiling[-4:] == ["-c", "a/kernel.cu", "-o", str(tmp_path / "kernel.o")]
    assert gpu.sanitizing("compute-sanitizer", "racecheck", Path("driver")) == [
        "compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9", "driver"
    ]  # fmt: skip
    pytest_command = gpu.pytest_command(["tests/test_gpu.py", "-k", "cuda"], Path("junit.xml"))
    assert pytest_command[:4] == [sys.executable, "-P", "-m", "pytest"]
    assert pytest_command[-4:] == ["--junitxml=junit.xml", "tests/test_gpu.py", "-k", "cuda"]


def test_what_is_measured_is_what_is_installed(tmp_path, monkeypatch):
    gpu.check_installed()
    (tmp_path / "__init__.py").write_text("another")
    monkeypatch.setattr(gpu.fastddpm, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(SystemExit, match="is not this checkout's .* install it: make gpu, or pip install"):
        gpu.check_installed()


JUNIT = """<?xml version="1.0" encoding="utf-8"?><testsuites><testsuite name="pytest" errors="1" failures="1" skipped="2"
tests="7" time="1.0"><testcase classname="tests.test_gpu" name="test_a[cuda]" time="0.1"/>
<testcase classname="tests.test_gpu" name="test_b[triton]"><failure message="assert 1 == 2&#10;more">trace</failure></testcase>
<testcase classname="" name="tests.test_x"><error message="collection failure">No module</error></testcase>
</testsuite></testsuites>"""


def test_counts_of_a_test_run():
    assert gpu.counted(JUNIT) == {
        "tests": 7, "failures": 1, "errors": 1, "skipped": 2,
        "failed": {"tests.test_gpu::test_b[triton]": "assert 1 == 2", "::tests.test_x": "collection failure"},
    }  # fmt: skip


def test_a_test_run_that_is_cut_off_leaves_counts(monkeypatch):
    output = (
        "tests/test_gpu.py::test_a[cuda] PASSED [ 1%]\ntests/test_gpu.py::test_b FAILED\ntests/test_gpu.py::test_c "
    )
    monkeypatch.setattr(gpu, "limited", lambda *_, **__: (None, output, 3.0))
    result = gpu.run_tests([], gpu.Clock(1))
    assert result["counts"] == {"passed": 1, "failed": 1}
    assert not result["passed"]
    assert result["output"][-1] == "tests/test_gpu.py::test_c"


def test_tests_that_are_all_skipped_prove_nothing(tmp_path, monkeypatch):
    def skipped(command, *_, **__):
        (junit,) = (word.partition("=")[2] for word in command if word.startswith("--junitxml"))
        Path(junit).write_text('<testsuites><testsuite tests="5" skipped="5" errors="0" failures="0"/></testsuites>')
        return 0, "5 skipped", 1.0

    monkeypatch.setattr(gpu, "limited", skipped)
    assert not gpu.run_tests([], gpu.Clock(1))["passed"]


# -------------------------------------------------------------------------------------------------- sanitizer

CLEAN = """========= COMPUTE-SANITIZER
ok    philox_normal [3, 7]      0.27 of the bound
all right
========= ERROR SUMMARY: 0 errors
"""
RACES = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at group_norm_silu.cu:10 and Read access at group_norm_silu.cu:12
=========     in kernel<float>(Args)
ok    group_norm_silu           0.27 of the bound
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


def test_a_clean_run():
    assert gpu.judged(0, CLEAN) == {"passed": True, "status": 0, "cases": 1, "summary": ["ERROR SUMMARY: 0 errors"]}
    warned = "ok    a\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert gpu.judged(0, warned)["passed"]


def test_what_a_tool_finds_is_kept():
    result = gpu.judged(9, RACES)
    assert not result["passed"]
    assert result["ended"] == "errors were found"
    assert result["summary"] == ["RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"]
    assert "group_norm_silu.cu:12" in result["found"][1]
    assert not gpu.judged(0, RACES)["passed"]  # whatever the exit status


@pytest.mark.parametrize(
    ("status", "output", "ended"),
    [
        (None, CLEAN.rpartition("=========")[0], "out of time"),
        (1, CLEAN.replace("ok   ", "WRONG"), "the driver, or the tool itself, failed"),
        (0, "ok    philox_normal\n", None),  # the tool has not looked
        (0, CLEAN.replace("ok   ", "     "), None),  # no case has run
    ],
)
def test_a_run_that_proves_nothing(status, output, ended):
    result = gpu.judged(status, output)
    assert not result["passed"]
    assert result.get("ended") == ended
    assert result["output"]


# ------------------------------------------------------------------------------------------------------ cases


def test_the_networks_norms():
    """Shapes and numbers of calls as the layers of the network have them."""
    norms = _cases.cifar10_norms()
    assert norms[128, 32, 32] == 8  # 2 blocks of 2 down, 1 + 1 + 1 second ones up, the last norm
    assert norms[384, 32, 32] == 1
    assert norms[256, 4, 4] == 12  # 4 down, 5 in the middle, 3 second ones up
    # Two for each of 22 residual blocks, one for each of 6 attentions, one at the end.
    assert sum(norms.values()) == 2 * 22 + 6 + 1
    assert _cases.ops.group_norm_silu.__name__ == "group_norm_silu"  # the hook is gone


def test_the_gpus_cases():
    cases = list(kernels.gpu_cases("meta"))
    assert len({(c.op, c.name) for c in cases}) == len(cases)
    norms = _cases.cifar10_norms()
    for bar in (*map(_bars.network, _bars.BATCHES), _bars.BATCH_1):
        assert sum(c.calls for c in cases if bar in c.bars) == sum(norms.values())
        assert sum(bar in c.bars for c in cases) == len(norms)
    for case in (case for case in cases if case.op in ("group_norm_silu", "ddpm_step_")):
        out = case.make()[case.out]
        size = out.numel() * out.element_size()
        assert 2 * size == min(c.moved for c in case.contestants.values())  # what the copy moves
        if case.op == "group_norm_silu":
            assert out.dtype == torch.bfloat16
            assert out.is_contiguous(memory_format=torch.channels_last)
            assert (_bars.ON_CHIP in case.bars) == (size >= 64 << 20 and out.shape[-1] < 256)
            assert (_bars.TWO_STAGE in case.bars) == (out.shape[-1] == 256)


def test_the_step_case_is_right():
    """By the CPU's kernels: the table's rows go on from call to call, and a reset brings the first one back."""
    case = _cases.ddpm_step_in_graph((2, 3, 4, 6), "cpu")
    for name in case.contestants:
        assert _cases.examined(case, name) < 4e-6 or name == "torch"
    case.contestants["fastddpm op"].check = lambda *_: (2.0, 1.0)
    with pytest.raises(_cases.WrongResult, match="fastddpm op is wrong: error 2, allowed 1; not timed"):
        _cases.examined(case, "fastddpm op")


def test_settings_of_torch_compile():
    from torch import _inductor

    variants = _cases._compiled(_cases.composition)
    assert next(iter(variants)) == "torch.compile"
    assert "torch.compile max-autotune" in variants
    assert len(variants) == (4 if hasattr(_inductor.config, _cases.REINDEXING) else 2)


# ----------------------------------------------------------------------------------------------------- timing


class WithoutGpu:
    """Counts instead of timing: one call takes `cost[name of the call]` seconds."""

    cache, stream = 1000, None

    def __init__(self, uncapturable=()):
        self.uncapturable, self.clock, self.inside = uncapturable, 0.0, False

    def capture(self, run):
        run()
        if self.last in self.uncapturable:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return run

    def seconds(self, run, times):
        before = self.clock
        for _ in range(times):
            run()
        return max(self.clock - before, 1e-6)  # a plain copy takes none

    def call(self, name, cost):
        def call(*buffers):
            self.last, self.clock = name, self.clock + cost
            return buffers[-1].copy_(buffers[0])

        return call


def copying(timer, costs, **about):
    def make():
        return torch.ones(25), torch.empty(25)

    def check(result, *_):
        return float((result - 1).abs().max()), 0.0

    contestants = {name: _cases.Contestant(timer.call(name, cost), check, 200) for name, cost in costs.items()}
    return _cases.Case("op", "case", make, contestants, **about)


def test_the_rotation_exceeds_the_cache_four_times():
    case = copying(WithoutGpu(), {"torch": 1.0})
    assert _graphs.sets_needed(case, 1000) == 21  # of 200 bytes
    assert _graphs.sets_needed(case, 10) == 2
    assert _graphs.sets_needed(case, 10**9) == _graphs.MOST_SETS
    case.touched = 100
    assert _graphs.sets_needed(case, 1000) == 41
    case.sets = 7
    assert _graphs.sets_needed(case, 1000) == 7


def test_a_turn_is_the_mean_over_whole_rotations():
    timer, resets, seen = WithoutGpu(), [], []
    call = timer.call("a", 3e-5)

    def noted(*buffers):
        seen.append(buffers[0].data_ptr())
        return call(*buffers)

    sets = [(torch.ones(3), torch.empty(3)) for _ in range(4)]
    turn, obstacle = _graphs.turn(timer, noted, sets, lambda: resets.append(len(seen)))
    assert obstacle is None
    seen.clear(), resets.clear()
    assert turn() == pytest.approx(3e-5)
    assert seen == [s[0].data_ptr() for s in sets] * 9  # a millisecond
    assert resets == [0]


def test_measuring_a_case():
    timer = WithoutGpu(uncapturable=("slow",))
    case = copying(
        timer, {"fastddpm cuda": 1e-4, "torch": 3e-4, "slow": 5e-4, "wrong": 1e-6, "fails": 1.0}, bars=("b",)
    )
    case.contestants["wrong"].check = lambda *_: (float("nan"), 1.0)
    case.contestants["fails"].call = lambda *_: 1 / 0
    result = kernels.measure_on_gpu(case, timer, 0.05)
    assert result["left_out"] == {
        "wrong": "WrongResult: wrong is wrong: error nan, allowed 1; not timed",
        "fails": "ZeroDivisionError: division by zero",
    }
    times = {name: c["ms"] for name, c in result["contestants"].items() if name != "copy"}
    assert times == pytest.approx({"fastddpm cuda": 0.1, "torch": 0.3, "slow": 0.5})
    assert result["contestants"]["fastddpm cuda"]["times_faster_than_torch"] == pytest.approx(3)
    assert result["contestants"]["slow"]["not_captured"] == "RuntimeError: operation not permitted"
    assert "not_captured" not in result["contestants"]["torch"]
    assert (result["bars"], result["sets"]) == (("b",), 21)


def test_a_run_goes_on_where_a_case_fails(monkeypatch):
    timer = WithoutGpu()
    cases = [copying(timer, {"fastddpm cuda": 1e-4, "torch": 3e-4}) for _ in range(3)]
    for name, case in zip(("one", "two", "three"), cases, strict=True):
        case.name = name

    def out_of_memory():
        raise RuntimeError("CUDA out of memory\nand a long story")

    cases[1].contestants["fastddpm cuda"].call = cases[1].contestants["torch"].call = lambda *_: out_of_memory()
    monkeypatch.setattr(kernels, "Gpu", lambda: timer)
    monkeypatch.setattr(kernels, "gpu_cases", lambda: iter(cases))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 10 << 30)
    settings = argparse.Namespace(only="o", force=False, seconds=0.01, quick=False)
    one, two = kernels.run_on_gpu(settings, {("op", "three")})
    assert (one["case"], two["case"]) == ("one", "two")
    assert one["contestants"]["torch"]["ms"] == pytest.approx(0.3)
    assert two["left_out"] == dict.fromkeys(("fastddpm cuda", "torch"), "RuntimeError: CUDA out of memory")
    kernels.table([one, two], "us")

    cases[1].make = out_of_memory
    assert [bool(r["contestants"]) for r in kernels.run_on_gpu(settings)] == [True, False, True]
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    with pytest.raises(SystemExit, match="other processes hold 10.0 GiB of this GPU's memory"):
        list(kernels.run_on_gpu(settings))


# ------------------------------------------------------------------------------------------------------- bars

SLOWER = {"copy": 0.9, "fastddpm cuda": 1.0, "fastddpm triton": 1.2, "torch": 3.0, "torch.compile": 2.0}


def result(case, **ms):
    times = {**SLOWER, "torch.compile max-autotune": 1.6, **ms}
    scale = 1e-3 if _bars.BATCH_1 in case.bars else 0.1
    contestants = {name: {"ms": scale * value} for name, value in times.items() if value is not None}
    return {"op": case.op, "case": case.name, "bars": case.bars, "calls": case.calls, "contestants": contestants}


@pytest.fixture(scope="module")
def gpu_cases():
    return list(kernels.gpu_cases("meta"))


def judge(results):
    return {row["bar"]: row for row in kernels.bars_of(results)}


def test_bars_that_are_reached(gpu_cases):
    rows = judge([result(case) for case in gpu_cases])
    assert all(row["reached"] for row in rows.values())
    measured = {bar: row["measured"] for bar, row in rows.items()}
    assert measured == pytest.approx(
        {
            "norm, groups on chip, of copy": 0.9,
            "norm, two-stage, of copy": 0.9,
            "norm, CIFAR-10 at batch 64, times faster than torch.compile": 1.6,  # its best setting
            "norm, CIFAR-10 at batch 64, times faster than eager": 3.0,
            "norm, CIFAR-10 at batch 256, times faster than torch.compile": 1.6,
            "norm, CIFAR-10 at batch 256, times faster than eager": 3.0,
            "norm, the network's worst shape, times faster": 1.6,
            "norm, batch 1, slowest node, us": 1.0,
            "step, [64, 3, 256, 256], of copy": 0.9,
            "step, [256, 3, 32, 32], times a copy": 1 / 0.9,
            **{f"triton, {op}, of cuda's speed": 1 / 1.2 for op in _bars.OPS},
            "norm backward, times faster than autograd": 3.0,
        }
    )


def test_the_worst_case_and_the_calls_decide(gpu_cases):
    def times(case):
        if case.name.startswith("[64, 256, 4, 4]"):  # 12 of the 51 calls
            return {"torch.compile max-autotune": 0.95, "fastddpm triton": 1.4}
        return {"copy": 0.84} if case.name.startswith("[16, 256, 128, 128]") else {}

    rows = judge([result(case, **times(case)) for case in gpu_cases])
    worst = rows["norm, the network's worst shape, times faster"]
    assert worst["measured"] == pytest.approx(0.95)
    assert worst["at"] == "group_norm_silu [64, 256, 4, 4] bfloat16 channels_last"
    compiled = rows["norm, CIFAR-10 at batch 64, times faster than torch.compile"]
    assert compiled["measured"] == pytest.approx((39 * 1.6 + 12 * 0.95) / 51)
    assert compiled["at"] == "11 shapes, 51 calls"
    on_chip, twin = rows["norm, groups on chip, of copy"], rows["triton, group_norm_silu, of cuda's speed"]
    assert on_chip["measured"] == pytest.approx(0.84)
    assert twin["measured"] == pytest.approx(1 / 1.4)
    unreached = {bar for bar, row in rows.items() if not row["reached"]}
    assert unreached == {worst["bar"], compiled["bar"], on_chip["bar"], twin["bar"]}


def test_a_bar_that_lacks_something_is_not_reached(gpu_cases):
    """A case that was not measured, a contestant that was left out, one that could not be captured."""
    results = []
    for case in gpu_cases:
        if case.name.startswith("[256, 384, 32, 32]"):
            continue
        ms = {"fastddpm triton": None} if case.op == "philox_normal" else {}
        results.append(result(case, **ms))
        if _bars.SMALL_STEP in case.bars:
            results[-1]["contestants"]["fastddpm cuda"]["not_captured"] = "why"
    rows = judge(results)
    missing = {bar for bar, row in rows.items() if row["measured"] is None}
    assert missing == {
        "norm, groups on chip, of copy",
        "norm, CIFAR-10 at batch 256, times faster than torch.compile",
        "norm, CIFAR-10 at batch 256, times faster than eager",
        "norm, the network's worst shape, times faster",
        "triton, group_norm_silu, of cuda's speed",
        "triton, philox_normal, of cuda's speed",
        "triton, ddpm_step_, of cuda's speed",
        "step, [256, 3, 32, 32], times a copy",
    }
    assert not any(rows[bar]["reached"] for bar in missing)
    assert ["not measured", "NO"] == next(r for r in _bars.cells(rows.values()) if r[0] in missing)[2:4]


# ------------------------------------------------------------------------------------------- the whole step


def test_benchmarks_are_flushed_as_they_come_and_can_be_resumed(tmp_path, monkeypatch, gpu_cases, capsys):
    settings = gpu.arguments().parse_args(["benchmarks", "--out", str(tmp_path)])
    path, calls = tmp_path / "gpu.json", []

    def whole(case):
        numbers = {"ms_p20": 1.0, "ms_p80": 1.0, "gb_per_s": 1.0, "share_of_copy": 1.0, "times_faster_than_torch": None}
        made = result(case)
        contestants = {name: {**numbers, **c} for name, c in made["contestants"].items()}
        return {**made, "contestants": contestants, "left_out": {}, "sets": 2}

    def killed_after(count):
        def run(_, done):
            calls.append(len(done))
            for i, case in enumerate(case for case in gpu_cases if (case.op, case.name) not in done):
                if i == count:
                    raise KeyboardInterrupt
                yield whole(case)

        return run

    monkeypatch.setattr(kernels, "run_on_gpu", killed_after(3))
    with pytest.raises(KeyboardInterrupt):
        gpu.run_benchmarks(gpu.Record(path, HEADER, "benchmarks"), settings, gpu.Clock(60))
    assert len(read(path)["benchmarks"]["results"]) == 3
    assert len(read(path)["bars"]) == 16

    monkeypatch.setattr(kernels, "run_on_gpu", killed_after(None))
    assert not gpu.run_benchmarks(gpu.Record(path, HEADER, "benchmarks"), settings, gpu.Clock(0))  # time runs out
    assert len(read(path)["benchmarks"]["results"]) == 1
    settings.resume = True
    assert gpu.run_benchmarks(gpu.Record(path, HEADER, "benchmarks"), settings, gpu.Clock(60))
    assert calls == [0, 0, 1]
    found = read(path)
    assert found["benchmarks"]["complete"]
    assert len(found["benchmarks"]["results"]) == len(gpu_cases)
    assert all(row["reached"] for row in found["bars"])
    assert "norm, groups on chip, of copy" in capsys.readouterr().out

    settings = argparse.Namespace(**{**vars(settings), "only": "ddpm"})  # a part is no proof
    assert not gpu.run_benchmarks(gpu.Record(path, HEADER, "benchmarks"), settings, gpu.Clock(60))


def test_parity_says_which_backend_fails(tmp_path, monkeypatch, capsys):
    def ran(command, *_, **__):
        if "-c" in command:
            name, path = command[-2:]
            share = 1.5 if name == "triton" else 0.5
            Path(path).write_text(json.dumps([["philox_normal", "float32", "contiguous", name, share, "many"]]))
            return (0, "", 1.0) if name != "cuda" else (1, "line\nBackendError: no kernels", 1.0)
        (junit,) = (word.partition("=")[2] for word in command if word.startswith("--junitxml"))
        Path(junit).write_text('<testsuites><testsuite tests="5" skipped="1" errors="0" failures="0"/></testsuites>')
        return 0, "4 passed", 1.0

    monkeypatch.setattr(gpu, "limited", ran)
    settings = gpu.arguments().parse_args(["parity", "--out", str(tmp_path)])
    record = gpu.Record(tmp_path / "gpu.json", HEADER, "parity")
    assert not gpu.run_parity(record, settings, gpu.Clock(60))
    found = read(tmp_path / "gpu.json")["parity"]
    assert {name: r["passed"] for name, r in found["ops"].items()} == {
        "cuda": False,
        "triton": False,
        "reference": True,
    }
    assert found["ops"]["cuda"]["output"][-1] == "BackendError: no kernels"
    assert found["ops"]["triton"]["over_their_bound"] == 1
    assert set(found["tests"]) == {"test_gpu", *(f"test_{op}" for op in gpu.OP_TESTS)}
    assert all(r["passed"] and r["counts"]["tests"] == 5 for r in found["tests"].values())
    assert "150.0% (!)" in capsys.readouterr().out


def test_sanitize_builds_and_runs_every_tool(tmp_path, monkeypatch):
    ran = []

    def run(command, *_, **__):
        ran.append(list(map(str, command)))
        return 0, CLEAN, 1.0

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu, "limited", run)
    monkeypatch.setattr(gpu, "tool", lambda name: name)
    settings = gpu.arguments().parse_args(["sanitize", "--out", str(tmp_path)])
    assert gpu.run_sanitize(gpu.Record(tmp_path / "gpu.json", HEADER, "sanitize"), settings, gpu.Clock(60))
    compiled = {Path(words[words.index("-c") + 1]).name for words in ran if "-c" in words}
    assert compiled == {"driver.cpp", *(path.name for path in (gpu.ROOT / "csrc" / "cuda").glob("*.cu"))}
    assert {words[2] for words in ran if words[0] == "compute-sanitizer"} == set(gpu.TOOLS)
    found = read(tmp_path / "gpu.json")["sanitize"]
    assert found["passed"]
    assert set(found["tools"]) == {"none", *gpu.TOOLS}

    monkeypatch.setattr(gpu, "tool", lambda name: None)
    assert not gpu.run_sanitize(gpu.Record(tmp_path / "gpu.json", HEADER, "sanitize"), settings, gpu.Clock(60))
    assert read(tmp_path / "gpu.json")["sanitize"]["missing"] == ["nvcc", "compute-sanitizer"]
