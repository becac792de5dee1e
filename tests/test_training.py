"""What a short run of each script does to its networks and logs."""

import os

import pytest
import torch

import diffsac_continuous as diffsac
import dime
import sac_continuous as sac
from tests.common import (
    CATEGORICAL,
    OFF_POLICY,
    ON_POLICY,
    PENDULUM,
    STEPWISE,
    TWINS,
    load,
    over,
    run_args,
    run_dirs,
    run_main,
    run_script,
    scalars,
)


@over(TWINS)
def test_temperature_target_and_moving_averages(script, monkeypatch, tmp_path):
    seen = {}

    def spy(name, function):
        def call(*inputs):
            seen.setdefault(name, []).append(inputs)
            return function(*inputs)

        monkeypatch.setattr(script, name, call)

    spy("temperature_loss", script.temperature_loss)
    deepcopy, copies = script.copy.deepcopy, []

    def deepcopy_and_keep(model):
        copied = deepcopy(model)
        if isinstance(model, torch.nn.Module):
            copies.append((model, copied))
        return copied

    monkeypatch.setattr(script.copy, "deepcopy", deepcopy_and_keep)
    args = run_args(script, total_timesteps=41, tau=0.25)
    before = []
    count = script.Run.count
    keep = lambda: before.append(
        [[p.clone() for p in average.parameters()] for _, average in copies]
    )  # noqa: E731
    monkeypatch.setattr(script.Run, "count", lambda run, *a, **kw: (keep(), count(run, *a, **kw)))
    script.main(args)
    assert seen["temperature_loss"][0][2] == -1  # one action dimension, whatever its bounds
    for (model, average), old in zip(copies, before[-1], strict=True):
        for now, online, was in zip(average.parameters(), model.parameters(), old, strict=True):
            torch.testing.assert_close(now, 0.25 * online + 0.75 * was)
    assert len(copies) == (1 if script is sac else 2)


@over(OFF_POLICY)
def test_actions_come_from_the_policy_after_the_random_ones(script, monkeypatch, tmp_path):
    fixed = lambda self, obs: (torch.full((len(obs), 1), 0.125), torch.zeros(len(obs)))  # noqa: E731
    monkeypatch.setattr(script.Actor, "sample", fixed)
    monkeypatch.setattr(script, "descend", lambda *_, **__: None)
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_, **__: None)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_value_", lambda *_: None)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *_: None)
    script.main(run_args(script, total_timesteps=60))
    actions = load(run_dirs(tmp_path)[0])["buffer"]["data"][2][:, 0]
    assert (
        (actions[:40] != 0.125).all()
        and actions[:40].abs().max() > 0.8
        and (actions[40:] == 0.125).all()
    )


@pytest.mark.parametrize("flags", ["--diffusion-steps 1", "--diffusion-steps 2", "--kl-bound 1e-6"])
@over(STEPWISE)
def test_short_chains_and_a_tight_trust_region_train(script, flags, monkeypatch, tmp_path):
    flags_of_the_run = [*PENDULUM, "--total-timesteps", 100, *flags.split()]
    assert run_script(monkeypatch, script, *flags_of_the_run) == 0
    (run_dir,) = run_dirs(tmp_path)
    checkpoint = load(run_dir)
    assert checkpoint["actor_optimizer"]["state"][0]["step"] == 60
    assert len(checkpoint["v_optimizer"]["state"]) == 6
    for name in ("control_energy", "noise_std_1", "kl_to_average", "in_trust_region"):
        assert [step for step, _ in scalars(run_dir, f"diffusion/{name}")] == [100]
    if flags == "--kl-bound 1e-6":
        ((_, share),) = scalars(run_dir, "diffusion/in_trust_region")
        assert share < 1


def test_the_gradient_through_the_chain_trains_without_the_latent_critic(monkeypatch, tmp_path):
    flags = [*PENDULUM, "--total-timesteps", 100, "--actor-gradient", "chain"]
    assert run_script(monkeypatch, diffsac, *flags) == 0
    (run_dir,) = run_dirs(tmp_path)
    checkpoint = load(run_dir)
    assert checkpoint["actor_optimizer"]["state"][0]["step"] == 60
    assert len(checkpoint["v_optimizer"]["state"]) == 0
    assert [step for step, _ in scalars(run_dir, "diffusion/control_energy")] == [100]


@over(STEPWISE)
def test_terminal_states_are_replaced_by_the_states_before(script, monkeypatch, tmp_path):
    """No action follows a terminal state: its row trains the actor at s."""
    seen, chain, critic_loss = {}, script.Actor.chain, script.critic_loss

    def spy_chain(self, obs, **rest):
        if len(obs) == 16:
            seen["obs"] = obs
        return chain(self, obs, **rest)

    def spy_loss(qf, batch, *rest):
        seen["batch"] = batch
        return critic_loss(qf, batch, *rest)

    monkeypatch.setattr(script.Actor, "chain", spy_chain)
    monkeypatch.setattr(script, "critic_loss", spy_loss)
    env_id = "tests.scripted_env:Scripted-v0"
    script.main(run_args(script, env_id=env_id, total_timesteps=60))
    ended = seen["batch"].terminations == 1
    assert 0 < ended.sum() < 16
    torch.testing.assert_close(seen["obs"][ended], seen["batch"].obs[ended])
    torch.testing.assert_close(seen["obs"][~ended], seen["batch"].next_obs[~ended])


@pytest.mark.parametrize("env_id", ["Hopper-v4", "Hopper-v5"])
@over(TWINS)
def test_trains_past_learning_starts(script, env_id, small, monkeypatch, tmp_path):
    assert (
        run_script(monkeypatch, script, "--env-id", env_id, "--total-timesteps", 200, *small) == 0
    )
    checkpoint = load(run_dirs(tmp_path)[0])
    for optimizer in ("actor_optimizer", "q_optimizer", "alpha_optimizer"):
        assert (
            checkpoint[optimizer]["state"][0]["step"] == 160
        )  # one gradient step per environment step
    for name in (
        "losses/critic_loss",
        "losses/actor_loss",
        "losses/alpha",
        "losses/entropy",
        "charts/SPS",
    ):
        assert [step for step, _ in scalars(run_dirs(tmp_path)[0], name)] == [100, 200]
    for name in ("eval/episodic_return", "eval/episodic_return_mean_action"):
        assert [step for step, _ in scalars(run_dirs(tmp_path)[0], name)] == [200]
    assert not torch.equal(checkpoint["qf"]["weights.0"], checkpoint["qf_target"]["weights.0"])


@over(CATEGORICAL)
def test_critics_learn_on_every_gradient_step_and_the_actor_on_every_third(
    script, small, monkeypatch, tmp_path
):
    flags = "--env-id Hopper-v4 --total-timesteps 100 --utd 2 --policy-delay 3".split()
    assert run_script(monkeypatch, script, *flags, *small) == 0
    (run_dir,) = run_dirs(tmp_path)
    checkpoint = load(run_dir)
    assert checkpoint["q_optimizer"]["state"][0]["step"] == 2 * 60
    assert checkpoint["actor_optimizer"]["state"][0]["step"] == 2 * 60 // 3
    assert checkpoint["alpha_optimizer"]["state"][0]["step"] == 2 * 60 // 3
    assert checkpoint["qf"]["norms.0.batches"] == 2 * 60
    assert checkpoint["qf"]["norms.0.mean"].abs().max() > 0
    for name in ("losses/critic_loss", "losses/clipped_targets", "losses/alpha"):
        assert [step for step, _ in scalars(run_dir, name)] == [100]
    resume = ["--resume", run_dir / "checkpoint.pt", "--total-timesteps", 130]
    assert run_script(monkeypatch, script, *resume) == 0
    after = load(run_dir)
    assert after["actor_optimizer"]["state"][0]["step"] == 2 * 90 // 3
    assert after["qf"]["norms.0.batches"] == 2 * 90
    for flags in (["--v-max", 9], ["--num-atoms", 11], ["--no-normalize-rewards"]):
        assert run_script(monkeypatch, script, *resume, *flags) == 2  # the critics' units


@pytest.mark.parametrize("num_atoms", [11, 1])
@over(CATEGORICAL)
def test_rewards_in_other_units_give_the_same_run(script, num_atoms, small, monkeypatch, tmp_path):
    """A factor 1/128 or 128 in front of the rewards; the scale's epsilon leaves a difference."""
    actors = {}
    for name in ("Pays128th-v0", "Pays-v0", "Pays128-v0"):
        flags = ["--env-id", f"tests.scripted_env:{name}", "--num-atoms", num_atoms, *small]
        assert run_script(monkeypatch, script, *flags, "--total-timesteps", 120) == 0
        checkpoint = load(max(run_dirs(tmp_path), key=os.path.getmtime))
        actors[name] = checkpoint["actor"]
        assert checkpoint["return_scaler"]["largest"] > 0
    for name in ("Pays128th-v0", "Pays128-v0"):
        for key, value in actors["Pays-v0"].items():
            torch.testing.assert_close(actors[name][key], value, rtol=0, atol=1e-3)


def test_dime_temperature_target_is_four_nats_of_running_cost(monkeypatch, tmp_path):
    seen, temperature_loss = [], dime.temperature_loss

    def spy(log_alpha, log_prob, target_entropy):
        seen.append(target_entropy)
        return temperature_loss(log_alpha, log_prob, target_entropy)

    monkeypatch.setattr(dime, "temperature_loss", spy)
    run_main(dime, total_timesteps=50)
    assert seen[0] == pytest.approx(-(4 - 2.33523), abs=1e-5)  # one dimension, whatever its bounds


def test_dimes_running_cost_is_the_bound_without_the_prior(monkeypatch, tmp_path):
    assert run_script(monkeypatch, dime, *PENDULUM, "--total-timesteps", 100) == 0
    ((_, cost),) = scalars(run_dirs(tmp_path)[0], "diffusion/running_cost_per_dim")
    ((_, bound),) = scalars(run_dirs(tmp_path)[0], "losses/entropy")
    assert cost == pytest.approx(2.33523 - bound, abs=1e-4)


@over(OFF_POLICY)
def test_temperature_is_annealed_geometrically(script, small, monkeypatch, tmp_path):
    flags = "--no-autotune --alpha 0.1 --alpha-anneal 50 --total-timesteps 500".split()
    assert run_script(monkeypatch, script, "--env-id", "Pendulum-v1", *small, *flags) == 0
    logged = dict(scalars(run_dirs(tmp_path)[0], "losses/alpha"))
    for step in (100, 200, 300):
        expected = 0.1 * 50 ** (1 - (step - 1) / 350)
        assert logged[step] == pytest.approx(expected, rel=0.012)  # DIME delays the actor
    assert logged[400] == logged[500] == pytest.approx(0.1)
    assert (
        run_script(monkeypatch, script, "--env-id", "Pendulum-v1", *small, "--alpha-anneal", 50)
        == 2
    )


@over(ON_POLICY)
@pytest.mark.parametrize("env_id", ["Hopper-v4", "Hopper-v5"])
def test_on_policy_runs_are_logged_and_resumed(script, small, env_id, monkeypatch, tmp_path):
    assert (
        run_script(monkeypatch, script, "--env-id", env_id, "--total-timesteps", 200, *small) == 0
    )
    (run_dir,) = run_dirs(tmp_path)
    checkpoint = load(run_dir)
    assert (
        checkpoint["optimizer"]["state"][0]["step"] == 10 * 2 * 2
    )  # iterations, epochs, minibatches
    assert checkpoint["obs_rms"]["count"] == 200  # every observation, once
    assert checkpoint["return_scaler"]["rms.count"] == 200
    names = ["actor_loss", "critic_loss", "entropy", "approx_kl", "clipfrac", "explained_variance"]
    names = ["losses/" + name for name in (*names, "alpha")]
    for name in [*names, "charts/learning_rate", "charts/SPS"]:
        assert [step for step, _ in scalars(run_dir, name)] == list(range(20, 201, 20))
    rates = [value for _, value in scalars(run_dir, "charts/learning_rate")]
    assert rates == pytest.approx([3e-4 * (1 - i / 10) for i in range(10)], rel=1e-5)
    assert (
        run_script(
            monkeypatch, script, "--resume", run_dir / "checkpoint.pt", "--total-timesteps", 300
        )
        == 0
    )
    after = load(run_dir)
    assert run_dirs(tmp_path) == [run_dir] and after["global_step"] == 300
    assert after["optimizer"]["state"][0]["step"] == 15 * 2 * 2
    assert [step for step, _ in scalars(run_dir, "losses/critic_loss")] == list(range(20, 301, 20))


@over(ON_POLICY)
def test_on_policy_temperature_is_annealed_geometrically(script, monkeypatch, tmp_path):
    """And `ppo_loss` gets it in the units of the scaled rewards."""
    make_rows, ppo_loss, seen = script.make_rows, script.ppo_loss, []

    def spy_rows(actor, critic, obs_rms, return_scaler, rollout, alpha, args):
        made = make_rows(actor, critic, obs_rms, return_scaler, rollout, alpha, args)
        seen.append((alpha, made[1].item(), []))
        return made

    def spy_loss(actor, critic, rows, alpha, args):
        seen[-1][2].append(alpha.item())
        return ppo_loss(actor, critic, rows, alpha, args)

    monkeypatch.setattr(script, "make_rows", spy_rows)
    monkeypatch.setattr(script, "ppo_loss", spy_loss)
    run_main(script, total_timesteps=200, alpha=0.1, alpha_anneal=50.0)
    logged = scalars(run_dirs(tmp_path)[0], "losses/alpha")
    assert [step for step, _ in logged] == list(range(20, 201, 20))
    for i, ((_, value), (alpha, scale, in_loss)) in enumerate(zip(logged, seen, strict=True)):
        assert value == pytest.approx(0.1 * 50 ** max(0, 1 - 20 * i / 140))  # 70 % of 200 steps
        assert alpha == pytest.approx(value) and scale != pytest.approx(1, abs=0.01)
        assert in_loss == pytest.approx([alpha * scale] * 4)
    assert run_script(monkeypatch, script, "--env-id", "Pendulum-v1", "--alpha-anneal", 0.5) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name,factor", [("Pendulum100th-v0", 0.01), ("Pendulum100-v0", 100.0)])
@over(CATEGORICAL)
def test_learns_with_rewards_in_any_units(script, name, factor, tmp_path):
    """As on Pendulum-v1, where this seed ends at -110."""
    flags = "--total-timesteps 20000 --learning-starts 1000 --eval-frequency 0 --hidden-dim 128"
    flags += f" --critic-dim 128 --env-id tests.scripted_env:{name}"
    flags += " --diffusion-steps 4" * (script.__name__ == "dime")
    script.main(script.tyro.cli(script.Args, args=flags.split()))
    ((_, found),) = scalars(run_dirs(tmp_path)[0], "eval/episodic_return")
    assert found / factor > -150
