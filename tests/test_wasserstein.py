"""wpo_continuous.py and diffwpo_continuous.py: mixed derivatives, closed-form flows, the gradients of their bases."""

import copy
import math
from collections import deque

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

import diffwpo_continuous
import wpo_continuous
from tests.common import ROOT, WASSERSTEIN, actor_loss, make_actor, pathwise_loss, randomise


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def gradients(actor):
    return {name: p.grad.clone() for name, p in actor.named_parameters() if p.grad is not None}


def assert_same_gradients(first, second, **tolerance):
    assert first.keys() == second.keys() and len(first) > 3
    for name in first:
        torch.testing.assert_close(
            first[name], second[name], **tolerance, msg=lambda text, name=name: name + text
        )


@pytest.mark.parametrize("precondition", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_gaussian_gradient_is_the_explicit_mixed_derivative(precondition, alpha):
    """(W2) by two automatic derivatives of log N, with the Fisher matrix as written, sample by sample."""
    actor, qf = (
        make_actor(wpo_continuous, low=(-1, -3), high=(1, 2)),
        wpo_continuous.SoftQNetwork(3, 2, 16),
    )
    obs, samples = torch.randn(7, 3), 5
    args = wpo_continuous.Args(action_samples=samples, precondition=precondition)
    torch.manual_seed(3)
    wpo_continuous.policy_loss(actor, actor, qf, obs, alpha, args)[0].backward()
    ours = gradients(actor)
    torch.manual_seed(3)
    noise = torch.randn(samples * 7, 2)
    actor.zero_grad()
    mean, log_std = (x.repeat(samples, 1) for x in actor(obs))
    std = log_std.exp()
    latent = (mean + std * noise).detach().requires_grad_()
    action, log_det = actor.squash(latent)
    log_density = Normal(mean, std).log_prob(latent).sum(-1)
    value = qf(obs.repeat(samples, 1), action).amin(0) - alpha * (log_density - log_det)
    (velocity,) = torch.autograd.grad(value.sum(), latent, retain_graph=True)
    (score,) = torch.autograd.grad(log_density.sum(), latent, create_graph=True)
    by_mean, by_std = torch.autograd.grad(
        (score * velocity).sum() / len(latent), (mean, std), retain_graph=True
    )
    if precondition:
        by_mean, by_std = by_mean * std.detach() ** 2, by_std * std.detach() ** 2 / 2
    torch.autograd.backward((mean, std), (-by_mean, -by_std))
    assert_same_gradients(ours, gradients(actor))


def test_gaussian_gradient_is_the_pathwise_one_sample_by_sample():
    actor, qf = (
        make_actor(wpo_continuous, low=(-1, -3), high=(1, 2)),
        wpo_continuous.SoftQNetwork(3, 2, 16),
    )
    obs = torch.randn(4, 3)
    torch.manual_seed(3)
    actor_loss(wpo_continuous, actor, qf, obs, 0.0, action_samples=1)[0].backward()
    ours = gradients(actor)
    actor.zero_grad()
    torch.manual_seed(3)
    pathwise_loss(actor, qf, obs, 0.0)[0].backward()
    assert_same_gradients(ours, gradients(actor))


def test_gaussian_entropy_gradient_is_sacs_on_average():
    """For alpha > 0 SAC's differs by alpha eps / sigma and alpha (eps^2 - 1) / sigma, scores of mean zero."""
    actor, qf = (
        make_actor(wpo_continuous, low=(-1,), high=(1,)),
        wpo_continuous.SoftQNetwork(3, 1, 16),
    )
    obs, alpha = torch.randn(4, 3), 0.3
    torch.manual_seed(3)
    actor_loss(wpo_continuous, actor, qf, obs, alpha, action_samples=1)[0].backward()
    ours = gradients(actor)
    actor.zero_grad()
    torch.manual_seed(3)
    pathwise_loss(actor, qf, obs, alpha)[0].backward()
    torch.manual_seed(3)
    mean, log_std = actor(obs)
    noise, std = torch.randn(4, 1), log_std.exp()
    (-alpha * (noise * mean + (noise**2 - 1) * std) / std.detach()).sum(-1).mean().backward()
    assert_same_gradients(ours, gradients(actor))


class OneGaussian(wpo_continuous.Actor):
    """One Gaussian for all states, its mean and its std the only parameters, without squashing."""

    def __init__(self, mean, std):
        torch.nn.Module.__init__(self)
        self.mean, self.std = (
            torch.nn.Parameter(torch.tensor(mean)),
            torch.nn.Parameter(torch.tensor(std)),
        )

    def forward(self, obs):
        return self.mean.expand(len(obs), 1), self.std.log().expand(len(obs), 1)

    def squash(self, latent):
        return latent, torch.zeros(latent.shape[:-1])


CURVATURE, CENTRE = 1.5, 0.7


def quadratic(obs, action):
    return (-0.5 * CURVATURE * (action - CENTRE) ** 2).sum(-1).expand(2, -1)


def flow(mean, std, alpha, time, curvature=CURVATURE, precondition=True):
    """Follow the script's loss by plain gradient descent; return mean and std at `time`."""
    actor, steps = OneGaussian(mean, std), 400
    optimizer = torch.optim.SGD(actor.parameters(), lr=time / steps)
    qf = quadratic if curvature else lambda obs, action: 0 * quadratic(obs, action)
    for _ in range(steps):
        loss, _ = actor_loss(
            wpo_continuous,
            actor,
            qf,
            torch.zeros(4000, 1),
            alpha,
            action_samples=1,
            precondition=precondition,
        )
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
    assert flow(0.0, 0.5, 0.2, 1.0, curvature=0)[1] ** 2 == pytest.approx(
        0.5**2 + 2 * 0.2, rel=0.03
    )


def test_raw_flow_collapses_in_finite_time():
    """Without F^-1, v(t) = v - 4 k t and m - c = (m0 - c) (1 - 4 k t / v)^(1/4)."""
    left = 1 - 4 * CURVATURE * 0.1 / 0.9**2
    mean, std = flow(-1.0, 0.9, 0.0, 0.1, precondition=False)
    assert std**2 == pytest.approx(0.9**2 * left, rel=0.03)
    assert mean == pytest.approx(CENTRE + (-1.0 - CENTRE) * left**0.25, abs=0.02)


def test_wasserstein_score_function_and_pathwise_directions_of_a_mixture():
    """For a mixture the directions differ, and (W2) is the one that follows the flow: by quadrature.

    The flow is made by moving the density's mass with the velocity for a short time, and the parameters of the
    mixture are fitted to it by least KL, without (W2).
    """
    grid = torch.linspace(-6, 6, 24_001)
    dx, weights, std = grid[1] - grid[0], torch.tensor([0.3, 0.7]), 0.6

    def log_mixture(theta, x):
        return torch.logsumexp(weights.log() + Normal(theta, std).log_prob(x[..., None]), dim=-1)

    def value(x):
        return torch.sin(2 * x) - 0.3 * x**2

    theta = torch.tensor([-1.0, 0.8], requires_grad=True)
    x = grid.clone().requires_grad_()
    log_density = log_mixture(theta, x)
    density = log_density.exp().detach()
    (velocity,) = torch.autograd.grad(value(x).sum(), x)
    (score,) = torch.autograd.grad(log_density.sum(), x, create_graph=True)
    (raw,) = torch.autograd.grad((density * score * velocity).sum() * dx, theta)
    by_theta = torch.autograd.functional.jacobian(
        lambda theta: log_mixture(theta, grid), theta.detach()
    )
    fisher = (density[:, None, None] * by_theta[:, :, None] * by_theta[:, None, :]).sum(0) * dx
    wasserstein = torch.linalg.solve(fisher, raw)
    score_function = (density[:, None] * by_theta * value(grid)[:, None]).sum(0) * dx
    natural = torch.linalg.solve(fisher, score_function)
    # a = m_i + std eps: the pathwise gradient is the mean of Q' under each component, times its weight
    pathwise = torch.stack(
        [
            w * (Normal(m, std).log_prob(grid).exp() * velocity).sum() * dx
            for w, m in zip(weights, theta, strict=True)
        ]
    ).detach()
    # the score-function and the pathwise estimator share their mean, for fixed weights
    torch.testing.assert_close(score_function, pathwise, rtol=1e-5, atol=1e-7)
    time = 1e-3
    fitted = theta.detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [fitted], tolerance_grad=1e-14, tolerance_change=1e-18, max_iter=100
    )

    def cross_entropy():  # of the moved density, in the coordinates before the move
        optimizer.zero_grad()
        loss = -(density * log_mixture(fitted, grid + time * velocity)).sum() * dx
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(cross_entropy)
    torch.testing.assert_close(
        (fitted.detach() - theta.detach()) / time, wasserstein, rtol=0.01, atol=1e-3
    )
    directions = [x / x.norm() for x in (wasserstein, raw, score_function, natural)]
    assert all((a - b).norm() > 0.02 for i, a in enumerate(directions) for b in directions[:i])


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_diffusion_gradient_is_the_pathwise_one_but_for_a_score_of_mean_zero(steps):
    flags = dict(
        low=(-1.0, -3.0), high=(1.0, 2.0), diffusion_steps=steps, hidden_dim=16, prior_std=1.3
    )
    actor, qf = make_actor(diffwpo_continuous, **flags), diffwpo_continuous.SoftQNetwork(3, 2, 16)
    randomise(actor)
    other, obs, alpha = make_actor(diffwpo_continuous, **flags), torch.randn(9, 3), 0.4
    other.load_state_dict(actor.state_dict())
    torch.manual_seed(5)
    loss, log_prob = actor_loss(diffwpo_continuous, actor, qf, obs, alpha)
    loss.backward()
    torch.manual_seed(5)
    loss, other_log_prob = pathwise_loss(other, qf, obs, alpha)
    loss.backward()
    torch.testing.assert_close(log_prob, other_log_prob)
    torch.manual_seed(5)
    with torch.no_grad():
        latents, noise = other(obs)
    noise = noise[:-1]
    std = other.kernels()[1]
    mean = actor.means(obs, latents)  # the same function of the same parameters
    torch.testing.assert_close(mean + std * noise, latents[:-1])
    with_score = gradients(other)
    scores = gradients_of(
        (-alpha * (noise * mean + (noise**2 - 1) * actor.kernels()[1]) / std.detach()), actor
    )
    assert_same_gradients(
        gradients(actor), {name: with_score[name] + scores[name] for name in with_score}
    )


def gradients_of(terms, actor):
    """Gradients of the sum of (K, batch, action_dim) terms over steps and dimensions, averaged over the batch."""
    parameters = {name: p for name, p in actor.named_parameters() if p.requires_grad}
    values = torch.autograd.grad(
        terms.sum((0, -1)).mean(), list(parameters.values()), allow_unused=True
    )
    return {
        name: value for name, value in zip(parameters, values, strict=True) if value is not None
    }


def test_raw_diffusion_gradient_is_the_explicit_mixed_derivative_of_every_kernel():
    """Without F^-1: sum_k sg[ alpha g_k - G_k ] g_k(theta), theta in the denoising means alone."""
    steps, alpha = 4, 0.4
    flags = dict(
        low=(-1.0, -3.0), high=(1.0, 2.0), diffusion_steps=steps, hidden_dim=16, prior_std=1.3
    )
    actor = make_actor(diffwpo_continuous, precondition=False, **flags)
    qf, obs = diffwpo_continuous.SoftQNetwork(3, 2, 16), torch.randn(6, 3)
    randomise(actor)
    torch.manual_seed(5)
    actor_loss(diffwpo_continuous, actor, qf, obs, alpha, precondition=False)[0].backward()
    assert actor.delta_logit.grad is None
    with torch.no_grad():
        torch.manual_seed(5)
        latents, noise = actor(obs)
    decay, std = (x.detach() for x in actor.kernels())
    kernel = lambda k, a: Normal(
        actor.means(obs, torch.stack([a] * (steps + 1)))[k - 1], std[k - 1]
    )  # noqa: E731
    total = 0.0
    for k in range(1, steps + 1):
        latent = latents[k - 1].clone().requires_grad_()
        chain, value, later = latent, 0.0, []
        for j in range(
            k - 1, 0, -1
        ):  # G_k: through the rest of the chain, with its noises and its weights held
            following = kernel(j, chain).mean + std[j - 1] * noise[j - 1]
            later.append(Normal(decay[j - 1] * following, std[j - 1]).log_prob(chain).sum())
            chain = following
        action, log_det = actor.squash(chain)
        value = qf(obs, action).amin(0).sum() + alpha * (log_det.sum() + sum(later))
        (pathwise,) = torch.autograd.grad(value, latent)
        leaf = latents[k - 1].clone().requires_grad_()
        q = kernel(k, latents[k]).log_prob(leaf).sum()
        pi = Normal(decay[k - 1] * leaf, std[k - 1]).log_prob(latents[k]).sum()
        (g,) = torch.autograd.grad(q - pi, leaf, create_graph=True)
        total = total + ((alpha * g - pathwise).detach() * g).sum(-1).mean()
    assert_same_gradients(gradients(actor), gradients_of(total[None, None, None], actor))


def test_divergences_against_torch_distributions():
    mean, target_mean = torch.randn(50, 3), torch.randn(50, 3)
    log_std, target_log_std = 0.3 * torch.randn(50, 3), 0.3 * torch.randn(50, 3)
    target = Normal(target_mean, target_log_std.exp())
    expected = torch.stack(
        (
            kl_divergence(target, Normal(mean, target_log_std.exp())).mean(0),
            kl_divergence(target, Normal(target_mean, log_std.exp())).mean(0),
        )
    )
    for script in WASSERSTEIN:
        torch.testing.assert_close(
            script.kl_divergences(mean, log_std, target_mean, target_log_std), expected
        )


@pytest.mark.parametrize("script", WASSERSTEIN)
def test_trust_region_is_the_kl_from_the_target_policy(script):
    """At equal spreads the two parts are the KL of the whole Gaussian, or of the chain: a mean over its log-ratio."""
    actor = make_actor(script, low=(-1.0, -1.0), high=(1.0, 1.0), hidden_dim=16)
    randomise(actor, 0.1)
    target = copy.deepcopy(actor)
    obs = torch.randn(1, 3).expand(100_000, 3)
    with torch.no_grad():
        for name, parameter in actor.named_parameters():
            if name.startswith("fc_mean") or (
                script is diffwpo_continuous and name != "delta_logit"
            ):
                parameter.add_(0.1 * torch.randn_like(parameter))
    qf = script.SoftQNetwork(3, 2, 16)
    for online, averaged in ((actor, actor), (actor, target)):
        kl = script.policy_loss(online, averaged, qf, obs, 0.1, script.Args(hidden_dim=16))[2]
        assert kl.shape == (2, 2)
        if averaged is actor:
            assert kl.abs().max() < 1e-12
    assert kl[0].min() > 1e-4
    if script is wpo_continuous:
        old, new = (Normal(m, s.exp()) for m, s in (target(obs), actor(obs)))
        torch.testing.assert_close(kl.sum(), kl_divergence(old, new).sum(-1).mean())
    else:  # the states are those of the new chain: a Monte Carlo mean of log( q_new / q_old ) has the same KL here
        with torch.no_grad():
            latents, _ = actor(obs)
            std = actor.kernels()[1]
            logs = [
                Normal(a.means(obs, latents), std).log_prob(latents[:-1]).sum((0, -1))
                for a in (actor, target)
            ]
        error = (logs[0] - logs[1]).std() / len(obs) ** 0.5
        assert kl.sum().item() == pytest.approx(
            (logs[0] - logs[1]).mean().item(), abs=4 * error.item()
        )


@pytest.mark.parametrize("script", WASSERSTEIN)
def test_spread_has_its_own_trust_region(script):
    actor = make_actor(script, hidden_dim=16)
    target = copy.deepcopy(actor)
    with torch.no_grad():
        if script is wpo_continuous:
            actor.fc_logstd.bias.add_(0.2)
        else:
            actor.delta_logit.add_(0.2)
    kl = script.policy_loss(
        actor, target, script.SoftQNetwork(3, 1, 16), torch.randn(50, 3), 0.1, script.Args()
    )[2]
    if script is wpo_continuous:
        assert kl[0].abs().max() < 1e-12
        torch.testing.assert_close(kl[1], torch.full((1,), 0.2 + 0.5 * math.exp(-0.4) - 0.5))
    else:
        (_, old), (_, new) = target.kernels(), actor.kernels()
        torch.testing.assert_close(
            kl[1], kl_divergence(Normal(0.0 * old, old), Normal(0.0 * new, new)).sum((0, 1))
        )


@pytest.mark.parametrize("script", WASSERSTEIN)
@pytest.mark.parametrize("n_step", [1, 3])
def test_n_step_transitions_against_a_loop(script, n_step):
    """Two environments of random episodes: every step starts one transition, with the rewards up to its end."""
    random, gamma, window, made = np.random.default_rng(1), 0.9, deque(maxlen=n_step), []
    steps = 60
    ended = random.random((steps, 2)) < 0.2
    terminations = ended & (random.random((steps, 2)) < 0.5)
    rewards = random.normal(size=(steps, 2))
    for t in range(steps):
        obs = np.stack([np.full(2, t), np.arange(2)], axis=1)
        arrays = script.n_step_transitions(
            window, gamma, obs, obs + [1, 0], -obs, rewards[t], terminations[t], ended[t]
        )
        for transitions in arrays:
            made += [
                tuple(np.concatenate([np.ravel(x) for x in row]))
                for row in zip(*transitions, strict=True)
            ]
    expected = []
    for t in range(steps):
        for env in range(2):
            last = next(
                (i for i in range(t, min(t + n_step, steps)) if ended[i, env]), t + n_step - 1
            )
            if last >= steps:
                continue  # still open
            value = sum(gamma ** (i - t) * rewards[i, env] for i in range(t, last + 1))
            discount = 0.0 if terminations[last, env] else gamma ** (last - t + 1)
            expected.append((t, env, last + 1, env, -t, -env, value, 1 - discount / gamma))
    assert len(made) == len(expected) > 100
    np.testing.assert_allclose(sorted(made), sorted(expected))


def run_main(script, monkeypatch, tmp_path, **flags):
    """A short run of `main`; returns its checkpoint."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr("sys.argv", ["script"])
    args = script.Args(
        **(dict(env_id="Pendulum-v1", total_timesteps=90, learning_starts=40) | flags)
    )
    args.hidden_dim, args.batch_size, args.eval_episodes, args.progress = 16, 16, 1, False
    script.main(args)
    newest = max(tmp_path.glob("runs/*/checkpoint.pt"), key=lambda path: path.stat().st_mtime_ns)
    return torch.load(newest, weights_only=True)


@pytest.mark.parametrize("script", WASSERSTEIN)
def test_learned_weights_of_the_trust_region_meet_the_bounds(script, monkeypatch, tmp_path):
    """--kl-bounds raises a weight while its KL is above the bound and lowers it below; fixed weights stand still."""
    flags = dict(kl_weights=(0.5, 0.25), policy_lr=1e-2)
    weights = run_main(script, monkeypatch, tmp_path, **flags)["temperature"][
        "log_kl_weights"
    ].exp()
    torch.testing.assert_close(weights, torch.tensor([[0.5], [0.25]]))
    checkpoint = run_main(script, monkeypatch, tmp_path, **flags, kl_bounds=(1e-9, 1e3))
    weights = checkpoint["temperature"]["log_kl_weights"].exp()
    assert weights[0, 0] > 0.5 and weights[1, 0] < 0.25


@pytest.mark.parametrize("script", WASSERSTEIN)
def test_a_heavy_trust_region_holds_the_policy(script, monkeypatch, tmp_path):
    """Weights of 1e5 keep the actor by its average; without weights it walks away from it."""
    distance = {}
    for weight in (0.0, 1e5):
        checkpoint = run_main(
            script,
            monkeypatch,
            tmp_path,
            kl_weights=(weight, weight),
            policy_lr=1e-2,
            total_timesteps=200,
            tau=0.002,
        )
        actors = []
        for name in ("actor", "actor_target"):
            env = gym.make("Pendulum-v1")
            actors.append(
                script.Actor(env.observation_space, env.action_space, script.Args(hidden_dim=16))
            )
            actors[-1].load_state_dict(checkpoint[name])
        qf = script.SoftQNetwork(3, 1, 16)
        kl = script.policy_loss(*actors, qf, torch.randn(500, 3), 0.1, script.Args())[2]
        distance[weight] = kl.sum().item()
    assert distance[1e5] < 0.02 * distance[0.0]


@pytest.mark.parametrize("script", WASSERSTEIN)
def test_averaged_policy_is_the_polyak_average(script, monkeypatch, tmp_path):
    """After two updates target = (1 - tau) target + tau actor, from the first actor on."""
    seen, loss = [], script.policy_loss

    def spy(actor, actor_target, *arguments):
        seen.append(
            [{k: v.clone() for k, v in x.state_dict().items()} for x in (actor, actor_target)]
        )
        return loss(actor, actor_target, *arguments)

    monkeypatch.setattr(script, "policy_loss", spy)
    checkpoint = run_main(script, monkeypatch, tmp_path, total_timesteps=42, tau=0.25)
    (first, target), (second, later) = seen
    for name in first:
        torch.testing.assert_close(target[name], first[name])
        torch.testing.assert_close(later[name], 0.75 * first[name] + 0.25 * second[name])
        torch.testing.assert_close(
            checkpoint["actor_target"][name], 0.75 * later[name] + 0.25 * checkpoint["actor"][name]
        )


@pytest.mark.parametrize("script", WASSERSTEIN)
def test_replay_of_n_steps_in_a_run(script, monkeypatch, tmp_path):
    """The scripted environment counts its steps and pays the count: sums over 3 steps, cut at both kinds of ends."""
    flags = dict(
        env_id="tests.scripted_env:Scripted-v0",
        num_envs=2,
        n_step=3,
        gamma=0.5,
        total_timesteps=160,
    )
    data = run_main(script, monkeypatch, tmp_path, **flags)["buffer"]["data"]
    obs, next_obs, _, rewards, terminations = (x.numpy() for x in data)
    first, last = obs[:, 1], next_obs[:, 1]
    odd = (
        obs[:, 0] % 2 == 1
    )  # odd episodes end in a terminal state after 3 steps, even ones are cut off after 5
    np.testing.assert_array_equal(next_obs[:, 0], obs[:, 0])
    np.testing.assert_array_equal(last, np.minimum(first + 3, np.where(odd, 3, 5)))
    steps = (last - first).astype(int)
    assert set(steps) == {1, 2, 3}
    expected = [
        sum(0.5**i * (a + 1 + i) for i in range(n)) for a, n in zip(first, steps, strict=True)
    ]
    np.testing.assert_allclose(rewards, expected)
    discount = np.where(odd & (last == 3), 0, 0.5**steps)
    np.testing.assert_allclose(0.5 * (1 - terminations), discount)
