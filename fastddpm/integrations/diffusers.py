"""diffusers' DDPMScheduler and DDIMScheduler with the step in one kernel, for unmodified pipelines.

    pipe.scheduler = FusedDDPMScheduler.from_config(pipe.scheduler.config)                  # torch's noise, as before
    pipe.scheduler = FusedDDPMScheduler.from_config(pipe.scheduler.config, noise_seed=7)    # fastddpm's noise

Each scheduler is a subclass that replaces its parent. It has the same options, timesteps and results, and draws from torch's
generators in the same way.

**Numbers.** Results are within a few float32 roundings of the parent's. Coefficients are computed as diffusers computes them,
in the precision of its alphas_cumprod. In float32 this is visible in the last timesteps, because 1 - abar/abar_prev cancels
there (up to 1e-4 of x0). Two deviations of diffusers from the papers are preserved: DDPM's last step adds noise unless its
timestep is 0, and DDIM's previous timestep is t - T // steps for every spacing. float16 and bfloat16 are computed in float32
and rounded once; diffusers rounds every operation. With betas rescaled to zero SNR, epsilon prediction and no clipping,
results are near 2^100; diffusers' are infinite.

**Noise.** By default the noise is torch's, drawn as diffusers draws it, so that generators end in the same state. With
`noise_seed` it is the noise of `fastddpm.sample`: image i of a batch is image `noise_first + i` of the seed's endless
sequence, and its noise depends only on (noise_seed, noise_first + i, timestep). The kernel draws it and ignores a `generator`
passed to `step`, because pipelines pass the generator of x_T there. x_T remains the pipeline's own. `noise_first` starts at 0
and is not part of the config. It advances by the batch size at the last timestep of a chain, so that batches do not share
noise: two calls for 4 images have the same noise as one call for 8. Set it to continue where another process stopped. A loop
that steps a batch in parts, each at the same timestep, would give the parts the same noise.

**Not fused.** If model_output or sample requires grad and grad is enabled, diffusers' own step runs, because it has a
gradient. With `noise_seed` this is a ValueError. The constructor refuses options that the kernel does not support:
thresholding, and the variance types "learned" and "fixed_large_log".

**Saved pipelines.** A folder that `DDPMPipeline.save_pretrained` writes with one of these schedulers loads only if this
module has been imported. To save for other users, restore the plain scheduler first: `pipe.scheduler =
DDPMScheduler.from_config(pipe.scheduler.config)`. DDIMPipeline converts any scheduler passed to it, or loaded, to a plain
DDIMScheduler. So assign to its `scheduler`, as above, after the pipeline has been created.
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
        "fastddpm.integrations.diffusers requires diffusers, which is missing: pip install diffusers"
    ) from error
if tuple(int(number) for number in diffusers.__version__.split(".")[:2]) < (0, 32):
    # DDPM in older versions steps from t to t - T // steps, even if the next timestep is another.
    raise ImportError(
        f"fastddpm.integrations.diffusers requires diffusers 0.32 or newer, and this is {diffusers.__version__}: "
        "pip install -U diffusers"
    )

# A loading pipeline looks up SchedulerMixin in the module of its scheduler.
from diffusers import DDIMScheduler, DDPMScheduler, SchedulerMixin  # noqa: F401
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

__all__ = ["FusedDDIMScheduler", "FusedDDPMScheduler"]

PREDICTIONS = ("epsilon", "sample", "v_prediction")
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")
ALTERNATIVES = {
    "learned": "; diffusers' own DDPMScheduler supports a variance that the network predicts directly",
    "fixed_large_log": "; diffusers computes the root of its logarithm, which is NaN: use fixed_large",
}


class _Chain(NamedTuple):
    """The values that the steps of a chain look up, on the host."""

    source: tuple  # the scheduler's objects that the chain was read from: timesteps, alphas_cumprod, ...
    timesteps: list[int]
    abar: torch.Tensor
    rows: dict[tuple, dict[int, torch.Tensor]]  # float64 [9], by the arguments of step that matter, then by timestep

    def timestep(self, timestep: int | torch.Tensor) -> int:
        """Return the timestep as an int. An element of scheduler.timesteps is recognized by its address, without a GPU sync."""
        listed = self.source[0]
        if isinstance(timestep, torch.Tensor) and (timestep.device, timestep.dtype) == (listed.device, listed.dtype):
            stride = listed.element_size() * listed.stride(0)
            index, between = divmod(timestep.data_ptr() - listed.data_ptr(), stride)
            if timestep.numel() == 1 and 0 <= index < len(self.timesteps) and not between:
                return self.timesteps[index]
        return operator.index(timestep)


def _init(parent: type) -> Callable:
    """Return the parent's __init__ with noise_seed added. from_config and save_config read its signature."""

    def __init__(self, *args, noise_seed: int | None = None, **options) -> None:
        parent.__init__(self, *args, **options)
        self.noise_seed = None if noise_seed is None else check_seed(noise_seed, "noise_seed")
        self.noise_first = 0
        self._chain = None
        self._check_options()
        # Without a seed the config contains only the parent's options, so that the parent can load it.
        if noise_seed is not None:
            self.register_to_config(noise_seed=noise_seed)

    theirs = inspect.signature(parent.__init__)
    ours = inspect.Parameter("noise_seed", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="int | None")
    __init__.__signature__ = theirs.replace(parameters=[*theirs.parameters.values(), ours])
    return __init__


class _Fused:
    """The base of both schedulers. A subclass's _table(chain, timesteps, *arguments) returns float64 rows for ddpm_step."""

    def _check_options(self) -> None:
        config = self.config
        if config.thresholding:
            raise ValueError(
                f"thresholding: got {config.thresholding}; not supported by the fused step: use diffusers' own scheduler, or "
                "clip_sample=True with a clip_sample_range"
            )
        if config.prediction_type not in PREDICTIONS:
            raise ValueError(
                f"prediction_type: got {config.prediction_type!r}; expected one of {', '.join(PREDICTIONS)}"
            )
        if config.clip_sample and not config.clip_sample_range > 0:
            raise ValueError(
                f"clip_sample_range: got {config.clip_sample_range}; expected a positive bound, or clip_sample=False"
            )

    def _current(self) -> _Chain:
        """Return the chain of the scheduler's current settings. It is read again if one of its sources has been replaced."""
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
                "with torch's noise supports; call it under torch.no_grad(), or omit noise_seed"
            )
        return True

    def _check_shapes(self, model_output: torch.Tensor, sample: torch.Tensor, learned: bool = False) -> None:
        """Raise ValueError if the shapes do not match. `learned` is whether model_output also contains a variance."""
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

        `noisy` is whether the step adds noise. The noise is `noise` if it is not None, else the seed's, else the generator's.
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
        """Return float64 (a, b) of x0 = a*x + b*o, from float32 square roots, as diffusers computes them."""
        if self.config.prediction_type == "epsilon":
            # rescale_betas_zero_snr makes the last root 0. With 2^-100 instead, (x - o)/0 is clipped to the bound of its sign.
            inverse = 1 / abar.sqrt().double().clamp(min=2.0**-100)
            return inverse, -(1 - abar).sqrt().double() * inverse
        a, b = x0_coefficients(abar, self.config.prediction_type)
        return a.double(), b.double()


def _without_gaps(v: torch.Tensor) -> torch.Tensor:
    """Return v in the form that the op requires: detached, without gaps, and [N, C, 1] if it is [N, C]."""
    v = v.detach() if v.requires_grad else v
    v = v.unsqueeze(2) if v.dim() == 2 else v
    return v.contiguous() if layout(v) == "gapped" else v


class FusedDDPMScheduler(_Fused, DDPMScheduler):
    """diffusers' DDPMScheduler with a fused step.

    It supports all options of DDPMScheduler except thresholding and the variance types "learned" and "fixed_large_log". The
    documentation of `fastddpm.integrations.diffusers` describes its numbers and noise.

    Attributes:
        noise_seed: The seed of fastddpm's noise, an int in [0, 2^64), stored in the config. None uses torch's noise, which is
            the default. It is passed to the constructor or to `from_config` by keyword.
        noise_first: The index of a batch's first image in the seed's sequence, an int in [0, 2^56). It starts at 0 and
            advances by the batch size at the last timestep of a chain.

    Raises:
        ValueError: If an option is not supported or noise_seed is out of range. The message names the option.
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
        posterior = ddim_variance(abar, prev).clamp(min=1e-20)  # in diffusers' order of operations, so bit-identical
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
        """Return the previous sample and the predicted original sample, as DDPMScheduler.step does.

        Args:
            model_output: The network's output, [N, C, *spatial], or [N, 2C, *spatial] for the variance type "learned_range".
            timestep: One of `timesteps`.
            sample: The noisy images, [N, C, *spatial].
            generator: The generator of the noise. Ignored with a noise_seed.
            return_dict: Whether to return a DDPMSchedulerOutput instead of a tuple.

        Returns:
            prev_sample and pred_original_sample, with sample's shape, in the dtype that sample and model_output promote to.

        Raises:
            ValueError: If a shape or noise_first is invalid, or if a noise_seed is set and a tensor requires grad.
            IndexError: If `timestep` is not one of `timesteps` after set_timesteps.
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
    """diffusers' DDIMScheduler with a fused step.

    It supports all options of DDIMScheduler except thresholding. The documentation of `fastddpm.integrations.diffusers`
    describes its numbers and noise.

    Attributes:
        noise_seed: The seed of fastddpm's noise for eta > 0, an int in [0, 2^64), stored in the config. None uses torch's
            noise, which is the default. It is passed to the constructor or to `from_config` by keyword.
        noise_first: The index of a batch's first image in the seed's sequence, an int in [0, 2^56). It starts at 0 and
            advances by the batch size at the last timestep of a chain.

    Raises:
        ValueError: If an option is not supported or noise_seed is out of range. The message names the option.
    """

    __init__ = _init(DDIMScheduler)

    def _table(self, chain: _Chain, t: torch.Tensor, eta: float, use_clipped_model_output: bool) -> torch.Tensor:
        before = t - self.config.num_train_timesteps // self.num_inference_steps
        abar = chain.abar[t]
        prev = torch.where(before >= 0, chain.abar[before.clamp(min=0)], self.final_alpha_cumprod.cpu())
        sigma = eta * ddim_variance(abar, prev).sqrt()
        # Unlike ddim_coefficients, diffusers uses the eps of the x0 before clipping, and rounds every root to float32.
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
        """Return the previous sample and the predicted original sample, as DDIMScheduler.step does.

        Args:
            model_output: The network's output, [N, C, *spatial].
            timestep: A timestep in 0..T-1.
            sample: The noisy images, [N, C, *spatial].
            eta: The noise's standard deviation in units of that of DDPM's posterior, at least 0.
            use_clipped_model_output: Whether eps is computed from the clipped x0.
            generator: The generator of the noise. Ignored with a noise_seed.
            variance_noise: The noise, like sample. Replaces the generator's noise and that of noise_seed.
            return_dict: Whether to return a DDIMSchedulerOutput instead of a tuple.

        Returns:
            prev_sample and pred_original_sample, with sample's shape, in the dtype that sample and model_output promote to.

        Raises:
            ValueError: If a shape or noise_first is invalid, if set_timesteps has not been called, if both variance_noise and
                generator are given with eta > 0, or if a noise_seed is set and a tensor requires grad.
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
