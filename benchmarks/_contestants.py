"""The contestants of steps_per_sec.py: fastddpm and its best alternatives, with the same weights."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import functools
import importlib.util
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from _bars import BF16, DEFAULTS, F32, GRAPH, OPENVINO
from _cases import inductor_settings
from torch import nn
from tqdm.auto import tqdm

from fastddpm import Schedule, UNet, backend, ops
from fastddpm.checkpoints.diffusers_options import unet_options
from fastddpm.diffusion import coefficients
from fastddpm.engine import memory
from fastddpm.engine.cache import acquire_runner
from fastddpm.inputs.resolve import resolve
from fastddpm.models.unet import Attention, GroupNormSiLU, TimestepEmbedding
from fastddpm.sampling.loop import Batch, ChainShape, chain_for

try:
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.utils import logging

    logging.set_verbosity_error()  # UNet2DModel warns of casts that harm none of its layers
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")  # a check of versions
except ImportError:
    DDPMScheduler = UNet2DModel = None

T = 1000
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ABSURD = 5  # times float32's time, above which a dtype is useless


class LeftOut(Exception):
    """The reason why a contestant, or a limit, is not measured."""


@dataclasses.dataclass
class Contestant:
    precision: str  # of the network's products: "float32", "tf32" or "bfloat16"
    predict: Callable[[torch.Tensor, int], torch.Tensor]  # x float32 [B, C, H, W] and a timestep -> epsilon, float32
    # Seconds of k steps, after an untimed one: only a chain's first step touches memory that is new to the process.
    steps: Callable[[int], float]
    slack: float = 1.0  # allowed error, as a multiple of its precision's tolerance
    isa: dict[str, int] | None = None  # instruction set -> layers that run on it, if the library reports it


Entrant = contextlib.AbstractContextManager[Contestant]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------ the network


def the_network(name: str) -> UNet:
    """Return a network of the paper, with weights that make every layer count: a fresh one has layers close to zero."""
    return stirred(UNet.from_preset(name))


def stirred(model: UNet) -> UNet:
    torch.manual_seed(0)
    model.eval().requires_grad_(False)
    for name, layer in model.named_modules():
        if name.endswith(("conv2", "conv_out", "to_out.0")):
            nn.init.xavier_uniform_(layer.weight, 0.5)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float(parameter.mean()), std=0.1)
    return model


def macs(model: UNet) -> tuple[int, int]:
    """Return one image's multiply-adds as the network is written down: (convolutions, linear layers and attention)."""
    convolutions = products = 0

    def count(layer: nn.Module, _: object, out: torch.Tensor) -> None:
        nonlocal convolutions, products
        if isinstance(layer, nn.Conv2d):
            convolutions += out.numel() * layer.weight[0].numel()
        elif isinstance(layer, nn.Linear):
            products += out.numel() * layer.in_features
        elif isinstance(layer, Attention):  # besides its linear layers: scores, and the weighted sum
            products += 2 * out[0, 0].numel() * out.numel()

    shapes = copy.deepcopy(model).to("meta")
    for layer in shapes.modules():
        layer.register_forward_hook(count)
    shapes(torch.empty(1, *model.shape, device="meta"), torch.empty(1, dtype=torch.int64, device="meta"))
    return convolutions, products


# ------------------------------------------------------------------------------------- the cost of a dtype


@functools.cache
def rates(precision: str) -> tuple[float, float]:
    """Probe torch's convolutions and matrix products on this processor. Return the multiply-adds per second of each.

    The probe is small, so that it ends soon on a processor without instructions for the dtype. It runs on one thread,
    since threads that wait for each other would hide the difference between dtypes.
    """
    dtype, threads = DTYPES[precision], torch.get_num_threads()
    layer = nn.Conv2d(128, 128, 3, padding=1).to(dtype, memory_format=torch.channels_last)
    image = torch.randn(1, 128, 32, 32).to(dtype, memory_format=torch.channels_last)
    matrix = torch.randn(256, 256).to(dtype)

    def rate(call: Callable[[], torch.Tensor], work: int) -> float:
        taken = []
        while len(taken) < 10 and sum(taken) < 0.3:
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        return threads * work / min(taken)

    torch.set_num_threads(1)
    try:
        convolutions = rate(lambda: layer(image), image.numel() * layer.weight[0].numel())
        return convolutions, rate(lambda: matrix @ matrix, 256**3)
    finally:
        torch.set_num_threads(threads)


def refuse_if_absurd(what: str, precision: str, convolutions: int, products: int) -> None:
    """Raise LeftOut if these multiply-adds in a dtype would take absurdly long on this processor."""
    seconds, usual = (convolutions / r[0] + products / r[1] for r in (rates(precision), rates("float32")))
    if seconds > ABSURD * usual:
        raise LeftOut(
            f"{what} in {precision} would take about {seconds:.2g} s here, {seconds / usual:.0f} times as long as in "
            "float32 (by a short probe)"
        )


class PlainNorm(nn.Module):
    def __init__(self, norm: GroupNormSiLU) -> None:
        super().__init__()
        self.groups, self.eps, self.silu = norm.groups, norm.eps, norm.silu
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: torch.Tensor, add: torch.Tensor | None = None) -> torch.Tensor:
        x = x if add is None else x + add[:, :, None, None]
        y = F.group_norm(x, self.groups, self.weight, self.bias, self.eps)
        return F.silu(y) if self.silu else y


class PlainEmbedding(TimestepEmbedding):
    def forward(self, t: torch.Tensor) -> torch.Tensor:
        sinusoids = ops.timestep_embedding_ref(t, self.channels).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


def plain(model: UNet) -> UNet:
    """The network made of PyTorch's functions, which a compiler can fuse: the peer if diffusers is missing."""
    used = copy.deepcopy(model)
    used.time_embedding.__class__ = PlainEmbedding
    for parent in list(used.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, GroupNormSiLU):
                setattr(parent, name, PlainNorm(layer))
    return used


def diffusers_unet(model: UNet) -> nn.Module:
    unet = UNet2DModel.from_config(unet_options(model.config))
    unet.load_state_dict(model.state_dict())
    return unet.eval().requires_grad_(False)


class Peer(nn.Module):
    """The peer's network as (x, t) -> tensor, to be compiled or converted: diffusers', or the plain one without it."""

    def __init__(self, model: UNet) -> None:
        super().__init__()
        self.unet = plain(model) if UNet2DModel is None else diffusers_unet(model)
        self.options = {} if UNet2DModel is None else {"return_dict": False}

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        out = self.unet(x, t, **self.options)
        return out[0] if self.options else out


# ------------------------------------------------------------------------------------------------------- ours


@contextlib.contextmanager
def ours(model: UNet, batch: int, precision: str, name: str | None = None) -> Iterator[Contestant]:
    """Yield fastddpm.sample's own loop over the first steps of the full chain's table, on backend `name` or the default."""
    device, shape = next(model.parameters()).device, (batch, *model.shape)
    # A model has one engine at a time, so each contestant has its own model of the same tensors.
    model = copy.deepcopy(model, {id(v): v for v in model.parameters()})
    table, bar = coefficients.table(Schedule.linear(T)), tqdm(disable=True)
    x_T, out = torch.randn(shape, device=device), torch.empty(shape, device=device)
    with contextlib.ExitStack() as stack:
        with backend.use(name):
            entry = stack.enter_context(acquire_runner(resolve(model), device, DTYPES[precision], shape))
            chain = chain_for(entry, table, ChainShape.of(table, shape, 1.0))

        def steps(k: int) -> float:
            with backend.use(name), memory.retain_freed_memory(device), chain.runner.execution_context():
                for chain.steps in (1, k):
                    synchronize(device)
                    start = time.perf_counter()
                    chain.run(Batch(out, 0, 0, x_T, None), bar, None)
                    synchronize(device)
                    taken = time.perf_counter() - start
            return taken

        def predict(x: torch.Tensor, t: int) -> torch.Tensor:
            chain.input.copy_(x)
            with backend.use(name), chain.runner.execution_context():
                return chain.predict(T - 1 - t).float()

        yield Contestant(precision, predict, steps)


# --------------------------------------------------------------------------------------------------- the peers


@contextlib.contextmanager
def cudnn(benchmark: bool, tf32: bool) -> Iterator[None]:
    flags = torch.backends.cudnn
    flags.benchmark, flags.allow_tf32 = benchmark, tf32
    try:
        yield
    finally:  # torch's defaults; the earlier values are unknown, as reading allow_tf32 fails if conv.fp32_precision is set
        flags.benchmark, flags.allow_tf32 = False, True


@contextlib.contextmanager
def at_its_best() -> Iterator[None]:
    with torch.inference_mode(), cudnn(benchmark=True, tf32=False):
        yield


def in_their_loop(
    precision: str,
    call: Callable,
    model: UNet,
    batch: int,
    settings: Callable[[], contextlib.AbstractContextManager] = at_its_best,
) -> Contestant:
    """Return the loop of diffusers' DDPMPipeline around call(x, t): x and the result float32, t from its scheduler."""
    device = next(model.parameters()).device
    scheduler = DDPMScheduler(T, beta_schedule="linear", variance_type="fixed_large", clip_sample=True)
    scheduler.set_timesteps(T)
    x_T = torch.randn(batch, *model.shape, device=device)

    def predict(x: torch.Tensor, t: int) -> torch.Tensor:
        with settings():
            return call(x, scheduler.timesteps[T - 1 - t]).clone()

    def steps(k: int) -> float:
        with settings():
            for count in (1, k):
                synchronize(device)
                x, start = x_T, time.perf_counter()
                for t in scheduler.timesteps[:count]:
                    x = scheduler.step(call(x, t), t, x).prev_sample
                synchronize(device)
            return time.perf_counter() - start

    return Contestant(precision, predict, steps)


@contextlib.contextmanager
def as_it_comes(model: UNet, batch: int, tf32: bool) -> Iterator[Contestant]:
    """Yield DDPMPipeline at torch's defaults, under which cuDNN may round convolutions' operands to TF32, or without it."""
    unet = diffusers_unet(model).to(next(model.parameters()).device)
    precision = "tf32" if tf32 else "float32"
    yield in_their_loop(
        precision, lambda x, t: unet(x, t).sample, model, batch, lambda: cudnn(benchmark=False, tf32=tf32)
    )


@contextlib.contextmanager
def tuned(model: UNet, batch: int, precision: str, options: dict[str, object] | None = None) -> Iterator[Contestant]:
    """Yield the same loop with a channels_last network, compiled if options are given, with all timesteps on the device."""
    device, dtype = next(model.parameters()).device, DTYPES[precision]
    if device.type == "cpu":
        refuse_if_absurd("a step", precision, *(batch * count for count in macs(model)))
    unet = Peer(model).to(device, dtype, memory_format=torch.channels_last)
    timesteps = torch.arange(T, device=device)[:, None].expand(T, batch).contiguous()
    # fullgraph: a fallback of torch.compile to eager code is an error, not a slow peer.
    compiled = unet if options is None else torch.compile(unet, fullgraph=True, dynamic=False, options=options)

    def call(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return compiled(x.to(dtype, memory_format=torch.channels_last), timesteps[int(t)]).float()

    yield in_their_loop(precision, call, model, batch)


class _Stack(ctypes.Structure):
    """The struct stack_t of sigaltstack(2)."""

    _fields_ = (("ss_sp", ctypes.c_void_p), ("ss_flags", ctypes.c_int), ("ss_size", ctypes.c_size_t))


@contextlib.contextmanager
def signal_stack_kept() -> Iterator[None]:
    """Restore this thread's alternate signal stack on exit.

    OpenVINO sets one when it compiles a model, and frees it: the next signal that Python handles would crash the process.
    """
    if sys.platform != "linux":
        yield
        return
    libc, before = ctypes.CDLL(None), _Stack()
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)


class Weighed(nn.Module):
    """A module that OpenVINO cannot run in bfloat16 on a processor without bfloat16 kernels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.softmax(-1) @ x


@contextlib.contextmanager
def openvino(model: UNet, batch: int, precision: str) -> Iterator[Contestant]:
    sys.modules.setdefault("openvino_telemetry", None)  # disables OpenVINO's telemetry
    import openvino as ov

    options = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    if precision == "bfloat16":  # on a processor without such products it computes in float32, or fails late
        small = ov.convert_model(Weighed(), example_input=torch.zeros(1, 4, 8, 8))
        try:
            with signal_stack_kept():
                used = ov.compile_model(small, "CPU", options).get_property("INFERENCE_PRECISION_HINT").to_string()
        except RuntimeError as problem:
            raise LeftOut("OpenVINO can't compile a small model in bfloat16 for this processor") from problem
        if used != "bf16":
            raise LeftOut(f"OpenVINO computes in {used} on this processor instead of bfloat16")
    x, timesteps = torch.zeros(batch, *model.shape), torch.arange(T)[:, None].expand(T, batch).contiguous()
    with warnings.catch_warnings(action="ignore", category=torch.jit.TracerWarning):  # shapes are static
        converted = ov.convert_model(Peer(model), example_input=(x, timesteps[0]))
    converted.reshape({converted.inputs[0]: list(x.shape), converted.inputs[1]: [batch]})
    with signal_stack_kept():
        compiled = ov.compile_model(converted, "CPU", options)
    request = compiled.create_infer_request()
    del converted

    def call(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        given = [x.numpy(), timesteps[int(t)].numpy()]
        return torch.from_numpy(request.infer(given, share_inputs=True, share_outputs=True)[0])

    contestant = in_their_loop(precision, call, model, batch)
    about = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    kernels = [info["primitiveType"].value for info in about if "primitiveType" in info]  # as in brgconv_avx2_1x1_f32
    # MLAS, which computes linear layers, selects its instructions itself, regardless of the cap.
    contestant.isa = dict(Counter(found[0] for name in kernels if (found := re.search("avx[0-9]*|amx|mlas", name))))
    if precision == "bfloat16":  # OpenVINO uses it in more places than others, and errs by 0.06 to 0.12
        contestant.slack = 3
    yield contestant


_failed: list[torch.cuda.CUDAGraph] = []


def capture(run: Callable[[], object]) -> Callable[[], None]:
    """Capture run() into a CUDA graph and return its replay."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except BaseException:
        _failed.append(graph)  # torch's allocator may still refer to it
        raise
    return graph.replay


@contextlib.contextmanager
def captured(model: UNet, batch: int, options: dict[str, object]) -> Iterator[Contestant]:
    """Yield a skilled user's version: the whole step under torch.compile, in a CUDA graph by hand, without host work."""
    device, dtype = next(model.parameters()).device, torch.bfloat16
    unet = Peer(model).to(device, dtype, memory_format=torch.channels_last)
    table = coefficients.table(Schedule.linear(T))
    timesteps, rows = table.timesteps.to(device), table.rows[:, [0, 1, 2, 3, 6]].float().to(device)

    def one(x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """Advance x and the step's number in place."""
        o = unet(x.to(dtype, memory_format=torch.channels_last), timesteps[step].expand(batch)).float()
        a, b, c0, c1, sigma = rows[step].unbind(1)
        x0 = (a * x + b * o).clamp(-1, 1)
        x.copy_(c0 * x0 + c1 * x + sigma * torch.randn_like(x))
        step.add_(1)
        return o

    compiled = torch.compile(one, fullgraph=True, dynamic=False, options=options)
    with at_its_best():  # makes all tensors inference tensors, to compile only once
        x_T = torch.randn(batch, *model.shape, device=device)
        x, step = x_T.clone(), torch.zeros(1, dtype=torch.int64, device=device)
        for _ in range(3):  # compiles, and completes all first-time work before the capture
            compiled(x, step)
        replay = capture(lambda: compiled(x, step))

    def predict(given: torch.Tensor, t: int) -> torch.Tensor:
        with at_its_best():
            return compiled(given.clone(), torch.tensor([T - 1 - t], device=device))

    def steps(k: int) -> float:
        with torch.inference_mode():
            for count in (1, k):
                x.copy_(x_T)
                step.zero_()
                synchronize(device)
                start = time.perf_counter()
                for _ in range(count):
                    replay()
                synchronize(device)
            return time.perf_counter() - start

    yield Contestant("bfloat16", predict, steps)


# --------------------------------------------------------------------------------------------------- all of them


def entrants(model: UNet, batch: int, quick: bool) -> dict[str, Entrant]:
    """Return name -> contestant, a context manager to enter. With `quick`, without contestants that compile.

    As time may run out, contestants that bars refer to come first, then the stronger ones.
    """
    on_gpu = next(model.parameters()).is_cuda
    field = {F32: ours(model, batch, "float32"), BF16: ours(model, batch, "bfloat16")}
    reference = {"fastddpm reference": ours(model, batch, "float32", "reference")}
    theirs = UNet2DModel is not None
    if theirs:
        field[DEFAULTS] = as_it_comes(model, batch, tf32=on_gpu)
    if on_gpu:
        field |= reference
        if theirs:
            field["diffusers, float32"] = as_it_comes(model, batch, tf32=False)
        if not quick:
            name = f"torch.compile of {'diffusers' if theirs else 'the plain network'}, {GRAPH}"
            for suffix, options in inductor_settings("max-autotune-no-cudagraphs").items():
                field[f"{name}{suffix}"] = captured(model, batch, options)
        if theirs and not quick:
            for suffix, options in inductor_settings("max-autotune").items():
                field[f"torch.compile of diffusers{suffix}"] = tuned(model, batch, "bfloat16", options)
        return field
    if theirs and importlib.util.find_spec("openvino") is not None:
        field |= {f"{OPENVINO} {precision}": openvino(model, batch, precision) for precision in DTYPES}
    field |= reference
    if theirs:
        field["diffusers, bfloat16 channels_last"] = tuned(model, batch, "bfloat16")
        if not quick:
            freezing = {"freezing": True}
            field |= {
                f"torch.compile of diffusers, {precision}": tuned(model, batch, precision, freezing)
                for precision in ("bfloat16", "float32")
            }
    return field
