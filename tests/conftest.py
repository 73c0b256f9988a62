"""What all tests share: devices and backends, dtypes, layouts, poisoned memory, and the last word on what was not run.

Tolerances have one home, fastddpm/parity.py, as they are promises to users.
"""

import os
import subprocess
import sys
import threading
from collections import Counter

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch's threads start. Each worker has one core, so it gets one thread: with more, a training test takes four
    # times as long. Tests about threads set their own number. PASSIVE: a waiting thread must not spin.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis
import pytest
import simulated
import torch

from fastddpm import UNet, UNetConfig, backend

os.environ["TRITON_INTERPRET"] = "1"  # read once, when triton is imported: here, before a test takes it away
if torch.cuda.is_available() or backend.unavailable_reason("triton"):
    del os.environ["TRITON_INTERPRET"]  # there is a GPU to run the kernels, or no triton that can
else:
    import triton  # noqa: F401

# Kernels take float16 too: it differs in how elements are loaded and stored, which test_ddpm_step.py shows for each value.
DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = ("contiguous", "channels_last", "permuted")
NO_GPU = "no CUDA device: make gpu runs these on a machine that has one"

# Examples are the same in every run: a failure is there for everyone, and nobody's run fails by chance.
hypothesis.settings.register_profile("fastddpm", deadline=None, derandomize=True, database=None, max_examples=60)
hypothesis.settings.load_profile("fastddpm")


def over_shapes(names, cases):
    """pytest.mark.parametrize, where `make quick` and `make capped` take the first case alone."""
    first, *others = cases
    marked = (
        pytest.param(*([case] if isinstance(names, str) else case), marks=pytest.mark.thorough) for case in others
    )
    return pytest.mark.parametrize(names, [first, *marked])


def _server(device, name):
    reason = simulated.missing() if name == SIMULATED else backend.unavailable_reason(name)
    reason = reason and f"{name} on {device}: {reason}"
    if device == "cuda" and not torch.cuda.is_available():
        reason = NO_GPU
    marks = [pytest.mark.skip(reason=reason)] if reason else []
    marks += [pytest.mark.thorough] if name == SIMULATED else []  # which has to be built
    return pytest.param((device, name), id=f"{device}-{name}", marks=marks)


# The CUDA kernels' device code, run on the CPU. Not named after cuda: -k cuda takes what runs on a GPU.
SIMULATED = "simulated"
# Triton on a CPU is its interpreter, which is too slow for all of this: test_triton.py runs a part there.
SERVERS = [
    ("cpu", "reference"), ("cpu", "cpu"), ("cpu", SIMULATED),
    ("cuda", "reference"), ("cuda", "cuda"), ("cuda", "triton"),
]  # fmt: skip


@pytest.fixture(params=[_server(*server) for server in SERVERS])
def device(request):
    """Each device with each backend that serves it, in use while the test runs."""
    device, name = request.param
    with simulated.cuda() if name == SIMULATED else backend.use(name):
        yield device


@pytest.fixture
def kernels():
    """The compiled CPU kernels, in use while the test runs."""
    if backend.unavailable_reason("cpu"):
        pytest.skip(backend.unavailable_reason("cpu"))
    with backend.use("cpu"):
        yield


@pytest.fixture
def float32_alone(monkeypatch):
    """As on a CPU that has products of float32 alone."""

    def emulated_reason(device, dtype):
        return None if dtype in (torch.float32, torch.float64) else f"no products of {dtype}"

    monkeypatch.setattr(backend, "emulated_reason", emulated_reason)


@pytest.fixture(autouse=True)
def poisoned_and_seeded():
    """torch.empty and its kin give NaN (for integers, the largest), so that an element that no kernel wrote shows."""
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)
    torch.set_grad_enabled(True)  # the benchmarks' functions switch it off for their whole process


@pytest.fixture
def with_threads():
    """with_threads(n, f) calls f on n threads."""
    before = torch.get_num_threads()

    def call(n, f):
        torch.set_num_threads(n)
        return f()

    yield call
    torch.set_num_threads(before)


def misaligned(x):
    """The same values and strides, one element past where the allocator put them."""
    storage = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return storage[1:].as_strided(x.shape, x.stride(), storage_offset=1).copy_(x)


def like_on(v, device):
    """v on the device, gaps and overlaps of its strides included; what is no tensor, or elsewhere already, as it is."""
    if not isinstance(v, torch.Tensor) or v.device.type != "cpu" or device == "cpu":
        return v
    storage = torch.zeros(v.untyped_storage().nbytes() // v.element_size(), dtype=v.dtype, device=device)
    return storage.as_strided(v.shape, v.stride(), v.storage_offset()).requires_grad_(v.requires_grad)


def same_bits(a, b):
    """Equal in every bit, NaNs included."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


LEFT_OUT = pytest.StashKey[int]()


def pytest_deselected(items):
    """pytest-xdist's workers, which all leave out the same, don't tell of it."""
    reported = getattr(items[0].config, "workeroutput", {})
    reported["deselected"] = reported.get("deselected", 0) + len(items)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    reported, known = (
        getattr(node, "workeroutput", {}),
        node.config.stash.get(LEFT_OUT, 0),
    )  # a worker that crashed tells nothing
    node.config.stash[LEFT_OUT] = max(known, reported.get("deselected", 0))


def pytest_terminal_summary(terminalreporter):
    """What did not run, and why: a skipped test that nobody notices is worse than none."""
    stats = terminalreporter.stats
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in stats.get("skipped", []))
    left_out = len(stats.get("deselected", [])) or terminalreporter.config.stash.get(LEFT_OUT, 0)
    if left_out:
        reasons["left out by -m or -k (make test runs the thorough ones, make slow the slow ones)"] = left_out
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"not run: {count} x {reason}")


def randomised(config: UNetConfig, seed: int = 0) -> UNet:
    """A network whose every parameter matters: the near-zero layers and the biases of a fresh one would hide mistakes."""
    torch.manual_seed(seed)
    model = UNet(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() < 2 or "conv2" in name or "to_out" in name or "conv_out" in name:
                p.add_(torch.randn_like(p) * 0.1)
    return model


def in_threads(*calls):
    """The calls' results, each in a thread of its own with this thread's settings."""
    results, count = [None] * len(calls), torch.get_num_threads()

    def work(i):
        torch.set_num_threads(count)
        torch.use_deterministic_algorithms(True, warn_only=True)
        results[i] = calls[i]()

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return results


def python(code, tmp_path, **environment):
    """The code's output and errors in a Python of its own, where the installed package is what imports."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True
    )


def on_variant(variant, code, tmp_path):
    """What the code prints where the kernels are those of one CPU variant."""
    result = python(code, tmp_path, FASTDDPM_CPU_VARIANT=variant, PYTHONPATH=os.path.dirname(__file__))
    if "cannot run here" in result.stderr:
        pytest.skip(f"CPU variant {variant} was not built or does not run on this processor")
    assert result.returncode == 0, result.stderr
    return result.stdout


def chain_with(runner, table, shape, **options):
    """A chain of the loop that `sample` runs, over x of `shape`, clipped to 1."""
    from fastddpm.engine.cache import CacheEntry
    from fastddpm.sampling.loop import ChainShape, chain_for

    return chain_for(CacheEntry(runner), table, ChainShape.of(table, shape, 1.0, **options))
