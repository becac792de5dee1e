"""ppo_continuous.py and diffppo_continuous.py: advantages, ratios, gradients, normalisers against plain references."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import diffppo_continuous
import ppo_continuous
from tests.common import ON_POLICY, log_normal, make_actor, randomise

GAMMA, LAMBDA, ALPHA = 0.9, 0.7, 0.3


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def make_args(script, **flags):
    return script.Args(hidden_dim=16, gamma=GAMMA, gae_lambda=LAMBDA, alpha=ALPHA, **flags)


def random_rollout(script, args, steps=12, envs=3):
    """An actor, a critic and a rollout with terminations, time limits and episodes that go on, at random."""
    actor = make_actor(script, 2, low=(-1.0, -0.5), high=(1.0, 3.0), **vars(args))
    critic = script.Critic(actor.net[0].in_features, args)
    randomise(actor, 0.1)
    actor.normalizer.update(torch.randn(50, 2) * 3 + 1)
    obs = torch.randn(steps, envs, 2)
    with torch.no_grad():
        latents = torch.stack([actor(actor.normalizer(row)) for row in obs])
    ends = (torch.rand(steps, envs) < 0.4).double()
    terminations = ends * (torch.rand(steps, envs) < 0.5)
    assert 0 < terminations.sum() < ends.sum() < ends.numel()
    rollout = script.Rollout(
        obs, torch.randn(steps, envs, 2), latents, torch.randn(steps, envs), terminations, ends
    )
    return actor, critic, rollout


def fixed_scaler(scale=1.0):
    return SimpleNamespace(update=lambda *_: None, scale=lambda: torch.tensor([scale]))


def loop_advantage(deltas, go_on, t):
    """Sum of all later temporal-difference errors, as long as the episode goes on."""
    total, weight = 0.0, 1.0
    for later in range(t, len(deltas)):
        total += weight * deltas[later]
        weight *= go_on[later]
        if weight == 0:
            break
    return total


def test_gae_is_the_discounted_sum_of_errors():
    rewards, values, next_values = torch.randn(3, 20, 4)
    ends = torch.rand(20, 4) < 0.3
    discounts, traces = GAMMA * (torch.rand(20, 4) > 0.2), GAMMA * LAMBDA * ~ends
    for script in ON_POLICY:
        advantages = script.gae(rewards, values, next_values, discounts, traces)
        for t in range(20):
            for env in range(4):
                deltas = (rewards + discounts * next_values - values)[:, env]
                assert advantages[t, env].item() == pytest.approx(
                    loop_advantage(deltas, traces[:, env], t).item()
                )


def test_ppo_rows_bootstrap_time_limits_and_stop_at_terminations():
    args = make_args(ppo_continuous)
    actor, critic, rollout = random_rollout(ppo_continuous, args)
    rows, scale = ppo_continuous.training_rows(
        actor, critic, fixed_scaler(0.4), rollout, args.alpha, args
    )
    assert scale == 0.4
    obs, latents, log_prob, refreshed, returns, values = rows
    with torch.no_grad():
        std = actor.log_std.exp()
        for env in range(3):
            deltas, go_on, entropy_terms = [], [], []
            for t in range(12):
                x, next_x = (actor.normalizer(o[t, env]) for o in (rollout.obs, rollout.next_obs))
                latent = rollout.latents[t, env]
                slope = actor.action_scale * (1 - torch.tanh(latent) ** 2)
                reward = rollout.rewards[t, env] - ALPHA * (
                    log_normal(latent, actor.net(x), std) - slope.log().sum()
                )
                alive = 1 - rollout.terminations[t, env]
                deltas.append(0.4 * reward + GAMMA * alive * critic(next_x) - critic(x))
                go_on.append(GAMMA * LAMBDA * (1 - rollout.ends[t, env]))
                entropy_terms.append(0.4 * ALPHA * log_normal(latent, actor.net(x), std))
            for t in range(12):
                advantage = loop_advantage(deltas, go_on, t).item()
                row = t * 3 + env
                assert refreshed[row].item() == pytest.approx(advantage + entropy_terms[t].item())
                assert (returns - values)[row].item() == pytest.approx(advantage)
                torch.testing.assert_close(latents[row], rollout.latents[t, env])


@pytest.mark.parametrize("steps", [1, 3])
def test_diffppo_rows_on_the_augmented_axis(steps, monkeypatch):
    args = make_args(diffppo_continuous, diffusion_steps=steps, prior_std=1.3)
    actor, critic, rollout = random_rollout(diffppo_continuous, args)
    fresh = torch.randn(12, 3, 2)
    monkeypatch.setattr(torch, "randn_like", lambda x: fresh)
    rows, _ = diffppo_continuous.training_rows(
        actor, critic, fixed_scaler(0.4), rollout, args.alpha, args
    )
    states, latents, next_latents, k, log_prob, refreshed, returns, values = rows
    prior_entropy = 2 * (math.log(1.3) + 0.5 * math.log(2 * math.pi * math.e))
    with torch.no_grad():
        value = lambda o, latent, k: critic(
            torch.cat((actor.normalizer(o), latent, actor.step_embedding[k - 1]))
        )  # noqa: E731
        for env in range(3):
            deltas, go_on, log_ratios = [], [], []
            for t in range(12):
                chain = rollout.latents[t, env]  # a^K ... a^0
                for i in range(steps):
                    step_k, latent, following = steps - i, chain[i], chain[i + 1]
                    std, logit = actor.log_std.exp()[step_k - 1], actor.delta_logit[step_k - 1]
                    delta = 1e-4 + (1.9 - 1e-4) / (1 + (-logit).exp())
                    decay, noising_std = 1 - delta / 2, 1.3 * delta.sqrt()
                    state = torch.cat(
                        (
                            actor.normalizer(rollout.obs[t, env]),
                            latent,
                            actor.step_embedding[step_k - 1],
                        )
                    )
                    log_q = log_normal(
                        following, decay * latent + noising_std * actor.net(state), std
                    )
                    log_ratios.append(log_q - log_normal(latent, decay * following, noising_std))
                    reward, discount, trace = -ALPHA * log_ratios[-1], 1.0, 1.0
                    if step_k > 1:
                        next_value = value(rollout.obs[t, env], following, step_k - 1)
                    else:
                        slope = actor.action_scale * (1 - torch.tanh(following) ** 2)
                        reward += rollout.rewards[t, env] + ALPHA * (
                            prior_entropy + slope.log().sum()
                        )
                        discount = GAMMA * (1 - rollout.terminations[t, env])
                        trace = GAMMA * LAMBDA * (1 - rollout.ends[t, env])
                        if rollout.ends[t, env] or t == 11:
                            next_value = value(rollout.next_obs[t, env], 1.3 * fresh[t, env], steps)
                        else:
                            next_value = value(
                                rollout.obs[t + 1, env], rollout.latents[t + 1, env, 0], steps
                            )
                    deltas.append(
                        0.4 * reward
                        + discount * next_value
                        - value(rollout.obs[t, env], latent, step_k)
                    )
                    go_on.append(trace)
                    row = (t * 3 + env) * steps + i
                    assert k[row] == step_k and log_prob[row].item() == pytest.approx(log_q.item())
                    torch.testing.assert_close(states[row], state)
            for t in range(12):
                for i in range(steps):
                    advantage = loop_advantage(deltas, go_on, t * steps + i).item()
                    row = (t * 3 + env) * steps + i
                    assert (returns - values)[row].item() == pytest.approx(advantage)
                    expected = advantage + 0.4 * ALPHA * log_ratios[t * steps + i].item()
                    assert refreshed[row].item() == pytest.approx(expected)


@pytest.mark.parametrize("script", ON_POLICY)
def test_exact_soft_values_have_errors_of_mean_zero(script):
    """Two states that alternate, rewards 1 and 3: with the exact soft value of the policy every error has mean zero."""
    args = make_args(script)
    args.gae_lambda = 0.0
    actor = make_actor(script, 2, low=(-2.0,), high=(1.0,), **vars(args))
    randomise(actor, 0.1)
    states = torch.eye(2)
    with torch.no_grad():
        entropy = torch.stack(
            [-actor.sample(states[i].expand(100_000, 2))[1].mean() for i in range(2)]
        )
    soft = torch.tensor([1.0, 3.0]) + ALPHA * entropy
    exact = torch.stack([soft[i] + GAMMA * soft[1 - i] for i in range(2)]) / (1 - GAMMA**2)
    which = torch.arange(2).repeat(20_000)[:, None]  # 40,000 steps of one environment
    zeros = torch.zeros(40_000, 1)
    with torch.no_grad():
        latents = actor(actor.normalizer(states[which[:, 0]]))[:, None]
    rollout = script.Rollout(
        states[which], states[1 - which], latents, 1.0 + 2.0 * which, zeros, zeros
    )
    value_of = lambda x: exact[x[..., :2].argmax(-1)]  # noqa: E731  (of the state alone: exact where a chain begins)
    rows, _ = script.training_rows(actor, value_of, fixed_scaler(), rollout, args.alpha, args)
    errors = (rows[-2] - rows[-1]).view(40_000, -1)[:, 0]  # of step K: the sum over the chain
    assert errors.std() > 0.05
    assert errors.mean().item() == pytest.approx(0, abs=5 * errors.std().item() / 200 + 0.02)


@pytest.mark.parametrize("script", ON_POLICY)
def test_ratios_are_one_in_the_first_minibatch(script):
    torch.set_default_dtype(torch.float32)
    args = make_args(script)
    actor, critic, rollout = random_rollout(script, args)
    rollout = script.Rollout(*(x.float() for x in rollout))
    rows, _ = script.training_rows(actor, critic, fixed_scaler(), rollout, args.alpha, args)
    *steps, old_log_prob, advantages, _, _ = (x[:7] for x in rows)
    log_prob = actor.log_density(*steps)
    log_prob = log_prob if isinstance(log_prob, torch.Tensor) else log_prob[0]
    _, ratio = script.policy_loss(log_prob, old_log_prob, advantages, 0.2)
    torch.testing.assert_close(ratio, torch.ones(7), rtol=0, atol=2e-5)


def test_clipped_loss_on_known_numbers():
    log_prob = torch.tensor([0.0, 0.5, 0.5, -0.5, -0.5]).requires_grad_()
    advantages = torch.tensor([1.0, 2.0, -2.0, 2.0, -2.0])
    for script in ON_POLICY:
        loss, ratio = script.policy_loss(log_prob, torch.zeros(5), advantages, 0.2)
        expected = [1.0, 1.2 * 2, -math.exp(0.5) * 2, math.exp(-0.5) * 2, -0.8 * 2]
        assert loss.item() == pytest.approx(-sum(expected) / 5)
        (gradient,) = torch.autograd.grad(loss, log_prob)
        flows = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
        torch.testing.assert_close(gradient, -flows * ratio.detach() * advantages / 5)
    log_noising = torch.zeros(5, requires_grad=True)
    diffppo_continuous.noising_loss(log_noising, ratio, advantages, 0.2, 0.7).backward()
    torch.testing.assert_close(log_noising.grad, -0.7 * flows * ratio.detach() / 5)


@pytest.mark.parametrize("norm_adv", [False, True])
def test_gradient_at_the_old_policy_is_equation_10(norm_adv):
    """At theta_old: -mean(A grad log q) - alpha mean(grad log pi), standardised alike, and by finite differences."""
    args = make_args(
        diffppo_continuous, diffusion_steps=3, norm_adv=norm_adv, vf_coef=0.0, ent_coef=0.25
    )
    actor, critic, rollout = random_rollout(diffppo_continuous, args)
    rows, _ = diffppo_continuous.training_rows(
        actor, critic, fixed_scaler(), rollout, args.alpha, args
    )
    *steps, _, _, returns, values = rows
    advantages = returns - values  # at theta_old the refreshed entropy term is the stored one
    mean, spread = (advantages.mean(), advantages.std()) if norm_adv else (0.0, 1.0)

    def objective():
        log_prob, log_noising = actor.log_density(*steps)
        entropy = (0.5 * torch.log(2 * math.pi * math.e * actor.std() ** 2)).sum(1).mean()
        surrogate = (
            -((advantages - mean) / spread * log_prob).mean() - ALPHA / spread * log_noising.mean()
        )
        return surrogate - 0.25 * entropy

    loss = diffppo_continuous.ppo_loss(actor, critic, rows, ALPHA, args)[0]
    parameters = [actor.delta_logit, actor.net[0].weight, actor.net[4].bias, actor.log_std]
    gradients = torch.autograd.grad(loss, parameters)
    for ours, expected in zip(gradients, torch.autograd.grad(objective(), parameters), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)
    h = 1e-5
    for row, column in ((0, 0), (2, 1)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                actor.delta_logit[row, column] += sign * h
                values.append(objective().item())
                actor.delta_logit[row, column] -= sign * h
        assert gradients[0][row, column].item() == pytest.approx(
            (values[0] - values[1]) / (2 * h), rel=1e-5
        )


@pytest.mark.parametrize("norm_adv", [False, True])
def test_ppo_loss_at_the_old_policy(norm_adv):
    args = make_args(ppo_continuous, norm_adv=norm_adv, ent_coef=0.25)
    actor, critic, rollout = random_rollout(ppo_continuous, args)
    rows, _ = ppo_continuous.training_rows(actor, critic, fixed_scaler(), rollout, args.alpha, args)
    obs, latents, _, _, returns, values = rows
    advantages = returns - values
    if norm_adv:
        advantages = (advantages - advantages.mean()) / advantages.std()
    entropy = torch.distributions.Normal(0.0, actor.log_std.exp()).entropy().sum()
    expected = -(advantages * actor.log_density(obs, latents)).mean() - 0.25 * entropy
    expected = expected + 0.5 * 0.5 * (critic(obs) - returns).square().mean()
    loss, metrics = ppo_continuous.ppo_loss(actor, critic, rows, ALPHA, args)
    parameters = [actor.log_std, actor.net[0].weight, critic.net[2].weight]
    for ours, reference in zip(
        *(torch.autograd.grad(x, parameters) for x in (loss, expected)), strict=True
    ):
        torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-7)
    assert metrics["entropy"].item() == pytest.approx(entropy.item()) and metrics["clipfrac"] == 0


def test_first_schedule_ends_with_the_smallest_noise():
    actor = make_actor(
        diffppo_continuous, diffusion_steps=5, delta_first=1.0, delta_last=0.01, prior_std=2.0
    )
    expected = 2 * torch.tensor([0.01, 0.01**0.75, 0.1, 0.01**0.25, 1.0]).sqrt()
    torch.testing.assert_close(actor.std()[:, 0], expected)
    torch.testing.assert_close(actor.order, torch.arange(5, 0, -1))


def test_path_log_ratio_of_diffppo_is_that_of_its_kernels():
    args = make_args(diffppo_continuous, diffusion_steps=4, prior_std=0.8)
    actor, _, rollout = random_rollout(diffppo_continuous, args)
    torch.manual_seed(3)
    action, log_ratio = actor.sample(rollout.obs[0])
    torch.manual_seed(3)
    chains = actor(actor.normalizer(rollout.obs[0]))
    log_prob, log_noising = actor.log_density(
        *actor.chain(actor.normalizer(rollout.obs[0]), chains)
    )
    slope = actor.action_scale * (1 - torch.tanh(chains[:, -1]) ** 2)
    expected = (
        log_normal(chains[:, 0], 0.0, torch.tensor(0.8))
        + (log_prob - log_noising).sum(1)
        - slope.log().sum(1)
    )
    torch.testing.assert_close(log_ratio, expected)
    torch.testing.assert_close(
        action, torch.tanh(chains[:, -1]) * actor.action_scale + actor.action_bias
    )
    with (
        torch.no_grad()
    ):  # unbiased for the volume of the action box, 2 times 3.5, whatever the parameters
        weight = torch.exp(-actor.sample(rollout.obs[0, :1].expand(400_000, 2))[1])
    error = weight.std().item() / 400_000**0.5
    assert error < 0.2 and weight.mean().item() == pytest.approx(7.0, abs=5 * error)


@pytest.mark.parametrize("script", ON_POLICY)
def test_running_normalizer_and_return_scaler(script):
    normalizer, data = (
        script.RunningNormalizer(3),
        torch.randn(100, 3) * torch.tensor([1.0, 5.0, 0.1]) + 7,
    )
    for rows in (data[:1], data[1:40], data[40:]):
        normalizer.update(rows)
    torch.testing.assert_close(normalizer.mean, data.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normalizer.var, data.var(0, unbiased=False), rtol=1e-3, atol=1e-3)
    before = normalizer.state_dict()["mean"].clone()
    expected = ((data - normalizer.mean) / normalizer.var.sqrt()).clamp(-10, 10)
    torch.testing.assert_close(normalizer(data), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(normalizer.mean, before)

    scaler, rewards = script.ReturnScaler(2, GAMMA), torch.randn(30, 2)
    ends = (torch.rand(30, 2) < 0.2).double()
    scaler.update(rewards[:17], ends[:17])
    scaler.update(rewards[17:], ends[17:])
    sums = np.zeros((30, 2))
    for env in range(2):
        total = 0.0
        for t in range(30):
            total = GAMMA * total + rewards[t, env].item()
            sums[t, env] = total
            total *= 1 - ends[t, env].item()
    assert scaler.scale().item() == pytest.approx(1 / sums.std(), rel=1e-3)


@pytest.mark.parametrize("script", ON_POLICY)
def test_learns_to_take_the_action_that_pays(script, monkeypatch, tmp_path):
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["script"])
    args = script.Args(
        env_id="tests.scripted_env:PaysTheAction-v0",
        total_timesteps=24_576,
        learning_rate=1e-3,
        seed=1,
    )
    args.hidden_dim, args.progress, args.eval_frequency = 32, False, 0
    script.main(args)
    checkpoint = torch.load(next(tmp_path.glob("runs/*/checkpoint.pt")), weights_only=True)
    actor = make_actor(script, 1, hidden_dim=32)
    actor.load_state_dict(checkpoint["actor"])
    thunks = [script.make_env(args.env_id, 1, i, False, "") for i in range(3)]
    envs = SyncVectorEnv(thunks, autoreset_mode=AutoresetMode.SAME_STEP)
    score = script.evaluate(actor, envs, 1, torch.device("cpu"))["episodic_return"].mean()
    assert score > 8, score  # of 20; 0 +- 1.3 at random
