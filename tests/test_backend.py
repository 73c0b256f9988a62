import pytest
import torch
from conftest import python

from fastddpm import backend, errors, ops

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def norm(dtype=torch.float32):
    return ops.group_norm_silu(
        torch.ones(1, 2, 3, dtype=dtype), 1, torch.ones(2, dtype=dtype), torch.zeros(2, dtype=dtype)
    )


@pytest.fixture
def calls(monkeypatch):
    """Return a list that records the names of the kernels that run."""
    ran = []

    class Recorder:
        def __getattr__(self, name):
            def call(*arguments):
                ran.append(name)
                return getattr(native, name)(*arguments)

            return call

    native = backend.native
    if native is not None:
        monkeypatch.setattr(backend, "native", Recorder())
    return ran


def call_every_op():
    x = torch.zeros(1, 2, 3, requires_grad=True)
    ops.group_norm_silu(x, 1, torch.ones(2), torch.zeros(2)).sum().backward()
    ops.timestep_embedding(torch.zeros(1), 4)
    ops.philox_normal((1, 2), seed=0, t=0, stream=0)
    ops.ddpm_step(x.detach(), x.detach(), [0.0] * 9)
    ops.ddpm_step_(x.detach(), x.detach(), torch.zeros(1, 9), torch.tensor([0]), torch.tensor([0, 0, 0, -1]))


def test_the_chosen_backend_is_what_runs(kernels, calls):
    call_every_op()
    assert set(calls) == {
        "group_norm_silu", "group_norm_silu_backward", "timestep_embedding", "philox_normal", "ddpm_step"
    }  # fmt: skip
    calls.clear()
    with backend.use("reference"):
        call_every_op()
    assert calls == []
    with backend.use(None):  # the device chooses
        call_every_op()
    assert len(calls) == 6


def test_the_device_chooses():
    with backend.use(None):
        for dtype in backend.DTYPES:
            assert backend.select(CPU, dtype) == ("cpu" if backend.native else "reference")
        assert backend.select(CPU, torch.float64) == "reference"
        if not torch.cuda.is_available():
            assert backend.select(CUDA) == "reference"
        assert backend.select(torch.device("meta")) == "reference"


def test_use_restores_what_was_before():
    with backend.use("reference"):
        with backend.use(None):
            assert backend.describe()["chosen"] == "by the tensor's device"
        assert backend.describe()["chosen"] == "reference"
        with pytest.raises(KeyError), backend.use(None):
            raise KeyError
        assert backend.describe()["chosen"] == "reference"
    before = backend.use("reference")
    assert backend.describe()["chosen"] == "reference"  # a plain call lasts
    with before:
        pass
    assert backend.describe()["chosen"] == "by the tensor's device"


def test_a_refused_choice_changes_nothing():
    without_gpu = [] if torch.cuda.is_available() else [("cuda", errors.BackendError)]
    for name, error in (("gpu", ValueError), ("", ValueError), *without_gpu):
        with pytest.raises(error):
            backend.use(name)
        assert backend.describe()["chosen"] == "by the tensor's device"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: this is about having none")
def test_what_needs_a_gpu_says_so(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(errors.BackendError, match="'cuda' was requested, but (the compiled module|PyTorch finds no)"):
        backend.use("cuda")
    with pytest.raises(
        errors.BackendError, match="'triton' was requested, but (Triton is not|Triton .* is older|PyTorch finds no)"
    ):
        backend.use("triton")


def test_without_triton(monkeypatch):
    monkeypatch.setattr(backend, "_triton_version", lambda: None)
    with pytest.raises(errors.BackendError, match="Triton is not installed"):
        backend.use("triton")
    monkeypatch.setattr(backend, "_triton_version", lambda: "3.2.0")
    with pytest.raises(errors.BackendError, match=r"Triton 3.2.0 is older than 3.6; torch 2.11 and newer install"):
        backend.use("triton")


def test_kernels_that_do_not_start_are_left_out(monkeypatch):
    """One warning is raised, for example for Triton on a machine with a GPU and without a C compiler."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backend, "_gpu_unavailable_reason", lambda: None)
    monkeypatch.setattr(backend, "_cuda_kernels_unavailable_reason", lambda: "no nvcc")
    monkeypatch.setattr(backend, "_triton_version", lambda: "3.7.1")
    monkeypatch.setattr(backend, "_triton_start_failure", lambda: "Triton does not start: no compiler")
    backend._warn.cache_clear()
    with backend.use(None), pytest.warns(UserWarning, match="the triton backend is not used: Triton does not start"):
        assert backend.select(CUDA) == "reference"
    with pytest.raises(errors.BackendError, match="'triton' was requested, but Triton does not start: no compiler"):
        backend.use("triton")


def test_errors_say_what_and_why(kernels):
    with pytest.raises(ValueError, match="backend: unknown name 'gpu'; expected one of reference, cpu, cuda, triton"):
        backend.use("gpu")
    with pytest.raises(errors.BackendError, match="it supports CPU tensors, and this one is on cuda; move or cast"):
        backend.select(CUDA)
    with pytest.raises(
        errors.BackendError, match="it supports float32, bfloat16 and float16, and this tensor is float64; move or cast"
    ):
        norm(torch.float64)
    with backend.use("reference"):
        norm(torch.float64)


def test_environment_variable(monkeypatch, calls):
    def read(value):
        monkeypatch.setattr(backend, "_environment_read", False)
        monkeypatch.setattr(backend, "_requested", None)
        monkeypatch.setenv("FASTDDPM_BACKEND", value)

    read("reference")
    with backend.use(None):  # in the program counts for more than around it
        assert backend.describe()["chosen"] == "by the tensor's device"
    assert backend.describe()["chosen"] == "reference"
    calls.clear()
    norm()
    assert calls == []
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    missing = [] if torch.cuda.is_available() else [("triton", "'triton' was requested, but")]
    for value, message in (("gpu", "unknown name 'gpu'"), *missing):
        read(value)
        for _ in range(2):  # and again at each use
            with pytest.raises((ValueError, errors.BackendError), match=message):
                norm()
    read("")
    norm()


def test_the_default_dtype_and_device_do_not_matter(kernels):
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        x, ones = torch.zeros(1, 2, 3, dtype=torch.float32), torch.ones(2, dtype=torch.float32)
        with torch.device("meta"):
            leaf = x.clone().requires_grad_()
            ops.group_norm_silu(leaf, 1, ones, ones).sum().backward()
            ops.timestep_embedding(torch.zeros(1, dtype=torch.int64, device="cpu"), 4)
            ops.ddpm_step(x, x, [0.5] * 9, seed=1, t=2, x0_last=x)
    finally:
        torch.set_default_dtype(before)


def test_describe(kernels):
    facts = backend.describe()
    assert facts["backends"].keys() == set(backend.NAMES)
    assert facts["backends"]["reference"] == facts["backends"]["cpu"] == "available"
    assert facts["serves"]["cpu"] == "cpu"
    assert facts["cpu_variant"] in facts["build"]["cpu_variants"]
    assert facts["threads"] == torch.get_num_threads()
    with backend.use("reference"):
        assert backend.describe()["serves"]["cpu"] == "reference"


WITHOUT_COMPILED_MODULE = """
import sys
sys.modules["fastddpm._C"] = None  # what `import` finds where there is none
import torch
from fastddpm import backend, ops
x = torch.zeros(1, 2, 3, requires_grad=True)
ops.group_norm_silu(x, 1, torch.ones(2), torch.zeros(2)).sum().backward()
assert ops.philox_normal((1, 2), seed=0, t=0, stream=0).shape == (1, 2)
assert ops.timestep_embedding(torch.zeros(1), 4).shape == (1, 4)
assert len(ops.ddpm_step(x.detach(), x.detach(), [0.0] * 9)) == 2
facts = backend.describe()
assert facts["serves"]["cpu"] == "reference" and facts["build"] is None, facts
assert "fastddpm._C does not import" in facts["backends"]["cpu"], facts
backend.use("cpu")
"""


def test_without_the_compiled_module(tmp_path):
    """Everything runs on the reference, and a request for the kernels raises an error with the reason why they are missing."""
    result = python(WITHOUT_COMPILED_MODULE, tmp_path, FASTDDPM_CPU_VARIANT="")
    assert result.stderr.splitlines()[-1].startswith(
        "fastddpm.errors.BackendError: backend 'cpu' was requested, but the compiled module fastddpm._C does not import"
    )
    assert "reinstall with a C++ compiler" in result.stderr


def test_unknown_cpu_variant(kernels, tmp_path):
    code = "import sys; sys.argv[1:] = ['sample', '-n', '1', '-o', 'x.png']; from fastddpm.cli import main; main()"
    result = python(code, tmp_path, FASTDDPM_CPU_VARIANT="sse9")
    assert result.stderr.startswith("fastddpm: FASTDDPM_CPU_VARIANT=sse9 cannot run here; this machine runs ")
    assert result.returncode and not list(tmp_path.iterdir())


def test_bfloat16_on_gpus(monkeypatch):
    """The tensor's GPU decides, even if another is current. cuDNN has bfloat16 convolutions from compute capability 8.0."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(7, 5), (8, 0), (12, 1)][device.index])
    reasons = [backend.emulated_reason(torch.device("cuda", i), torch.bfloat16) for i in range(3)]
    assert reasons == [
        "this GPU, of compute capability 7.5, multiplies float16 in hardware and not bfloat16",
        None,
        None,
    ]
    assert backend.emulated_reason(torch.device("cuda", 0), torch.float16) is None
