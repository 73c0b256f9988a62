"""The command line: its files, its output and its errors."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import python
from PIL import Image

import fastddpm
from fastddpm import Schedule, UNet, UNetConfig, cli
from fastddpm.models.config import PRESETS


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    config = UNetConfig(
        sample_size=8,
        in_channels=1,
        channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(),
        norm_groups=4,
    )
    UNet(config, schedule=Schedule.linear(20, 1e-3, 0.5)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(capsys, monkeypatch, *arguments):
    """Return (exit code, stdout, stderr) of `fastddpm ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["fastddpm", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


def test_sample_writes_a_grid_and_says_its_seed(model, tmp_path, capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "sample", model, "-n", 4, "-o", tmp_path / "a.png")
    assert code == 0
    with Image.open(tmp_path / "a.png") as grid:
        assert grid.width > 16
    seed = out.split("seed ")[1].split(")")[0]
    for name in ("b.npy", "c.npz"):
        assert run(capsys, monkeypatch, "sample", model, "-n", 4, "-o", tmp_path / name, "--seed", seed)[0] == 0
    raw = np.load(tmp_path / "b.npy")
    assert raw.shape == (4, 1, 8, 8) and raw.dtype == np.float32
    assert np.array_equal(raw, np.load(tmp_path / "c.npz")["images"])
    run(capsys, monkeypatch, "sample", model, "-n", 2, "--first", 2, "-o", tmp_path / "d.npy", "--seed", seed)
    np.testing.assert_allclose(np.load(tmp_path / "d.npy"), raw[2:], atol=1e-4)


def test_film_and_forward(model, tmp_path, capsys, monkeypatch):
    arguments = ("sample", model, "-n", 3, "--batch-size", 2, "-o", tmp_path / "a.png", "--gif", tmp_path / "a.gif")
    assert run(capsys, monkeypatch, *arguments)[0] == 0
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames > 10
    Image.fromarray(np.full((6, 5, 3), 200, np.uint8)).save(tmp_path / "in.png")
    code, out, _ = run(capsys, monkeypatch, "sample", model, "--forward", tmp_path / "in.png", "-o", tmp_path / "f.png")
    assert code == 0 and "x_0 to x_T" in out
    with Image.open(tmp_path / "f.png") as strip:
        assert strip.mode == "RGB" and strip.width > 7 * strip.height


def test_samplers_and_the_progressive_strip(model, tmp_path, capsys, monkeypatch):
    arguments = ("sample", model, "-n", 3, "-o", tmp_path / "a.npy", "--seed", 1, "--sampler", "dpm++2m", "--steps", 6)
    code, out, _ = run(capsys, monkeypatch, *arguments, "--strip", tmp_path / "s.png", "--gif", tmp_path / "s.gif")
    assert code == 0 and "6 steps" in out
    with Image.open(tmp_path / "s.png") as strip:
        assert strip.width > 1.5 * strip.height  # 6 columns, 3 rows
    loaded = UNet.from_pretrained(model)
    x = fastddpm.sample(loaded, 3, seed=1, sampler="dpm++2m", steps=6)
    assert np.array_equal(np.load(tmp_path / "a.npy"), x.numpy())
    more = ("--sampler", "ddim", "--eta", 0.5, "--spacing", "linspace", "--steps", 5)
    assert run(capsys, monkeypatch, *arguments, *more)[0] == 0
    x = fastddpm.sample(loaded, 3, seed=1, sampler="ddim", steps=5, spacing="linspace", eta=0.5)
    assert np.array_equal(np.load(tmp_path / "a.npy"), x.numpy())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("sample", "nothing"), "neither a folder nor a bundled model"),
        (("sample", "MODEL", "-n", "-1"), "n: got -1"),
        (("sample", "MODEL", "-o", "missing/a.png"), "folder missing does not exist"),
        (("sample", "MODEL", "-o", "a.jpeg2"), "expected .png, .npy, .npz"),
        (("sample", "MODEL", "--gif", "missing/a.gif"), "folder missing does not exist"),
        (("sample", "MODEL", "--seed", str(2**64)), "seed: got"),
        (("sample", "MODEL", "--first", "-1"), "first: got -1"),
        (("sample", "MODEL", "--batch-size", "0"), "batch_size: got 0"),
        (("sample", "MODEL", "--device", "abacus"), "device: got 'abacus'"),
        (("sample", "MODEL", "--forward", "none.png"), "forward: none.png: not a readable picture"),
        (("sample", "MODEL", "--label", "1"), "no classes"),
        (
            ("sample", "MODEL", "--label", "cat"),
            "label: got 'cat'; expected a number",
        ),
        (("sample", "MODEL", "-n", "200000", "-o", "a.npy", "--strip", "s.png"), "strip: s.png would have"),
        (("sample", "MODEL", "-n", "1000000", "--gif", "s.gif"), "gif: s.gif would have 80016x80016 pixels"),
        (("train", "--data", "x.npy", "--out", "o", "--size", "0"), "size: got 0"),
        (("train", "--data", "x.npy", "--out", "o", "--alpha", "keep"), "alpha and skip_damaged are for folders"),
        (("train", "--data", ".", "--out", "o", "--labels"), "no pictures in the folder"),
        (("sample", "MODEL", "--steps", "21"), "steps: got 21; expected an int in 1..20"),
        (("sample", "MODEL", "--sampler", "ddim", "--eta", "2"), "eta: got 2.0"),
        (("sample", "MODEL", "--sampler", "ddim", "--variance", "none"), "ddim's noise is eta"),
        (("sample", "MODEL", "--strip", "s.gif"), "expected .png"),
        (("sample", "MODEL", "-n", "0", "-o", "a.npy", "--strip", "s.png"), "at least 1 image"),
        (("train", "--data", "none.npz", "--out", "runs"), "none.npz: no such file"),
        (("train", "--data", "x.npy", "--out", "MODEL", "--resume"), "nothing to resume"),
        (("train", "--data", "x.npy", "--out", "o", "--resume", "--lr", "1"), "only --steps or --epochs may change"),
        (("train", "--data", "x.npy", "--out", "o", "--resume", "--preset", "cifar10"), "preset: a resumed run uses"),
        (("train", "--data", "x.npy", "--out", "o", "--resume"), "nothing to resume"),
        (("train", "--data", "x.npy", "--out", "o", "--steps", "1", "--epochs", "1"), "steps, epochs: got both"),
        (("train", "--data", "x.npy", "--out", "o", "--batch-size", "0"), "batch_size: got 0"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(arguments, says, model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.zeros((4, 8, 8), np.uint8))
    before = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    code, _, err = run(capsys, monkeypatch, *(str(model) if a == "MODEL" else a for a in arguments))
    assert code != 0 and says in err and "Traceback" not in err
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == before


def test_convert(model, tmp_path, capsys, monkeypatch):
    """Converting to diffusers and back gives the same tensors, and prints what was found."""
    code, out, err = run(capsys, monkeypatch, "convert", model, tmp_path / "theirs", "--to", "diffusers")
    assert code == 0 and err == ""
    for line in (
        f"format       fastddpm, {model}",
        "network      sample_size 8, in_channels 1",
        "schedule     Schedule(T=20, ",
        "prediction   epsilon",
        "variance     fixed_large",
        "clip         True",
        "averaged     not stated",
    ):
        assert line in out, line
    assert f"parameters   {sum(p.numel() for p in UNet.from_pretrained(model).parameters()):,}" in out
    assert f"{tmp_path / 'theirs'}: written, for diffusers" in out
    (tmp_path / "back").mkdir()  # an empty one is as good as none
    code, out, _ = run(capsys, monkeypatch, "convert", tmp_path / "theirs", tmp_path / "back", "--to", "fastddpm")
    assert code == 0 and "format       diffusers" in out and "note         " in out and "(EMA)" in out
    first, second = UNet.from_pretrained(model), UNet.from_pretrained(tmp_path / "back")
    assert first.config == second.config and first.schedule == second.schedule
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "model", "theirs"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("MODEL", "out", "--to", "onnx"), "onnx"),
        (("MODEL", "out"), "--to"),
        (("MODEL", "missing/out", "--to", "diffusers"), "the folder"),
        (("MODEL", "full", "--to", "diffusers"), "full exists; expected a new or an empty folder"),
        (("MODEL", "file", "--to", "diffusers"), "file exists; expected a new or an empty folder"),
        (("MODEL", "out", "--to", "diffusers", "--revision", "v2"), "revision: got 'v2'"),
        (("MODEL", "out", "--to", "fastddpm", "--flags", "--image_size 64"), "flags: got '"),
        (("nothing", "out", "--to", "diffusers"), "neither a folder nor a bundled model"),
        (("rescaled", "out", "--to", "diffusers"), "time_scale: got 0.5; diffusers' UNet2DModel does not support it"),
        (("file", "out", "--to", "fastddpm"), "file: not a complete torch checkpoint"),
    ],
)
def test_convert_writes_nothing_where_it_fails(arguments, says, model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    for name in ("full/kept.txt", "file"):
        (tmp_path / name).write_text("kept")
    network = UNet.from_pretrained(model)
    UNet(dataclasses.replace(network.config, time_scale=0.5)).save_pretrained("rescaled")
    before = sorted(tmp_path.rglob("*"))
    code, _, err = run(capsys, monkeypatch, "convert", *(str(model) if a == "MODEL" else a for a in arguments))
    assert code != 0 and says in err and "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_convert_leaves_nothing_of_a_write_that_fails(model, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save", full)
    before = sorted(tmp_path.rglob("*"))
    code, _, err = run(capsys, monkeypatch, "convert", model, tmp_path / "out", "--to", "diffusers")
    assert code != 0 and "no space left on device" in err and sorted(tmp_path.rglob("*")) == before


def test_a_forward_strip_of_a_diffusers_model(model, tmp_path, capsys, monkeypatch):
    """sample accepts every model that from_pretrained loads, also with --forward."""
    UNet.from_pretrained(model).save_pretrained(tmp_path / "ema", format="diffusers")
    Image.fromarray(np.full((6, 5, 3), 200, np.uint8)).save(tmp_path / "in.png")
    for options in (("--forward", tmp_path / "in.png"), ("-n", 2)):
        code, _, err = run(capsys, monkeypatch, "sample", tmp_path / "ema", *options, "-o", tmp_path / "out.png")
        assert code == 0 and err == ""


def test_train_interrupt_and_resume(tmp_path, capsys, monkeypatch):
    """Ctrl-C in a subprocess saves the run and prints the command that continues it, and the resumed run completes."""
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8))
    command = [sys.executable, "-m", "fastddpm", "train", "--data", "x.npz", "--out", "run"]
    options = ["--batch-size", "2", "--log-every", "1", "--save-every", "1", "--sample-every", "0", "--steps", "100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([*command, *options], cwd=tmp_path, env=environment, **pipes) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "log.csv").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "fastddpm train --data x.npz --out run --resume" in said, said
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, monkeypatch, *command[3:], *options)
    assert code == 1 and "already has a run; pass --resume" in err
    code, out, err = run(capsys, monkeypatch, *command[3:], "--resume", "--steps", saved["step"] + 2)
    assert code == 0 and f"steps {saved['step']} to {saved['step'] + 2}" in out, err


def test_class_folders_to_samples_of_a_class(tmp_path, capsys, monkeypatch):
    """Pictures of several sizes and modes, one of them damaged, with one folder per class."""
    monkeypatch.chdir(tmp_path)
    smaller = {"channels": 8, "channel_mult": (1,), "num_res_blocks": 1, "attention_resolutions": (), "norm_groups": 4}
    monkeypatch.setitem(PRESETS, "digits", dataclasses.replace(PRESETS["digits"], **smaller))
    rng = np.random.default_rng(0)
    for name, shape in (
        ("dog/a.png", (9, 12, 3)),
        ("dog/b.jpg", (8, 8)),
        ("cat/a.png", (10, 8, 4)),
        ("cat/b.tiff", (16, 8)),
    ):
        (tmp_path / "pets" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / "pets" / name)
    (tmp_path / "pets" / "cat" / "c.png").write_bytes(b"nonsense")
    options = ["--size", "8", "--skip-damaged", "--labels"]
    recipe = ["--steps", "2", "--batch-size", "2", "--sample-every", "2", "--dtype", "float32"]
    code, out, err = run(capsys, monkeypatch, "train", "--data", "pets", "--out", "run", *options, *recipe)
    assert code == 0 and "4 images of 3x8x8" in out, err
    assert "cat/c.png" in err and "2 of 4 pictures are grey" in err and "1 of 4 pictures are transparent" in err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["class_names"] == ["cat", "dog"]
    with Image.open(tmp_path / "run" / "samples" / "0000002.png") as grid:
        assert grid.width * (2 * 10 + 2) == grid.height * (4 * 10 + 2)  # a row of four for each class
    for label, same in (("dog", "1"), ("cat", "0")):
        drawn = []
        for value in (label, same):
            code, _, err = run(
                capsys,
                monkeypatch,
                "sample",
                "run",
                "-n",
                1,
                "--steps",
                2,
                "--label",
                value,
                "--seed",
                0,
                "-o",
                "x.npy",
            )
            assert code == 0, err
            drawn.append(np.load("x.npy"))
        assert np.array_equal(*drawn)
    code, out, err = run(capsys, monkeypatch, "convert", "run", "theirs", "--to", "diffusers")
    assert code == 0 and "classes      cat, dog" in out and "diffusers' format has no names of classes" in err, out
    code, _, err = run(capsys, monkeypatch, "sample", "run", "--label", "cow")
    assert code == 1 and "label: got 'cow'; expected one of cat, dog" in err
    again = ["train", "--data", "pets", "--out", "run", "--resume", "--steps", "3"]
    code, _, err = run(capsys, monkeypatch, *again, *options)
    assert code == 0, err
    code, _, err = run(capsys, monkeypatch, *again, "--skip-damaged", "--size", "8")
    assert code == 1 and "content, labels or reading options differ" in err
    measure = ["evaluate", "run", "--data", "pets", "--out", "e", "--metrics", "bpd", "--subsample", "2", "--size", "8"]
    code, out, err = run(capsys, monkeypatch, *measure, "--skip-damaged")
    assert code == 0 and "bits per dimension" in out, err


def test_a_number_is_no_name(model):
    config = UNetConfig(
        sample_size=8,
        channels=8,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        norm_groups=4,
        num_classes=2,
    )
    network = UNet(config)
    assert cli._class_number("1", network) == 1
    network.class_names = ["3", "7"]
    assert cli._class_number("7", network) == 1
    with pytest.raises(ValueError, match="label: got '1'; expected one of 3, 7"):
        cli._class_number("1", network)


def test_info_and_check(capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "info")
    assert code == 0 and "reference" in out and "cuda" in out
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # as users have it; test_parity.py runs the interpreter
    code, out, _ = run(capsys, monkeypatch, "check")
    assert code == 0 and "group_norm_silu" in out


def test_a_bundled_model_draws(tmp_path, capsys, monkeypatch):
    """`fastddpm sample` with only -n 1."""
    assert run(capsys, monkeypatch, "sample", "-n", 1, "-o", tmp_path / "a.npy", "--seed", 0)[0] == 0
    x = np.load(tmp_path / "a.npy")
    assert x.shape == (1, 1, 32, 32) and np.abs(x).max() <= 1
    assert (x < -0.9).mean() > 0.5 and (x > 0.5).any()  # a bright stroke on black


LIGHT = """
import sys, torch, time
start = time.perf_counter()
import fastddpm
print(time.perf_counter() - start, *sys.modules)
import fastddpm.evaluation
print(*sys.modules)
"""


def test_imports_are_light(tmp_path):
    """`import fastddpm` adds no heavy library and little time to `import torch`; nor does evaluation add a library."""
    first, second = python(LIGHT, tmp_path).stdout.splitlines()
    seconds, *modules = first.split()
    assert not {"diffusers", "matplotlib", "sklearn", "click"} & set(modules)
    assert not {"torchmetrics", "torch_fidelity", "torchvision", "scipy"} & set(second.split())
    assert float(seconds) < 2  # the bar is 0.3 s on an idle machine; tests may run on a loaded one
