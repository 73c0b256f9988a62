"""The terms of the bound against their definitions, and the objective made of them."""

import math

import mpmath
import pytest
import torch
from torch.distributions import Normal, kl_divergence

import fastddpm
from fastddpm import Schedule, UNet, UNetConfig
from fastddpm.diffusion import coefficients
from fastddpm.diffusion.bound import Bound
from fastddpm.training.loss import draw_noise, draw_timesteps

SHORT = Schedule.linear(20, 1e-3, 0.3)
TIMES = torch.tensor([0, 1, 7, 19])
VARIANCES = ["fixed_large", "fixed_small", "learned_range"]


def on_grid(*shape):
    """Return random 8-bit images that contain both ends of the grid."""
    pixels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))
    pixels[:, :, 0, 0], pixels[:, :, 0, 1] = 0, 255
    return pixels.double() / 127.5 - 1


def output(prediction, schedule, x0, x_t, t, error):
    """Return the output of a network whose x0_hat is x0 - error."""
    a, b = (v[t][:, None, None, None] for v in coefficients.to_x0(schedule, prediction))
    return (x0 - error - a * x_t) / b


def log_mass(x0, mean, std):
    """Return the log of the normal's mass around x0 in multiple precision."""
    with mpmath.workdps(60):
        x0, mean, std = mpmath.mpf(x0), mpmath.mpf(mean), mpmath.mpf(std)
        half = mpmath.mpf(1) / 255
        lower = -mpmath.inf if x0 < -0.999 else (x0 - half - mean) / std
        upper = mpmath.inf if x0 > 0.999 else (x0 + half - mean) / std
        if lower > 0:  # towards the tail that erfc keeps
            lower, upper = -upper, -lower
        return mpmath.log((mpmath.erfc(-upper / mpmath.sqrt(2)) - mpmath.erfc(-lower / mpmath.sqrt(2))) / 2)


@pytest.mark.parametrize("T", [2, 1000])
def test_decoder_is_exact_in_both_tails(T):
    """Agrees with 60 digits, from the mode to a mass of exp(-10^8), inside and at both open ends."""
    schedule = Schedule.linear(T, 1e-4, 0.02)
    bound = Bound(schedule, "fixed_large")
    std = math.exp(float(bound.log_variance[0]) / 2)
    assert std == pytest.approx(float(schedule.posterior_variance[1].sqrt()), rel=1e-14)
    for x0 in (-1.0, 1.0, 0.0, 100 / 127.5 - 1):
        for error in (sign * size for size in (0.0, 1e-9, 1e-3, 1 / 255, 0.03, 0.7, 2.0, 150.0) for sign in (1, -1)):
            got = bound.decoder(*(torch.tensor(w, dtype=torch.float64).reshape(1, 1, 1, 1) for w in (x0, error)))
            exact = float(-log_mass(x0, x0 - mpmath.mpf(error), std) / mpmath.log(2))
            assert float(got) == pytest.approx(exact, rel=1e-11, abs=1e-14), (x0, error)


def test_the_decoder_is_a_distribution():
    """The masses of all 256 values sum to 1 for any mean."""
    x0 = (torch.arange(256).double() / 127.5 - 1).reshape(-1, 1, 1, 1)
    for variance in VARIANCES:
        bound = Bound(SHORT, variance)
        v = torch.full_like(x0, 0.4) if variance == "learned_range" else None
        for mean in (-1.3, -1.0, 0.0, 0.77, 5.0):
            assert float((-bound.decoder(x0, x0 - mean, v)).exp2().sum()) == pytest.approx(1, abs=1e-12)


def test_variances():
    """The paper's two choices, with the posterior's of t = 1 at t = 0; a single timestep has beta alone."""
    large, small = (Bound(SHORT, variance).log_variance.exp() for variance in VARIANCES[:2])
    torch.testing.assert_close(large[1:], SHORT.betas[1:], rtol=1e-14, atol=0)
    torch.testing.assert_close(small[1:], SHORT.posterior_variance[1:], rtol=1e-14, atol=0)
    assert float(large[0]) == float(small[0]) == pytest.approx(float(SHORT.posterior_variance[1]), rel=1e-14)
    for variance in VARIANCES[:2]:
        assert float(Bound(Schedule([0.3]), variance).log_variance.exp()) == pytest.approx(0.3)
    for variance in ("none", "huge"):
        with pytest.raises(ValueError, match=f"variance: got '{variance}'; the variational bound needs a density"):
            Bound(SHORT, variance)


@pytest.mark.parametrize("prediction", coefficients.PREDICTIONS)
@pytest.mark.parametrize("variance", VARIANCES)
def test_bound_is_the_definition(prediction, variance):
    """Each L_t by torch's own KL between the posterior and the model's normal distribution, both as the paper writes them."""
    s, x0 = SHORT, on_grid(4, 2, 3, 3)
    eps, v, error = (torch.randn_like(x0) for _ in range(3))
    error = error * 0.05
    column = TIMES[:, None, None, None]
    x_t = s.add_noise(x0, eps, TIMES)
    q = Normal(
        s.posterior_mean_coef1[column] * x0 + s.posterior_mean_coef2[column] * x_t,
        s.posterior_variance[column.clamp(min=1)].sqrt(),
    )
    low, high = s.posterior_variance[column.clamp(min=1)].log(), s.betas[column].log()
    log_variance = {
        "fixed_small": low,
        "fixed_large": torch.where(column > 0, high, low),
        "learned_range": (v + 1) / 2 * high + (1 - v) / 2 * low,
    }[variance]
    mean = s.posterior_mean_coef1[column] * (x0 - error) + s.posterior_mean_coef2[column] * x_t
    std = (log_variance / 2).exp().expand_as(mean)
    nats = kl_divergence(q, Normal(mean, std)).clone()
    for i in range(x0[0].numel()):
        x, m, sd = (float(w[0].flatten()[i]) for w in (x0, mean, std))
        nats[0].view(-1)[i] = float(-log_mass(x, m, sd))

    def model(x, t):
        o = output(prediction, s, x0, x_t, TIMES, error)
        return torch.cat((o, v), dim=1) if variance == "learned_range" else o

    loss = fastddpm.training_loss(
        model, x0, schedule=s, prediction=prediction, t=TIMES, noise=eps, objective="bound", variance=variance
    )
    assert loss.dtype == torch.float64 and loss.dim() == 0
    assert float(loss) == pytest.approx(float(nats.mean()) / math.log(2), rel=1e-9)


@pytest.mark.parametrize("prediction", ["sample", "v_prediction", "mean"])
@pytest.mark.parametrize("variance", VARIANCES)
def test_losses_with_zero_snr(prediction, variance):
    """A correct network has no error: L_T is 0, L_{T-1} is a KL of two normals, and gradients are finite."""
    s, x0, t = Schedule([*SHORT.betas[:-1], 1.0]), on_grid(4, 1, 3, 3), TIMES
    eps, error = torch.randn_like(x0), 0.1 * torch.randn_like(x0)
    x_t, options = s.add_noise(x0, eps, t), {"schedule": s, "prediction": prediction, "t": t, "noise": eps}
    assert torch.equal(x_t[3], eps[3])
    right = output(prediction, s, x0, x_t, t, torch.zeros_like(x0))
    assert float(fastddpm.training_loss(lambda x, t: right, x0, **options)) == pytest.approx(0, abs=1e-12)
    bound, v = Bound(s, variance), torch.rand_like(x0) * 2 - 1 if variance == "learned_range" else None
    assert (bound.prior(x0) == 0).all()
    prev = s.alphas_cumprod[-2]
    # Learned log variances are between those of 1 and 1 - prev. fixed_large has 1 - prev.
    log_variance = (1 - prev).log() * (1 if v is None else (1 - v[3:]) / 2)
    q = Normal(prev.sqrt() * x0[3:], (1 - prev).sqrt())
    exact = kl_divergence(q, Normal(prev.sqrt() * (x0 - error)[3:], (log_variance / 2).exp())).mean() / math.log(2)
    got = bound.kl(t[3:], error[3:], None if v is None else v[3:])
    assert float(got) == pytest.approx(float(exact), rel=1e-9)
    o = output(prediction, s, x0, x_t, t, error)
    o = (o if v is None else torch.cat((o, v), dim=1)).requires_grad_()
    fastddpm.training_loss(lambda x, t: o, x0, objective="bound", variance=variance, **options).backward()
    assert o.grad.isfinite().all() and (o.grad[3] != 0).any()


def test_prior_is_the_definition():
    x0 = on_grid(3, 1, 4, 4)
    for schedule in (SHORT, Schedule.linear(), Schedule([0.999])):
        bar = schedule.alphas_cumprod[-1]
        exact = kl_divergence(Normal(bar.sqrt() * x0, (1 - bar).sqrt()), Normal(0.0, 1.0)).flatten(1).mean(
            1
        ) / math.log(2)
        torch.testing.assert_close(Bound(schedule, "fixed_small").prior(x0), exact, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("prediction", coefficients.PREDICTIONS)
@pytest.mark.parametrize("variance", VARIANCES)
def test_the_bound_can_be_differentiated(prediction, variance):
    x0 = on_grid(4, 1, 2, 2)
    eps = torch.randn_like(x0)
    halves = 2 if variance == "learned_range" else 1

    def loss(scale, shift):
        return fastddpm.training_loss(
            lambda x, t: (scale * x + shift).repeat(1, halves, 1, 1),
            x0, schedule=SHORT, prediction=prediction, t=TIMES, noise=eps, objective="bound", variance=variance,
        )  # fmt: skip

    arguments = [torch.randn(1, 1, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(loss, arguments)


@pytest.mark.parametrize("variance", VARIANCES[:2])
def test_its_gradient_is_equation_12s(variance):
    """For t >= 1 the loss is beta^2 / (2 sigma^2 alpha (1 - alpha-bar)) |eps - eps_hat|^2, in float32 and float64."""
    s, t = Schedule.linear(), torch.tensor([1, 40, 500, 999])
    x0 = on_grid(4, 1, 6, 6)
    eps, given = torch.randn_like(x0), torch.randn_like(x0)
    sigma2 = s.betas if variance == "fixed_large" else s.posterior_variance
    weight = (s.betas**2 / (2 * sigma2 * s.alphas * (1 - s.alphas_cumprod)))[t][:, None, None, None]
    o = given.requires_grad_()
    ((weight * (eps - o).square()).mean() / math.log(2)).backward()
    for dtype in (torch.float64, torch.float32):
        mine = given.detach().to(dtype, copy=True).requires_grad_()
        fastddpm.training_loss(
            lambda x, t, mine=mine: mine, x0.to(dtype), schedule=s, t=t, noise=eps.to(dtype), objective="bound",
            variance=variance,
        ).backward()  # fmt: skip
        torch.testing.assert_close(mine.grad.double(), o.grad, rtol=1e-9 if dtype == torch.float64 else 1e-5, atol=0)


def test_gradients_are_finite_for_a_network_that_knows_nothing():
    """In float32 and under autocast, at both ends of the chain, where x0_hat is off by thousands of standard deviations."""
    config = UNetConfig(
        sample_size=8,
        in_channels=1,
        channels=8,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        norm_groups=4,
    )
    t = torch.tensor([0, 0, 1, 999])
    x0 = on_grid(4, 1, 8, 8).float()
    for scale in (1, 1e4):
        for autocast in (False, True):
            model = UNet(config)
            with torch.no_grad():
                model.conv_out.weight.normal_().mul_(scale)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = fastddpm.training_loss(model, x0, t=t, seed=0, objective="bound")
            assert loss.dtype == torch.float32 and loss.isfinite()
            loss.backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            assert len(grads) > 10 and all(g.isfinite().all() for g in grads) and any((g != 0).any() for g in grads)


def test_simple_is_what_it_was():
    """The simple objective is bitwise the mean squared error, and requires no variance."""
    x0 = on_grid(5, 2, 3, 3).float()
    t = draw_timesteps(5, 20, seed=4)
    eps = draw_noise(x0, t, seed=4)
    expected = (0.3 * SHORT.add_noise(x0, eps, t) - eps).square().mean()
    for options in ({}, {"objective": "simple"}, {"variance": "none"}):
        assert torch.equal(
            fastddpm.training_loss(lambda x, t: 0.3 * x, x0, schedule=SHORT, seed=4, **options), expected
        )


def test_bad_arguments():
    x0, same = on_grid(2, 1, 2, 2), lambda x, t: x
    with pytest.raises(ValueError, match="objective: got 'hybrid'; expected one of simple, bound"):
        fastddpm.training_loss(same, x0, objective="hybrid")
    with pytest.raises(ValueError, match="variance: got 'none'; the variational bound needs a density"):
        fastddpm.training_loss(same, x0, objective="bound", variance="none")
    with pytest.raises(ValueError, match=r"output has shape \[2, 1, 2, 2\]; expected \[2, 2, 2, 2\]"):
        fastddpm.training_loss(same, x0, objective="bound", variance="learned_range")


@pytest.mark.parametrize("change", ["hook", "subclass"])
def test_labels_are_checked_of_a_network_that_its_owner_has_changed(change):
    class Own(UNet):
        def forward(self, x, t, class_labels=None):
            return super().forward(x, t, class_labels)

    config = UNetConfig(
        sample_size=4,
        in_channels=1,
        channels=8,
        channel_mult=(1,),
        attention_resolutions=(),
        norm_groups=4,
        num_classes=3,
    )
    model = (Own if change == "subclass" else UNet)(config, schedule=SHORT)
    if change == "hook":
        model.register_forward_hook(lambda module, arguments, output: output)
    with pytest.raises(ValueError, match=r"class_labels: got values from 0 to 7; expected 0\.\.2"):
        fastddpm.training_loss(model, torch.zeros(2, 1, 4, 4), class_labels=[0, 7])
