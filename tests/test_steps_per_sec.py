"""benchmarks/steps_per_sec.py: its contestants on a small network, and what becomes of what they measured."""

import argparse
import json
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import _bars  # noqa: E402
import _contestants  # noqa: E402
import gpu  # noqa: E402
import steps_per_sec  # noqa: E402

from fastddpm import UNet, UNetConfig  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    """As small as diffusers' groups of 32 allow, with attention, a shortcut and both ways between levels."""
    config = UNetConfig(sample_size=8, channels=32, multipliers=(1, 2), blocks=1, attention=(4,))
    return _contestants.stirred(UNet(config))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def given(**changed):
    return argparse.Namespace(**{"steps": 1, "rounds": 1, "seconds": 1.0, "quick": True, "patience": None, **changed})


def test_multiply_adds_of_the_papers_networks():
    assert _contestants.macs(UNet.from_preset("cifar10")) == 6_221_856_768
    assert _contestants.macs(UNet.from_preset("lsun256")) == 248_513_757_184


def test_all_contestants_agree_and_are_measured(model, monkeypatch):
    monkeypatch.setattr(steps_per_sec, "cold", lambda *_: {"float32": 0.5})
    result = steps_per_sec.measure(model, "small", 2, given())
    assert not result["left_out"]
    names = {"fastddpm reference", _bars.F32, _bars.BF16, _bars.DEFAULTS, "diffusers, bfloat16 channels_last"}
    assert names <= set(result["contestants"])
    ours, theirs = result["contestants"][_bars.BF16], result["contestants"][_bars.DEFAULTS]
    assert ours["times_faster_than_diffusers"] == pytest.approx(theirs["ms"] / ours["ms"])
    assert theirs["times_faster_than_diffusers"] == 1
    assert theirs["times_faster_than_best_alike"] <= 1
    assert ours["images_per_s"] <= 2 * ours["steps_per_s"] / 1000
    assert 0 < result["own_ms"] < 10
    steps_per_sec.table([result])
    json.dumps(result)


def test_a_contestant_that_is_wrong_or_fails_is_left_out(model, monkeypatch):
    class Wrong(_contestants.PlainNorm):
        def forward(self, x, add=None):
            return super().forward(x, add) * 1.01

    def entrants(*_):
        return {
            _bars.F32: _contestants.ours(model, 2, "float32"),
            "wrong": _contestants.tuned(model, 2, "float32"),
            "fails": _contestants.tuned(model, 2, "no such precision"),
        }

    monkeypatch.setattr(steps_per_sec, "cold", lambda *_: {})
    monkeypatch.setattr(steps_per_sec, "entrants", entrants)
    monkeypatch.setattr(_contestants, "UNet2DModel", None)
    monkeypatch.setattr(_contestants, "PlainNorm", Wrong)
    result = steps_per_sec.measure(model, "small", 2, given())
    assert list(result["contestants"]) == [_bars.F32]
    assert result["contestants"][_bars.F32]["times_faster_than_best_peer"] is None
    assert result["left_out"]["wrong"].startswith("ValueError: wrong: error 0.0")
    assert set(result["left_out"]) == {"wrong", "fails"}
    result = steps_per_sec.measure(model, "small", 2, given(patience=0.0))
    assert set(result["left_out"].values()) == {"Late: out of time"}
    assert not result["contestants"]


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


def test_a_cold_call_is_timed_in_a_process_of_its_own():
    found = steps_per_sec.cold("digits", 1, CPU)
    assert set(found) == {"float32", "bfloat16"}
    assert all(0 < seconds < 60 for seconds in found.values())


def test_set_up_ends_with_its_time():
    start = time.monotonic()
    with pytest.raises(steps_per_sec.Late), steps_per_sec.until(start + 0.2):
        while True:
            try:
                time.sleep(0.01)
            except Exception:  # as compilers do
                continue
    assert time.monotonic() - start < 5
    with steps_per_sec.until(None), steps_per_sec.until(time.monotonic() + 60):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], r"--batch: got \[0\]; expected numbers >= 1"),
        (["--rounds", "0"], "--rounds: got 0; expected at least 1"),
        (["--plot", "no/such/folder/x.png"], "--plot: the folder no/such/folder does not exist"),
    ],
)
def test_arguments_are_checked(monkeypatch, options, message):
    monkeypatch.setattr(sys, "argv", ["steps_per_sec.py", "--device", "cpu", *options])
    with pytest.raises(SystemExit, match=message):
        steps_per_sec.main()


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


# --------------------------------------------------------------------------------------------- gpu.py's engine


def test_units_are_what_the_script_measures_by_itself():
    batches = {
        (name, b) for (device, name), all_of in steps_per_sec.BATCHES.items() if device == "cuda" for b in all_of
    }
    assert set(gpu.UNITS) == batches
    assert len(gpu.UNITS) == len(batches)
    command = gpu.measuring("lsun256", 4, Path("x.json"), 300.4, False)
    settings = steps_per_sec.parser().parse_args(command[2:])
    assert (settings.device, settings.network, settings.batch, settings.patience) == ("cuda", "lsun256", [4], 180)


def test_engine_results_are_kept_as_they_come(tmp_path, monkeypatch, capsys):
    """A unit that fails, one whose peer wasn't compiled in time, and what --resume makes of them."""
    settings = gpu.arguments().parse_args(["engine", "--out", str(tmp_path)])
    header = {"commit": "abc", "sources": "1", "versions": {}}
    path, asked = tmp_path / "gpu.json", []
    late = {("cifar10", 256): {"torch.compile": "Late: out of time"}}
    failing = {("lsun256", 4)}
    ms = {_bars.F32: 2.0, _bars.BF16: 1.0, _bars.DEFAULTS: 12.0, f"torch.compile, {_bars.GRAPH}": 1.4}

    def ran(command, *_, **__):
        given = steps_per_sec.parser().parse_args(command[2:])
        which = given.network, *given.batch
        asked.append(which)
        if which in failing:
            return 1, "Traceback\nRuntimeError: no", 3.0
        given.json.write_text(json.dumps({"results": [unit(*which, ms, left_out=late.get(which, {}))]}))
        return 0, "", 3.0

    monkeypatch.setattr(gpu, "limited", ran)
    monkeypatch.setattr(steps_per_sec, "table", lambda results: print(len(results), "measured"))
    assert not gpu.run_engine(gpu.Record(path, header, "engine"), settings, gpu.Clock(500))
    found = json.loads(path.read_text())
    assert asked == list(gpu.UNITS)
    assert found["engine"]["failed"]["lsun256 at batch 4"]["output"] == ["Traceback", "RuntimeError: no"]
    assert not found["engine"]["complete"]
    assert len(found["engine"]["results"]) == len(gpu.UNITS) - 1
    assert "go on with --resume" in capsys.readouterr().out

    late.clear(), failing.clear(), asked.clear()
    settings.resume = True
    assert not gpu.run_engine(gpu.Record(path, header, "engine"), settings, gpu.Clock(100))  # too little time for one
    assert not asked
    assert gpu.run_engine(gpu.Record(path, header, "engine"), settings, gpu.Clock(500))
    assert asked == [("cifar10", 256), ("lsun256", 4)]
    found = json.loads(path.read_text())
    assert found["engine"]["complete"]
    assert len(found["engine"]["results"]) == len(gpu.UNITS)
    assert all(row["reached"] for row in found["engine_bars"] if not row["moonshot"])
