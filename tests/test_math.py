"""The mathematics of flow_sde.py against diffusers, torch.distributions and closed forms."""

import math

import numpy as np
import pytest
import torch
from conftest import sigma_schedule
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.distributions import Independent, Normal, kl_divergence

from flow_sde import (
    WEIGHTINGS,
    centred_log_ratio,
    clipped_surrogate,
    generators,
    kl,
    log_prob,
    pick_prompts,
    randn,
    rollout,
    step_weights,
    transition,
    update_average,
)

X, V, V2 = (torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(s)) for s in range(3))
STEPS = list(zip(sigma_schedule(10)[:-1], sigma_schedule(10)[1:]))


def test_ode_step_is_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    for timestep, (t, t_next) in zip(scheduler.timesteps, STEPS):
        theirs = scheduler.step(V, timestep, X).prev_sample
        for sde, noise_level in (("ode", 0.7), ("flow", 0.0), ("cps", 0.0)):
            mean, std = transition(X, V, t, t_next, noise_level, sde)
            assert std == 0 and torch.allclose(mean, theirs, atol=1e-5)


@pytest.mark.parametrize("sde", ["flow", "cps"])
def test_log_prob_and_kl_are_those_of_torch(sde):
    for t, t_next in STEPS[:-1] if sde == "cps" else STEPS:
        (mean, std), (mean2, _) = (transition(X, v, t, t_next, 0.7, sde) for v in (V, V2))
        p, q = (Independent(Normal(m.double(), std), 3) for m in (mean, mean2))
        x_next = mean + std * torch.randn_like(mean)
        assert torch.allclose(
            log_prob(x_next, mean, std).double(), p.log_prob(x_next.double()) / X[0].numel(), rtol=1e-4
        )
        assert torch.allclose(kl(mean, mean2, std).double(), kl_divergence(p, q) / X[0].numel(), rtol=1e-4)


def test_flow_transition_by_hand():
    t, t_next, a = 0.8, 0.7, 0.7  # s^2 = a^2 t / (1-t) = 1.96
    mean, std = transition(torch.tensor([1.0]), torch.tensor([2.0]), t, t_next, a)
    assert std == pytest.approx(math.sqrt(1.96 * 0.1))
    assert mean.item() == pytest.approx(1 - (2 + 1.96 / 1.6 * (1 + 0.2 * 2)) * 0.1)
    assert transition(X, V, 1.0, 0.96, a)[1] == pytest.approx(
        a / math.sqrt(0.04) * math.sqrt(0.04)
    )  # t = 1: s = a / sqrt(1 - t_next)


def test_kl_is_a_weighted_velocity_distance():
    a = 0.7
    for t, t_next in STEPS[1:]:
        (mean, std), (mean2, _) = (transition(X.double(), v.double(), t, t_next, a) for v in (V, V2))
        w = (t - t_next) / 2 * (1 - t) / t * (a / 2 + 1 / a) ** 2
        assert torch.allclose(
            kl(mean, mean2, std), w * (V.double() - V2.double()).square().flatten(1).mean(1), rtol=1e-9
        )


def test_a_step_without_noise_has_no_log_prob():
    with pytest.raises(ValueError):
        log_prob(X, X, 0.0)
    steps = list(
        rollout(lambda x, t: V, X, sigma_schedule(4), [0, 0.7, 0.7, 0], "flow", lambda: torch.zeros_like(X))
    )
    assert [s.log_prob is not None for s in steps] == [False, True, True, False]


@pytest.mark.parametrize("noise_level", [0.0, 0.3, 0.7, 1.0])
def test_marginal_variance_on_a_gaussian(noise_level):
    """Data N(0, c^2): the exact velocity is linear in x, so the sampler's variance obeys a recursion; whatever the noise, it must
    follow the ODE's (1-t)^2 c^2 + t^2, ever closer as steps get finer. (From t = 0.9: at t = 1 Flow-GRPO's replacement of 1-t injects a
    finite amount of noise in the first step, however short, and adds a^4/4 to the variance.)"""
    c, errors = 0.5, []
    marginal = lambda t: (1 - t) ** 2 * c**2 + t**2
    for n in (100, 400, 1600):
        sigmas, worst = np.linspace(0.9, 0.02, n + 1).tolist(), 0.0
        variance = marginal(0.9)
        for t, t_next in zip(sigmas[:-1], sigmas[1:]):
            gain, std = transition(1.0, (t - (1 - t) * c**2) / marginal(t), t, t_next, noise_level)
            variance = gain**2 * variance + std**2
            worst = max(worst, abs(variance / marginal(t_next) - 1))
        errors.append(worst)
    assert errors[2] < 0.01 and errors[2] < 0.3 * errors[1] < 0.09 * errors[0] * 1.2, errors


def test_first_step_from_pure_noise():
    gain, std = transition(1.0, 1.0, 1.0, 0.999, 0.7)
    assert gain**2 + std**2 == pytest.approx(1 + 0.7**4 / 4, abs=3e-3)


def test_cps_keeps_the_amount_of_noise():
    """x_t = (1-t) x_0 + t eps becomes (1-t') x_0 + noise whose variance is t'^2, at every step and noise level."""
    for t, t_next in STEPS:
        for a in (0.3, 0.7, 1.0):
            mean, std = transition(t * 1.0, 1.0, t, t_next, a, "cps")  # x_0 = 0, eps = 1
            assert mean**2 + std**2 == pytest.approx(t_next**2)
            mean, _ = transition((1 - t) * 1.0, -1.0, t, t_next, a, "cps")  # x_0 = 1, eps = 0
            assert mean == pytest.approx(1 - t_next)


def test_equal_student_and_teacher_have_no_loss_and_no_gradient():
    v = V.clone().requires_grad_()
    for t, t_next in STEPS:
        mean, std = transition(X, v, t, t_next, 0.7)
        loss = kl(mean, transition(X, V, t, t_next, 0.7)[0], std).sum()
        assert loss.item() == 0 and torch.autograd.grad(loss, v)[0].abs().max() == 0


def test_which_objective_learns():
    """The gradient table: a linear velocity v = W x with 400,000 states, one transition. Expected gradient of each objective
    relative to the analytic one (the gradient through the closed-form KL)."""
    d, n, t, t_next, a = 3, 400_000, 0.7, 0.6, 0.7
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=gen)
    W = torch.eye(d) + 0.3 * torch.randn(d, d, generator=gen)
    teacher = W + 0.2 * torch.randn(d, d, generator=gen)
    W = W.requires_grad_()
    gauss = lambda w: transition(x, x @ w.T, t, t_next, a)
    (mean, std), (mean_teacher, _) = gauss(W), gauss(teacher)
    x_next = mean.detach() + std * torch.randn(n, d, generator=gen)
    new, old = log_prob(x_next, mean, std), log_prob(x_next, mean, std).detach()
    closed = kl(mean, mean_teacher, std)
    reward = (log_prob(x_next, mean_teacher, std) - old) * d

    def gradient(loss):
        return torch.autograd.grad(loss.mean(), W, retain_graph=True)[0]

    analytic = gradient(closed)
    compare = lambda g: (
        torch.nn.functional.cosine_similarity(g.flatten(), analytic.flatten(), 0).item(),
        ((g - analytic).norm() / analytic.norm()).item(),
    )
    paper = compare(gradient(clipped_surrogate(new - old, -closed.detach() * d, 1e-4)))
    action = compare(gradient(clipped_surrogate(new - old, reward, 1e-4)))
    attached = compare(
        gradient(clipped_surrogate(new - old, torch.zeros(n), 1e-4) + closed)
    )  # what differentiating through -KL adds
    for name, (cosine, error) in {"kl": attached, "ppo": action, "ppo-paper": paper}.items():
        print(f"\n{name}: cosine {cosine:.3f}, relative error {error:.3f}", end="")
    assert paper[1] > 0.9  # the paper's literal objective: expected gradient zero
    assert gradient(clipped_surrogate(new - old, -closed.detach() * d, 1e-4)).norm() < 0.1 * analytic.norm()
    assert action[0] > 0.99 and action[1] < 0.1  # the action-dependent reward: the analytic gradient
    assert attached[1] < 1e-5


def test_clipping_works():
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0])
    log_ratio = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)
    clipped_surrogate(log_ratio, advantage, 0.2).sum().backward()
    assert (log_ratio.grad != 0).tolist() == [
        False,
        True,
        True,
        False,
    ]  # moving further the way the advantage points is not rewarded
    with pytest.raises(AssertionError):
        clipped_surrogate(log_ratio, advantage[:, None], 0.2)  # a (B,1) advantage would broadcast to (B,B)


def test_drift_makes_a_log_ratio_one_sided_and_centring_mends_it():
    """65,536 dimensions at SD3's last learnt step (t = 0.28): the mean that a drifted policy's log-ratio has is several times Flow-GRPO's
    clip range of 1e-4 and its own spread."""
    t, t_next = STEPS[8]
    gen = torch.Generator().manual_seed(0)
    x, v = (torch.randn(64, 16, 64, 64, generator=gen) for _ in range(2))
    for drift, bias, spread in (
        (0.01, -7.6e-5, 4e-5),
        (0.03, -6.4e-4, 1.3e-4),
    ):  # of the mean, per dimension, in units of the transition
        mean_old, std = transition(x, v, t, t_next, 0.7)
        mean = mean_old + drift * torch.randn(x.shape, generator=gen) * (2 * -bias) ** 0.5 / drift * std
        x_next = mean_old + std * torch.randn(x.shape, generator=gen)
        plain = log_prob(x_next, mean, std) - log_prob(x_next, mean_old, std)
        centred = centred_log_ratio(x_next, mean, mean_old, std)
        assert plain.mean().item() == pytest.approx(bias, rel=0.2) and centred.std().item() == pytest.approx(
            spread, rel=0.3
        )
        assert abs(centred.mean()) < spread / 3  # of 64 samples
        assert torch.allclose(centred, plain + kl(mean, mean_old, std), atol=1e-5)
    # to first order, which is all that counts where the policies meet, the gradients are the same
    mean = mean_old.clone().requires_grad_()
    a, b = (
        torch.autograd.grad(f.sum(), mean)[0]
        for f in (log_prob(x_next, mean, std), centred_log_ratio(x_next, mean, mean_old, std))
    )
    assert torch.allclose(a, b, atol=1e-9)


def test_average_of_the_parameters():
    """After n updates the k-th parameters weigh d^(n-k), from the second update on the decay tells, and the start has no weight."""
    params = [torch.full((3,), float(k)) for k in range(1, 6)]
    for decay in (0.0, 0.5, 0.9):
        ema, d = [torch.full((3,), 100.0)], decay ** (1 / 8)
        for n, p in enumerate(params, 1):
            update_average(ema, [p], decay, n)
            weights = [d ** (n - k) for k in range(1, n + 1)]
            assert ema[0][0].item() == pytest.approx(
                sum(w * k for k, w in enumerate(weights, 1)) / sum(weights), rel=1e-5
            )


def test_noise_and_prompts_do_not_depend_on_how_the_batch_is_cut():
    whole = randn(generators(7, 3, range(6)), (2, 2), "cpu")
    halves = torch.cat([randn(generators(7, 3, r), (2, 2), "cpu") for r in (range(3), range(3, 6))])
    assert torch.equal(whole, halves) and not torch.equal(
        whole, randn(generators(7, 4, range(6)), (2, 2), "cpu")
    )
    prompts = {"a": [{"prompt": f"a{i}"} for i in range(50)], "b": [{"prompt": f"b{i}"} for i in range(50)]}
    batch = pick_prompts(prompts, {"a": 3, "b": 1}, 0, 5, 8)
    assert [t for t, _ in batch].count("a") == 6 and batch == pick_prompts(prompts, {"a": 3, "b": 1}, 0, 5, 8)
    assert all(t == "b" for t, _ in pick_prompts(prompts, {"a": 0, "b": 1}, 0, 5, 8))
    turns = [
        {t for t, _ in pick_prompts(prompts, {"a": 3, "b": 1}, 0, step, 8, "alternate")} for step in range(8)
    ]
    assert turns == [{"a"}, {"a"}, {"a"}, {"b"}] * 2


@pytest.mark.parametrize("sde", ["flow", "cps"])
def test_step_weights(sde):
    """Times its factor, a step's KL is the same multiple of the velocity distance at every step, the mean of what it was; or it is left alone."""
    sigmas, one = sigma_schedule(10)[:-1], torch.ones(1, 4)
    steps, terms = list(zip(sigmas, sigmas[1:])), []
    for t, t_next in steps:
        (mean, std), (other, _) = (transition(one, v * one, t, t_next, 0.7, sde) for v in (0.0, 1.0))
        terms.append(kl(mean, other, std).item())
    factors = step_weights(steps, 0.7, sde, "uniform")
    assert list(factors) == sigmas[:-1]
    assert [f * term for f, term in zip(factors.values(), terms)] == pytest.approx(
        [sum(terms) / len(terms)] * len(terms), rel=1e-3
    )
    assert set(step_weights(steps, 0.7, sde, "kl").values()) == {1.0} and max(terms) > 10 * min(terms)
    for (t, t_next), term in zip(steps, terms):
        assert step_weights(steps, 0.7, sde, "kl-dt")[t] == t - t_next
        (mean, _), (other, _) = (
            transition(one, v * one, t, t_next, 0.0, "ode") for v in (0.0, 1.0)
        )  # of deterministic steps
        assert step_weights(steps, 0.7, sde, "dt2")[t] * term == pytest.approx(
            (mean - other).square().mean().item() / 2, rel=1e-3
        )


def test_share_of_the_last_learnt_step():
    """Of the loss, T = 10, the same velocity distance at every step: README's table."""
    sigmas, one = sigma_schedule(10)[:-1], torch.ones(1, 4)
    steps = list(zip(sigmas, sigmas[1:]))
    for weighting, expected in zip(WEIGHTINGS, (0.111, 0.641, 0.757, 0.466)):
        factors, terms = step_weights(steps, 0.7, "flow", weighting), []
        for t, t_next in steps:
            (mean, std), (other, _) = (transition(one, v * one, t, t_next, 0.7) for v in (0.0, 1.0))
            terms.append(factors[t] * kl(mean, other, std).item())
        print(weighting, *(f"{term / sum(terms):.3f}" for term in terms))
        assert terms[-1] / sum(terms) == pytest.approx(expected, abs=1e-3)
