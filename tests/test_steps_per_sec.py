"""benchmarks/steps_per_sec.py: its contestants on a small network, and what becomes of what they measured; kernels.py."""

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import _bars
import _contestants
import _harness
import _isa
import pytest
import steps_per_sec
import torch

from fastddpm import UNet, UNetConfig, backend

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    """As small as diffusers' groups of 32 allow, with attention, a shortcut and both ways between levels."""
    config = UNetConfig(sample_size=8, channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,))
    return _contestants.stirred(UNet(config))


@pytest.fixture(autouse=True)
def no_grad_and_one_thread():
    """On networks as small as these, threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def measure(model, monkeypatch):
    """steps_per_sec.measure of few steps: entrants are those given, or all that are quick."""
    monkeypatch.setattr(steps_per_sec, "cold", lambda *_: {"float32": 0.5})
    monkeypatch.setattr(steps_per_sec, "own", lambda *_: 0.1)
    monkeypatch.setitem(steps_per_sec.TURN, "cpu", 1)
    monkeypatch.setitem(steps_per_sec.PRODUCT, "cpu", (256, 1))
    monkeypatch.setattr(steps_per_sec, "MOST_ROUNDS", 4)

    def call(entrants=None, seconds=200, tried=()):
        field = _contestants.entrants(model, 2, True) if entrants is None else entrants
        return steps_per_sec.measure(model, "small", 2, field, _harness.Clock(seconds), 0.0, dict(tried))

    return call


def test_multiply_adds_of_the_papers_networks():
    with torch.device("meta"):
        networks = {name: UNet.from_preset(name) for name in ("cifar10", "lsun256")}
    assert sum(_contestants.macs(networks["cifar10"])) == 6_221_856_768
    assert sum(_contestants.macs(networks["lsun256"])) == 248_513_757_184


def test_all_contestants_agree_and_are_measured(measure, capsys):
    result = measure()
    # Whether a processor is fit for bfloat16 is for the probe and for OpenVINO to say; nothing else may be missing.
    unfit = {"the limit in bfloat16", "diffusers, bfloat16 channels_last", "OpenVINO bfloat16"}
    assert set(result["left_out"]) <= unfit, result["left_out"]
    assert {"fastddpm reference", _bars.F32, _bars.BF16, _bars.DEFAULTS} <= set(result["contestants"])
    theirs = result["contestants"].get("OpenVINO float32")
    if theirs is not None and torch.cpu._is_avx2_supported():
        assert theirs["isa"].get("avx2" if torch.backends.cpu.get_cpu_capability() == "AVX2" else "avx512", 0) > 10
    ours, theirs = result["contestants"][_bars.BF16], result["contestants"][_bars.DEFAULTS]
    assert 3 <= ours["rounds"] == theirs["rounds"] <= 4
    assert ours["times_faster_than_diffusers"] == pytest.approx(theirs["ms"] / ours["ms"])
    assert theirs["times_faster_than_diffusers"] == 1
    assert theirs["times_faster_than_best_alike"] <= 1
    assert ours["images_per_s"] <= 2 * ours["steps_per_s"] / 1000
    steps_per_sec.table([result])
    said = capsys.readouterr().out.splitlines()
    for name in result["contestants"]:  # by default, and in the table
        assert sum(f"batch 2: {name}: set up in " in line for line in said) == 1
        assert sum(line.startswith(f"  {name} ") for line in said) == 1
    json.dumps(result)


def test_a_contestant_that_is_wrong_or_fails_is_left_out(model, measure, monkeypatch):
    class Wrong(_contestants.PlainNorm):
        def forward(self, x, add=None):
            return super().forward(x, add) * 1.01

    monkeypatch.setattr(_contestants, "UNet2DModel", None)
    monkeypatch.setattr(_contestants, "PlainNorm", Wrong)
    result = measure(
        {
            _bars.F32: _contestants.ours(model, 2, "float32"),
            "wrong": _contestants.tuned(model, 2, "float32"),
            "fails": _contestants.tuned(model, 2, "no such precision"),
        }
    )
    assert list(result["contestants"]) == [_bars.F32]
    assert result["contestants"][_bars.F32]["times_faster_than_best_peer"] is None
    assert result["left_out"]["wrong"].startswith("wrong: error 0.0")
    assert result["left_out"]["fails"] == "KeyError: 'no such precision'"


def test_who_does_not_fit_is_left_out(model, measure):
    @contextlib.contextmanager
    def right(seconds):  # those that its steps are said to take
        yield _contestants.Contestant("float32", lambda x, t: model(x, torch.full((len(x),), t)), lambda k: seconds * k)

    @contextlib.contextmanager
    def endless():
        while True:
            time.sleep(0.01)
        yield

    entrants = {
        "fits": right(0.001),
        "slow": right(500.0),
        "was slow": right(0.001),
    }
    result = measure(entrants, tried={"was slow": 600.0, "fits": 0.1})
    assert list(result["contestants"]) == ["fits"]
    assert {who: why for who, why in result["left_out"].items() if who in entrants} == {
        "slow": "no time left: a step takes 500 s",
        "was slow": "no time left: its set-up took 600 s at an earlier batch size",
    }
    result = measure({"endless": endless()}, seconds=0)
    assert not result["contestants"]
    assert result["left_out"]["endless"] == "no time left"


def test_rounds_end_with_the_time():
    """Each call once in each round, the first one another each time; at least three rounds."""
    made, left = [], iter([50, 10, -5])

    def call(name):
        return lambda: made.append(name) or len(made)

    calls = {name: call(name) for name in "abc"}
    taken = steps_per_sec.in_turn(calls, 20, lambda: next(left), print)
    assert "".join(made) == "abcbcacababcbca"
    assert taken == {"a": [1, 6, 8, 10, 15], "b": [2, 4, 9, 11, 13], "c": [3, 5, 7, 12, 14]}


def test_what_a_dtype_would_take(model, measure, monkeypatch):
    """A peer in a dtype that this processor is unfit for is left out before it is set up; ours never is."""
    monkeypatch.setattr(_contestants, "rates", {"float32": (1e11, 1e11), "bfloat16": (1e10, 5e9)}.get)
    slow = "diffusers, bfloat16 channels_last"
    result = measure(
        {_bars.BF16: _contestants.ours(model, 2, "bfloat16"), slow: _contestants.tuned(model, 2, "bfloat16")}
    )
    assert list(result["contestants"]) == [_bars.BF16]
    assert result["contestants"][_bars.BF16]["share_of_matmul"] is None
    assert list(result["matmul_gflop_per_s"]) == ["float32"]
    assert set(result["left_out"]) == {slow, "the limit in bfloat16"}
    limit = "a product of 256 x 256 matrices in bfloat16 would take about 0.0034 s here, 20 times as long as in float32"
    assert result["left_out"]["the limit in bfloat16"].startswith(limit)
    monkeypatch.setattr(_contestants, "rates", {"float32": (1e11, 1e11), "bfloat16": (5e10, 3e10)}.get)
    _contestants.refuse_if_absurd("a step", "bfloat16", 10**9, 10**9)  # two or three times as long is not absurd


def test_the_probe_measures_each_dtype():
    torch.set_num_threads(2)
    rates = {precision: _contestants.rates.__wrapped__(precision) for precision in _contestants.DTYPES}
    assert torch.get_num_threads() == 2  # and not the probe's one
    assert all(1e7 < rate < 1e14 for pair in rates.values() for rate in pair)


@pytest.mark.parametrize("without_diffusers", [False, True])
def test_the_step_in_a_graph_is_diffusers_step(model, monkeypatch, without_diffusers):
    """The peer that is captured by hand: its network, and its step with the same noise."""
    if without_diffusers:
        monkeypatch.setattr(_contestants, "UNet2DModel", None)
    compiled, replayed = [], []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    monkeypatch.setattr(_contestants, "capture", lambda run: lambda: (run(), replayed.append(1)))
    noise = torch.randn(2, *model.shape)
    monkeypatch.setattr(torch, "randn_like", lambda _: noise)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: noise)
    with _contestants.captured(model, 2, {}) as contestant:
        (one,) = compiled
        x = torch.randn(2, *model.shape)
        scheduler = _contestants.DDPMScheduler(1000, beta_schedule="linear", variance_type="fixed_large")
        for t in (999, 500, 1, 0):
            stepped, step = x.clone(), torch.tensor([999 - t])
            o = one(stepped, step)
            assert int(step) == 1000 - t
            torch.testing.assert_close(stepped, scheduler.step(o, t, x).prev_sample, atol=1e-4, rtol=1e-4)
        assert steps_per_sec.error(contestant, x, steps_per_sec.exact(model, x)) < 0.03
        assert contestant.steps(4) > 0
        assert len(replayed) == 5


@pytest.mark.skipif(sys.platform != "linux", reason="stack_t is laid out as on Linux")
def test_openvino_leaves_the_signal_stack_alone(model):
    """Else a worker of the suite crashes at the next Ctrl-C that a test sends to it."""
    pytest.importorskip("openvino")

    def stack():
        found = _contestants._Stack()
        assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found)) == 0
        return found.ss_sp, found.ss_flags, found.ss_size

    before = stack()
    with _contestants.openvino(model, 2, "float32") as contestant:
        contestant.steps(2)
    assert stack() == before


def test_a_cold_call_is_timed_in_a_process_of_its_own():
    found = steps_per_sec.cold("digits", 1, CPU, 0.0)  # one process for each dtype
    assert set(found) == {"float32", "bfloat16"}
    assert all(0 < seconds < 60 for seconds in found.values())


def test_set_up_ends_with_its_time():
    start = time.monotonic()
    with pytest.raises(steps_per_sec.Late), steps_per_sec.within(0.2):
        while True:
            try:
                time.sleep(0.01)
            except Exception:  # as compilers do
                continue
    assert time.monotonic() - start < 5
    with steps_per_sec.within(60):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], r"--batch: got \[0\]; expected numbers >= 1"),
        (["--minutes", "0"], "--minutes: got 0; expected a number > 0"),
        (["--plot", "no/such/folder/x.png"], "--plot: the folder no/such/folder does not exist"),
    ],
)
def test_arguments_are_checked(monkeypatch, options, message):
    monkeypatch.setattr(sys, "argv", ["steps_per_sec.py", "--device", "cpu", *options])
    with pytest.raises(SystemExit, match=message):
        steps_per_sec.main()


# ------------------------------------------------------------------------------------------ the instruction set


@pytest.fixture
def uncapped(monkeypatch):
    for name in _isa.CAP:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_an_instruction_set_is_kept_or_refused(uncapped):
    started = []
    uncapped.setattr(os, "execve", lambda *given: started.append(given))
    uncapped.setattr(torch.cpu, "_is_avx2_supported", lambda: True)
    _isa.set_isa("native", "cpu")
    assert not started
    _isa.set_isa("avx2", "cpu")
    ((program, command, environment),) = started
    assert program == command[0] == sys.executable
    assert environment.items() >= _isa.CAP.items()

    with pytest.raises(SystemExit, match="--isa avx2: only a CPU can be capped, and --device is cuda"):
        _isa.set_isa("avx2", "cuda")
    uncapped.setenv("ATEN_CPU_CAPABILITY", "avx2")  # a part of the cap: the rest is added
    _isa.set_isa("avx2", "cpu")
    assert len(started) == 2
    with pytest.raises(SystemExit, match="--isa native: the environment has ATEN_CPU_CAPABILITY=avx2, which caps"):
        _isa.set_isa("native", "cpu")
    uncapped.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    with pytest.raises(
        SystemExit, match="has ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX512_CORE, which contradicts"
    ):
        _isa.set_isa("avx2", "cpu")
    uncapped.setattr(torch.cpu, "_is_avx2_supported", lambda: False)
    with pytest.raises(SystemExit, match="--isa avx2: this processor has no AVX2"):
        _isa.set_isa("avx2", "cpu")


@pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="a processor without AVX2")
def test_a_capped_process_is_capped(uncapped):
    code = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import json, _isa; "
        "_isa.set_isa('avx2', 'cpu'); print(json.dumps(_isa.capped(quick=True)))"
    )
    command = [sys.executable, "-P", "-c", code]
    said = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    assert said["torch's kernels"].startswith("AVX2, ")
    if backend.native is not None:
        assert said["fastddpm's kernels"].startswith("avx2, ")
    if torch.backends.mkldnn.is_available():
        assert said["torch's convolutions"].startswith("Intel AVX2, ")


# ------------------------------------------------------------------------------------------------------- bars


def unit(network, batch, ms, **about):
    contestants = {
        name: {"ms": value, "share_of_matmul": 0.5, "added_of_weights": 0.6 if name.startswith("fastddpm") else None}
        for name, value in ms.items()
    }
    more = {"cold_s": {"float32": 0.4, "bfloat16": 0.3}, "own_ms": 0.2, "left_out": {}}
    return {"network": network, "batch": batch, "contestants": contestants, **more, **about}


def test_bars_on_a_cpu():
    ms = {_bars.F32: 2.0, _bars.BF16: 1.0, _bars.DEFAULTS: 3.5, "OpenVINO float32": 2.3, "OpenVINO bfloat16": 1.08}
    rows = _bars.engine_bars([unit("cifar10", 1, ms), unit("cifar10", 16, ms, own_ms=1.5)], "cpu")
    judged = {row["bar"]: (row["measured"], row["reached"]) for row in rows}
    assert judged == {
        "cifar10 at batch 16, bfloat16, times faster than OpenVINO": (pytest.approx(1.08), True),
        "cifar10 at batch 16, bfloat16, times faster than diffusers' defaults": (3.5, True),
        "cifar10 at batch 16, bfloat16, of matmul (moonshot)": (0.5, False),
        "cifar10 at batch 1, bfloat16, times faster than OpenVINO": (pytest.approx(1.08), False),
        "cifar10 at batch 1, bfloat16, times faster than diffusers' defaults": (3.5, True),
        "cifar10 at batch 1, bfloat16, of matmul (moonshot)": (0.5, False),
        "cifar10 at batch 16, float32, times faster than OpenVINO": (pytest.approx(1.15), True),
        "a warm call's own time, ms a step": (1.5, False),
        "a cold call's first step, s": (0.4, True),
        "memory that the engine adds, times the weights": (0.6, True),
    }
    assert [row["bar"] for row in rows if row["moonshot"]] == [bar for bar in judged if "moonshot" in bar]
    del ms["OpenVINO bfloat16"]
    rows = _bars.engine_bars([unit("cifar10", 16, ms)], "cpu")
    missing = [row["bar"] for row in rows if row["measured"] is None]
    assert len(missing) == 4  # of batch 1 all three, of batch 16 the one
    assert not any(row["reached"] for row in rows if row["bar"] in missing)


def test_bars_on_a_cpu_with_avx2():
    ms = {_bars.F32: 2.0, _bars.BF16: 2.06, _bars.DEFAULTS: 3.5, "OpenVINO float32": 2.5}
    large = unit("cifar10", 16, {**ms, _bars.BF16: 2.2})
    large["contestants"][_bars.F32]["share_of_matmul"] = 1.35
    large["contestants"][_bars.BF16]["share_of_matmul"] = None
    rows = _bars.engine_bars([unit("cifar10", 1, ms), large], "avx2")
    judged = {row["bar"]: (row["measured"], row["reached"]) for row in rows if row["bar"].startswith("cifar10")}
    assert judged == {
        "cifar10 at batch 16, float32, times faster than OpenVINO": (1.25, False),
        "cifar10 at batch 16, float32, times faster than diffusers' defaults": (1.75, True),
        "cifar10 at batch 16, float32, of matmul (moonshot)": (1.35, True),
        "cifar10 at batch 16, bfloat16's step, times float32's": (pytest.approx(1.1), False),
        "cifar10 at batch 1, float32, times faster than OpenVINO": (1.25, True),
        "cifar10 at batch 1, float32, times faster than diffusers' defaults": (1.75, True),
        "cifar10 at batch 1, float32, of matmul (moonshot)": (0.5, False),
        "cifar10 at batch 1, bfloat16's step, times float32's": (pytest.approx(1.03), True),
    }
    assert len(rows) == len(judged) + 3
    missing = [row["bar"] for row in _bars.engine_bars([large], "cpu") if row["measured"] is None]
    assert "cifar10 at batch 16, bfloat16, of matmul (moonshot)" in missing  # there was no limit


def test_bars_on_a_gpu():
    graph = f"torch.compile of diffusers, {_bars.GRAPH}"
    ms = {_bars.F32: 2.0, _bars.BF16: 1.0, _bars.DEFAULTS: 12.0, graph: 1.6, f"{graph}, no reindexing": 1.4}
    units = [unit("cifar10", 1, ms), unit("cifar10", 256, ms), unit("lsun256", 4, ms)]
    rows = _bars.engine_bars(units, "cuda")
    best = [row for row in rows if "best peer" in row["bar"]]
    assert all(row["measured"] == pytest.approx(1.4) for row in best)
    assert all(row["at"] == f"{graph}, no reindexing" for row in best)
    assert [row["reached"] for row in best] == [True, False, True, True]  # the second is a moonshot
    assert all(row["reached"] or row["moonshot"] for row in rows)
    # Without the strongest peer the others are no measure, however fast we are.
    quick = {name: value for name, value in ms.items() if _bars.GRAPH not in name}
    rows = _bars.engine_bars([unit("cifar10", 1, quick)], "cuda")
    assert all(row["measured"] is None for row in rows if "best peer" in row["bar"])
    assert {row["measured"] for row in rows if "defaults" in row["bar"]} == {12.0, None}


# ------------------------------------------------------------------------------------------------- kernels.py


def test_kernels_still_runs_on_a_cpu(tmp_path):
    to = tmp_path / "kernels.json"
    options = ["--device", "cpu", "--quick", "--only", "timestep", "--seconds", "0.1", "--force", "--json", str(to)]
    command = [sys.executable, str(BENCHMARKS / "kernels.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (case,) = json.loads(to.read_text())["results"]
    assert (case["op"], case["case"]) == ("timestep_embedding", "[256] -> 128")
    assert list(case["contestants"]) == ["copy", "fastddpm op", "torch", "torch, float64 inside"]
