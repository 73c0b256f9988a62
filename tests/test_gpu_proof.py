"""benchmarks/gpu.py and the GPU half of kernels.py as far as they go without a GPU, and compute-sanitizer where there is one."""

import contextlib
import json
import re
import subprocess
import sys

import _bars
import _cases
import _contestants
import gpu
import kernels
import ptxas
import pytest
import steps_per_sec
import torch
from conftest import NO_GPU

HEADER = {"sources": "1", "versions": {"torch": "2"}, "triton": "3"}


@pytest.fixture
def results(tmp_path):
    return gpu.Results(tmp_path / "gpu.json", HEADER, keep=True)


@pytest.mark.parametrize("piece", gpu.PIECES)
def test_what_a_piece_needs_and_its_exit_statuses(monkeypatch, tmp_path, piece, capsys):
    def status(wrong=(), short=()):
        monkeypatch.setitem(gpu.PIECES, piece, lambda *_: (list(wrong), list(short)))
        with pytest.raises(SystemExit) as ended:
            gpu.main()
        code = ended.value.code
        return capsys.readouterr().err if code == 2 else code  # where nothing could be run

    monkeypatch.setattr(sys, "argv", ["gpu.py", piece, "--force", "--out", str(tmp_path / "out")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "finds no CUDA device; run this on a machine with an NVIDIA GPU" in status()
    assert not list(tmp_path.iterdir())

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (tmp_path / "__init__.py").write_text("another")
    with monkeypatch.context() as another:
        another.setattr(gpu.fastddpm, "__file__", str(tmp_path / "__init__.py"))
        assert re.search(r"is not this checkout's \(.*; install it: rm -f build/gpu-installed; make", status())
    monkeypatch.setattr(gpu.backend, "unavailable_reason", lambda kind: f"no {kind} here")
    assert status() == "gpu.py: no cuda here; no triton here\n"

    monkeypatch.setattr(gpu.backend, "unavailable_reason", lambda _: None)
    monkeypatch.setattr(gpu, "header", lambda _: HEADER)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    assert [status(), status(short=["a bar"]), status(["a result"]), status(["a result"], ["a bar"])] == [0, 3, 1, 1]
    (path,) = (tmp_path / "out").iterdir()
    assert path.name == f"nvidia-h200_{'steps' if piece == 'peers' else piece}.json"
    assert json.loads(path.read_text())[piece] == {"wrong": ["a result"], "missed or not measured": ["a bar"]}
    monkeypatch.setattr(sys, "argv", [word for word in sys.argv if word != "--force"])
    assert "other processes hold 10.0 GiB of this GPU's memory" in str(status()) or piece == "check"


@pytest.mark.skipif(gpu.tool("timeout") is None, reason="no timeout, which a machine with a GPU has")
def test_check_runs_what_needs_a_gpu_and_nothing_else(results, tmp_path, monkeypatch):
    """Without one, all that is selected is skipped, for one reason, and that proves nothing."""
    monkeypatch.setenv("PYTHONPATH", str(gpu.ROOT))
    tests = "import time\ndef test_right(): pass\ndef test_wrong(): assert 1 == 2\ndef test_slow(): time.sleep(60)\n"
    (tmp_path / "test_x.py").write_text(tests)
    chunks = {name: [str(tmp_path / "test_x.py"), "-c", "/dev/null", "-k", name] for name in ("right", "wrong", "slow")}
    skipped = {} if torch.cuda.is_available() else {name: gpu.CHUNKS[name] for name in ("test_ddpm_step", "memcheck")}
    wrong, short = gpu.check(results, gpu.Clock(25), {**chunks, **skipped})
    found = json.loads(results.path.read_text())["results"]
    assert {line.partition(":")[0] for line in wrong} == {"wrong", *skipped} - {"memcheck"}
    assert set(short) == {"slow: out of time", *(f"{n}: skipped; see its log" for n in {"memcheck"} & {*skipped})}
    assert (found["right"]["right"], found["right"]["counts"]) == (True, {"PASSED": 1})
    assert any("assert 1 == 2" in line for line in found["wrong"]["end"])
    for name in skipped:
        assert found[name]["counts"].keys() == {"SKIPPED"}
        reasons = {line.partition(" x ")[2] for line in found[name]["end"] if line.startswith("not run: ")}
        assert {reason for reason in reasons if not reason.startswith("left out by")} == {NO_GPU}


@pytest.fixture
def small(monkeypatch):
    """gpu.steps on a CPU, with the bundled network and few steps; the peer that has to be compiled is a plain one."""

    def entrants(model, batch, quick):
        field = {name: _contestants.ours(model, batch, name.split()[1]) for name in (_bars.F32, _bars.BF16)}
        return field if quick else {**field, _bars.GRAPH: _contestants.ours(model, batch, "float32", "reference")}

    monkeypatch.setattr(gpu, "entrants", entrants)
    monkeypatch.setattr(gpu, "tool", lambda _: None)
    monkeypatch.setattr(steps_per_sec, "cold", lambda *_: {"float32": 0.5})
    monkeypatch.setitem(steps_per_sec.TURN, "cpu", 1)
    monkeypatch.setitem(steps_per_sec.PRODUCT, "cpu", (256, 1))
    units = [("digits", 1), ("digits", 2)]
    return lambda results, compiled=False: gpu.steps(results, gpu.Clock(200), "cpu", units, compiled)


def test_steps_are_measured_and_compiled_peers_join_them(results, small, monkeypatch, capsys):
    wrong, short = small(results)
    assert (wrong, sum("diffusers' defaults" in bar for bar in short)) == ([], 2)  # bars of the paper's networks
    assert not any("best peer" in bar for bar in short)  # which `peers` measures
    found = json.loads(results.path.read_text())
    assert found["profile"] == "no profile: ncu is not on the PATH"
    assert [list(unit["contestants"]) for unit in found["results"].values()] == [[_bars.F32, _bars.BF16]] * 2

    again = gpu.Results(results.path, HEADER, keep=True)
    wrong, short = small(again, compiled=True)
    assert (wrong, len(short)) == ([], 3)
    assert all("best peer" in bar for bar in short)
    joined = json.loads(again.path.read_text())["results"]
    for unit, stored in joined.items():
        assert list(stored.pop("compiled")["contestants"]) == [_bars.BF16, _bars.GRAPH]
        assert stored == found["results"][unit]
    before = json.dumps(again)
    small(again, compiled=True)
    assert json.dumps(again) == before  # nothing is compiled twice

    monkeypatch.setattr(gpu, "UNet2DModel", None)  # a peer that is missing is a line
    monkeypatch.setattr(gpu, "entrants", lambda model, batch, quick: 1 / 0 if batch == 1 else {})
    wrong, short = small(again)
    assert wrong == ["digits at batch 1: ZeroDivisionError: division by zero"]
    assert not any("diffusers" in bar for bar in short)
    assert "digits at batch 2" in short
    assert "diffusers is not installed" in capsys.readouterr().out
    assert all("compiled" in unit for unit in json.loads(again.path.read_text())["results"].values())


def test_results_of_other_sources_are_not_kept(results):
    results["case"] = 1
    results.write()
    for keep, other, kept in ((1, {}, {"case": 1}), (0, {}, {}), (1, {"sources": "2"}, {}), (1, {"versions": {}}, {})):
        assert gpu.Results(results.path, HEADER | other, keep) == kept
    results.path.write_text('{"sources": "1", "vers')
    assert gpu.Results(results.path, HEADER, keep=True) == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
@pytest.mark.slow
@pytest.mark.parametrize("tool", gpu.TOOLS)
def test_sanitizer(tool, tmp_path):
    """compute-sanitizer over the kernels, which C++ calls, compiled as CMakeLists.txt has it."""
    nvcc, sanitizer = gpu.tool("nvcc"), gpu.tool("compute-sanitizer")
    if nvcc is None or sanitizer is None:
        pytest.skip("no nvcc or no compute-sanitizer: install the CUDA toolkit and put it on the PATH")
    arch, driver = "{}{}".format(*torch.cuda.get_device_capability()), tmp_path / "driver"
    flags = ["-std=c++17", "-O3", "-lineinfo", "-DFASTDDPM_CUDA", *ptxas.arithmetic_flags(), f"-I{gpu.ROOT / 'csrc'}"]
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "--threads", "0", "-o", driver]
    sources = [gpu.ROOT / "tests" / "cuda_on_cpu" / "driver.cpp", *(gpu.ROOT / "csrc" / "cuda").glob("*.cu")]
    subprocess.run([nvcc, *flags, *sources], check=True)
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", driver]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    assert set(re.findall(r"SUMMARY: (\d+)", done.stdout)) == {"0"}, done.stdout
    assert "\nok " in done.stdout  # a run of no cases proves nothing


def test_the_gpus_cases():
    """The network's norms as its layers have them, and what each bar is about."""
    norms, cases = _cases.cifar10_norms(), list(kernels.gpu_cases("meta"))
    assert norms[128, 32, 32] == 8  # 2 blocks of 2 down, 1 + 1 + 1 second ones up, the last norm
    assert norms[256, 4, 4] == 12  # 4 down, 5 in the middle, 3 second ones up
    # Two for each of 22 residual blocks, one for each of 6 attentions, one at the end.
    assert sum(norms.values()) == 2 * 22 + 6 + 1
    assert _cases.ops.group_norm_silu.__name__ == "group_norm_silu"  # the hook is gone
    assert len({(c.op, c.name) for c in cases}) == len(cases)
    for bar in (*_bars.BATCHES.values(), _bars.BATCH_1):
        assert sum(c.calls for c in cases if bar in c.bars) == sum(norms.values())
        assert sum(bar in c.bars for c in cases) == len(norms)
    for case in (case for case in cases if case.op in ("group_norm_silu", "ddpm_step_")):
        out = case.make()[case.out]
        size = out.numel() * out.element_size()
        assert 2 * size == min(c.moved for c in case.contestants.values())  # what the copy moves
        if case.op == "group_norm_silu":
            assert (_bars.ON_CHIP in case.bars) == (size >= 64 << 20 and out.shape[-1] < 256)
            assert (_bars.TWO_STAGE in case.bars) == (out.shape[-1] == 256)


def test_the_step_case_is_right():
    """By the CPU's kernels: the table's rows go on from call to call, and a reset brings the first one back."""
    case = _cases.ddpm_step_in_graph((2, 3, 4, 6), "cpu")
    for name in case.contestants:
        assert _cases.examined(case, name) < 4e-6 or name == "torch"


COSTS = {"fastddpm cuda": 1, "torch": 3, "torch.compile": 2}  # ms of a call


def copying(name, costs):
    def contestant(cost):
        def call(x, out):
            copying.cost = cost
            return out.copy_(x)

        return _cases.Contestant(call, lambda result, *_: (float((result - 1).abs().max()), 0.0), 200)

    contestants = {who: contestant(cost) for who, cost in costs.items()}
    return _cases.Case("op", name, lambda: (torch.ones(25), torch.empty(25)), contestants)


def test_ops_are_measured_until_the_time_ends(results, monkeypatch):
    """A contestant that is wrong, fails or cannot be captured, a case without memory, and no time to compile or go on."""
    pytest.importorskip("triton")
    cases = [copying("one", {**COSTS, "no graph": 9, "not right": 1, "fails": 1})]
    cases += [copying(name, COSTS) for name in ("two", "three", "four")]
    cases[0].contestants["not right"].check = lambda *_: (float("nan"), 1.0)
    cases[0].contestants["fails"].call = lambda *_: 1 / 0
    cases[1].make = lambda: torch.empty(1 << 60)
    cases[2].sets, resets = 7, []
    cases[2].reset = lambda: resets.append(1)

    def bench(run, rep, return_mode):
        copying.cost = 0.5  # of the plain copy
        turn = run()
        assert len({v.data_ptr() for v in turn}) == len(turn)  # all sets, once each
        if copying.cost == 9:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return copying.cost * len(turn)

    monkeypatch.setattr("triton.testing.do_bench_cudagraph", bench)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("", (), {"L2_cache_size": 1000}))
    for name, fake in (("Stream", None), ("synchronize", None), ("stream", contextlib.nullcontext())):
        monkeypatch.setattr(torch.cuda, name, lambda *_, fake=fake: fake)
    monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", None)
    monkeypatch.setattr(kernels, "gpu_cases", lambda *_: iter(cases))
    monkeypatch.setattr(kernels, "planned", lambda: [{"op": "op", "case": case.name, "bars": ()} for case in cases])
    clock, left = gpu.Clock(0), iter([100, 100, 100, 100, 1, 1, 0])
    monkeypatch.setattr(clock, "left", lambda: next(left))
    wrong, short = gpu.ops(results, clock)
    one, two, three = json.loads(results.path.read_text())["results"].values()
    assert wrong == ["op two: fastddpm cuda: " + two["left_out"]["fastddpm cuda"]]
    assert len(short) == len(UNCHANGED)
    assert {name: c["ms"] for name, c in one["contestants"].items()} == pytest.approx({"copy": 0.5, **COSTS})
    assert one["contestants"]["fastddpm cuda"]["times_faster_than_torch"] == pytest.approx(3)
    assert one["left_out"] == {
        "no graph": "RuntimeError: operation not permitted",
        "not right": "WrongResult: not right is wrong: error nan, allowed 1; not timed",
        "fails": "ZeroDivisionError: division by zero",
    }
    assert (one["sets"], two["contestants"], three["sets"]) == (21, {}, 7)  # 21 of 200 bytes: four times the cache
    assert three["left_out"] == {"torch.compile": "no time left to compile it"}
    assert len(resets) == 3 * kernels.ROUNDS + 2  # before each turn, and before ours and torch's results are checked


MS = {"copy": 0.9, "fastddpm cuda": 1, "fastddpm triton": 1.2, "torch": 3, "torch.compile": 2, "torch.compile max": 1.6}
UNCHANGED = {
    "norm, groups on chip, of copy": 0.9,
    "norm, two-stage, of copy": 0.9,
    **{f"norm, CIFAR-10 at batch {n}, times faster than torch.compile": 1.6 for n in (64, 256)},  # its best setting
    **{f"norm, CIFAR-10 at batch {n}, times faster than eager": 3.0 for n in (64, 256)},
    "norm, the network's worst shape, times faster": 1.6,
    "norm, batch 1, slowest node, us": 1.0,
    "step, [64, 3, 256, 256], of copy": 0.9,
    "step, [256, 3, 32, 32], times a copy": 1 / 0.9,
    **{f"triton, {op}, of cuda's speed": 1 / 1.2 for op in _bars.OPS},
    "norm backward, times faster than autograd": 3.0,
}


def judged(changes):
    """Every bar where all of a whole run's cases take MS, but for changes(case): None where it wasn't measured."""
    found = []
    for case in kernels.gpu_cases("meta"):
        changed, scale = changes(case), 1e-3 if _bars.BATCH_1 in case.bars else 0.1
        if changed is not None:
            times = {who: {"ms": scale * ms} for who, ms in (MS | changed).items() if ms is not None}
            found.append({**vars(case), "case": case.name, "contestants": times})
    rows = {row["bar"]: row for row in kernels.bars_of(found)}
    return rows, _bars.missed(rows.values())


def test_the_worst_case_and_the_calls_decide():
    rows, missed = judged(lambda case: {})
    assert {bar: row["measured"] for bar, row in rows.items()} == pytest.approx(UNCHANGED)
    assert missed == []

    def changes(case):
        if case.name.startswith("[64, 256, 4, 4]"):  # 12 of the 51 calls
            return {"torch.compile max": 0.95, "fastddpm triton": 1.4}
        return {"copy": 0.84} if case.name.startswith("[16, 256, 128, 128]") else {}

    rows, missed = judged(changes)
    worst = "norm, the network's worst shape, times faster"
    compiled = "norm, CIFAR-10 at batch 64, times faster than torch.compile"
    changed = {worst: 0.95, compiled: (39 * 1.6 + 12 * 0.95) / 51, "norm, groups on chip, of copy": 0.84}
    changed["triton, group_norm_silu, of cuda's speed"] = 1 / 1.4
    assert {bar: row["measured"] for bar, row in rows.items()} == pytest.approx(UNCHANGED | changed)
    assert set(missed) == set(changed)
    assert rows[worst]["at"] == "group_norm_silu [64, 256, 4, 4] bfloat16 channels_last"
    assert rows[compiled]["at"] == "11 shapes, 51 calls"


def test_a_bar_that_lacks_something_is_not_reached(capsys):
    """A case that was not measured, and a contestant that was left out."""
    without = {"[256, 384, 32, 32] bfloat16 channels_last": None, "philox_normal": {"fastddpm triton": None}}
    rows, missed = judged(lambda case: without.get(case.name, without.get(case.op, {})))
    lacking = ["norm, groups on chip, of copy", *(bar for bar in UNCHANGED if "batch 256" in bar or "worst" in bar)]
    lacking += [f"triton, {op}, of cuda's speed" for op in ("group_norm_silu", "philox_normal")]
    assert missed == [bar for bar, row in rows.items() if row["measured"] is None] == lacking
    _bars.print_bars(rows.values())
    assert len(re.findall("not measured +NO", capsys.readouterr().out)) == len(lacking)
