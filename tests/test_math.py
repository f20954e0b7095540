"""The equations of flow_sde.py, one a test, against closed forms, torch.distributions and diffusers."""

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
    kl_weight,
    log_prob,
    pick_prompts,
    randn,
    rollout,
    step_weights,
    transition,
    update_average,
    velocity_distance,
)

SIGMAS = sigma_schedule(10)
STEPS = list(zip(SIGMAS, SIGMAS[1:]))
X, V, V2 = (torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(3))


# -- transition: N(mean, std^2) ----------------------------------------------------------------------------


@pytest.mark.parametrize("sde, noise_level", [("ode", 0.7), ("flow", 0.0), ("cps", 0.0)])
def test_ode(sde, noise_level):
    """x' = x - v dt, the step of diffusers' scheduler; without noise every sampler is this one."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    for timestep, (t, t_next) in zip(scheduler.timesteps, STEPS):
        mean, std = transition(X, V, t, t_next, noise_level, sde)
        assert std == 0
        assert torch.allclose(mean, scheduler.step(V, timestep, X).prev_sample, atol=1e-5)


def test_flow_sde():
    """mean = x - [v + s^2/(2t) (x + (1-t) v)] dt, std = s sqrt(dt), s^2 = a^2 t/(1-t): eq. 5, by hand."""
    mean, std = transition(torch.tensor([1.0]), torch.tensor([2.0]), t=0.8, t_next=0.7, noise_level=0.7)
    assert std == pytest.approx(math.sqrt(1.96 * 0.1))
    assert mean.item() == pytest.approx(1 - (2 + 1.96 / 1.6 * (1 + 0.2 * 2)) * 0.1)


def test_flow_sde_at_the_first_step():
    """At t = 1, s^2 = a^2 / (1-t'): std = a, however short the step, which adds a^4/4 to the variance."""
    gain, std = transition(1.0, 1.0, 1.0, 0.999, 0.7)
    assert std == pytest.approx(0.7)
    assert gain**2 + std**2 == pytest.approx(1 + 0.7**4 / 4, abs=3e-3)


@pytest.mark.parametrize("noise_level", [0.0, 0.3, 0.7, 1.0])
def test_flow_sde_has_the_marginals_of_the_ode(noise_level):
    """Var x_t = (1-t)^2 c^2 + t^2 for data N(0, c^2), whatever the noise, ever closer as steps get finer: the
    exact velocity is linear in x. From t = 0.9, because of the first step's extra noise."""

    def marginal(t, c=0.5):
        return (1 - t) ** 2 * c**2 + t**2

    errors = []
    for n in (100, 400, 1600):
        sigmas, variance, worst = np.linspace(0.9, 0.02, n + 1).tolist(), marginal(0.9), 0.0
        for t, t_next in zip(sigmas, sigmas[1:]):
            v = (t - (1 - t) * 0.5**2) / marginal(t)
            gain, std = transition(1.0, v, t, t_next, noise_level)
            variance = gain**2 * variance + std**2
            worst = max(worst, abs(variance / marginal(t_next) - 1))
        errors.append(worst)
    assert errors[2] < 0.01 and errors[2] < 0.3 * errors[1] and errors[1] < 0.36 * errors[0], errors


@pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.0])
def test_cps_preserves_the_coefficients(noise_level):
    """x = (1-t) x_0 + t eps becomes (1-t') x_0 + noise of variance t'^2, at every step."""
    for t, t_next in STEPS:
        mean, std = transition(t * 1.0, 1.0, t, t_next, noise_level, "cps")  # x_0 = 0, eps = 1
        assert mean**2 + std**2 == pytest.approx(t_next**2)
        mean, std = transition((1 - t) * 1.0, -1.0, t, t_next, noise_level, "cps")  # x_0 = 1, eps = 0
        assert mean == pytest.approx(1 - t_next)


# -- log_prob and kl ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sde", ["flow", "cps"])
def test_log_prob_and_kl(sde):
    """log N(x'; mean, std^2) / d and KL(p || q) / d are those of torch.distributions."""
    for t, t_next in STEPS[:-1]:
        (mean, std), (mean2, _) = (transition(X, v, t, t_next, 0.7, sde) for v in (V, V2))
        p, q = (Independent(Normal(m.double(), std), 3) for m in (mean, mean2))
        x_next, d = mean + std * torch.randn_like(mean), X[0].numel()
        expected = p.log_prob(x_next.double()) / d
        assert torch.allclose(log_prob(x_next, mean, std).double(), expected, rtol=1e-4)
        assert torch.allclose(kl(mean, mean2, std).double(), kl_divergence(p, q) / d, rtol=1e-4)


def test_log_prob_of_a_step_without_noise():
    """There is none; a rollout says None."""
    with pytest.raises(ValueError):
        log_prob(X, X, 0.0)
    noise_levels = [0, 0.7, 0.7, 0]
    steps = rollout(lambda x, t: V, X, sigma_schedule(4), noise_levels, "flow", lambda: torch.zeros_like(X))
    assert [step.log_prob is not None for step in steps] == [False, True, True, False]


@pytest.mark.parametrize("sde", ["flow", "cps"])
def test_kl_is_a_weighted_velocity_distance(sde):
    """KL = w(t) mean (v - v_teacher)^2; of the flow-SDE w(t) = dt/2 (1-t)/t (a/2 + 1/a)^2 for t < 1."""
    a, x, v, v2 = 0.7, X.double(), V.double(), V2.double()
    for t, t_next in STEPS[:-1]:
        (mean, std), (mean2, _) = (transition(x, velocity, t, t_next, a, sde) for velocity in (v, v2))
        w = kl_weight(t, t_next, a, sde)
        assert torch.allclose(kl(mean, mean2, std), w * velocity_distance(v, v2), rtol=1e-9)
        if sde == "flow" and t < 1:
            assert w == pytest.approx((t - t_next) / 2 * (1 - t) / t * (a / 2 + 1 / a) ** 2)
    assert torch.allclose(velocity_distance(v, v2), (v - v2).square().flatten(1).mean(1))


def test_kl_of_equals():
    """Student = teacher: no loss and no gradient."""
    v = V.clone().requires_grad_()
    for t, t_next in STEPS:
        mean, std = transition(X, v, t, t_next, 0.7)
        loss = kl(mean, transition(X, V, t, t_next, 0.7)[0], std).sum()
        assert loss.item() == 0 and torch.autograd.grad(loss, v)[0].abs().max() == 0


# -- step_weights ------------------------------------------------------------------------------------------


def test_step_weights():
    """What a velocity distance counts. kl: w(t). uniform: the mean of w. kl-dt: dt w(t). dt2: dt^2/2."""
    sigmas, dt = SIGMAS[:-1], [t - t_next for t, t_next in STEPS[:-1]]
    w = [kl_weight(t, t_next, 0.7) for t, t_next in STEPS[:-1]]
    expected = {"kl": w, "kl-dt": [d * wt for d, wt in zip(dt, w)], "uniform": [sum(w) / len(w)] * len(w)}
    expected["dt2"] = [d * d / 2 for d in dt]
    assert expected.keys() == set(WEIGHTINGS) and max(w) > 10 * min(w)
    for weighting, weights in expected.items():
        found = step_weights(sigmas, 0.7, weighting)
        assert list(found) == sigmas[:-1] and list(found.values()) == pytest.approx(weights, rel=1e-3)


@pytest.mark.parametrize("weighting, share", list(zip(WEIGHTINGS, (0.111, 0.641, 0.757, 0.466))))
def test_share_of_the_last_step(weighting, share):
    """Of the loss, ten steps, the same distance at every step: the table of experiments/README.md."""
    weights = list(step_weights(SIGMAS[:-1], 0.7, weighting).values())
    assert weights[-1] / sum(weights) == pytest.approx(share, abs=1e-3)


# -- policy gradients --------------------------------------------------------------------------------------


def test_which_objective_learns():
    """The gradient table: a linear velocity v = W x, 400,000 states, one transition. Against the gradient of
    the closed-form KL, E grad is the same for the reward log pi_T(a|s) - log pi(a|s), and 0 for the paper's,
    the detached -KL of the state."""
    d, n, gen = 3, 400_000, torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=gen)
    W = torch.eye(d) + 0.3 * torch.randn(d, d, generator=gen)
    W_teacher = W + 0.2 * torch.randn(d, d, generator=gen)
    W.requires_grad_()
    (mean, std), (mean_teacher, _) = (transition(x, x @ w.T, 0.7, 0.6, 0.7) for w in (W, W_teacher))
    x_next = mean.detach() + std * torch.randn(n, d, generator=gen)
    new = log_prob(x_next, mean, std)
    old, closed = new.detach(), kl(mean, mean_teacher, std)

    def gradient(loss):
        return torch.autograd.grad(loss.mean(), W, retain_graph=True)[0]

    exact = gradient(closed)
    action = gradient(clipped_surrogate(new - old, (log_prob(x_next, mean_teacher, std) - old) * d, 1e-4))
    paper = gradient(clipped_surrogate(new - old, -closed.detach() * d, 1e-4))
    attached = gradient(clipped_surrogate(new - old, torch.zeros(n), 1e-4) + closed)  # through -KL itself
    size = exact.norm()
    cosine = torch.nn.functional.cosine_similarity(action.flatten(), exact.flatten(), 0)
    print(f"ppo {(action - exact).norm() / size:.3f}, ppo-paper {paper.norm() / size:.3f} of the gradient")
    assert (action - exact).norm() < 0.1 * size and cosine > 0.99
    assert paper.norm() < 0.1 * size
    assert (attached - exact).norm() < 1e-5 * size


def test_clipped_surrogate():
    """-min(ratio A, clip(ratio) A): moving further the way the advantage points is not rewarded."""
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0])
    log_ratio = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)
    clipped_surrogate(log_ratio, advantage, 0.2).sum().backward()
    assert (log_ratio.grad != 0).tolist() == [False, True, True, False]
    with pytest.raises(AssertionError):
        clipped_surrogate(log_ratio, advantage[:, None], 0.2)  # (B, 1) would broadcast to (B, B)


@pytest.mark.parametrize("bias", [-7.6e-5, -6.4e-4])
def test_centred_log_ratio(bias):
    """log pi - log pi_old + |mean - mean_old|^2 / (2 std^2). At SD3's last learnt step, 65,536 dimensions,
    the log-ratio of a policy that has drifted is one-sided: its mean is several of its spreads."""
    t, t_next, spread = *STEPS[8], math.sqrt(-2 * bias / 65536)
    gen = torch.Generator().manual_seed(0)
    x, v, way, noise = (torch.randn(64, 16, 64, 64, generator=gen) for _ in range(4))
    mean_old, std = transition(x, v, t, t_next, 0.7)
    mean = mean_old + math.sqrt(-2 * bias) * std * way
    x_next = mean_old + std * noise
    plain = log_prob(x_next, mean, std) - log_prob(x_next, mean_old, std)
    centred = centred_log_ratio(x_next, mean, mean_old, std)
    assert torch.allclose(centred, plain + kl(mean, mean_old, std), atol=1e-5)
    assert plain.mean().item() == pytest.approx(bias, rel=0.2) and bias < -1.5 * spread
    assert centred.std().item() == pytest.approx(spread, rel=0.3) and abs(centred.mean()) < spread / 3


def test_centred_log_ratio_has_the_same_gradient_where_the_policies_meet():
    mean_old, std = transition(X, V, *STEPS[8], 0.7)
    mean, x_next = mean_old.clone().requires_grad_(), mean_old + std * V2
    (plain,) = torch.autograd.grad(log_prob(x_next, mean, std).sum(), mean)
    (centred,) = torch.autograd.grad(centred_log_ratio(x_next, mean, mean_old, std).sum(), mean)
    assert torch.allclose(plain, centred, rtol=1e-4)


# -- the average, and what is drawn ------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_average_of_the_parameters(decay):
    """After n updates the k-th parameters weigh d^(n-k), d = decay^(1/8); the start has no weight."""
    average, d = [torch.full((3,), 100.0)], decay ** (1 / 8)
    for n in range(1, 6):
        update_average(average, [torch.full((3,), float(n))], decay, n)
        weights = [d ** (n - k) for k in range(1, n + 1)]
        expected = sum(weight * k for k, weight in enumerate(weights, 1)) / sum(weights)
        assert average[0][0].item() == pytest.approx(expected, rel=1e-5)


def test_noise_does_not_depend_on_how_the_batch_is_cut():
    """A sample's noise is a function of (seed, step, index in the global batch)."""
    whole, *halves = (randn(generators(7, 3, r), (2, 2), "cpu") for r in (range(6), range(3), range(3, 6)))
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(whole, randn(generators(7, 4, range(6)), (2, 2), "cpu"))


def test_prompts_come_by_weight():
    """A batch has every task's share, or whole batches have it in turn; a function of (seed, step)."""
    prompts = {task: [{"prompt": f"{task}{i}"} for i in range(50)] for task in "ab"}

    def tasks(a, b, step=5, *schedule):
        return [task for task, _ in pick_prompts(prompts, {"a": a, "b": b}, 0, step, 8, *schedule)]

    assert tasks(3, 1).count("a") == 6 and set(tasks(0, 1)) == {"b"}
    assert pick_prompts(prompts, {"a": 3, "b": 1}, 0, 5, 8) == pick_prompts(
        prompts, {"a": 3, "b": 1}, 0, 5, 8
    )
    turns = [set(tasks(3, 1, step, "alternate")) for step in range(8)]
    assert turns == [{"a"}, {"a"}, {"a"}, {"b"}] * 2
