"""wpo and diffwpo: mixed derivatives, closed-form flows, gradients of their bases, penalties."""

import copy
import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import diffsac_continuous as diffsac
import diffwpo_continuous as diffwpo
import wpo_continuous as wpo
from tests.common import gauss_hermite, make_actor, pathwise_loss, randomise


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def gradients(actor):
    return {name: p.grad.clone() for name, p in actor.named_parameters() if p.grad is not None}


def gradients_of(value, actor):
    learned = {name: p for name, p in actor.named_parameters() if p.requires_grad}
    names, weights = learned.keys(), list(learned.values())
    made = torch.autograd.grad(value, weights, allow_unused=True)
    return {name: x for name, x in zip(names, made, strict=True) if x is not None}


def assert_same(first, second, **tolerance):
    assert len(first) > 3
    for name in first.keys() | second.keys():
        zero = torch.zeros(())
        ours, expected = first.get(name, zero), second.get(name, zero)
        torch.testing.assert_close(
            *torch.broadcast_tensors(ours, expected), **tolerance, msg=lambda m, n=name: n + m
        )


# the Gaussian


def wpo_setting(rows=7):
    actor, qf = make_actor(wpo, action_dim=2, hidden_dim=16), None
    randomise(actor, 0.1)
    qf = wpo.SoftQNetwork(3, 2, wpo.Args(hidden_dim=16))
    return actor, qf, torch.randn(rows, 3)


def wpo_gradients(actor, qf, obs, alpha, **flags):
    torch.manual_seed(3)
    loss = wpo.actor_loss(actor, copy.deepcopy(actor), qf, obs, alpha, wpo.Args(**flags))[0]
    return gradients_of(loss, actor)


@pytest.mark.parametrize("precondition", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_gaussian_gradient_is_the_explicit_mixed_derivative(precondition, alpha):
    """(W2) by two automatic derivatives of log N, with the Fisher matrix as written."""
    (actor, qf, obs), samples = wpo_setting(), 5
    flags = {"action_samples": samples, "precondition": precondition}
    ours = wpo_gradients(actor, qf, obs, alpha, **flags)
    torch.manual_seed(3)
    mean, log_std = (x.repeat(samples, 1) for x in actor(obs))
    std = log_std.exp()
    latent = (mean + std * torch.randn_like(mean)).detach().requires_grad_()
    slope = 1 - torch.tanh(latent) ** 2
    log_density = Normal(mean, std).log_prob(latent).sum(-1)
    value = qf(obs.repeat(samples, 1), torch.tanh(latent)).amin(0)
    value = value - alpha * (log_density - slope.log().sum(-1))
    (velocity,) = torch.autograd.grad(value.sum(), latent, retain_graph=True)
    (score,) = torch.autograd.grad(log_density.sum(), latent, create_graph=True)
    mixed = (score * velocity).sum() / len(latent)
    by_mean, by_std = torch.autograd.grad(mixed, (mean, std), retain_graph=True)
    if precondition:
        by_mean, by_std = by_mean * std.detach() ** 2, by_std * std.detach() ** 2 / 2
    torch.autograd.backward((mean, std), (-by_mean, -by_std))
    assert_same(ours, gradients(actor))


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_gaussian_gradient_is_sacs_but_for_a_score_of_mean_zero(alpha):
    """At alpha = 0 sample by sample; else by alpha noise / std and alpha (noise^2 - 1) / std."""
    actor, qf, obs = wpo_setting()
    ours = wpo_gradients(actor, qf, obs, alpha, action_samples=1)
    torch.manual_seed(3)
    expected = gradients_of(pathwise_loss(actor, qf, obs, alpha)[0], actor)
    torch.manual_seed(3)
    mean, log_std = actor(obs)
    noise, std = torch.randn_like(mean), log_std.exp()
    scores = noise / std.detach() * mean + (noise**2 - 1) / std.detach() * std
    scores = gradients_of(-alpha * scores.sum(-1).mean(), actor)
    assert_same(ours, {name: expected[name] + scores[name] for name in expected})


class OneGaussian(wpo.Actor):
    """One Gaussian for all states, its mean and its std the only parameters."""

    def __init__(self, mean, std):
        torch.nn.Module.__init__(self)
        self.mean = torch.nn.Parameter(torch.tensor(mean))
        self.std = torch.nn.Parameter(torch.tensor(std))

    def forward(self, obs):
        return self.mean.expand(len(obs), 1), self.std.log().expand(len(obs), 1)


CURVATURE, CENTRE = 1.5, 0.7


def flow(mean, std, alpha, time, curvature=CURVATURE, precondition=True):
    """Follow the script's loss on a quadratic of the latent; mean and std at `time`."""
    actor, steps = OneGaussian(mean, std), 400
    optimizer = torch.optim.SGD(actor.parameters(), lr=time / steps)
    args = wpo.Args(action_samples=1, precondition=precondition, kl_weight_mean=0, kl_weight_std=0)

    def qf(obs, action):
        return (-0.5 * curvature * (action - CENTRE) ** 2).sum(-1).expand(2, -1)

    with pytest.MonkeyPatch.context() as patch:  # without squashing
        patch.setattr(wpo, "squash", lambda latent: (latent, torch.zeros(len(latent))))
        for _ in range(steps):
            loss = wpo.actor_loss(actor, actor, qf, torch.zeros(4000, 1), alpha, args)[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return actor.mean.item(), actor.std.item()


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("time", [0.4, 1.0])
def test_flow_of_a_gaussian_on_a_quadratic(alpha, time):
    """m(t) = c + (m - c) e^-kt and v(t) = alpha/k + (v - alpha/k) e^-2kt."""
    mean, std = flow(-1.0, 0.9, alpha, time)
    decay, target = math.exp(-CURVATURE * time), alpha / CURVATURE
    assert mean == pytest.approx(CENTRE + (-1.0 - CENTRE) * decay, abs=0.02)
    assert std**2 == pytest.approx(target + (0.9**2 - target) * decay**2, rel=0.03)


def test_flow_ends_at_the_boltzmann_density():
    mean, std = flow(-1.0, 0.9, 0.3, 6.0)
    assert mean == pytest.approx(CENTRE, abs=0.02)
    assert std**2 == pytest.approx(0.3 / CURVATURE, rel=0.05)


def test_heat_flow_widens_the_density():
    """Without a value, v(t) = v + 2 alpha t."""
    variance = flow(0.0, 0.5, 0.2, 1.0, curvature=0)[1] ** 2
    assert variance == pytest.approx(0.5**2 + 2 * 0.2, rel=0.03)


def test_raw_flow_collapses_in_finite_time():
    """Without F^-1, v(t) = v - 4 k t and m - c = (m0 - c) (1 - 4 k t / v)^(1/4)."""
    left = 1 - 4 * CURVATURE * 0.1 / 0.9**2
    mean, std = flow(-1.0, 0.9, 0.0, 0.1, precondition=False)
    assert std**2 == pytest.approx(0.9**2 * left, rel=0.03)
    assert mean == pytest.approx(CENTRE + (-1.0 - CENTRE) * left**0.25, abs=0.02)


def test_penalties_are_kl_divergences_of_torch_distributions():
    actor, qf, obs = wpo_setting()
    average_actor = copy.deepcopy(actor)
    randomise(average_actor, 0.2)
    (mean, log_std), (average_mean, average_log_std) = actor(obs), average_actor(obs)
    average = Normal(average_mean, average_log_std.exp())
    kl_mean, kl_std = wpo.actor_loss(actor, average_actor, qf, obs, 0.1, wpo.Args())[2]
    assert kl_mean.min() > 1e-3 and kl_std.min() > 1e-3
    expected = kl_divergence(average, Normal(mean, average_log_std.exp())).sum(-1)
    torch.testing.assert_close(kl_mean, expected)
    expected = kl_divergence(average, Normal(average_mean, log_std.exp())).sum(-1)
    torch.testing.assert_close(kl_std, expected)


def test_weights_of_the_penalties():
    actor, qf, obs = wpo_setting()
    average = copy.deepcopy(actor)
    randomise(average, 0.2)

    def loss(mean_weight, std_weight):
        torch.manual_seed(3)
        args = wpo.Args(kl_weight_mean=mean_weight, kl_weight_std=std_weight)
        return wpo.actor_loss(actor, average, qf, obs, 0.1, args)

    free, _, (kl_mean, kl_std) = loss(0.0, 0.0)
    assert kl_mean.min() > 0 and kl_std.min() > 0
    torch.testing.assert_close(loss(3.0, 0.0)[0] - free, 3 * kl_mean.mean())
    torch.testing.assert_close(loss(0.0, 5.0)[0] - free, 5 * kl_std.mean())


def test_log_prob_of_the_actors_samples():
    actor, qf, obs = wpo_setting()
    torch.manual_seed(3)
    args = wpo.Args(action_samples=1)
    log_prob = wpo.actor_loss(actor, actor, qf, obs, 0.1, args)[1]
    torch.manual_seed(3)
    torch.testing.assert_close(log_prob, actor.sample(obs)[1])


def test_wasserstein_score_function_and_pathwise_directions_of_a_mixture():
    """For a mixture the directions differ, and (W2) follows the flow: by quadrature.

    The flow is made by moving the density's mass with the velocity for a short time, and the
    parameters of the mixture are fitted to it by least KL, without (W2).
    """
    grid = torch.linspace(-6, 6, 24_001)
    dx, weights, std = grid[1] - grid[0], torch.tensor([0.3, 0.7]), 0.6

    def log_mixture(theta, x):
        return torch.logsumexp(weights.log() + Normal(theta, std).log_prob(x[..., None]), dim=-1)

    theta = torch.tensor([-1.0, 0.8], requires_grad=True)
    x = grid.clone().requires_grad_()
    log_density = log_mixture(theta, x)
    density, value = log_density.exp().detach(), torch.sin(2 * x) - 0.3 * x**2
    (velocity,) = torch.autograd.grad(value.sum(), x)
    (score,) = torch.autograd.grad(log_density.sum(), x, create_graph=True)
    (raw,) = torch.autograd.grad((density * score * velocity).sum() * dx, theta)
    log_of = lambda theta: log_mixture(theta, grid)
    by_theta = torch.autograd.functional.jacobian(log_of, theta.detach())
    fisher = (density[:, None, None] * by_theta[:, :, None] * by_theta[:, None, :]).sum(0) * dx
    wasserstein = torch.linalg.solve(fisher, raw)
    score_function = (density[:, None] * by_theta * value.detach()[:, None]).sum(0) * dx
    natural = torch.linalg.solve(fisher, score_function)
    # a = m_i + std eps: the pathwise gradient is the mean of Q' under each component
    parts = zip(weights, theta.detach(), strict=True)
    pathwise = [w * (Normal(m, std).log_prob(grid).exp() * velocity).sum() * dx for w, m in parts]
    # the score-function and the pathwise estimator share their mean, for fixed weights
    torch.testing.assert_close(score_function, torch.stack(pathwise), rtol=1e-5, atol=1e-7)
    time = 1e-3
    fitted = theta.detach().clone().requires_grad_()
    tolerance = {"tolerance_grad": 1e-14, "tolerance_change": 1e-18, "max_iter": 100}
    optimizer = torch.optim.LBFGS([fitted], **tolerance)

    def cross_entropy():  # of the moved density, in the coordinates before the move
        optimizer.zero_grad()
        loss = -(density * log_mixture(fitted, grid + time * velocity)).sum() * dx
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(cross_entropy)
    moved = (fitted.detach() - theta.detach()) / time
    torch.testing.assert_close(moved, wasserstein, rtol=0.01, atol=1e-3)
    directions = [x / x.norm() for x in (wasserstein, raw, score_function, natural)]
    assert all((a - b).norm() > 0.02 for i, a in enumerate(directions) for b in directions[:i])


# the chain


def chain_setting(steps, rows=15, **flags):
    """An actor of DiffWPO, the same one of DiffSAC, their critics, and a chain of it."""
    flags = {"diffusion_steps": steps, "hidden_dim": 16, "prior_std": 1.3} | flags
    actor = make_actor(diffwpo, action_dim=2, **flags)
    randomise(actor)
    args = diffwpo.Args(kl_bound=1e9, **flags)
    twin = diffsac.Actor(3, 2, args)
    twin.load_state_dict(actor.state_dict())
    qf, vf = diffwpo.SoftQNetwork(3, 2, args), diffwpo.latent_critic_network(3, 2, args)
    torch.nn.init.normal_(vf[-1].weight)
    return actor, twin, qf, vf, torch.randn(rows, 3), args


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_step_gradient_of_the_controls_is_diffsacs_sample_by_sample(steps, monkeypatch):
    """With F^-1; that of delta differs by noise of mean zero."""
    actor, twin, qf, vf, obs, args = chain_setting(steps)
    with torch.no_grad():
        chain = actor.chain(obs)
    rows = torch.arange(len(obs))
    monkeypatch.setattr(torch, "randn_like", lambda _: chain.noises[rows % steps, rows])
    loss, kl = diffsac.step_actor_loss(twin, copy.deepcopy(twin), qf, vf, chain, 0.4, args)
    expected = gradients_of(loss, twin)
    loss, other_kl = diffwpo.actor_loss(actor, copy.deepcopy(actor), qf, vf, chain, 0.4, args)
    ours = gradients_of(loss, actor)
    torch.testing.assert_close(kl, other_kl)
    assert (ours.pop("delta_logit") - expected.pop("delta_logit")).abs().max() > 1e-6
    assert_same(ours, expected)


def test_gradient_of_delta_is_diffsacs_in_the_mean(monkeypatch):
    """(W3) and (10) have the mean of (8) of DiffSAC: by quadrature over the noise of each step."""
    flags = {"diffusion_steps": 2, "hidden_dim": 16, "prior_std": 1.3}
    actor, args = make_actor(diffwpo, **flags), diffwpo.Args(kl_bound=1e9, **flags)
    randomise(actor)
    twin = diffsac.Actor(3, 1, args)
    twin.load_state_dict(actor.state_dict())
    nodes, weights = (x.repeat_interleave(2, 0) for x in gauss_hermite(1, points=60))
    rows = torch.arange(len(nodes))
    k, obs = 1 + rows % 2, torch.randn(1, 3).expand(len(nodes), 3)
    latents, noises = torch.zeros(3, len(nodes), 1), torch.zeros(2, len(nodes), 1)
    latents[k, rows], noises[k - 1, rows] = 0.7, nodes
    with torch.no_grad():
        decay, std = (x[k - 1] for x in actor.kernels())
        control = actor.control(actor.fc_obs(obs), latents[k, rows], k)
        latents[k - 1, rows] = decay * 0.7 + std * (control + nodes)
    chain = diffsac.Chain(obs, latents, torch.zeros(2, len(nodes), 1), noises)
    qf = lambda obs, action: torch.stack((action[:, 0] ** 3, action[:, 0] ** 3 + 1))
    vf = lambda inputs: torch.cat((inputs[:, 3:4].sin(), inputs[:, 3:4] ** 2, inputs[:, 3:4]), 1)
    monkeypatch.setattr(torch, "randn_like", lambda _: nodes)
    monkeypatch.setattr(torch.Tensor, "mean", lambda x, *_: (x * weights).sum() / 2)
    loss, _ = diffsac.step_actor_loss(twin, copy.deepcopy(twin), qf, vf, chain, 0.4, args)
    expected = gradients_of(loss, twin)
    loss, _ = diffwpo.actor_loss(actor, copy.deepcopy(actor), qf, vf, chain, 0.4, args)
    ours = gradients_of(loss, actor)
    assert expected["delta_logit"].abs().min() > 1e-4
    torch.testing.assert_close(ours["delta_logit"], expected["delta_logit"], rtol=1e-6, atol=1e-9)


def test_raw_gradient_is_the_explicit_mixed_derivative_of_every_kernel():
    """Without F^-1: sg[ alpha g - grad V ] g(theta), g = grad log( q / free step ), by autograd."""
    steps, alpha = 4, 0.4
    actor, _, qf, vf, obs, args = chain_setting(steps, 8, precondition=False)
    assert not actor.delta_logit.requires_grad
    with torch.no_grad():
        chain = actor.chain(obs)
    loss, _ = diffwpo.actor_loss(actor, copy.deepcopy(actor), qf, vf, chain, alpha, args)
    ours = gradients_of(loss, actor)
    decay, std = actor.kernels()
    total = 0.0
    for row in range(8):
        k = 1 + row % steps
        state, before = obs[row : row + 1], chain.latents[k, row : row + 1]
        x = chain.latents[k - 1, row : row + 1].clone().requires_grad_()
        if k == 1:  # V_0 is known
            end_cost = Normal(0.0, 1.3).log_prob(x).sum() - (1 - torch.tanh(x) ** 2).log().sum()
            value = qf(state, torch.tanh(x)).amin() - alpha * end_cost
        else:
            out = vf(torch.cat((state, x, torch.full((1, 1), (k - 1) / steps)), 1))
            value = qf(state, torch.tanh(out[:, :2])).amin() + out[0, 2] - alpha * out[0, 3]
        (slope,) = torch.autograd.grad(value, x)
        leaf = x.detach().requires_grad_()
        mean = decay[k - 1] * before
        mean = mean + std[k - 1] * actor.control(actor.fc_obs(state), before, k)
        log_q = Normal(mean, std[k - 1]).log_prob(leaf).sum()
        log_free = Normal(decay[k - 1] * before, std[k - 1]).log_prob(leaf).sum()
        (g,) = torch.autograd.grad(log_q - log_free, leaf, create_graph=True)
        total = total + ((alpha * g - slope).detach() * g).sum() / 8
    assert_same(ours, gradients_of(total, actor))


def test_switch_holds_every_kernel_near_its_average():
    """Equation (9) on single kernels: outside there is 0.3 D alone, whatever the slope of Q."""
    actor, _, qf, vf, obs, args = chain_setting(4)
    average = copy.deepcopy(actor)
    randomise(average, 0.2)
    with torch.no_grad():
        chain = actor.chain(obs)
    steep = lambda obs, actions: 1e6 * qf(obs, actions)
    args.kl_bound = 1e-12
    loss, kl = diffwpo.actor_loss(actor, average, steep, vf, chain, 0.4, args)
    torch.testing.assert_close(loss, 0.3 * kl.mean())
    rows, k = torch.arange(15), 1 + torch.arange(15) % 4
    controls = [a.control(a.fc_obs(obs), chain.latents[k, rows], k) for a in (actor, average)]
    torch.testing.assert_close(kl, 2 * (controls[0] - controls[1]).square().sum(-1))
    args.kl_bound = kl.median().item()
    assert diffwpo.actor_loss(actor, average, steep, vf, chain, 0.4, args)[0].abs() > 1e3
