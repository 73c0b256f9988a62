"""diffusers' DDPMScheduler and DDIMScheduler with their step in one kernel, for unmodified pipelines.

    pipe.scheduler = FusedDDPMScheduler.from_config(pipe.scheduler.config)                  # torch's noise, as before
    pipe.scheduler = FusedDDPMScheduler.from_config(pipe.scheduler.config, noise_seed=7)    # fastddpm's

Each is a subclass and takes its parent's place: the same options, timesteps, numbers, and draws from torch's generators.

Numbers: within a few float32 roundings of the parent's. Coefficients are computed as diffusers does, in the precision of its
alphas_cumprod: float32, which shows in the last timesteps, where 1 - abar/abar_prev is what is left of a difference (up to 1e-4
of x0). What diffusers does otherwise than the papers stays: DDPM's last step adds noise where its timestep is not 0, DDIM's
previous timestep is t - T // steps whatever the spacing. float16 and bfloat16 are computed in float32 and rounded once, where
diffusers rounds every operation. Betas rescaled to zero SNR with epsilon and no clipping give
numbers near 2^100 where diffusers gives infinities.

Noise: torch's by default, drawn as diffusers draws it, so that generators end in the same state. With `noise_seed` a step's
noise is that of `fastddpm.sample`: image i of a batch is image `noise_first + i` of the seed's endless sequence, and its noise
depends on (noise_seed, noise_first + i, timestep) alone. It is drawn inside the kernel, and a `generator` passed to `step` is
not used: there pipelines pass what they were given for x_T, which stays the pipeline's own. `noise_first` is 0 at first, is
not part of the config, and advances by the batch size when a chain takes its last timestep, so that batches don't share noise:
two calls for 4 images have the noise of one for 8. Set it to go on where another process stopped. (A loop that steps a batch
in parts, each at the same timestep, would give the parts the same noise.)

Not fused: where model_output or sample requires grad and grad is enabled, diffusers' own step serves, which has a gradient; with
noise_seed that is a ValueError. Options that the kernel doesn't have are refused when a scheduler is made: thresholding, and the
variance types "learned" and "fixed_large_log".

Saved pipelines: a folder that `DDPMPipeline.save_pretrained` writes with one of these loads where this module has been imported,
and nowhere else: for others put the plain one back first, `pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)`.
DDIMPipeline makes a plain DDIMScheduler of whatever scheduler it is given or loads: assign to its `scheduler`, as above, once the
pipeline is there.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import NamedTuple

import torch

from .. import backend
from ..diffusion.coefficients import Columns, ddim_variance, ddpm_coefficients, x0_coefficients
from ..ops import ddpm_step
from ..ops._register import layout
from ..ops.rng import check_first, check_seed
from ..utils.warn import warn_once

try:
    import diffusers
except ModuleNotFoundError as error:
    if error.name != "diffusers":
        raise
    raise ImportError(
        "fastddpm.integrations.diffusers needs diffusers, which is missing: pip install diffusers"
    ) from error
if tuple(int(number) for number in diffusers.__version__.split(".")[:2]) < (0, 32):
    # Its DDPM goes from t to t - T // steps, whatever the next timestep is.
    raise ImportError(
        f"fastddpm.integrations.diffusers needs diffusers 0.32 or newer, and this is {diffusers.__version__}: "
        "pip install -U diffusers"
    )

# A pipeline that is loaded looks for SchedulerMixin beside its scheduler.
from diffusers import DDIMScheduler, DDPMScheduler, SchedulerMixin  # noqa: F401
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

__all__ = ["FusedDDIMScheduler", "FusedDDPMScheduler"]

PREDICTIONS = ("epsilon", "sample", "v_prediction")
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")
ALTERNATIVES = {
    "learned": "; diffusers' own DDPMScheduler takes a variance that the network gives as it is",
    "fixed_large_log": "; diffusers takes the root of its logarithm, which is NaN: use fixed_large",
}


class _Chain(NamedTuple):
    """What the steps of a chain look up, on the host."""

    source: tuple  # what it was read from: the scheduler's timesteps, alphas_cumprod and so on
    timesteps: list[int]
    abar: torch.Tensor
    rows: dict[tuple, dict[int, torch.Tensor]]  # for step's arguments that they depend on: by timestep, float64 [9]

    def timestep(self, timestep: int | torch.Tensor) -> int:
        """Return the timestep as an int. Elements of the scheduler's own tensor are known by address: no wait for a GPU."""
        listed = self.source[0]
        if isinstance(timestep, torch.Tensor) and (timestep.device, timestep.dtype) == (listed.device, listed.dtype):
            stride = listed.element_size() * listed.stride(0)
            index, between = divmod(timestep.data_ptr() - listed.data_ptr(), stride)
            if timestep.numel() == 1 and 0 <= index < len(self.timesteps) and not between:
                return self.timesteps[index]
        return operator.index(timestep)


def _init(parent: type) -> Callable:
    """Return parent's __init__ with noise_seed added. from_config and save_config read its signature."""

    def __init__(self, *args, noise_seed: int | None = None, **options) -> None:
        parent.__init__(self, *args, **options)
        self.noise_seed = None if noise_seed is None else check_seed(noise_seed, "noise_seed")
        self.noise_first = 0
        self._chain = None
        self._check_options()
        # Without a seed the config has the parent's options only, so that the parent can load it.
        if noise_seed is not None:
            self.register_to_config(noise_seed=noise_seed)

    theirs = inspect.signature(parent.__init__)
    ours = inspect.Parameter("noise_seed", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="int | None")
    __init__.__signature__ = theirs.replace(parameters=[*theirs.parameters.values(), ours])
    return __init__


class _Fused:
    """What both schedulers share. A subclass's _table(chain, timesteps, *arguments) returns float64 rows of ops/ddpm_step.py."""

    def _check_options(self) -> None:
        config = self.config
        if config.thresholding:
            raise ValueError(
                f"thresholding: got {config.thresholding}; it is not fused: use diffusers' own scheduler, or clip_sample=True "
                "with a clip_sample_range"
            )
        if config.prediction_type not in PREDICTIONS:
            raise ValueError(
                f"prediction_type: got {config.prediction_type!r}; expected one of {', '.join(PREDICTIONS)}"
            )
        if config.clip_sample and not config.clip_sample_range > 0:
            raise ValueError(
                f"clip_sample_range: got {config.clip_sample_range}; expected a positive bound; clip_sample=False is none"
            )

    def _current(self) -> _Chain:
        """Return the chain that the scheduler is set to, read again if something that it was read from has been replaced."""
        source = self.timesteps, self.alphas_cumprod, self.num_inference_steps, self.config
        if self._chain is None or any(a is not b for a, b in zip(source, self._chain.source, strict=True)):
            self._check_options()
            self._chain = _Chain(source, self.timesteps.tolist(), self.alphas_cumprod.cpu(), {})
        return self._chain

    def _row(self, chain: _Chain, t: int, *arguments) -> torch.Tensor:
        rows = chain.rows.get(arguments)
        if rows is None:
            table = self._table(chain, torch.tensor(chain.timesteps, device="cpu"), *arguments)
            rows = chain.rows[arguments] = dict(zip(chain.timesteps, table.unbind(), strict=True))
        if t not in rows:
            rows[t] = self._table(chain, torch.tensor([t], device="cpu"), *arguments)[0]
        return rows[t]

    def _needs_gradient(self, model_output: torch.Tensor, sample: torch.Tensor) -> bool:
        if not torch.is_grad_enabled() or not (model_output.requires_grad or sample.requires_grad):
            return False
        if self.noise_seed is not None:
            raise ValueError(
                f"noise_seed: is {self.noise_seed}, and model_output or sample requires grad, which only diffusers' own step "
                "with torch's noise serves; call it under torch.no_grad(), or leave noise_seed out"
            )
        return True

    def _check_shapes(self, model_output: torch.Tensor, sample: torch.Tensor, learned: bool = False) -> None:
        """Raise ValueError where the shapes don't fit. learned: whether model_output also holds a variance."""
        expected = list(sample.shape)
        if len(expected) < 2:
            raise ValueError(
                f"sample: got shape {expected}; expected [N, C, *spatial], e.g. sample.unsqueeze(1) and model_output likewise"
            )
        if learned:
            expected[1] *= 2
        if list(model_output.shape) != expected:
            raise ValueError(
                f"model_output: got shape {list(model_output.shape)}; expected {expected}"
                + (", with the learned variance" if learned else ", as sample")
            )

    def _fused_step(
        self,
        chain: _Chain,
        t: int,
        row: torch.Tensor,
        model_output: torch.Tensor,
        sample: torch.Tensor,
        noisy: bool,
        generator: torch.Generator | list[torch.Generator] | None,
        noise: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (prev_sample, pred_original_sample).

        noisy: whether the step adds noise. noise: default the seed's, or without a seed the generator's.
        """
        if reason := backend.emulated_reason(model_output.device, model_output.dtype):
            warn_once(self, backend.slow_module_warning(reason).replace("the module", "the model"))
        dtype = sample.dtype
        if model_output.dtype != dtype:
            dtype = torch.promote_types(dtype, model_output.dtype)
        x = _without_gaps(sample.to(torch.float64 if dtype == torch.float64 else torch.float32))
        seed = self.noise_seed if noisy else None
        if noisy and noise is None and seed is None:
            noise = randn_tensor(
                sample.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
            )
        if noise is not None:
            noise = _without_gaps(noise.to(x.dtype).expand(sample.shape))
        results = ddpm_step(
            x, _without_gaps(model_output), row, noise=noise, seed=seed, t=t, first=check_first(self.noise_first, "noise_first"),
            clip=self.config.clip_sample_range if self.config.clip_sample else None,
        )  # fmt: skip
        if self.noise_seed is not None and t == chain.timesteps[-1]:
            self.noise_first += len(sample)
        return tuple(v.to(dtype) if sample.dim() > 2 else v.to(dtype).squeeze(2) for v in results)

    def _x0_coefficients(self, abar: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return float64 (a, b) of x0 = a*x + b*o, from the float32 roots that diffusers takes."""
        if self.config.prediction_type == "epsilon":
            # rescale_betas_zero_snr makes the last root 0. A power of 2 clips (x - o)/0 to the bound that its sign points to.
            inverse = 1 / abar.sqrt().double().clamp(min=2.0**-100)
            return inverse, -(1 - abar).sqrt().double() * inverse
        a, b = x0_coefficients(abar, self.config.prediction_type)
        return a.double(), b.double()


def _without_gaps(v: torch.Tensor) -> torch.Tensor:
    """Return v as the op takes it: detached, without gaps, and [N, C, 1] where it is [N, C]."""
    v = v.detach() if v.requires_grad else v
    v = v.unsqueeze(2) if v.dim() == 2 else v
    return v.contiguous() if layout(v) == "gapped" else v


class FusedDDPMScheduler(_Fused, DDPMScheduler):
    """diffusers' DDPMScheduler with a fused step: see the top of `fastddpm.integrations.diffusers`.

    noise_seed: an int in [0, 2^64), for fastddpm's noise, part of the config; None for torch's. All else as in DDPMScheduler, but
    for thresholding and the variance types "learned" and "fixed_large_log": ValueError.
    """

    __init__ = _init(DDPMScheduler)

    def _check_options(self) -> None:
        super()._check_options()
        variance = self.config.variance_type
        if variance not in VARIANCES:
            raise ValueError(
                f"variance_type: got {variance!r}; expected one of {', '.join(VARIANCES)}{ALTERNATIVES.get(variance, '')}"
            )

    def _table(self, chain: _Chain, t: torch.Tensor) -> torch.Tensor:
        if not self.custom_timesteps and not self.num_inference_steps:
            before = t - 1
        elif t.tolist() == chain.timesteps:
            before = torch.cat((t[1:], t.new_tensor([-1])))
        else:
            raise IndexError(f"timestep: got {t.item()}; expected one of scheduler.timesteps")
        abar = chain.abar[t]
        prev = torch.where(before >= 0, chain.abar[before.clamp(min=0)], self.one.cpu())
        c0, c1, beta, _ = ddpm_coefficients(abar, prev)
        posterior = ddim_variance(abar, prev).clamp(min=1e-20)  # in diffusers' order of operations, to the bit
        lv_lo = lv_hi = None
        if self.config.variance_type == "learned_range":
            sigma, lv_lo, lv_hi = torch.ones_like(beta), posterior.log(), beta.log()
        else:
            sigma = (beta if self.config.variance_type == "fixed_large" else posterior).sqrt()
        a, b = self._x0_coefficients(abar)
        return Columns(a, b, c0, c1, sigma=sigma.where(t > 0, 0), lv_lo=lv_lo, lv_hi=lv_hi).rows()

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """As DDPMScheduler.step: (prev_sample, pred_original_sample), in the dtype that sample and model_output promote to.

        sample: [N, C, *spatial]. model_output: likewise, or [N, 2C, *spatial] for "learned_range". timestep: one of
        `timesteps`. generator: of the noise, unless there is a noise_seed. Raises ValueError naming what does not fit.
        """
        if self._needs_gradient(model_output, sample):
            return super().step(model_output, timestep, sample, generator, return_dict)
        chain = self._current()
        t = chain.timestep(timestep)
        row = self._row(chain, t)
        self._check_shapes(model_output, sample, learned=self.config.variance_type == "learned_range")
        results = self._fused_step(chain, t, row, model_output, sample, t > 0, generator)
        return DDPMSchedulerOutput(*results) if return_dict else results


class FusedDDIMScheduler(_Fused, DDIMScheduler):
    """diffusers' DDIMScheduler with a fused step: see the top of `fastddpm.integrations.diffusers`.

    noise_seed: an int in [0, 2^64), for fastddpm's noise where eta > 0, part of the config; None for torch's. All else as in
    DDIMScheduler, but for thresholding: ValueError.
    """

    __init__ = _init(DDIMScheduler)

    def _table(self, chain: _Chain, t: torch.Tensor, eta: float, use_clipped_model_output: bool) -> torch.Tensor:
        before = t - self.config.num_train_timesteps // self.num_inference_steps
        abar = chain.abar[t]
        prev = torch.where(before >= 0, chain.abar[before.clamp(min=0)], self.final_alpha_cumprod.cpu())
        sigma = eta * ddim_variance(abar, prev).sqrt()
        # Unlike ddim_coefficients, diffusers takes the eps of the x0 before clipping, and rounds every root to float32.
        eps_scale = (1 - prev - sigma**2).sqrt().double()
        a, b = self._x0_coefficients(abar)
        c0, signal, noise = prev.sqrt().double(), abar.sqrt().double(), (1 - abar).sqrt().double()
        if use_clipped_model_output:  # eps = (x - signal*x0) / noise
            return Columns(a, b, c0 - eps_scale * signal / noise, eps_scale / noise, sigma=sigma).rows()
        if self.config.prediction_type == "epsilon":
            return Columns(a, b, c0, torch.zeros_like(c0), d=eps_scale, sigma=sigma).rows()
        if self.config.prediction_type == "v_prediction":  # eps = signal*o + noise*x
            return Columns(a, b, c0, eps_scale * noise, d=eps_scale * signal, sigma=sigma).rows()
        d = -eps_scale * signal / noise  # eps = (x - signal*o) / noise
        return Columns(a, b, c0, eps_scale / noise, d=d, sigma=sigma).rows()

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """As DDIMScheduler.step: (prev_sample, pred_original_sample), in the dtype that sample and model_output promote to.

        sample, model_output: [N, C, *spatial]. timestep: in 0..T-1. variance_noise: in place of a generator's noise, and of
        noise_seed's. Raises ValueError naming what does not fit, and before `set_timesteps`.
        """
        if self._needs_gradient(model_output, sample):
            return super().step(
                model_output, timestep, sample, eta, use_clipped_model_output, generator, variance_noise, return_dict
            )
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps: is None; call set_timesteps first")
        if eta > 0 and variance_noise is not None and generator is not None:
            raise ValueError("variance_noise, generator: got both; pass one of them")
        chain = self._current()
        t = chain.timestep(timestep)
        row = self._row(chain, t, float(eta), bool(use_clipped_model_output))
        self._check_shapes(model_output, sample)
        noise = variance_noise if eta > 0 else None
        results = self._fused_step(chain, t, row, model_output, sample, eta > 0, generator, noise)
        return DDIMSchedulerOutput(*results) if return_dict else results
