"""toys/: exact optima by other means; toys/measure.py on policies whose numbers are known."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from scipy import integrate

import diffppo_continuous
import diffsac_continuous
import dime
import sac_continuous
import toys
from tests.common import ROOT, make_actor, randomise, run_script
from tools.enjoy import Normalised
from toys import measure

IDS = ("toys:TurningDoubleWell-v0", "toys:TurningGMM-v0")
TABLE = {  # temperature: E[R], entropy, density at the peaks and at 0, E|a|, alpha log Z
    0.01: (0.99490, -0.8838, 4.030, 1.2e-6, 0.4984, 0.98606),
    0.05: (0.97138, 0.04898, 1.688, 0.0840, 0.4637, 0.97383),
    0.1: (0.95086, 0.34290, 1.160, 0.2588, 0.4362, 0.98515),
    0.2: (0.92759, 0.50901, 0.8633, 0.4078, 0.4284, 1.02939),
    1.0: (0.86182, 0.67344, 0.5855, 0.5040, 0.4673, 1.53525),
}


@pytest.mark.parametrize("env_id", IDS)
@pytest.mark.filterwarnings("ignore")
def test_environment_passes_gymnasiums_checks(env_id):
    check_env(gym.make(env_id).unwrapped, skip_render_check=True)
    env = gym.make(env_id)
    env.reset(seed=1)
    ends = [env.step(np.array([0.3], dtype=np.float32))[2:4] for _ in range(100)]
    assert ends[:-1] == [(False, False)] * 99 and ends[-1] == (
        False,
        True,
    )  # a time limit, not a terminal state


def test_turns_and_rewards():
    env = gym.make(IDS[0]).unwrapped
    obs, _ = env.reset(seed=3)
    heading = np.arctan2(obs[1], obs[0])
    assert heading / (np.pi / 4) == pytest.approx(round(heading / (np.pi / 4)), abs=1e-9)
    for action, reward, turn in (
        (0.5, 1.0, 45),
        (0.0, 0.85, 45),
        (-0.01, 0.85, -45),
        (-1.0, 0.0, -45),
        (0.75, 0.8264, 45),
    ):
        obs, paid, *_ = env.step(np.array([action]))
        heading += np.deg2rad(turn)
        assert paid == pytest.approx(reward, abs=1e-3)
        np.testing.assert_allclose(obs, (np.cos(heading), np.sin(heading)), atol=1e-9)
    env = gym.make(IDS[1]).unwrapped
    env.reset(seed=3)
    env.heading = np.deg2rad(50.0)  # sector 1: means .619 .160 .344 .065 .653
    obs, paid, *_ = env.step(np.array([0.344]))
    density = np.mean(np.exp(-0.5 * ((0.344 - toys.MEANS[1]) / 0.05) ** 2)) / (
        0.05 * np.sqrt(2 * np.pi)
    )
    assert paid == pytest.approx(np.log(density), abs=1e-9)
    np.testing.assert_allclose(
        obs, (np.cos(np.deg2rad(50 + 41.28)), np.sin(np.deg2rad(50 + 41.28))), atol=1e-9
    )
    assert env.step(np.array([1.0]))[1] == pytest.approx(np.log(1e-12))  # the floor


def test_mixtures_are_those_of_the_source():
    assert toys.MEANS[0].round(3).tolist() == [0.205, -0.345, -0.689, -0.725, 0.470]
    assert toys.MEANS[7].round(3).tolist() == [-0.285, -0.021, 0.584, 0.651, -0.213]


@pytest.mark.parametrize("alpha", TABLE)
def test_double_well_optimum(alpha):
    """Against the table of the source and against adaptive quadrature."""
    exact = toys.optimum(toys.TurningDoubleWell(), alpha)
    peak, valley = (exact.density[0, np.abs(exact.actions - a).argmin()] for a in (0.5, 0.0))
    distance = (exact.density[0] * np.abs(exact.actions)).mean() * 2
    numbers = (
        exact.mean_reward[0],
        exact.entropy[0],
        peak,
        valley,
        distance,
        alpha * exact.log_partition[0],
    )
    np.testing.assert_allclose(
        numbers, TABLE[alpha], rtol=2e-4, atol=1e-4 if alpha > 0.01 else 5e-6
    )
    density = lambda a: np.exp((toys.double_well_reward(0.0, a) - 1) / alpha)  # noqa: E731
    whole = integrate.quad(density, -1, 1, points=(-0.5, 0, 0.5), limit=200)[0]
    assert exact.log_partition[0] == pytest.approx(np.log(whole) + 1 / alpha, abs=1e-4)
    assert np.ptp(exact.log_partition) < 1e-9 and exact.density.shape[0] == 8


def test_gmm_optimum_at_temperature_one_is_the_mixture():
    exact = toys.optimum(toys.TurningGMM(), 1.0)
    entropies = [-0.2243, -0.4136, -0.5162, -0.0730, -0.5871, -0.4614, -0.2307, -0.3959]
    np.testing.assert_allclose(
        exact.entropy.reshape(8, -1), np.repeat(entropies, 15).reshape(8, -1), atol=6e-5
    )
    np.testing.assert_allclose(exact.mean_reward, -exact.entropy, atol=1e-3)
    assert np.abs(exact.log_partition).max() < 1e-6
    np.testing.assert_allclose(exact.density.mean(1) * 2, 1, atol=1e-9)


def test_gmm_optimum_at_another_temperature_satisfies_the_soft_bellman_equation():
    """V = alpha log integral exp((R + gamma V') / alpha), by sums over the density."""
    alpha, gamma = 0.3, 0.5
    exact = toys.optimum(toys.TurningGMM(), alpha, gamma, actions=1000, sectors=8)
    random, count = np.random.default_rng(0), 4000
    cumulative = exact.density.cumsum(1) / exact.density.sum(1, keepdims=True)
    values = []
    for start in (0, 21):
        headings, total = np.full(count, exact.headings[start]), np.zeros(count)
        for t in range(25):
            cell = np.abs(np.angle(np.exp(1j * (headings[:, None] - exact.headings)))).argmin(1)
            column = (cumulative[cell] < random.uniform(size=(count, 1))).sum(1).clip(max=999)
            action = exact.actions[column]
            reward = toys.gmm_reward(headings, action)
            total += gamma**t * (reward - alpha * np.log(exact.density[cell, column]))
            headings = headings + toys.gmm_turn(action)
        values.append(total)
    # alpha log_partition = V - gamma V at one heading, up to the same constant everywhere
    expected = alpha * (exact.log_partition[0] - exact.log_partition[21]) / (1 - gamma)
    error = np.sqrt(sum(v.var() for v in values) / count)
    assert error < 0.02
    assert values[0].mean() - values[1].mean() == pytest.approx(expected, abs=4 * error + 0.01)


class Exact(torch.nn.Module):
    """A policy that draws from the exact density of the double well, its left half times `left`."""

    def __init__(self, alpha, left=1.0):
        super().__init__()
        self.exact, self.left = toys.optimum(toys.TurningDoubleWell(), alpha), left
        self.random = np.random.default_rng(2)

    def sample(self, obs):
        density = (
            self.exact.density[0]
            * np.where(self.exact.actions > 0, 1, self.left)
            * 2
            / (1 + self.left)
        )
        cell = self.random.choice(len(density), size=len(obs), p=density / density.sum())
        spread = (self.random.uniform(size=len(obs)) - 0.5) * 2 / len(density)
        action = torch.as_tensor(self.exact.actions[cell] + spread)
        return action[:, None], torch.as_tensor(np.log(density[cell]))


class Uniform(torch.nn.Module):
    def sample(self, obs):
        return 2 * torch.rand(len(obs), 1, dtype=torch.float64) - 1, torch.full(
            (len(obs),), -np.log(2)
        )


class ExactMixture(torch.nn.Module):
    """The mixture of the GMM: the optimum at alpha = 1, but for what lies outside [-1, 1]."""

    def __init__(self):
        super().__init__()
        self.random = np.random.default_rng(3)

    def sample(self, obs):
        headings = torch.atan2(obs[:, 1], obs[:, 0]).double().numpy()
        component = self.random.integers(5, size=len(obs))
        action = toys.MEANS[toys.sector(headings), component] + toys.STD * self.random.normal(
            size=len(obs)
        )
        action = action.clip(-1, 1)
        return torch.as_tensor(action)[:, None], torch.as_tensor(toys.gmm_reward(headings, action))


def policy_of(actor, alpha, env_id=IDS[0]):
    return measure.Policy("exact", 1, actor, gym.make(env_id).unwrapped, alpha, 0.99)


def test_table_of_the_exact_policy():
    row = measure.compare(policy_of(Exact(0.05), 0.05), 20_000, 200)[0]
    assert row["tv"] < 0.03 and (row["kept"], row["modes"]) == (16, 16)
    assert abs(row["regret"]) < 0.002 and abs(row["gap"]) < 1e-3


def test_table_of_the_exact_mixture():
    """It visits some sectors more than others: its regret is against the headings visited."""
    row = measure.compare(policy_of(ExactMixture(), 1.0, IDS[1]), 20_000, 4_000)[0]
    assert row["tv"] < 0.04 and (row["kept"], row["modes"]) == (84, 84)
    assert abs(row["regret"]) < 0.009  # 0.017 off the mean over all headings; standard error 0.002
    assert abs(row["gap"]) < 1e-3


def test_table_of_a_policy_with_one_mode():
    """Right half only: TV 1/2, half of the modes, a KL of log 2 a step."""
    row = measure.compare(policy_of(Exact(0.05, left=0.0), 0.05), 20_000, 200)[0]
    assert row["tv"] == pytest.approx(0.5, abs=0.02) and (row["kept"], row["modes"]) == (8, 16)
    assert row["gap"] == pytest.approx(np.log(2), abs=1e-3) and abs(row["regret"]) < 0.003


def test_table_of_a_uniform_policy():
    """Against quadrature: what it loses, and its divergence from the optimum."""
    alpha, reward = 0.2, lambda a: toys.double_well_reward(0.0, a)
    row = measure.compare(policy_of(Uniform(), alpha), 20_000, 1_000)[0]
    integral = lambda f: 0.5 * integrate.quad(f, -1, 1, points=(-0.5, 0.5))[0]
    mean, whole = integral(reward), integral(lambda a: np.exp(reward(a) / alpha))
    assert row["reward"] == pytest.approx(mean, abs=0.004)
    assert row["regret"] == pytest.approx(mean - TABLE[alpha][0], abs=0.004)  # below the optimum
    assert row["gap"] == pytest.approx(np.log(whole) - mean / alpha, abs=0.02)


@pytest.mark.parametrize("script", [diffsac_continuous, diffppo_continuous, dime])
def test_weights_of_a_chain_are_those_of_its_actions(script):
    """Z from single steps of a policy that is not the optimum; standard error below 0.004."""
    torch.manual_seed(1)
    actor = make_actor(script, 2, diffusion_steps=3, prior_std=1.0)
    randomise(actor, 0.05)
    policy, exact = policy_of(actor, 1.0), toys.optimum(toys.TurningDoubleWell(), 1.0)
    headings = np.zeros(200_000)
    action, log_ratio = measure.sample(policy, headings)
    weights = np.exp(policy.env.reward(headings, action) - log_ratio)
    assert np.log(weights.mean()) == pytest.approx(exact.log_partition[0], abs=0.015)
    assert measure.compare(policy, 5_000, 10)[0]["tv"] > 0.1


def test_optimum_refuses_a_temperature_without_a_density():
    env = gym.make(IDS[1])
    assert np.ptp(toys.optimum(env, 2.0, 0.5, actions=200, sectors=1).log_partition) > 1e-3
    for alpha in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="alpha must be positive"):
            toys.optimum(env, alpha)


def test_the_gap_is_left_out_where_log_z_depends_on_the_heading():
    row = measure.compare(policy_of(Uniform(), 2.0, IDS[1]), 500, 10)[0]
    assert np.isnan(row["gap"]) and np.isfinite(row["regret"])


@pytest.mark.parametrize("left,kept", [(0.2, 16), (0.1, 8)])  # left mode: 1 / 6 and 1 / 11 of 1 / 2
def test_a_mode_is_kept_from_a_quarter_of_its_mass_on(left, kept):
    assert measure.compare(policy_of(Exact(0.05, left), 0.05), 20_000, 200)[0]["kept"] == kept


@pytest.mark.parametrize("script", [diffsac_continuous, diffppo_continuous, dime])
def test_latents_of_the_chain_lead_to_the_action(script):
    args = script.Args(diffusion_steps=3)
    actor = make_actor(script, 2, diffusion_steps=3)
    randomise(actor)
    obs = torch.randn(4000, 2)
    torch.manual_seed(2)
    action = actor.sample(obs)[0]
    torch.manual_seed(2)
    latents = measure.latents_of(Normalised(actor, lambda obs: obs), obs)
    assert latents.shape == (4, 4000)
    torch.testing.assert_close(torch.tanh(latents[0]), action[:, 0])
    assert latents[3].std().item() == pytest.approx(args.prior_std, rel=0.05)


def test_table_and_pictures_from_checkpoints(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(ROOT))
    flags = "--total-timesteps 60 --hidden-dim 16 --eval-episodes 1 --device cpu".split()
    off = "--learning-starts 40 --batch-size 16 --no-autotune --alpha 0.05".split()
    on = "--num-envs 2 --num-steps 10 --num-minibatches 2 --alpha 1".split()
    assert run_script(monkeypatch, sac_continuous, "--env-id", IDS[0], *flags, *off) == 0
    assert run_script(monkeypatch, diffppo_continuous, "--env-id", IDS[1], *flags, *on) == 0
    capsys.readouterr()
    checkpoints = sorted(tmp_path.glob("runs/*/checkpoint.pt"))
    measure.table(checkpoints, samples=200, episodes=10)
    rows = [row.split("|") for row in capsys.readouterr().out.splitlines()[2:]]
    assert [row[1].strip() for row in rows] == ["sac, seed 1", "diffppo, K = 8, seed 1"]
    assert [row[2].strip() for row in rows] == ["0.05", "1"]
    figure = tmp_path / "table.png"
    with pytest.raises(SystemExit):
        measure.table(checkpoints, samples=200, episodes=10, figure=figure)
    assert "one environment" in capsys.readouterr().err
    measure.table([checkpoints[1]] * 2, samples=200, episodes=10, figure=figure)
    single, _, mean = (row.split("|") for row in capsys.readouterr().out.splitlines()[2:])
    assert mean[1].strip() == "diffppo, K = 8, TurningGMM-v0, 2 runs"
    assert mean[3].strip() == single[3].strip() + " ± 0.000"
    measure.chain(checkpoints[1], tmp_path / "chain.png", samples=200)
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("table", "chain"))
    with pytest.raises(SystemExit):
        measure.chain(checkpoints[0], tmp_path / "none.png")
    assert "has no chain" in capsys.readouterr().err
