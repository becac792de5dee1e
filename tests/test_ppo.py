"""ppo and diffppo: advantages, ratios, gradients and normalisers against plain references."""

import math
from types import SimpleNamespace

import pytest
import torch

import diffppo_continuous as diffppo
import ppo_continuous as ppo
from tests.common import ON_POLICY, log_normal, make_actor, randomise, run_dirs, scalars, set_delta

GAMMA, LAMBDA, ALPHA = 0.9, 0.7, 0.3
DELTA_MIN, DELTA_MAX = 1e-4, 0.999


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def make_args(script, **flags):
    return script.Args(hidden_dim=16, gamma=GAMMA, gae_lambda=LAMBDA, alpha=ALPHA, **flags)


def make_critic(script, args, obs_dim=2, action_dim=2):
    inputs = obs_dim + (action_dim + args.diffusion_steps if script is diffppo else 0)
    return script.mlp(inputs, 1, 16, last_gain=1.0)


def random_rollout(script, args, steps=12, envs=3):
    """Networks and a rollout with terminations, time limits and episodes that go on, at random."""
    actor, obs_rms = make_actor(script, 2, action_dim=2, **vars(args)), script.RunningMeanStd(2)
    randomise(actor, 0.1)
    obs_rms.update(torch.randn(50, 2) * 3 + 1)
    obs = torch.randn(steps, envs, 2)
    with torch.no_grad():
        latents = torch.stack([actor.latents(obs_rms(row)) for row in obs])
    dones = (torch.rand(steps, envs) < 0.4).double()
    terminations = dones * (torch.rand(steps, envs) < 0.5)
    assert 0 < terminations.sum() < dones.sum() < dones.numel()
    next_obs, rewards = torch.randn(steps, envs, 2), torch.randn(steps, envs)
    rollout = script.Rollout(obs, next_obs, latents, rewards, terminations, dones)
    return actor, make_critic(script, args), obs_rms, rollout


def make_rows(script, networks, rollout, args, scale=1.0):
    scaler = SimpleNamespace(update=lambda *_: None, factor=lambda: torch.tensor([scale]))
    return script.make_rows(*networks, scaler, rollout, args.alpha, args)[0]


def loop_advantage(deltas, go_on, t):
    """Sum of all later temporal-difference errors, as long as the episode goes on."""
    total, weight = 0.0, 1.0
    for later in range(t, len(deltas)):
        total += weight * deltas[later]
        weight *= go_on[later]
        if weight == 0:
            break
    return float(total)


@pytest.mark.parametrize("script", ON_POLICY)
def test_gae_is_the_discounted_sum_of_errors(script):
    rewards, values, next_values = torch.randn(3, 20, 4)
    dones, lambdas = (torch.rand(20, 4) < 0.3).double(), torch.rand(20, 4)
    discounts = GAMMA * (torch.rand(20, 4) > 0.2)
    advantages = script.gae(rewards, values, next_values, discounts, lambdas, dones)
    deltas, traces = rewards + discounts * next_values - values, discounts * lambdas * (1 - dones)
    for t in range(20):
        for env in range(4):
            expected = loop_advantage(deltas[:, env], traces[:, env], t)
            assert advantages[t, env].item() == pytest.approx(expected)


def log_det(latent):
    return (1 - torch.tanh(latent) ** 2).log().sum()


def test_ppo_rows_bootstrap_time_limits_and_stop_at_terminations():
    args = make_args(ppo)
    actor, critic, obs_rms, rollout = random_rollout(ppo, args)
    rows = make_rows(ppo, (actor, critic, obs_rms), rollout, args, scale=0.4)
    with torch.no_grad():
        std = actor.log_std.exp()
        for env in range(3):
            deltas, go_on, log_probs, values = [], [], [], []
            for t in range(12):
                x, next_x = obs_rms(rollout.obs[t, env]), obs_rms(rollout.next_obs[t, env])
                latent = rollout.latents[t, env]
                log_probs.append(log_normal(latent, actor.net(x), std))
                reward = rollout.rewards[t, env] - ALPHA * (log_probs[-1] - log_det(latent))
                alive = 1 - rollout.terminations[t, env]
                values.append(critic(x).item())
                deltas.append(0.4 * reward + GAMMA * alive * critic(next_x) - critic(x))
                go_on.append(GAMMA * LAMBDA * (1 - rollout.dones[t, env]))
            for t in range(12):
                advantage, row = loop_advantage(deltas, go_on, t), t * 3 + env
                own = 0.4 * ALPHA * log_probs[t].item()
                assert rows.log_prob[row].item() == pytest.approx(log_probs[t].item())
                assert rows.advantages[row].item() == pytest.approx(advantage + own)
                assert rows.returns[row].item() == pytest.approx(values[t] + advantage)
                torch.testing.assert_close(rows.latents[row], rollout.latents[t, env])
                torch.testing.assert_close(rows.obs[row], obs_rms(rollout.obs[t, env]))


@pytest.mark.parametrize("steps", [1, 3])
def test_diffppo_rows_on_the_augmented_axis(steps, monkeypatch):
    args = make_args(diffppo, diffusion_steps=steps, prior_std=1.3)
    actor, critic, obs_rms, rollout = random_rollout(diffppo, args)
    fresh = torch.randn(12, 3, 2)
    monkeypatch.setattr(torch, "randn_like", lambda x: fresh)
    rows = make_rows(diffppo, (actor, critic, obs_rms), rollout, args, scale=0.4)
    eye, prior = torch.eye(steps), torch.tensor(1.3)
    delta = DELTA_MIN + (DELTA_MAX - DELTA_MIN) * actor.delta_logit.sigmoid()
    decay, free_std = (1 - delta).sqrt(), 1.3 * delta.sqrt()
    state = lambda obs, latent, k: torch.cat((obs_rms(obs), latent, eye[k - 1]))
    with torch.no_grad():
        for env in range(3):
            deltas, go_on, log_ratios, values = [], [], [], []
            for t in range(12):
                chain = rollout.latents[t, :, env]  # row k is a^k
                for k in range(steps, 0, -1):
                    here = state(rollout.obs[t, env], chain[k], k)
                    free = decay[k - 1] * chain[k]
                    mean = free + free_std[k - 1] * actor.net(here)
                    log_q = log_normal(chain[k - 1], mean, actor.log_std[k - 1].exp())
                    log_ratios.append(log_q - log_normal(chain[k - 1], free, free_std[k - 1]))
                    reward, discount, trace = -ALPHA * log_ratios[-1], 1.0, 1.0
                    if k > 1:
                        following = state(rollout.obs[t, env], chain[k - 1], k - 1)
                    else:
                        end = log_normal(chain[0], 0.0, prior) - log_det(chain[0])
                        reward = reward + rollout.rewards[t, env] - ALPHA * end
                        discount = GAMMA * (1 - rollout.terminations[t, env])
                        trace = GAMMA * LAMBDA * (1 - rollout.dones[t, env])
                        if rollout.dones[t, env] or t == 11:
                            first = rollout.next_obs[t, env], 1.3 * fresh[t, env]
                        else:
                            first = rollout.obs[t + 1, env], rollout.latents[t + 1, steps, env]
                        following = state(*first, steps)
                    values.append(critic(here).item())
                    deltas.append(0.4 * reward + discount * critic(following) - critic(here))
                    go_on.append(trace)
                    row = (t * steps + steps - k) * 3 + env
                    assert rows.k[row] == k
                    assert rows.log_prob[row].item() == pytest.approx(log_q.item())
                    ours = rows.obs[row], rows.latents[row], rows.next_latents[row]
                    expected = obs_rms(rollout.obs[t, env]), chain[k], chain[k - 1]
                    for x, y in zip(ours, expected, strict=True):
                        torch.testing.assert_close(x, y)
            for i in range(12 * steps):
                advantage, row = loop_advantage(deltas, go_on, i), i * 3 + env
                assert rows.returns[row].item() == pytest.approx(values[i] + advantage)
                own = 0.4 * ALPHA * log_ratios[i].item()
                assert rows.advantages[row].item() == pytest.approx(advantage + own)


@pytest.mark.parametrize("script", ON_POLICY)
def test_exact_soft_values_have_errors_of_mean_zero(script):
    """Two states that alternate, rewards 1 and 3, and the exact soft value of the policy."""
    args = make_args(script)
    args.gae_lambda, steps = 0.0, getattr(args, "diffusion_steps", 1)
    actor, obs_rms = make_actor(script, 2, **vars(args)), script.RunningMeanStd(2, enabled=False)
    randomise(actor, 0.1)
    states = torch.eye(2)
    with torch.no_grad():
        samples = [actor.sample(states[i].expand(100_000, 2))[1] for i in range(2)]
    soft = torch.tensor([1.0, 3.0]) - ALPHA * torch.stack([x.mean() for x in samples])
    exact = torch.stack([soft[i] + GAMMA * soft[1 - i] for i in range(2)]) / (1 - GAMMA**2)
    which = torch.arange(2).repeat(20_000)[:, None]  # 40,000 steps of one environment
    zeros = torch.zeros(40_000, 1)
    with torch.no_grad():
        latents = actor.latents(states[which[:, 0]])  # PPO (T, 1), DiffPPO (K + 1, T, 1)
    latents = latents[:, None] if script is ppo else latents.transpose(0, 1)[:, :, None]
    steps_of = states[which], states[1 - which], latents, 1.0 + 2.0 * which, zeros, zeros
    # of the state alone: exact where a chain begins
    value_of = lambda x: exact[x[..., :2].argmax(-1)][..., None]
    rows = make_rows(script, (actor, value_of, obs_rms), script.Rollout(*steps_of), args)
    errors = (rows.returns - value_of(rows.obs)[..., 0]).view(40_000, steps)[:, 0]
    assert errors.std() > 0.05  # of step K: the sum over the chain
    assert errors.mean().item() == pytest.approx(0, abs=5 * errors.std().item() / 200 + 0.02)


@pytest.mark.parametrize("script", ON_POLICY)
def test_ratios_are_one_in_the_first_minibatch(script):
    torch.set_default_dtype(torch.float32)
    args = make_args(script)
    actor, critic, obs_rms, rollout = random_rollout(script, args)
    rollout = script.Rollout(*(x.float() for x in rollout))
    rows = script.Rows(*(x[:7] for x in make_rows(script, (actor, critic, obs_rms), rollout, args)))
    _, metrics = script.ppo_loss(actor, critic, rows, torch.tensor(ALPHA), args)
    assert metrics["losses/approx_kl"].abs().max() < 1e-9 and not metrics["losses/clipfrac"].any()


def test_clipped_loss_on_known_numbers():
    log_prob = torch.tensor([0.0, 0.5, 0.5, -0.5, -0.5]).requires_grad_()
    advantages = torch.tensor([1.0, 2.0, -2.0, 2.0, -2.0])
    for script in ON_POLICY:
        loss, ratio = script.actor_loss(log_prob, torch.zeros(5), advantages, 0.2)
        expected = [1.0, 1.2 * 2, -math.exp(0.5) * 2, math.exp(-0.5) * 2, -0.8 * 2]
        assert loss.item() == pytest.approx(-sum(expected) / 5)
        (gradient,) = torch.autograd.grad(loss, log_prob)
        flows = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
        torch.testing.assert_close(gradient, -flows * ratio.detach() * advantages / 5)
    log_n = torch.zeros(5, requires_grad=True)
    diffppo.free_step_loss(log_n, ratio, advantages, 0.2, 0.7).backward()
    torch.testing.assert_close(log_n.grad, -0.7 * flows * ratio.detach() / 5)


def advantages_of(script, critic, rows, steps):
    """At the policy of the rollout: A of (2), recovered from the returns."""
    states = rows.obs
    if script is diffppo:
        states = script.augment(rows.obs, rows.latents, rows.k, steps)
    return rows.returns - critic(states)[:, 0].detach()


@pytest.mark.parametrize("script", ON_POLICY)
@pytest.mark.parametrize("norm_adv", [False, True])
def test_gradient_at_the_old_policy(script, norm_adv):
    """-mean(A grad log q), and for DiffPPO -alpha mean(grad log n), standardised alike."""
    args = make_args(script, norm_adv=norm_adv)
    actor, critic, obs_rms, rollout = random_rollout(script, args)
    rows = make_rows(script, (actor, critic, obs_rms), rollout, args)
    advantages = advantages_of(script, critic, rows, getattr(args, "diffusion_steps", 1))
    mean, spread = (advantages.mean(), advantages.std()) if norm_adv else (0.0, 1.0)
    standardised = (advantages - mean) / spread

    def objective():
        if script is ppo:
            return -(standardised * actor.log_prob(rows.obs, rows.latents)).mean()
        log_q, log_n = actor.log_prob(rows.obs, rows.k, rows.latents, rows.next_latents)
        return -(standardised * log_q).mean() - ALPHA / spread * log_n.mean()

    loss, metrics = script.ppo_loss(actor, critic, rows, torch.tensor(ALPHA), args)
    weights = [actor.log_std, actor.net[0].weight, actor.net[4].bias]
    weights += [actor.delta_logit] if script is diffppo else []
    ours = torch.autograd.grad(loss, weights, retain_graph=True)
    for mine, expected in zip(ours, torch.autograd.grad(objective(), weights), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-7)
    assert metrics["losses/clipfrac"].sum() == 0
    value_loss = 0.5 * 0.5 * advantages.square().mean()  # vf_coef, and (5)
    assert (loss - metrics["losses/actor_loss"]).item() == pytest.approx(value_loss.item())
    mine = torch.autograd.grad(loss, critic[0].weight)[0]
    assert mine.abs().max() > 0
    if script is diffppo:
        h, values = 1e-5, []
        for sign in (1, -1):
            with torch.no_grad():
                actor.delta_logit[2, 1] += sign * h
                values.append(objective().item())
                actor.delta_logit[2, 1] -= sign * h
        difference = (values[0] - values[1]) / (2 * h)
        assert ours[3][2, 1].item() == pytest.approx(difference, rel=1e-5)


def test_own_entropy_follows_the_current_policy():
    """Equation (3): after the policy has moved, A' holds the log-probability of now."""
    args = make_args(ppo, norm_adv=False)
    actor, critic, obs_rms, rollout = random_rollout(ppo, args)
    rows = make_rows(ppo, (actor, critic, obs_rms), rollout, args)
    advantages = advantages_of(ppo, critic, rows, 1)
    randomise(actor, 0.01)
    log_prob = actor.log_prob(rows.obs, rows.latents).detach()
    refreshed = advantages + ALPHA * (rows.log_prob - log_prob)
    ratio = (log_prob - rows.log_prob).exp()
    expected = -torch.min(ratio * refreshed, ratio.clamp(0.8, 1.2) * refreshed).mean()
    _, metrics = ppo.ppo_loss(actor, critic, rows, torch.tensor(ALPHA), args)
    torch.testing.assert_close(metrics["losses/actor_loss"].detach(), expected)
    assert (log_prob - rows.log_prob).abs().max() > 0.01


@pytest.mark.parametrize("script", ON_POLICY)
def test_diagnostics_of_ratios_that_underflow_are_finite(script):
    """Where a large step has made an old action impossible: the loss is finite, the KL too."""
    args = make_args(script, norm_adv=False)
    actor, critic, obs_rms, rollout = random_rollout(script, args)
    rows = make_rows(script, (actor, critic, obs_rms), rollout, args)
    rows = rows._replace(log_prob=rows.log_prob + 900.0)
    _, metrics = script.ppo_loss(actor, critic, rows, torch.tensor(ALPHA), args)
    assert metrics["losses/approx_kl"].mean().item() == pytest.approx(899)


def test_first_policy_is_the_squashed_prior():
    flags = {"diffusion_steps": 5, "delta_first": 0.9, "delta_last": 0.01, "prior_std": 2.0}
    actor = make_actor(diffppo, **flags)
    expected = 2 * torch.tensor([0.01 * 90 ** (i / 4) for i in range(5)]).sqrt()
    torch.testing.assert_close(actor.log_std.exp()[:, 0], expected)
    torch.testing.assert_close(actor.free_steps()[1][:, 0], expected)
    with torch.no_grad():
        latents, log_ratio = actor.latents(torch.zeros(20_000, 3)), actor.sample(torch.zeros(9, 3))
        assert latents[0].std().item() == pytest.approx(2, rel=0.02)
        latent = torch.atanh(log_ratio[0])
    expected = log_normal(latent, 0.0, torch.tensor(2.0)) - torch.stack(
        [log_det(x) for x in latent]
    )
    torch.testing.assert_close(log_ratio[1], expected)


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 16])
def test_no_step_makes_most_of_the_noise(steps):
    """Shares of the first policy's variance: about 1 / K each, and that of the prior is small."""
    actor = make_actor(diffppo, 1, action_dim=1, diffusion_steps=steps)
    decay, free_std = (x[:, 0] for x in actor.free_steps())
    before = torch.cat((torch.ones(1), decay.cumprod(0)))  # what is left of a^k's noise in a^0
    shares = (
        before * torch.cat((free_std, torch.tensor([actor.prior_std]))) / actor.prior_std
    ) ** 2
    assert shares.sum().item() == pytest.approx(1)
    assert shares[0].item() == pytest.approx(0.9 if steps == 1 else 1 / steps)
    assert shares.max() < 2 / steps and shares[-1] < 0.11
    with torch.no_grad():
        noise = actor.latents(torch.zeros(50_000, 1))[0].std().item()
    assert noise == pytest.approx(actor.prior_std, rel=0.02)


def test_a_small_first_delta_is_not_exceeded():
    actor = make_actor(diffppo, diffusion_steps=2, delta_first=0.3)
    torch.testing.assert_close(actor.free_steps()[0], torch.full((2, 1), 0.7**0.5))


def test_log_ratio_telescopes_to_the_noising_kernels():
    """(8) is log q of the chain minus log of the exact noising from a^0: detailed balance."""
    actor = make_actor(diffppo, action_dim=2, diffusion_steps=4, prior_std=0.8, hidden_dim=16)
    randomise(actor, 0.2)
    obs = torch.randn(30, 3)
    torch.manual_seed(3)
    action, log_ratio = actor.sample(obs)
    torch.manual_seed(3)
    latents = actor.latents(obs)
    expected = log_normal(latents[4], 0.0, torch.tensor(0.8))
    decay, free_std = actor.free_steps()
    for k in range(4, 0, -1):
        mean = actor.mean(obs, latents[k], torch.full((30,), k))
        expected = expected + log_normal(latents[k - 1], mean, actor.log_std[k - 1].exp())
        noised = decay[k - 1] * latents[k - 1]
        expected = expected - log_normal(latents[k], noised, free_std[k - 1])
    expected = expected - torch.stack([log_det(x) for x in latents[0]])
    torch.testing.assert_close(log_ratio, expected)
    torch.testing.assert_close(action, torch.tanh(latents[0]))
    zero = torch.zeros(30, 2)
    for k in range(4, 0, -1):
        zero = actor.mean(obs, zero, torch.full((30,), k))
    torch.testing.assert_close(actor.mean_action(obs), torch.tanh(zero))


def test_partition_function_is_unbiased_for_any_parameters():
    """Exp of minus (8) has the area of the box as its mean."""
    actor = make_actor(diffppo, 1, action_dim=1, diffusion_steps=3, hidden_dim=16, prior_std=1.2)
    set_delta(diffppo, actor, [0.2, 0.4, 0.8])
    with torch.no_grad():
        actor.log_std.copy_((1.1 * actor.free_steps()[1]).log())
        for weight in actor.net.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
        weight = (-actor.sample(torch.zeros(400_000, 1))[1]).exp()
    error = (weight.std() / len(weight) ** 0.5).item()
    assert error < 0.02 and weight.mean().item() == pytest.approx(2, abs=5 * error)


@pytest.mark.parametrize("script", ON_POLICY)
def test_return_scaler(script):
    scaler, gamma = script.ReturnScaler(2, 0.9), 0.9
    rewards, dones = torch.randn(300, 2) * 3, (torch.rand(300, 2) < 0.1).double()
    for part in ((0, 100), (100, 300)):
        scaler.update(rewards[slice(*part)], dones[slice(*part)])
    sums, current = [], torch.zeros(2)
    for reward, done in zip(rewards, dones, strict=True):
        current = gamma * current + reward
        sums.append(current)
        current = current * (1 - done)
    variance = torch.stack(sums).var(correction=0)
    torch.testing.assert_close(scaler.factor()[0], 1 / variance.sqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("script", ON_POLICY)
def test_learns_to_take_the_action_that_pays(script, monkeypatch, tmp_path):
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr("sys.argv", ["script.py"])
    flags = {"num_steps": 64, "num_minibatches": 4, "learning_rate": 3e-3, "eval_episodes": 2}
    flags |= {"env_id": "tests.scripted_env:PaysTheAction-v0", "total_timesteps": 12_000}
    script.main(script.Args(eval_frequency=0, **flags))
    (_, value) = scalars(run_dirs(tmp_path)[0], "eval/episodic_return_mean_action")[-1]
    assert value > 15  # of 20; 0 at first
