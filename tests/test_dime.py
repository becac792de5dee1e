"""dime.py: batch renormalisation, the categorical projection and the chain against references, quadrature and grids."""

import math

import numpy as np
import pytest
import torch

import dime
from tests.common import log_normal, make_actor, randomise

PRIOR_COST = -0.5 * math.log(
    2 * math.pi * math.e * 2.5**2
)  # mean log-density of the prior, per dimension


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def test_batch_renorm_worked_example():
    """Numbers of a plain computation by hand: statistics, corrections, output and the statistics afterwards."""
    norm = dime.BatchRenorm(2, warmup=0)
    norm.mean[:] = torch.tensor([1.0, 2.0])
    norm.var[:] = torch.tensor([4.0, 1.0])
    x = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 8.0]]).expand(2, 3, 2)
    expected = torch.tensor([[-0.50006, -0.99917], [0.49988, 0.99894], [1.49981, 5.99424]])
    torch.testing.assert_close(norm(x, train=True)[1], expected, rtol=0, atol=5e-3)
    torch.testing.assert_close(norm.mean[0], torch.tensor([[1.01, 2.02]]))
    torch.testing.assert_close(
        norm.var[1], torch.tensor([[3.986667, 1.076667]]), rtol=1e-5, atol=1e-5
    )
    plain = torch.stack(
        [(x[0, :, j] - norm.mean[0, 0, j]) / (norm.var[0, 0, j] + 1e-3).sqrt() for j in range(2)],
        dim=1,
    )
    torch.testing.assert_close(norm(x, train=False)[0], plain)


@pytest.mark.parametrize("warm", [False, True])
def test_batch_renorm_scales_and_shifts_after_the_correction(warm):
    """weight ((x - m) / s r + d) + bias as the paper writes it, and by the running statistics in evaluation."""
    torch.manual_seed(0)
    norm = dime.BatchRenorm(3, warmup=0 if warm else 10)
    with torch.no_grad():
        for values in (norm.weight, norm.bias, norm.mean):
            values.copy_(torch.randn(2, 1, 3))
        norm.var.copy_(0.5 + torch.rand(2, 1, 3))
    x = 2 * torch.randn(2, 50, 3) + 1
    running_mean, running_std = norm.mean.clone(), (norm.var.clone() + norm.eps).sqrt()
    expected = norm.weight * (x - running_mean) / running_std + norm.bias
    torch.testing.assert_close(norm(x, train=False), expected)
    mean, std = x.mean(1, keepdim=True), (x.var(1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    r = (std / running_std).clamp(1 / 3, 3) if warm else 1.0
    d = ((mean - running_mean) / running_std).clamp(-5, 5) if warm else 0.0
    torch.testing.assert_close(
        norm(x, train=True), norm.weight * ((x - mean) / std * r + d) + norm.bias
    )


def test_batch_renorm_warms_up_as_plain_batch_normalisation():
    norm, x = dime.BatchRenorm(3, warmup=2), torch.randn(2, 50, 3) * 4 + 7
    plain = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-3).sqrt()
    for _ in range(2):
        torch.testing.assert_close(norm(x, train=True), plain)
    mean, var = norm.mean.clone(), norm.var.clone()
    renormed = norm(x, train=True)
    assert (renormed - plain).abs().max() > 0.5
    r = ((x.var(1, unbiased=False, keepdim=True) + 1e-3) / (var + 1e-3)).sqrt().clamp(1 / 3, 3)
    d = ((x.mean(1, keepdim=True) - mean) / (var + 1e-3).sqrt()).clamp(-5, 5)
    torch.testing.assert_close(renormed, plain * r + d)
    for _ in range(
        3000
    ):  # once the running statistics have converged, training and evaluation agree
        norm(x, train=True)
    torch.testing.assert_close(norm(x, train=True), norm(x, train=False), rtol=1e-6, atol=1e-6)
    assert norm.batches == 3004 and set(norm.state_dict()) == {
        "weight",
        "bias",
        "mean",
        "var",
        "batches",
    }


def test_batch_renorm_has_finite_gradients_on_constant_columns():
    norm = dime.BatchRenorm(3, warmup=0).float()
    x = torch.randn(2, 20, 3, dtype=torch.float32)
    x[..., 0], x[..., 1] = 5.0, 1000 + 1e-4 * x[..., 1]
    x.requires_grad_()
    norm(x, train=True).square().sum().backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(norm.weight.grad).all()


def test_projection_against_a_loop():
    atoms, probs = torch.linspace(-2, 3, 6), torch.rand(40, 6).softmax(1)
    values = torch.randn(40, 6) * 2
    values[0], values[1], values[2] = -2.0, 3.0, 1.0  # on the ends, on an atom
    values[3], values[4] = -50.0, 50.0  # outside
    expected = torch.zeros(40, 6)
    for row in range(40):
        for p, v in zip(probs[row], values[row].clamp(-2, 3), strict=True):
            for m in range(6):
                expected[row, m] += p * max(0.0, 1 - abs(v - atoms[m]).item() / 1.0)
    projected = dime.project(probs, values, atoms)
    torch.testing.assert_close(projected, expected)
    torch.testing.assert_close(projected.sum(1), torch.ones(40))
    inside = values.abs().amax(1) < 2
    assert inside.sum() >= 3
    torch.testing.assert_close((projected @ atoms)[inside], (probs * values).sum(1)[inside])
    assert projected[3, 0] == pytest.approx(1) and projected[4, -1] == pytest.approx(1)


ARGS = dict(critic_dim=16, num_atoms=11, v_min=-5.0, v_max=5.0)


def critics(**flags):
    return dime.SoftQNetwork(3, 1, dime.Args(**ARGS, **flags))


def test_critic_loss_is_the_projected_cross_entropy():
    qf, args = critics(), dime.Args(**ARGS, gamma=0.9, critic_entropy=0.005)
    ended = torch.tensor([0.0, 1, 0, 0, 1, 0])
    batch = dime.Batch(*torch.randn(2, 6, 3), torch.rand(6, 1), torch.randn(6), ended)
    next_actions, next_cost = torch.rand(6, 1), torch.randn(6)
    both = torch.cat((batch.obs, batch.next_obs)), torch.cat((batch.actions, next_actions))
    logits = qf(*both, train=True)
    for norm in qf.norms:  # take back the update of the running statistics
        norm.mean.zero_(), norm.var.fill_(1.0), norm.batches.zero_()
    loss, values, clipped = dime.critic_loss(qf, batch, next_actions, next_cost, args)
    assert all(norm.batches == 1 for norm in qf.norms)
    p, expected, outside = logits.softmax(-1), 0.0, 0.0
    for row in range(6):
        target = torch.zeros(11)
        for i in range(11):
            weight = 0.5 * (p[0, 6 + row, i] + p[1, 6 + row, i]).detach()
            alive = 1 - ended[row]
            value = batch.rewards[row] + 0.9 * alive * (qf.atoms[i] - next_cost[row])
            outside += weight.item() * (abs(value) > 5) / 6
            for m in range(11):
                target[m] += weight * max(0.0, 1 - abs(value.clamp(-5, 5) - qf.atoms[m]).item())
        for twin in range(2):
            log_p = p[twin, row].log()
            expected += (-(target * log_p).sum() + 0.005 * (p[twin, row] * log_p).sum()) / 6
    torch.testing.assert_close(loss, expected)
    assert clipped.mean().item() == pytest.approx(float(outside))
    torch.testing.assert_close(values, (p @ qf.atoms)[:, :6])
    for parameter in qf.parameters():  # the target is a constant
        gradients = [torch.autograd.grad(x, parameter, retain_graph=True) for x in (loss, expected)]
        assert gradients[1][0].abs().max() > 0
        torch.testing.assert_close(*gradients)


def test_actor_loss_takes_the_mean_of_the_twins():
    class Critic:
        def value(self, obs, action):
            return torch.stack((3 * action[:, 0], -action[:, 0]))

    actor, obs = make_actor(dime, hidden_dim=16, diffusion_steps=3), torch.randn(20, 3)
    torch.manual_seed(1)
    loss, _ = dime.actor_loss(actor, Critic(), obs, 0.4)
    torch.manual_seed(1)
    action, log_prob = actor.sample(obs)
    torch.testing.assert_close(loss, (0.4 * log_prob - action[:, 0]).mean())


def test_joint_pass_shares_batch_statistics_and_evaluation_does_not():
    qf = critics()
    obs, actions = torch.randn(8, 3), torch.randn(8, 1)
    other = torch.cat((obs[:4], torch.randn(4, 3)))
    assert not torch.allclose(
        qf(obs, actions, train=True)[:, :4], qf(other, actions, train=True)[:, :4]
    )
    torch.testing.assert_close(qf(obs, actions)[:, :4], qf(other, actions)[:, :4])
    torch.testing.assert_close(qf.value(obs, actions), qf(obs, actions).softmax(-1) @ qf.atoms)


def test_log_ratio_is_the_sum_of_kernel_log_densities():
    actor = make_actor(dime, action_dim=2, diffusion_steps=5, hidden_dim=16)
    randomise(actor, 0.1)
    obs = torch.randn(30, 3)
    torch.manual_seed(3)
    action, log_prob = actor.sample(obs)
    torch.manual_seed(3)
    latents, noise = actor.chain(obs)
    scale, kappa = (torch.log(1 + torch.exp(x)) for x in (actor.raw_eta, actor.raw_kappa))
    expected = log_normal(latents[5], 0.0, torch.tensor(2.5))
    for i in range(5):  # the order of the chain: i = 0 is the first denoising step
        k = 5 - i
        schedule = 0.999 * math.cos(math.pi / 2 * (0.008 + i / 5) / 1.008) ** 2 + 0.001
        eta = scale * schedule / kappa
        angle = i * torch.linspace(0.1, 100, 256) + actor.phase
        time = actor.fc_time2(actor.gelu(actor.fc_time1(torch.cat((angle.sin(), angle.cos())))))
        weight = torch.cat(
            (actor.fc_latent.weight, actor.fc_obs.weight, actor.fc_time.weight), dim=1
        )
        x = torch.cat((latents[k], obs, time.expand(30, -1)), dim=1) @ weight.T + actor.fc_obs.bias
        control = actor.fc_control(actor.gelu(actor.fc3(actor.gelu(actor.fc2(actor.gelu(x))))))
        std, decay = (2 * eta).sqrt(), 1 - eta / 2.5**2
        mean = decay * latents[k] + eta * control
        torch.testing.assert_close(latents[k - 1], mean + std * noise[k - 1], rtol=1e-6, atol=1e-6)
        expected = (
            expected
            + log_normal(latents[k - 1], mean, std)
            - log_normal(latents[k], decay * latents[k - 1], std)
        )
    slope = 1 - torch.tanh(latents[0]) ** 2
    torch.testing.assert_close(log_prob, expected - slope.log().sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(action, torch.tanh(latents[0]))


@pytest.mark.parametrize(
    "steps,cost", [(2, 2.85524), (4, 2.85548), (8, 2.85594), (16, 2.85677), (32, 2.85807)]
)
def test_running_cost_of_the_first_policy(steps, cost):
    """With f = 0: per dimension by moments of the latents and quadrature of the log-determinant."""
    actor = make_actor(dime, 1, diffusion_steps=steps, hidden_dim=8)
    _, decay, std = (x.flatten() for x in actor.kernels())
    variance, latent_cost = 2.5**2, 0.0
    for k in range(steps, 0, -1):
        g, two_eta = decay[k - 1].item(), std[k - 1].item() ** 2
        new = g**2 * variance + two_eta
        latent_cost += -0.5 + (variance * (1 - 2 * g**2) + g**2 * new) / (2 * two_eta)
        variance = new
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    x = nodes * variance**0.5
    log_det = 2 * (math.log(2) - x - np.logaddexp(0, -2 * x))
    assert latent_cost - (weights * log_det).sum() / weights.sum() == pytest.approx(cost, abs=2e-5)
    with torch.no_grad():
        log_prob = actor.sample(torch.zeros(200_000, 1))[1]
    assert log_prob.mean().item() == pytest.approx(
        cost + PRIOR_COST, abs=5 * log_prob.std().item() / 200_000**0.5
    )


def test_volume_of_the_action_box_for_any_parameters():
    actor = make_actor(dime, 1, action_dim=2, diffusion_steps=8, hidden_dim=16)
    randomise(actor, 0.03)
    with torch.no_grad():
        weight = torch.exp(-actor.sample(torch.zeros(400_000, 1))[1])
    error = weight.std().item() / 400_000**0.5
    assert error < 0.1 and weight.mean().item() == pytest.approx(4.0, abs=5 * error)


def riccati(mean, std, eta, prior_std=2.5):
    """Smallest path KL to the target N(mean, std^2) over all controls: dynamic programming from the last step back."""
    p, q, const = 1 / (2 * std**2), -mean / (2 * std**2), 0.0
    for step in reversed(eta):
        g = 1 - step / prior_std**2
        denominator = g**2 + 4 * step * p
        a, b = g / denominator, -4 * step * q / denominator
        const += g**2 * b**2 / (4 * step) + p * b**2 + 2 * q * b + g**2 / 2 + 2 * step * p
        p, q = (
            (1 - g * a) ** 2 / (4 * step) + p * a**2,
            -(1 - g * a) * g * b / (4 * step) + p * a * b + q * a,
        )
    constant = -len(eta) / 2 - 0.5 * math.log(2 * math.pi * math.e * prior_std**2)
    return (
        p * prior_std**2
        + const
        + constant
        + 0.5 * math.log(2 * math.pi * std**2)
        + mean**2 / (2 * std**2)
    )


@pytest.mark.parametrize(
    "steps,gap", [(2, 1.2043), (4, 0.9845), (8, 0.6916), (16, 0.3878), (32, 0.1595)]
)
def test_bound_of_the_schedule_tightens_with_the_number_of_steps(steps, gap):
    actor = make_actor(dime, 1, diffusion_steps=steps, hidden_dim=8)
    eta = actor.kernels()[0].flatten().flip(0).tolist()
    assert riccati(0.0, 1.0, eta) == pytest.approx(gap, abs=2e-4)


def test_training_reaches_the_gaussian_target():
    """Path KL to N(0.5, 0.8^2) by the script's loss: close to the optimum for its final step sizes, never below it."""
    torch.manual_seed(3)
    actor = make_actor(dime, 1, diffusion_steps=4, hidden_dim=32)
    mean, std, alpha = 0.5, 0.8, 0.5

    class Critic:  # alpha log-density of the target over the latents, minus the log-determinant that the loss adds
        def value(self, obs, action):
            latent = torch.atanh(action.clamp(-1 + 1e-12, 1 - 1e-12))
            value = -0.5 * ((latent - mean) / std) ** 2 - math.log(std * math.sqrt(2 * math.pi))
            return alpha * (value.sum(-1) - dime.squash(latent)[1]).expand(2, -1)

    optimizer = torch.optim.Adam(actor.parameters(), lr=3e-3, betas=(0.5, 0.999))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, 1200)
    for _ in range(1200):
        loss, _ = dime.actor_loss(actor, Critic(), torch.zeros(256, 1), alpha)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        path_kl = dime.actor_loss(actor, Critic(), torch.zeros(200_000, 1), alpha)[0].item() / alpha
    optimum = riccati(mean, std, actor.kernels()[0].flatten().flip(0).tolist())
    initial = riccati(
        mean, std, make_actor(dime, 1, diffusion_steps=4).kernels()[0].flatten().flip(0).tolist()
    )
    assert optimum - 0.01 < path_kl < optimum + 0.05
    assert optimum < 0.5 * initial  # learning the step size tightens the bound


def test_gradient_of_the_chain_against_finite_differences():
    actor = make_actor(dime, diffusion_steps=4, hidden_dim=16)
    randomise(actor, 0.1)
    qf, obs = critics().eval(), torch.randn(50, 3)
    for norm in qf.norms:
        norm.mean.normal_(0, 0.3)

    def loss():
        torch.manual_seed(1)
        return dime.actor_loss(actor, qf, obs, 0.3)[0]

    parameters = [actor.raw_eta, actor.raw_kappa, actor.phase, actor.fc_latent.weight]
    for parameter, gradient in zip(
        parameters, torch.autograd.grad(loss(), parameters), strict=True
    ):
        index, values = (0,) * parameter.dim(), []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[index] += sign * 1e-5
                values.append(loss().item())
                parameter[index] -= sign * 1e-5
        assert gradient[index].item() == pytest.approx(
            (values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-7
        )


def test_gradients_of_the_actor_are_clipped_entry_by_entry(monkeypatch, tmp_path):
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["dime.py"])
    largest, step = [], torch.optim.Adam.step

    def spy(optimizer, *rest, **more):
        weights = optimizer.param_groups[0]["params"]
        if len(weights) > 10 and weights[0].dim() == 0:  # the actor: the first is raw_eta
            largest.append(max(w.grad.abs().max().item() for w in weights if w.grad is not None))
        return step(optimizer, *rest, **more)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    flags = {"hidden_dim": 16, "batch_size": 16, "learning_starts": 40, "eval_episodes": 1}
    flags |= {"critic_dim": 16, "diffusion_steps": 3, "alpha": 1e4}
    dime.main(dime.Args(env_id="Pendulum-v1", total_timesteps=46, **flags))
    assert len(largest) == 4 and max(largest) == 1
