"""Run every example of README.md and docs/, unmodified except for the replacements in these tables."""

import dataclasses
import functools
import importlib
import re
import shlex
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from openai_unet import OpenAIUNet
from pesser_unet import PesserUNet
from PIL import Image

import fastddpm
from fastddpm import UNet, UNetConfig
from fastddpm.cli import cli
from fastddpm.models import config
from fastddpm.training import trainer

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
# The examples' warnings are for their readers; the last filter is for diffusers with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:fastddpm", "ignore:.* features", "ignore:__array__")

HUB = "google/ddpm-cifar10-32"
OPENAI = (
    "--image_size 8 --num_channels 32 --num_res_blocks 1 --channel_mult 1 --attention_resolutions 8 --learn_sigma True"
)
TRAIN = "--steps 2 --batch-size 2 --sample-every 2"  # with a grid of samples at the end
# By page: (text, replacement) pairs, so that no example takes hours or needs the network. Each text must occur in the page.
REPLACED = {
    "README.md": [
        ("sample(model, 64, seed", "sample(model, 2, steps=3, seed"),
        ("sample -n 16 -o", "sample -n 4 --steps 3 -o"),
        ("network, 100, ", "network, 2, steps=3, "),
        (HUB, "saved/pipeline"),
        ("sample(pipeline.unet, 64", "sample(pipeline.unet, 2, steps=3"),
        ("--out runs/digits  ", f"--out runs/digits {TRAIN} "),
        ("--size 32 --out runs/mine --preset cifar10 ", f"--size 8 --out runs/mine --preset digits {TRAIN} "),
        ("--resume", "--resume --steps 3"),
        ("runs/digits -n 64", "runs/digits -n 2 --steps 3"),
    ],
    "docs/index.md": [
        ("sample(model, 64, seed", "sample(model, 2, steps=3, seed"),
        ("sample(model, 500, seed", "sample(model, 2, steps=3, seed"),
    ],
    "docs/start.md": [
        ("sample -n 16 -o", "sample -n 4 --steps 3 -o"),
        ("sample(model, 64, seed", "sample(model, 2, steps=3, seed"),
        ("sample(network, 16, ", "sample(network, 2, steps=3, "),
        ("--size 32 --out runs/mine-32", f"--size 8 --out runs/mine-32 {TRAIN}"),
        ("runs/mine-32 -n 16", "runs/mine-32 -n 2 --steps 3"),
    ],
    "docs/from-diffusers.md": [
        (HUB, "saved/pipeline"),
        ("sample(pipeline.unet, 64", "sample(pipeline.unet, 2, steps=100"),
        ("sample(model, 64", "sample(model, 2, steps=3"),
        ("batch_size=4)", "batch_size=4, num_inference_steps=3)"),
        ("-n 16", "-n 2 --steps 3"),
    ],
    "docs/from-guided-diffusion.md": [
        ('"256x256_diffusion_uncond.pt"', f'"logs/ema_0.9999_1.pt", flags="{OPENAI}"'),
        ("sample(model, 4, steps=250", "sample(model, 4, steps=25"),
        (
            "--image_size 64 --num_channels 128 --num_res_blocks 3 --learn_sigma True --class_cond True --noise_schedule cosine",
            f"{OPENAI} --class_cond True --noise_schedule cosine",
        ),
        ("sample(model, 16", "sample(model, 2, steps=3"),
        ("arange(16)", "arange(2)"),
        ("-n 16", "-n 2 --steps 3"),
        ("sample(model, 64", "sample(model, 2, steps=3"),
    ],
    "docs/own-unet.md": [("(model, 64,", "(model, 2,"), ("(guided, 8, ", "(guided, 2, steps=3, ")],
    "docs/own-data.md": [
        ("--out runs/digits\n", f"--out runs/digits {TRAIN}\n"),
        ("runs/digits -n 64", "runs/digits -n 2 --steps 3"),
        ("--resume", "--resume --steps 3"),
        ("--labels", f"--labels {TRAIN}"),
        ("--size 64", "--size 8"),
        ("runs/pets -n 16", "runs/pets -n 2 --steps 3"),
        ("runs/classes -n 16", "runs/classes -n 2 --steps 3"),
        ("sample(model, 20", "sample(model, 20, steps=3"),
        ("--preset cifar10", f"--preset digits {TRAIN}"),
        ("batch_size=64", "batch_size=2"),
        ("range(20):", "range(1):"),
        ("--subsample 20", "--subsample 2"),
    ],
    "docs/group-norm-kernel.md": [("fullgraph=True", 'fullgraph=True, backend="aot_eager"')],  # no C++ is compiled
    "docs/sampling.md": [
        ("sample(model, 64, steps=100)", "sample(model, 8, steps=3)"),
        ("sample(model, 64", "sample(model, 2"),
        ("t=499", "t=499, steps=3"),
        ("progressive(model, 8", "progressive(model, 2, steps=10"),
    ],
    "docs/measuring.md": [
        ("[:64, None]", "[:1, None]"),
        ("(model, images)  # uint8", "(model, images, subsample=20)  # uint8"),
        (
            "evaluate runs/mine --data cifar10.npz --out evaluations/mine",
            "evaluate runs/mine --data cifar10.npz --out evaluations/mine -n 4 --steps 3 --features mynet:features --subsample 2",
        ),
        ("-n 2000 --steps 100", "-n 4 --steps 3"),
    ],
}
# By page: names that its examples use without defining them, in addition to the files of `made`.
GIVEN = {"README.md": {"x_test": torch.zeros(1, 1, 8, 8, dtype=torch.uint8)}}
# Prefix of each command that is not run, and the reason.
LEFT_OUT = {
    "make ": "builds an environment; CI runs them",
    "pip install ": "needs a network",
    "fastddpm check": "tests/test_parity.py and tests/test_cli.py run it",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a folder with small versions of the files that the pages mention."""
    folder = tmp_path_factory.mktemp("reader")
    rng = np.random.default_rng(0)

    def pixels(*shape):
        return rng.integers(0, 256, shape, dtype=np.uint8)

    labels = np.arange(10) % 10
    np.savez(
        folder / "mnist.npz", x_train=pixels(10, 28, 28), y_train=labels, x_test=pixels(4, 28, 28), y_test=labels[:4]
    )
    np.savez(folder / "cifar10.npz", x_train=pixels(4, 8, 8, 3), x_test=pixels(2, 8, 8, 3))
    (folder / "pictures").mkdir()
    (folder / "pets").mkdir()
    for i in range(4):
        Image.fromarray(pixels(20, 24, 3)).save(folder / "pictures" / f"{i}.png")
        place = folder / "pets" / ("cat", "dog")[i % 2] / f"{i}.png"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels(20 + i, 24, 3)).save(place)
    (folder / "mynet.py").write_text("def features(x):\n    return x.float().flatten(2).mean(2)\n")

    torch.manual_seed(0)
    tiny = UNetConfig(
        sample_size=8, channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,), norm_groups=4
    )
    UNet(tiny).save_pretrained(folder / "runs/mine")
    network = {"channels": 32, "multipliers": (1,), "blocks": 1, "attention": (0,), "outputs": 6}
    (folder / "logs").mkdir()
    torch.save(OpenAIUNet(**network).state_dict(), folder / "logs/ema_0.9999_1.pt")
    torch.save(OpenAIUNet(**network, classes=10).state_dict(), folder / "logs/ema_0.9999_500000.pt")
    (folder / "ema_diffusion_cifar10_model").mkdir()
    paper = PesserUNet(32, (1, 1), 1, 1).state_dict()
    torch.save(paper, folder / "ema_diffusion_cifar10_model/model-790000.ckpt")
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, attention_head_dim=None,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler(variance_type="fixed_large")).save_pretrained(folder / "saved/pipeline")
    return folder


def blocks(page):
    """Return [language, number of the line before it, text] of each fenced block, with REPLACED applied."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [
        [match[1], text.count("\n", 0, match.start()) + 1, match[2]]
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]
    for old, new in REPLACED.get(page, ()):
        assert any(old in block[2] for block in found), f"{page}: nothing to replace: {old!r}"
        for block in found:
            block[2] = block[2].replace(old, new)
    return found


def run_commands(text, place):
    for line in text.splitlines():
        if not line.strip() or line.startswith(tuple(LEFT_OUT)):
            continue
        program, *arguments = shlex.split(line, comments=True)
        assert program == "fastddpm", f"{place}: not run, and LEFT_OUT has no reason: {line}"
        result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert result.exit_code == 0, f"{place}: {line}\n{result.output}"


@pytest.mark.parametrize("page", [page for page in PAGES if "```" in (ROOT / page).read_text(encoding="utf-8")])
def test_examples_run(page, made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # `fastddpm evaluate` adds the working directory
    monkeypatch.delitem(sys.modules, "mynet", raising=False)
    smaller = {
        "channels": 8,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (),
        "norm_groups": 4,
    }
    monkeypatch.setitem(config.PRESETS, "digits", dataclasses.replace(config.PRESETS["digits"], **smaller))
    monkeypatch.setattr(trainer, "GRID", (2, 1))
    monkeypatch.setattr(trainer, "MAX_CLASS_ROWS", 2)
    names = dict(GIVEN.get(page, {}))
    for language, line, text in blocks(page):
        if language == "python":
            exec(compile("\n" * line + text, str(ROOT / page), "exec"), names)
        else:
            run_commands(text, f"{page}:{line}")
    sys.modules.pop("mynet", None)


def test_the_tables_say_nothing_that_is_not_there():
    assert {*REPLACED, *GIVEN} <= set(PAGES)
    lines = [line for page in PAGES for _, _, text in blocks(page) for line in text.splitlines()]
    assert all(any(line.startswith(command) for line in lines) for command in LEFT_OUT)


def described():
    """Yield the names that the reference pages describe, and the members that they list."""
    for page in PAGES:
        if page.startswith("docs/reference/"):
            text = (ROOT / page).read_text(encoding="utf-8") + "\n"
            for name, members in re.findall(r"^::: (\S+)\n(?:    options:\n      members: \[(.*)\]\n)?", text, re.M):
                yield name
                yield from (f"{name}.{member}" for member in members.split(", ") if member)


def find(name):
    """Return the object of a dotted name; the module if a function has the same name."""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try:
            return functools.reduce(getattr, parts[i:], importlib.import_module(".".join(parts[:i])))
        except ModuleNotFoundError:
            continue
    raise AssertionError(f"{name} is nothing")


def test_the_reference_has_every_public_name():
    names = list(described())
    found = [find(name) for name in names]
    for module in (fastddpm, fastddpm.ops, find("fastddpm.integrations.diffusers")):
        for name in module.__all__:
            thing = getattr(module, name)
            whole = isinstance(thing, types.ModuleType)
            there = any(n.startswith(thing.__name__) for n in names) if whole else any(thing is f for f in found)
            assert there, f"docs/reference lacks {module.__name__}.{name}"


def test_the_reference_has_a_place_for_every_command():
    text = (ROOT / "docs/reference/command-line.md").read_text(encoding="utf-8")
    assert "<!-- help -->" in text  # docs/mkdocs/hooks.py replaces it by the commands' help
