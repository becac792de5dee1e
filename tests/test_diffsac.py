"""diffsac_continuous.py against closed forms: linear controls, quadrature, densities on a grid.

The value Q(a^0) = -(c / 2) (a^0 - b)^2 of the latent action has the optimum N(b, alpha / c). A
critic that undoes the squashing and its log-determinant puts it into the script's own losses.
"""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

import diffsac_continuous as diffsac
from tests.common import gauss_hermite, log_normal, make_actor, randomise, set_delta

ALPHA, CURVATURE, CENTRE, PRIOR_STD = 0.4, 1.7, 0.8, 1.2
LOG_Z = 0.5 * math.log(2 * math.pi * ALPHA / CURVATURE)
DELTA, SLOPES, OFFSETS = [0.05, 0.2, 0.7], [0.9, -0.4, 0.3], [0.2, 0.5, -0.6]


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def linear_actor(slopes, offsets, delta):
    """An actor whose network is c_k(a) = slope_k a + offset_k (k - 1 is the place in the list).

    Each step has two units relu(+-a) and a constant one; the step's bias silences all other units.
    """
    steps, silence = len(delta), 1e3
    sizes = {"diffusion_steps": steps, "hidden_dim": 3 * steps, "prior_std": PRIOR_STD}
    actor, slopes, offsets = (
        make_actor(diffsac, 1, **sizes),
        torch.tensor(slopes),
        torch.tensor(offsets),
    )
    set_delta(diffsac, actor, delta)
    bias = torch.full((steps, steps, 3), -silence)
    bias[range(steps), range(steps)] = torch.tensor([0.0, 0.0, 1.0])
    with torch.no_grad():
        for parameter in (*actor.fc_obs.parameters(), actor.fc2.bias, actor.fc_control.bias):
            parameter.zero_()
        actor.fc_step.weight.copy_(bias.flatten(1))
        actor.fc_latent.weight.copy_(torch.tensor([1.0, -1.0, 0.0]).repeat(steps)[:, None])
        actor.fc2.weight.copy_(torch.eye(3 * steps))
        actor.fc_control.weight.copy_(torch.stack((slopes, -slopes, offsets), 1).reshape(1, -1))
    return actor


def qf(obs, action):
    latent = torch.atanh(action)
    value = -0.5 * CURVATURE * (latent - CENTRE) ** 2
    return (value.sum(-1) - ALPHA * diffsac.squash(latent)[1]).expand(2, -1)


def quadratics(slopes, offsets, delta):
    """Coefficients (p, q, r) of V_0 ... V_K, V_j(a) = p a^2 + q a + r, of linear controls."""
    p, q, r = -CURVATURE / 2, CURVATURE * CENTRE, -CURVATURE * CENTRE**2 / 2
    p, r = p + ALPHA / (2 * PRIOR_STD**2), r + ALPHA * 0.5 * math.log(2 * math.pi * PRIOR_STD**2)
    values = [(p, q, r)]
    for s, o, d in zip(slopes, offsets, delta, strict=True):
        std = PRIOR_STD * d**0.5
        a, b = (1 - d) ** 0.5 + std * s, std * o
        r = p * (b**2 + std**2) + q * b + r - ALPHA * o**2 / 2
        p, q = p * a**2 - ALPHA * s**2 / 2, 2 * p * a * b + q * a - ALPHA * s * o
        values.append((p, q, r))
    return values


def optimal_controls(delta):
    """Controls that reverse the noising of N(b, alpha / c), and the gap of the bound they leave."""
    mean, variance, slopes, offsets, gap = CENTRE, ALPHA / CURVATURE, [], [], 0.0
    for d in delta:
        decay, std = (1 - d) ** 0.5, PRIOR_STD * d**0.5
        new_mean, new_variance = decay * mean, decay**2 * variance + std**2
        gain = variance * decay / new_variance
        ratio = std**2 / (variance - gain**2 * new_variance)
        slopes.append((gain - decay) / std)
        offsets.append((mean - gain * new_mean) / std)
        gap += 0.5 * (ratio - 1 - math.log(ratio))
        mean, variance = new_mean, new_variance
    prior, last = (
        torch.distributions.Normal(m, s) for m, s in ((0.0, PRIOR_STD), (mean, variance**0.5))
    )
    return slopes, offsets, gap + torch.distributions.kl_divergence(prior, last).item()


def exact_actor_loss(monkeypatch, actor):
    """`actor_loss` as an exact expectation over the noises, in which it is quadratic."""
    nodes, weights = gauss_hermite(actor.steps + 1)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *_, **__: nodes.T[:, :, None])
        patch.setattr(torch.Tensor, "mean", lambda values, *_: (values * weights).sum())
        return diffsac.actor_loss(actor, qf, torch.zeros(len(nodes), 1), ALPHA)[0]


def reference_control(actor, obs, latent, k):
    """The network as one would write it down: an MLP on (obs, a^k) with a bias for each step."""
    x = obs @ actor.fc_obs.weight.T + actor.fc_obs.bias + latent @ actor.fc_latent.weight.T
    return actor.fc_control(actor.fc2((x + actor.fc_step.weight[k - 1]).relu()).relu())


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_log_ratio_is_that_of_the_kernel_densities(steps):
    """Equation (6): denoising over noising kernels telescopes into the control's cost."""
    actor = make_actor(diffsac, action_dim=2, diffusion_steps=steps, prior_std=1.5, hidden_dim=16)
    randomise(actor)
    obs = torch.randn(30, 3)
    torch.manual_seed(3)
    action, log_ratio = actor.sample(obs)
    torch.manual_seed(3)
    _, latents, controls, noises = actor.chain(obs)
    low, high = diffsac.DELTA_MIN, diffsac.DELTA_MAX
    delta = low + (high - low) / (1 + torch.exp(-actor.delta_logit))
    expected = log_normal(latents[steps], 0.0, torch.tensor(1.5))
    for k in range(steps, 0, -1):
        decay, std = (1 - delta[k - 1]).sqrt(), 1.5 * delta[k - 1].sqrt()
        control = reference_control(actor, obs, latents[k], k)
        mean = decay * latents[k] + std * control
        torch.testing.assert_close(controls[k - 1], control)
        torch.testing.assert_close(latents[k - 1], mean + std * noises[k - 1])
        expected = expected + log_normal(latents[k - 1], mean, std)
        expected = expected - log_normal(latents[k], decay * latents[k - 1], std)
    torch.testing.assert_close(action, torch.tanh(latents[0]))
    x = latents[0].abs()
    expected = expected + 2 * (x + torch.log1p(torch.exp(-2 * x)) - math.log(2)).sum(
        -1
    )  # log cosh^2
    torch.testing.assert_close(log_ratio, expected, rtol=0, atol=1e-10)


def test_first_policy_is_the_squashed_prior_with_a_geometric_schedule():
    actor = make_actor(diffsac, diffusion_steps=5, hidden_dim=16, delta_first=0.9, delta_last=0.01)
    decay, std = actor.kernels()
    expected = torch.tensor([0.01 * 90 ** (i / 4) for i in range(5)])[:, None]
    torch.testing.assert_close(std**2, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(decay**2, 1 - expected)
    single = make_actor(diffsac, diffusion_steps=1).kernels()[1]
    assert single.item() == pytest.approx(0.9**0.5)  # of the first step
    action, log_ratio = actor.sample(torch.randn(20_000, 3))
    latent = torch.atanh(action)
    assert latent.mean().abs() < 0.03 and latent.std().item() == pytest.approx(1, abs=0.02)
    expected = log_normal(latent, 0.0, torch.tensor(1.0)) - (1 - action**2).log().sum(-1)
    torch.testing.assert_close(log_ratio, expected)


def test_fixed_schedule_is_not_learned():
    actor = make_actor(diffsac, learn_delta=False)
    randomise(actor)
    actor.sample(torch.randn(5, 3))[1].mean().backward()
    assert not actor.delta_logit.requires_grad and actor.fc2.weight.grad is not None


@pytest.mark.parametrize("steps", [1, 4])
def test_partition_function_is_unbiased_for_any_parameters(steps):
    """E[ exp(R / alpha - log-ratio) ] is the integral of exp(R / alpha) over the box of actions."""
    temperature, sizes = 0.7, {"diffusion_steps": steps, "hidden_dim": 16, "delta_last": 0.1}
    actor = make_actor(diffsac, action_dim=2, prior_std=1.2, **sizes)
    randomise(actor, 0.2)
    grid = torch.linspace(-1, 1, 4001)
    for reward in (lambda a, b: 0 * a, lambda a, b: torch.sin(3 * a) - b**2):
        exact = torch.trapezoid(torch.exp(reward(grid, 0 * grid) / temperature), grid)
        exact = exact * torch.trapezoid(torch.exp(reward(0 * grid, grid) / temperature), grid)
        with torch.no_grad():
            action, log_ratio = actor.sample(torch.zeros(400_000, 3))
        log_weight = reward(action[:, 0], action[:, 1]) / temperature - log_ratio
        error = (log_weight.exp().std() / len(action) ** 0.5).item()
        assert error < 0.02 * exact
        assert log_weight.exp().mean().item() == pytest.approx(exact.item(), abs=5 * error)
        assert log_weight.mean() < exact.log()  # the bound


def test_objective_of_linear_controls_is_the_closed_form(monkeypatch):
    p, _, r = quadratics(SLOPES, OFFSETS, DELTA)[-1]
    loss = exact_actor_loss(monkeypatch, linear_actor(SLOPES, OFFSETS, DELTA))
    assert loss.item() == pytest.approx(-(p * PRIOR_STD**2 + r), abs=1e-8)


@pytest.mark.parametrize("delta", [DELTA, [0.3], [0.01, 0.05, 0.2, 0.6, 0.9]])
def test_gap_at_the_gaussian_targets_optimum(monkeypatch, delta):
    """With controls that reverse the noising, log Z - bound is the closed form; none is better."""
    slopes, offsets, gap = optimal_controls(delta)
    loss = exact_actor_loss(monkeypatch, linear_actor(slopes, offsets, delta)).item()
    assert LOG_Z + loss / ALPHA == pytest.approx(gap, abs=1e-7)
    for moved in (0.05, -0.05):
        for controls in (
            ([slopes[0] + moved, *slopes[1:]], offsets),
            (slopes, [offsets[0] + moved, *offsets[1:]]),
        ):
            assert (
                exact_actor_loss(monkeypatch, linear_actor(*controls, delta)).item() > loss + 1e-7
            )


def test_step_gradients_with_exact_values_add_up_to_the_chains(monkeypatch):
    """K times the gradient of (8), by exact quadrature and with the exact V, is that of (3)."""
    steps, values = len(DELTA), torch.tensor(quadratics(SLOPES, OFFSETS, DELTA))
    chain_actor, step_actor = (linear_actor(SLOPES, OFFSETS, DELTA) for _ in range(2))
    exact_actor_loss(monkeypatch, chain_actor).backward()

    def exact_values(inputs):
        obs, latent, place = inputs.split(1, -1)
        p, q, r = values[(place * steps).round().long()].unbind(-1)
        end = torch.sin(latent)  # any: the rest is what V lacks there
        rest = p * latent**2 + q * latent + r - qf(obs, torch.tanh(end)).amin(0)[:, None]
        return torch.cat((end, rest, torch.zeros_like(r)), dim=-1)

    nodes, weights = gauss_hermite(steps + 2)  # of the chain, and the step's own
    nodes, weights = nodes.repeat_interleave(steps, 0), weights.repeat_interleave(steps) / steps
    obs = torch.zeros(len(nodes), 1)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *_, **__: nodes[:, :-1].T[:, :, None])
        patch.setattr(torch, "randn_like", lambda _: nodes[:, -1:])
        patch.setattr(torch.Tensor, "mean", lambda values, *_: (values * weights).sum())
        with torch.no_grad():
            chain = step_actor.chain(obs)
        twins = lambda obs, action: torch.cat((qf(obs, action), qf(obs, action) + 1 + action.T))
        networks = (step_actor, copy.deepcopy(step_actor), twins, exact_values)
        loss, drift = diffsac.step_actor_loss(
            *networks, chain, ALPHA, SimpleNamespace(kl_bound=1e-9)
        )
        assert drift.abs().max() < 1e-20
        (steps * loss).backward()
    for (name, first), second in zip(
        chain_actor.named_parameters(), step_actor.parameters(), strict=True
    ):
        torch.testing.assert_close(
            second.grad, first.grad, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert chain_actor.delta_logit.grad.abs().min() > 1e-3


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_latent_critic_learns_what_the_chains_brought(steps):
    """Equation (7), one row after another; e learns from |e - a^0|^2 alone."""
    actor = make_actor(diffsac, action_dim=2, diffusion_steps=steps, hidden_dim=16, prior_std=1.3)
    randomise(actor)
    obs, q = torch.randn(9, 3), torch.randn(9)
    chain = diffsac.Chain(*(x.detach() for x in actor.chain(obs)))
    seen, outputs = [], torch.tensor([0.2, -0.1, 0.25, 0.35]).repeat(9, 1).requires_grad_()

    def critic(inputs):
        seen.append(inputs)
        return outputs

    qf = lambda obs, action: torch.stack((obs.sum(-1), obs[:, 0])) + action.sum(-1)
    loss = diffsac.latent_critic_loss(actor, qf, critic, chain, q, alpha=0.3)
    expected, later_steps = 0.0, set()
    for row, (state, latent, place) in enumerate(zip(*seen[0].split((3, 2, 1), -1), strict=True)):
        j = round(place.item() * steps)
        later_steps.add(j)
        torch.testing.assert_close(state, obs[row])
        torch.testing.assert_close(latent, chain.latents[j, row])
        end = chain.latents[0, row]
        cost = log_normal(end, 0.0, torch.tensor(1.3)) - (1 - torch.tanh(end) ** 2).log().sum()
        cost = cost + sum(chain.controls[i - 1, row].square().sum() / 2 for i in range(1, j + 1))
        q_there = min(state.sum(), state[0]) + math.tanh(0.2) + math.tanh(-0.1)
        expected += ((q_there + 0.25 - q[row]) ** 2 + (0.3 * (0.35 - cost)) ** 2) / 9
        expected += ((0.2 - end[0]) ** 2 + (-0.1 - end[1]) ** 2) / 9
    torch.testing.assert_close(loss, expected)
    assert later_steps == set(range(1, max(steps, 2)))
    loss.backward()
    torch.testing.assert_close(outputs.grad[:, :2], 2 / 9 * (outputs[:, :2] - chain.latents[0]))


def test_rows_outside_of_the_trust_region_are_pulled_back():
    """Equation (9): their gradient is that of 0.3 D alone, whatever slope the critics have."""
    steps, obs, alpha = 4, torch.randn(12, 3), 0.3
    actor = make_actor(diffsac, action_dim=2, diffusion_steps=steps, hidden_dim=16)
    randomise(actor)
    average = copy.deepcopy(actor)
    randomise(average, 0.1)
    chain = diffsac.Chain(*(x.detach() for x in actor.chain(obs)))
    rows, k = torch.arange(12), 1 + torch.arange(12) % steps
    latent = chain.latents[k, rows]
    controls = [a.control(a.fc_obs(obs), latent, k) for a in (actor, average)]
    distance = 0.5 * steps * (controls[0] - controls[1].detach()).square().sum(-1)
    steep = lambda inputs: torch.cat((inputs[:, 3:5], 1e6 * inputs[:, 3:5]), 1)  # noqa: E731
    critic = lambda obs, action: 1e6 * action.T  # noqa: E731
    torch.manual_seed(7)
    args = SimpleNamespace(kl_bound=distance.median().item())
    loss, drift = diffsac.step_actor_loss(actor, average, critic, steep, chain, alpha, args)
    torch.testing.assert_close(drift, distance)
    per_row = torch.autograd.grad(loss, actor.fc_control.bias, retain_graph=True)[0]
    assert per_row.abs().max() > 1e3  # rows inside follow the slope
    torch.manual_seed(7)
    args.kl_bound = 0.0
    loss, _ = diffsac.step_actor_loss(actor, average, critic, steep, chain, alpha, args)
    torch.testing.assert_close(loss, 0.3 * distance.mean())
    ours = torch.autograd.grad(loss, actor.fc_control.bias)[0]
    torch.testing.assert_close(
        ours, torch.autograd.grad(0.3 * distance.mean(), actor.fc_control.bias)[0]
    )


def cosine_of_the_latent_critic(normalise, updates=800):
    """Cosine of the slopes of the learned V_1 and the true one: Q = -|a^0|^2 / 2, no control.

    The observations have standard deviations from 0.1 to 300, as those of Humanoid-v4.
    """
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(1)
    obs_dim, action_dim = 376, 17
    args = diffsac.Args(diffusion_steps=8)
    actor, scales = diffsac.Actor(obs_dim, action_dim, args), torch.logspace(-1, 2.5, obs_dim)
    obs_rms = diffsac.RunningMeanStd(obs_dim, enabled=normalise)
    obs_rms.update(torch.randn(5000, obs_dim) * scales)
    qf = lambda obs, action: -0.5 * action.atanh().square().sum(-1)[None]
    critic = diffsac.latent_critic_network(obs_dim, action_dim, args)
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3)
    for _ in range(updates):
        obs = obs_rms(torch.randn(256, obs_dim) * scales)
        with torch.no_grad():
            chain = actor.chain(obs)
        q = qf(obs, torch.tanh(chain.latents[0]))[0]
        loss = diffsac.latent_critic_loss(actor, qf, critic, chain, q, 0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    obs, latent = obs_rms(torch.randn(500, obs_dim) * scales), torch.randn(500, action_dim)
    latent.requires_grad_()
    end, rest, _ = diffsac.latent_critic(actor, critic, obs, latent, torch.ones(500))
    value = qf(obs, torch.tanh(end))[0] + rest
    (slope,) = torch.autograd.grad(value.sum(), latent)
    return torch.nn.functional.cosine_similarity(slope, -latent, dim=-1).mean().item()


def test_latent_critic_sees_the_latents_beside_normalised_observations():
    assert cosine_of_the_latent_critic(normalise=True) > 0.8
    assert cosine_of_the_latent_critic(normalise=False) < 0.3


@pytest.mark.parametrize("learn_delta", [False, True])
def test_training_reaches_the_gaussian_target(learn_delta):
    """Along the chain: within 0.05 nats of the smallest gap, below it with learned delta."""
    torch.manual_seed(7)
    sizes = {"diffusion_steps": 4, "hidden_dim": 32, "prior_std": PRIOR_STD}
    actor = make_actor(diffsac, 1, learn_delta=learn_delta, **sizes)
    _, _, optimum = optimal_controls((actor.kernels()[1][:, 0] / PRIOR_STD).square().tolist())
    optimizer = torch.optim.Adam([p for p in actor.parameters() if p.requires_grad], lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, 1500)
    for _ in range(1500):
        loss, _ = diffsac.actor_loss(actor, qf, torch.zeros(256, 1), ALPHA)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        loss, _ = diffsac.actor_loss(actor, qf, torch.zeros(200_000, 1), ALPHA)
    gap = LOG_Z + loss.item() / ALPHA
    assert -0.01 < gap < optimum - 0.1 if learn_delta else optimum - 0.01 < gap < optimum + 0.05


def test_entropy_bound_lies_below_the_entropy_of_the_action():
    """In one dimension, by carrying the density of a^k through the kernels on a grid."""
    actor = make_actor(diffsac, 1, diffusion_steps=3, hidden_dim=16)
    randomise(actor, 0.2)
    set_delta(diffsac, actor, [0.1, 0.3, 0.8])
    grid, zeros = torch.linspace(-12, 12, 2401), torch.zeros(2401, 1)
    dx = (grid[1] - grid[0]).item()
    density = torch.exp(-0.5 * grid**2) / math.sqrt(2 * math.pi)
    with torch.no_grad():
        decay, std = (x.flatten() for x in actor.kernels())
        cost = 0.0
        for k in (3, 2, 1):
            control = reference_control(actor, zeros, grid[:, None], k)[:, 0]
            cost += (0.5 * control**2 * density).sum().item() * dx
            mean = decay[k - 1] * grid + std[k - 1] * control
            kernel = torch.exp(-0.5 * ((grid[:, None] - mean) / std[k - 1]) ** 2)  # (to, from)
            density = kernel @ density * dx / (std[k - 1] * math.sqrt(2 * math.pi))
        assert density.sum().item() * dx == pytest.approx(1, abs=1e-6)
        cost += (density * actor.end_cost(grid[:, None])).sum().item() * dx
        log_det = diffsac.squash(grid[:, None])[1]
        entropy = (density * (log_det - torch.log(density + 1e-300))).sum().item() * dx
        action, log_ratio = actor.sample(torch.zeros(400_000, 1))
    error = (log_ratio.std() / len(log_ratio) ** 0.5).item()
    assert log_ratio.mean().item() == pytest.approx(cost, abs=4 * error)
    assert -log_ratio.mean().item() < entropy - 0.01
    histogram = torch.histc(torch.atanh(action[:, 0]), 60, -3, 3) / len(action)
    exact = density[900:1500].reshape(60, 10).sum(1) * dx
    assert 0.5 * (histogram - exact).abs().sum() < 0.02


def test_mean_action_is_the_chain_without_noise():
    actor, obs, latent = (
        make_actor(diffsac, diffusion_steps=3, hidden_dim=16),
        torch.randn(4, 3),
        0.0,
    )
    randomise(actor)
    decay, std = actor.kernels()
    latent = torch.zeros(4, 1)
    for k in (3, 2, 1):
        latent = decay[k - 1] * latent + std[k - 1] * reference_control(actor, obs, latent, k)
    torch.testing.assert_close(actor.mean_action(obs), torch.tanh(latent))


def test_actor_is_equivariant_to_the_order_of_action_dimensions(monkeypatch):
    actor, obs = (
        make_actor(diffsac, action_dim=2, diffusion_steps=3, hidden_dim=16),
        torch.randn(6, 3),
    )
    randomise(actor)
    noise = torch.randn(4, 6, 2)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: noise)
    first = actor.chain(obs)
    with torch.no_grad():
        for parameter in (actor.delta_logit, actor.fc_latent.weight):
            parameter.copy_(parameter.flip(1))
        for parameter in (actor.fc_control.weight, actor.fc_control.bias):
            parameter.copy_(parameter.flip(0))
    monkeypatch.setattr(torch, "randn", lambda *_, **__: noise.flip(2))
    torch.testing.assert_close(actor.chain(obs).latents.flip(2), first.latents)
