"""Running mean and standard deviation of observations."""

import os

import numpy as np
import torch

import sac_continuous as sac
from tests.common import OFF_POLICY, ON_POLICY, load, over, run_args, run_dirs, run_main


def test_statistics_are_those_of_all_rows():
    rows, obs_rms = (
        np.random.default_rng(1).normal(3, 5, (1000, 4)) * [1, 10, 0.1, 0],
        sac.RunningMeanStd(4),
    )
    for part in np.split(rows, [1, 2, 3, 10, 200, 201, 900]):
        obs_rms.update(torch.as_tensor(part, dtype=torch.float32))
    mean, var = rows.mean(0), rows.var(0)
    torch.testing.assert_close(obs_rms.mean, torch.as_tensor(mean).float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(obs_rms.var, torch.as_tensor(var).float(), rtol=1e-4, atol=1e-4)
    x = torch.tensor([[0.0, 1.0, 2.0, 1e9]])
    expected = np.clip((x.numpy() - mean) / np.sqrt(var + sac.RunningMeanStd.EPSILON), -10, 10)
    torch.testing.assert_close(obs_rms(x), torch.as_tensor(expected).float(), rtol=1e-3, atol=1e-3)
    disabled = sac.RunningMeanStd(4, enabled=False)
    disabled.update(x)
    assert disabled(x) is x and disabled.count == 0


@over(OFF_POLICY)
def test_normaliser_in_a_run(script, monkeypatch, tmp_path):
    """Raw rows in the buffer, normalised ones in the losses; frozen in evaluation; saved."""
    seen, critic_loss = [], script.critic_loss

    def spy(qf, batch, *rest):
        seen.append(batch)
        return critic_loss(qf, batch, *rest)

    monkeypatch.setattr(script, "critic_loss", spy)
    script.main(run_args(script, total_timesteps=60, eval_frequency=50, normalize_obs=True))
    checkpoint = load(run_dirs(tmp_path)[0])
    rows = checkpoint["buffer"]["data"][0]
    assert checkpoint["obs_rms"]["count"] == 60 == len(rows)  # not those of the evaluations
    torch.testing.assert_close(checkpoint["obs_rms"]["mean"], rows.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        checkpoint["obs_rms"]["var"], rows.var(0, correction=0), rtol=1e-4, atol=1e-5
    )
    obs_rms = script.RunningMeanStd(3)
    obs_rms.load_state_dict(checkpoint["obs_rms"])
    for mine, name in ((seen[-1].obs, "obs"), (seen[-1].next_obs, "next_obs")):
        stored = obs_rms(checkpoint["buffer"]["data"][0 if name == "obs" else 1])
        nearest = (
            torch.cdist(mine, stored, compute_mode="donot_use_mm_for_euclid_dist").min(1).values
        )
        assert nearest.max() < 1e-4, name
    script.main(run_args(script, total_timesteps=60, normalize_obs=False, seed=2))
    raw = load(max(run_dirs(tmp_path), key=os.path.getmtime))["buffer"]["data"][0]
    assert (
        torch.cdist(seen[-1].obs, raw, compute_mode="donot_use_mm_for_euclid_dist")
        .min(1)
        .values.max()
        == 0
    )


@over(ON_POLICY)
def test_normaliser_stands_still_between_rollout_and_update(script, monkeypatch, tmp_path):
    """Of observations; and the ratios of the first minibatch are one."""
    seen, draw, ppo_loss = [], script.Actor.latents, script.ppo_loss
    forward, means = script.RunningMeanStd.forward, []

    def spy_forward(self, x):
        means.append(self.mean.clone())
        return forward(self, x)

    def spy_draw(self, obs):
        seen.append(("rollout", means[-1]))
        return draw(self, obs)

    def spy_loss(actor, critic, rows, alpha, args):
        loss, metrics = ppo_loss(actor, critic, rows, alpha, args)
        if seen[-1][0] == "rollout":  # before the first gradient step
            assert metrics["losses/approx_kl"].abs().max() < 1e-5
        seen.append(("update", means[-1]))
        return loss, metrics

    monkeypatch.setattr(script.RunningMeanStd, "forward", spy_forward)
    monkeypatch.setattr(script.Actor, "latents", spy_draw)
    monkeypatch.setattr(script, "ppo_loss", spy_loss)
    flags = dict(num_envs=8, num_steps=35, num_minibatches=28, update_epochs=10)
    monkeypatch.setattr(script.Run, "evaluate", lambda *_: None)
    run_main(script, total_timesteps=560, **flags)
    first, second = seen[: 35 + 280], seen[35 + 280 :]
    for iteration in (first, second):
        assert [kind for kind, _ in iteration] == ["rollout"] * 35 + ["update"] * 280
        assert all(torch.equal(mean, iteration[0][1]) for _, mean in iteration)
    assert not torch.equal(first[0][1], second[0][1])
