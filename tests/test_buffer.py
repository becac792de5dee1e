"""What is stored of an episode: replay buffer and rollout."""

import numpy as np
import torch

from tests.common import (
    OFF_POLICY,
    ON_POLICY,
    TWINS,
    load,
    over,
    run_dirs,
    run_main,
    run_script,
    scalars,
)


@over(OFF_POLICY)
def test_replay_at_terminations_and_truncations_with_three_environments(
    script, small, monkeypatch, tmp_path
):
    flags = ["--env-id", "tests.scripted_env:Scripted-v0"]
    flags += "--num-envs 3 --total-timesteps 150 --utd 0.5".split()
    assert run_script(monkeypatch, script, *flags, *small) == 0
    obs, next_obs, actions, rewards, terminations = (
        x.numpy() for x in load(run_dirs(tmp_path)[0])["buffer"]["data"]
    )
    assert len(obs) == 150 and np.abs(actions).max() <= 1
    np.testing.assert_array_equal(
        next_obs[:, 0], obs[:, 0]
    )  # never the first observation of the next episode
    np.testing.assert_array_equal(next_obs[:, 1], obs[:, 1] + 1)
    np.testing.assert_array_equal(rewards, next_obs[:, 1])
    odd = obs[:, 0] % 2 == 1
    np.testing.assert_array_equal(terminations, (odd & (next_obs[:, 1] == 3)).astype(np.float32))
    assert (next_obs[~odd, 1] == 5).sum() >= 18  # cut off: stored, and bootstrapped from
    for env in range(3):  # each environment's own course, without a gap
        ended = terminations[env::3] + (next_obs[env::3, 1] == 5)
        np.testing.assert_array_equal(
            obs[env::3][1:, 1], np.where(ended[:-1], 0, obs[env::3][:-1, 1] + 1)
        )
    # three environments finish together: each episode is logged, at the count of environment steps
    lengths = scalars(run_dirs(tmp_path)[0], "charts/episodic_length")
    assert lengths[:6] == [(15, 5.0)] * 3 + [(24, 3.0)] * 3 and len(lengths) == 36
    # half a gradient step for each of the 3 environments' steps
    steps = load(run_dirs(tmp_path)[0])["q_optimizer"]["state"][0]["step"]
    assert steps == (150 - 40) // 2


@over(TWINS)
def test_buffer_is_a_ring(script):
    buffer = script.ReplayBuffer(5, 1, 1, "cpu")
    for t in range(0, 14, 2):  # two environments
        rows = np.array([[t], [t + 1]])
        buffer.add(rows, rows + 0.5, -rows, 10.0 * rows[:, 0], np.array([False, t == 8]))
    assert buffer.size == 5 and buffer.position == 14 % 5
    assert sorted(buffer.data.obs[:, 0].tolist()) == [9, 10, 11, 12, 13]
    batch = buffer.sample(400)
    assert set(batch.obs[:, 0].tolist()) == {9, 10, 11, 12, 13}
    torch.testing.assert_close(batch.next_obs, batch.obs + 0.5)
    torch.testing.assert_close(batch.actions, -batch.obs)
    torch.testing.assert_close(batch.rewards, 10 * batch.obs[:, 0])
    torch.testing.assert_close(batch.terminations, (batch.obs[:, 0] == 9).float())
    for capacity, kept in ((5, [9, 10, 11, 12, 13]), (3, [11, 12, 13]), (8, [9, 10, 11, 12, 13])):
        other = script.ReplayBuffer(capacity, 1, 1, "cpu")
        other.load_state_dict(buffer.state_dict())
        assert (other.position, other.size) == (len(kept) % capacity, len(kept))
        assert other.data.obs[: other.size, 0].tolist() == kept
        assert other.data.rewards[: other.size].tolist() == [10.0 * t for t in kept]


@over(TWINS)
def test_checkpoint_holds_only_the_filled_part_of_the_buffer(script, tmp_path):
    buffer = script.ReplayBuffer(1_000_000, 3, 1, "cpu")
    buffer.add(np.zeros((2, 3)), np.zeros((2, 3)), np.zeros((2, 1)), np.zeros(2), np.zeros(2))
    torch.save(buffer.state_dict(), tmp_path / "checkpoint.pt")
    assert (tmp_path / "checkpoint.pt").stat().st_size < 50_000


@over(ON_POLICY)
def test_on_policy_rollout_at_terminations_and_truncations(script, small, monkeypatch, tmp_path):
    seen, make_rows = [], script.make_rows

    def spy(actor, critic, obs_rms, return_scaler, rollout, *others):
        seen.append(rollout)
        return make_rows(actor, critic, obs_rms, return_scaler, rollout, *others)

    monkeypatch.setattr(script, "make_rows", spy)
    flags = dict(env_id="tests.scripted_env:Scripted-v0", total_timesteps=90)
    run_main(script, num_envs=3, num_steps=30, **flags)
    (rollout,) = seen
    np.testing.assert_array_equal(
        rollout.next_obs[..., 0], rollout.obs[..., 0]
    )  # never the next episode's
    np.testing.assert_array_equal(rollout.next_obs[..., 1], rollout.obs[..., 1] + 1)
    np.testing.assert_array_equal(rollout.rewards, rollout.next_obs[..., 1])
    odd = rollout.obs[..., 0] % 2 == 1
    np.testing.assert_array_equal(rollout.terminations, odd & (rollout.next_obs[..., 1] == 3))
    cut = ~odd & (rollout.next_obs[..., 1] == 5)
    np.testing.assert_array_equal(rollout.dones, rollout.terminations.bool() | cut)
    assert cut.sum() == 12 and rollout.terminations.sum() == 9
    assert scalars(run_dirs(tmp_path)[0], "charts/episodic_length")[:4] == [(15, 5.0)] * 3 + [
        (24, 3.0)
    ]
