import json

import pytest
import torch
from conftest import NO_GPU, on_variant

from fastddpm import backend, errors, ops, parity

OPS = {
    "philox_normal", "timestep_embedding", "ddpm_step", "ddpm_step_", "group_norm_silu", "group_norm_silu_backward"
}  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    return parity.run()


def test_every_error_is_within_its_bound(rows):
    assert [row for row in rows if not row.share <= 1] == []


def test_everything_is_covered(rows):
    """The results cover each op on each available backend, in each dtype and layout that it supports."""
    available = {
        name for name in backend.NAMES if backend.unsupported_reason(name, torch.device("cpu"), torch.float32) is None
    }
    assert {row[:1] + row[3:4] for row in rows} == {(op, name) for op in OPS for name in available}
    for op in ("ddpm_step", "group_norm_silu", "group_norm_silu_backward"):
        for name in available:
            dtypes = {"float32", "bfloat16", "float16"}
            covered = {row[1:3] for row in rows if row.op == op and row.backend == name}
            assert covered == {(dtype, layout) for dtype in dtypes for layout in parity.LAYOUTS}


def test_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    assert [row for row in parity.run("cuda") if not row.share <= 1] == []


VARIANT = """
import json, torch, torch.nn.functional as F
from fastddpm import backend, parity
from fastddpm.ops import winograd
torch.use_deterministic_algorithms(True)  # poisons new memory

def error_of_winograd(upsample):
    s = 2 if upsample else 1
    x, residual = (torch.randn(shape).to(memory_format=torch.channels_last) for shape in ((2, 32, 8, 6), (2, 64, 8 * s, 6 * s)))
    weight, bias = torch.randn(64, 32, 3, 3), torch.randn(64)
    got = winograd.convolve(x, winograd.pack(weight, x.dtype, upsample), bias, residual, upsample=upsample)
    truth = F.conv2d(F.interpolate(x.double(), scale_factor=s), weight.double(), bias.double(), padding=1) + residual
    return float((got - truth).norm() / truth.norm())

print(json.dumps([backend.describe()["cpu_variant"], parity.run(backends=["cpu"]),
                  max(map(error_of_winograd, (False, True))), backend.native.winograd_serves("bfloat16")]))
"""


@pytest.mark.parametrize("variant", ["generic", "avx2", "avx512"])
def test_every_cpu_variant(kernels, tmp_path, variant):
    """Each variant runs in a separate process: the ops, and Winograd's convolution within test_winograd.py's bound."""
    used, rows, error, bfloat16 = json.loads(on_variant(variant, VARIANT, tmp_path))
    assert used == variant
    assert len(rows) >= 18
    assert [row for row in map(parity.Result._make, rows) if not row.share <= 1] == []
    assert error <= 1e-6
    assert not bfloat16 or variant == "avx512"


def test_an_error_shows(monkeypatch):
    """A result that is wrong in one element, or is not written, has a share over 1 in its own row."""
    good = ops.timestep_embedding

    def wrong(t, dim, **convention):
        out = good(t, dim, **convention)
        if t.dtype == torch.int64:
            out[-1, -1] += 3e-6
        else:
            out[0, 0] = torch.nan
        return out

    monkeypatch.setattr(ops, "timestep_embedding", wrong)
    shares = {row[:2]: row.share for row in parity.run(backends=["reference"])}
    assert 1 < shares.pop(("timestep_embedding", "int64")) < 2
    assert shares.pop(("timestep_embedding", "float32")) == float("inf")
    assert all(share <= 1 for share in shares.values())


def test_a_result_of_the_wrong_shape_is_an_error():
    with pytest.raises(ValueError, match=r"got shape \[1, 3\]; expected \[2, 3\]"):
        parity.share(torch.zeros(1, 3), torch.zeros(2, 3), 1.0)


def test_backends_that_cannot_run():
    with pytest.raises(ValueError, match="unknown name 'gpu'"):
        parity.run(backends=["gpu"])
    if not torch.cuda.is_available():
        with pytest.raises(errors.BackendError, match="'cuda' was requested"):
            parity.run(backends=["cuda"])


def test_table():
    row = parity.Result("ddpm_step", "bfloat16", "channels_last", "cpu", 0.4321, "last step")
    head, good, bad = parity.as_text([row, row._replace(share=1.5)]).splitlines()
    assert head.split() == ["op", "dtype", "layout", "backend", "error/bound", "largest", "in"]
    assert good.split() == ["ddpm_step", "bfloat16", "channels_last", "cpu", "43.2%", "last", "step"]
    assert "150.0% (!)" in bad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ulp(dtype):
    value = torch.tensor([0.0, 1e-6, 0.75, 1.0, 1.5, 1000.0]).to(dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    above = (value.view(bits) + 1).view(dtype)  # the next bit pattern is the next number
    assert torch.equal(parity.ulp(-value.double(), dtype), above.double() - value.double())


def test_new_memory_is_poisoned():
    """Memory that a kernel does not write is NaN. Every test relies on this."""
    like = torch.zeros(2, 3)
    for made in (torch.empty(2, 3), torch.empty_strided((2, 3), (1, 2)), torch.empty_like(like), like.new_empty(2, 3)):
        assert made.isnan().all()
    assert torch.empty(3, dtype=torch.bfloat16).isnan().all()
