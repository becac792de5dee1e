"""The second edition's chain, on the actor of diffwpo_continuous.py, against closed forms: Gaussian target, linear controls, exact quadrature, densities on a grid.

The latent value Q(a) = -(c/2) (a - b)^2 at temperature alpha has the target exp(Q/alpha)/Z = N(b, alpha/c). It is put
into the script's own `policy_loss` by a critic that undoes the squashing and its log-determinant.
"""

import math

import pytest
import torch

import diffwpo_continuous
from tests.common import (
    actor_loss,
    chain,
    gauss_hermite,
    linear_control_actor,
    log_normal,
    make_actor,
    pathwise_loss,
    randomise,
    set_delta,
)

ALPHA, CURVATURE, CENTRE, PRIOR_STD = 0.4, 1.7, 0.8, 1.2
TARGET_STD = (ALPHA / CURVATURE) ** 0.5
LOG_Z = 0.5 * math.log(2 * math.pi * ALPHA / CURVATURE)
PRIOR_ENTROPY = 0.5 * math.log(2 * math.pi * math.e * PRIOR_STD**2)
DELTA = [0.05, 0.2, 0.7]


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def latent_critic(actor):
    def qf(obs, action):
        latent = torch.atanh((action - actor.action_bias) / actor.action_scale)
        value = (-0.5 * CURVATURE * (latent - CENTRE) ** 2).sum(-1)
        return (value - ALPHA * actor.squash(latent)[1]).expand(2, -1)

    return qf


def exact_loss(monkeypatch, actor):
    """policy_loss as an exact expectation over the noises of the chain (a polynomial of degree two in them)."""
    nodes, weights = gauss_hermite(actor.diffusion_steps + 1)
    noise = nodes.T[:, :, None]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *shape, **_: noise)
        patch.setattr(torch.Tensor, "mean", lambda values, *_: (values * weights).sum())
        return pathwise_loss(actor, latent_critic(actor), torch.zeros(len(nodes), 1), ALPHA)[0]


def quadratic_step(p, q, r, delta, control_slope, control_offset):
    """Coefficients of V_k(a) = p a^2 + q a + r from those of Q_k, for u_k(a) = slope a + offset; nu, alpha as above."""
    variance, decay = PRIOR_STD**2 * delta, 1 - delta / 2
    a, b = decay + variance * control_slope, variance * control_offset
    p_new = p * a**2 - ALPHA * (1 - decay * a) ** 2 / (2 * variance)
    q_new = 2 * p * a * b + q * a + ALPHA * (1 - decay * a) * decay * b / variance
    r_new = (
        p * (b**2 + variance) + q * b + r + ALPHA * 0.5 * torch.log(2 * math.pi * math.e * variance)
    )
    r_new -= ALPHA * (
        0.5 * torch.log(2 * math.pi * variance) + decay**2 * (b**2 + variance) / (2 * variance)
    )
    return p_new, q_new, r_new


def closed_form_objective(delta, slope, offset):
    """E[Q] - alpha E[sum_k l_k] of the chain with linear controls."""
    coefficients = [
        torch.tensor(x) for x in (-CURVATURE / 2, CURVATURE * CENTRE, -CURVATURE * CENTRE**2 / 2)
    ]
    for k in range(len(delta)):
        coefficients = quadratic_step(*coefficients, delta[k], slope[k], offset[k])
    return coefficients[0] * PRIOR_STD**2 + coefficients[2]


def optimal_control(delta):
    """Controls that reverse the noising of N(b, alpha/c): slopes, offsets, gap of the bound, mean and std of a^0."""
    mean, variance = CENTRE, ALPHA / CURVATURE
    slope, offset, gap = [], [], 0.0
    for d in delta:
        decay, noise = 1 - d / 2, PRIOR_STD**2 * d
        new_mean, new_variance = decay * mean, decay**2 * variance + noise
        gain = variance * decay / new_variance
        posterior = variance - gain**2 * new_variance
        slope.append((gain - decay) / noise)
        offset.append((mean - gain * new_mean) / noise)
        gap += 0.5 * (noise / posterior - 1 - math.log(noise / posterior))
        mean, variance = new_mean, new_variance
    prior = torch.distributions.Normal(0.0, PRIOR_STD)
    last = torch.distributions.Normal(torch.tensor(mean), torch.tensor(variance).sqrt())
    gap += torch.distributions.kl_divergence(prior, last).item()
    mean, variance = 0.0, PRIOR_STD**2
    for k in range(len(delta) - 1, -1, -1):
        noise = PRIOR_STD**2 * delta[k]
        factor = 1 - delta[k] / 2 + noise * slope[k]
        mean, variance = factor * mean + noise * offset[k], factor**2 * variance + noise
    return slope, offset, gap, mean, variance**0.5


def reference_control(actor, obs, latent, k):
    """The network as one would write it down: an MLP on (obs, embedding of k, a^k)."""
    embedding = actor.step_embedding[k - 1].expand(len(obs), -1)
    weight = torch.cat((actor.fc_obs.weight, actor.fc_step.weight, actor.fc_latent.weight), dim=1)
    x = torch.cat((obs, embedding, latent), dim=1) @ weight.T + actor.fc_obs.bias
    return actor.fc_control(actor.fc2(x.relu()).relu())


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_path_log_ratio_is_the_sum_of_kernel_log_densities(steps):
    actor = make_actor(
        diffwpo_continuous,
        low=(-1.0, -0.4),
        high=(3.0, 0.4),
        diffusion_steps=steps,
        prior_std=1.5,
        hidden_dim=16,
    )
    randomise(actor)
    obs = torch.randn(30, 3)
    action, log_prob, latents, noise = chain(actor, obs, seed=3)
    low, high = diffwpo_continuous.DELTA_MIN, diffwpo_continuous.DELTA_MAX
    delta = low + (high - low) / (1 + torch.exp(-actor.delta_logit))
    expected = log_normal(latents[steps], 0.0, torch.tensor(1.5))
    for k in range(steps, 0, -1):
        std, decay = 1.5 * delta[k - 1].sqrt(), 1 - delta[k - 1] / 2
        mean = decay * latents[k] + std * reference_control(actor, obs, latents[k], k)
        torch.testing.assert_close(latents[k - 1], mean + std * noise[k - 1])
        expected = (
            expected
            + log_normal(latents[k - 1], mean, std)
            - log_normal(latents[k], decay * latents[k - 1], std)
        )
    torch.testing.assert_close(
        action, torch.tanh(latents[0]) * torch.tensor([2.0, 0.4]) + torch.tensor([1.0, 0.0])
    )
    slope = torch.tensor([2.0, 0.4]) * (1 - torch.tanh(latents[0]) ** 2)
    torch.testing.assert_close(log_prob, expected - slope.log().sum(-1))


def test_initial_policy_has_no_control_and_a_geometric_schedule():
    actor = make_actor(
        diffwpo_continuous, diffusion_steps=5, hidden_dim=16, delta_first=1.0, delta_last=0.01
    )
    decay, std = actor.kernels()
    expected = torch.tensor([0.01, 0.01**0.75, 0.1, 0.01**0.25, 1.0])[:, None, None]
    torch.testing.assert_close(2 * (1 - decay), expected)
    torch.testing.assert_close(std**2, expected)
    assert actor.diagnostics(torch.randn(10, 3))["diffusion/control_energy"].abs().max() < 1e-20
    randomise(actor)
    obs = torch.randn(50, 3)
    torch.manual_seed(4)
    diagnostics = actor.diagnostics(obs)
    _, _, latents, _ = chain(actor, obs, seed=4)
    energy = sum(
        0.5 * reference_control(actor, obs, latents[k], k).square().sum(-1) for k in range(1, 6)
    )
    torch.testing.assert_close(diagnostics["diffusion/control_energy"], energy)


def test_fixed_schedule_is_not_learned():
    actor = make_actor(diffwpo_continuous, learn_delta=False)
    randomise(actor)
    actor.sample(torch.randn(5, 3))[1].mean().backward()
    assert actor.delta_logit.grad is None and actor.fc2.weight.grad is not None


@pytest.mark.parametrize("steps", [1, 4])
def test_partition_function_is_unbiased_for_any_parameters(steps):
    """E_q[ exp(Q/alpha) pi(chain) / q(chain) ] = integral over the action box of exp(Q/alpha)."""
    low, high, temperature = (-1.0, -0.5), (3.0, 2.0), 0.7
    actor = make_actor(
        diffwpo_continuous,
        low=low,
        high=high,
        diffusion_steps=steps,
        hidden_dim=16,
        delta_last=0.1,
        prior_std=1.2,
    )
    randomise(actor, 0.2)
    grid = [torch.linspace(lo, hi, 4001) for lo, hi in zip(low, high, strict=True)]
    value = lambda a, b: torch.sin(3 * a) - b**2  # noqa: E731
    for reward in (lambda a, b: 0 * a, value):
        exact = torch.trapezoid(torch.exp(reward(grid[0], 0 * grid[0]) / temperature), grid[0])
        exact = exact * torch.trapezoid(
            torch.exp(reward(0 * grid[1], grid[1]) / temperature), grid[1]
        )
        with torch.no_grad():
            action, log_prob = actor.sample(torch.zeros(400_000, 3))
        weight = torch.exp(reward(action[:, 0], action[:, 1]) / temperature - log_prob)
        error = (weight.std() / len(weight) ** 0.5).item()
        assert error < 0.02 * exact
        assert weight.mean().item() == pytest.approx(exact.item(), abs=5 * error)
        assert (
            reward(action[:, 0], action[:, 1]) / temperature - log_prob
        ).mean() < exact.log()  # the bound


def test_objective_of_linear_controls_is_the_closed_form(monkeypatch):
    """The script's actor loss, by exact quadrature, is -J - alpha H(prior)."""
    slope, offset = [0.9, -0.4, 0.3], [0.2, 0.5, -0.6]
    actor = linear_control_actor(diffwpo_continuous, slope, offset, DELTA, PRIOR_STD)
    expected = -closed_form_objective(torch.tensor(DELTA), slope, offset) - ALPHA * PRIOR_ENTROPY
    assert exact_loss(monkeypatch, actor).item() == pytest.approx(expected.item(), abs=1e-8)


@pytest.mark.parametrize("delta", [DELTA, [0.3], [0.01, 0.05, 0.2, 0.6, 1.3]])
def test_gap_at_the_gaussian_targets_optimum(monkeypatch, delta):
    """With the controls that reverse the noising, ln Z - bound is the closed form, and no control does better."""
    slope, offset, gap, _, _ = optimal_control(delta)
    loss = exact_loss(
        monkeypatch, linear_control_actor(diffwpo_continuous, slope, offset, delta, PRIOR_STD)
    ).item()
    assert LOG_Z + loss / ALPHA == pytest.approx(gap, abs=1e-7)
    for sign in (-0.05, 0.05):
        for kind in range(2):
            moved = [list(slope), list(offset)]
            moved[kind][0] += sign
            worse = exact_loss(
                monkeypatch, linear_control_actor(diffwpo_continuous, *moved, delta, PRIOR_STD)
            )
            assert worse.item() > loss + 1e-7


def test_chain_gradient_is_the_sum_of_per_step_gradients(monkeypatch):
    """With exact Q_k, the gradient through the chain equals the sum over k of the policy-gradient terms."""
    slope, offset = torch.tensor([0.9, -0.4, 0.3]), torch.tensor([0.2, 0.5, -0.6])
    actor = linear_control_actor(diffwpo_continuous, slope, offset, DELTA, PRIOR_STD)
    exact_loss(monkeypatch, actor).backward()
    weight = actor.fc_control.weight.grad.view(3, 3)
    low, high, delta = (
        diffwpo_continuous.DELTA_MIN,
        diffwpo_continuous.DELTA_MAX,
        torch.tensor(DELTA),
    )
    delta_grad = actor.delta_logit.grad[:, 0] / ((delta - low) * (high - delta) / (high - low))
    chain_gradients = [weight[:, 0] - weight[:, 1], weight[:, 2], delta_grad]

    # the actor's output is f = nu sqrt(delta) u: its slopes and offsets, and delta, are the parameters
    std = PRIOR_STD * delta.sqrt()
    parameters = [x.clone().requires_grad_() for x in (std * slope, std * offset, delta)]
    moments, mean, square = [], 0.0, PRIOR_STD**2  # E[a^k], E[(a^k)^2], from k = K down
    for k in (2, 1, 0):
        moments.insert(0, (mean, square))
        variance = PRIOR_STD**2 * delta[k]
        a, b = 1 - delta[k] / 2 + variance * slope[k], variance * offset[k]
        mean, square = a * mean + b, a**2 * square + 2 * a * b * mean + b**2 + variance
    coefficients = [
        torch.tensor(x) for x in (-CURVATURE / 2, CURVATURE * CENTRE, -CURVATURE * CENTRE**2 / 2)
    ]
    total = 0.0
    for k in range(3):
        s, o, d = (parameter[k] for parameter in parameters)
        step_std = PRIOR_STD * d.sqrt()
        p, q, r = quadratic_step(*coefficients, d, s / step_std, o / step_std)
        total = total + p * moments[k][1] + q * moments[k][0] + r
        coefficients = [
            x.detach() for x in (p, q, r)
        ]  # Q_{k+1} is frozen: no gradient through the other steps
    total.backward()
    for ours, parameter in zip(chain_gradients, parameters, strict=True):
        torch.testing.assert_close(ours, -parameter.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("learn_delta", [False, True])
@pytest.mark.parametrize("script", [diffwpo_continuous])
def test_training_reaches_the_gaussian_target(script, learn_delta):
    """With the script's own loss the gap comes within 0.05 nats of the optimum, or below it with learned delta."""
    torch.manual_seed(7)
    actor = make_actor(
        script, 1, diffusion_steps=4, hidden_dim=32, prior_std=PRIOR_STD, learn_delta=learn_delta
    )
    delta = [2 * (1 - decay.item()) for decay in actor.kernels()[0].flatten()]
    _, _, optimum, mean, std = optimal_control(delta)
    optimizer = torch.optim.Adam([p for p in actor.parameters() if p.requires_grad], lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, 1500)
    for _ in range(1500):
        loss, _ = actor_loss(script, actor, latent_critic(actor), torch.zeros(256, 1), ALPHA)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():  # the pathwise loss, the negative bound, of either actor
        loss, _ = pathwise_loss(actor, latent_critic(actor), torch.zeros(200_000, 1), ALPHA)
        latent = torch.atanh(actor.sample(torch.zeros(200_000, 1))[0])
    gap = LOG_Z + loss.item() / ALPHA
    if learn_delta:  # a tighter bound, closer to the target itself
        assert -0.01 < gap < optimum - 0.1
        assert latent.mean().item() == pytest.approx(CENTRE, abs=0.1)
        assert abs(latent.std().item() - TARGET_STD) < 0.6 * abs(std - TARGET_STD)
    else:
        assert optimum - 0.01 < gap < optimum + 0.05
        assert latent.mean().item() == pytest.approx(mean, abs=0.05)
        assert latent.std().item() == pytest.approx(std, rel=0.05)


def test_entropy_bound_lies_below_the_entropy_of_the_action():
    """In one dimension, by carrying the density of a^k through the kernels on a grid."""
    steps = 3
    actor = make_actor(
        diffwpo_continuous, 1, low=(-0.5,), high=(1.5,), diffusion_steps=steps, hidden_dim=16
    )
    randomise(actor, 0.2)
    set_delta(actor, torch.tensor([0.1, 0.3, 0.8])[:, None])
    grid = torch.linspace(-12, 12, 2401)
    dx, zeros = grid[1] - grid[0], torch.zeros(2401, 1)
    decay, std = (x.flatten() for x in actor.kernels())
    with torch.no_grad():
        density = torch.exp(-0.5 * grid**2) / math.sqrt(2 * math.pi)
        log_ratio = -0.5 * math.log(2 * math.pi * math.e)
        for k in (3, 2, 1):
            s, c = std[k - 1], decay[k - 1]
            mean = c * grid + s * reference_control(actor, zeros, grid[:, None], k)[:, 0]
            kernel = torch.exp(-0.5 * ((grid[:, None] - mean) / s) ** 2) / (
                s * math.sqrt(2 * math.pi)
            )  # (to, from)
            joint = kernel * density * dx**2
            residual = (grid - c * grid[:, None]) / s
            log_ratio += (joint * 0.5 * (residual**2 - 1)).sum().item()
            density = kernel @ density * dx
        assert density.sum() * dx == pytest.approx(1, abs=1e-6)
        log_det = actor.squash(grid[:, None])[1]
        log_ratio -= (density * log_det).sum().item() * dx.item()
        entropy = (density * (log_det - torch.log(density + 1e-300))).sum().item() * dx.item()
        action, log_prob = actor.sample(torch.zeros(400_000, 1))
    error = (log_prob.std() / len(log_prob) ** 0.5).item()
    assert log_prob.mean().item() == pytest.approx(log_ratio, abs=4 * error)
    assert -log_prob.mean().item() < entropy - 0.01
    latent = torch.atanh((action[:, 0] - 0.5) / 1.0)
    histogram = torch.histc(latent, 60, -3, 3) / len(latent)
    exact = torch.stack(
        [density[(grid >= -3 + 0.1 * i) & (grid < -2.9 + 0.1 * i)].sum() * dx for i in range(60)]
    )
    assert 0.5 * (histogram - exact).abs().sum() < 0.02


def test_mean_action_is_the_chain_without_noise():
    actor = make_actor(diffwpo_continuous, diffusion_steps=3, hidden_dim=16)
    randomise(actor)
    obs = torch.randn(4, 3)
    latent, (decay, std) = torch.zeros(4, 1), actor.kernels()
    for k in (3, 2, 1):
        latent = decay[k - 1] * latent + std[k - 1] * reference_control(actor, obs, latent, k)
    torch.testing.assert_close(actor.mean_action(obs), torch.tanh(latent))


def test_actor_is_equivariant_to_the_order_of_action_dimensions(monkeypatch):
    actor = make_actor(
        diffwpo_continuous, low=(-1.0, -1.0), high=(1.0, 1.0), diffusion_steps=3, hidden_dim=16
    )
    randomise(actor)
    obs = torch.randn(6, 3)
    _, log_prob, latents, noise = chain(actor, obs, seed=1)
    with torch.no_grad():
        for parameter in (actor.delta_logit, actor.fc_latent.weight):
            parameter.copy_(parameter.flip(1))
        for parameter in (actor.fc_control.weight, actor.fc_control.bias):
            parameter.copy_(parameter.flip(0))
    monkeypatch.setattr(torch, "randn", lambda *_, **__: noise.flip(2))
    torch.testing.assert_close(actor(obs)[0], latents.flip(2))
