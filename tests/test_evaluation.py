"""Evaluation: returns, endless episodes, signals."""

import signal
import subprocess
import sys
import types
from functools import partial

import pytest
import torch

import sac_continuous as sac
from tests.common import ON_POLICY, ROOT, SMALL, load, over, run_args, run_dirs, scalars
from tests.scripted_env import Endless


def make_run(script, env_id, **flags):
    args = run_args(script, env_id=env_id, **({"eval_episodes": 3} | flags))
    script.set_up(args)
    envs = script.make_envs(env_id, 1)
    return script.Run(args, envs, {})


@over([sac, *ON_POLICY])
def test_evaluation_sums_rewards_over_one_episode(script, tmp_path):
    """One environment pays 1 + 2 + 3 + 4 + 5 in its first episode, the other one its action."""
    obs_rms, zeros = script.RunningMeanStd(1, enabled=False), torch.zeros
    actor = types.SimpleNamespace(
        sample=lambda obs: (torch.full((len(obs), 1), 0.25), zeros(len(obs))),
        mean_action=lambda obs: torch.full((len(obs), 1), -0.5),
    )
    for env_id, returns in (("Scripted", (15, 15)), ("PaysTheAction", (5, -10))):
        run = make_run(script, f"tests.scripted_env:{env_id}-v0")
        state = torch.get_rng_state()
        run.evaluate(actor, obs_rms)
        assert torch.equal(state, torch.get_rng_state())
        run.writer.close()
        for name, expected in zip(
            ("episodic_return", "episodic_return_mean_action"), returns, strict=True
        ):
            assert scalars(run.folder, f"eval/{name}") == [(0, expected)]


def test_an_episode_without_an_end_is_evaluated_for_10_000_steps(tmp_path):
    Endless.total = 0
    run = make_run(sac, "Endless-v0", eval_episodes=1)
    actor = types.SimpleNamespace(mean_action=lambda obs: torch.zeros(len(obs), 1))
    actor.sample = lambda obs: (actor.mean_action(obs), None)
    run.evaluate(actor, sac.RunningMeanStd(3, enabled=False))
    run.writer.close()
    assert scalars(run.folder, "eval/episodic_return") == [(0, 10_000)] and Endless.total == 20_000


@over([sac, *ON_POLICY])
def test_best_and_last_policy_are_kept(script, monkeypatch, tmp_path, capsys):
    """Also over a resumption; they hold what acts, and nothing can be resumed from them."""
    means, now, evaluate = iter([1.0, 3.0, 2.0, 2.5, 2.75]), [None], script.Run.evaluate
    envs_step = script.gym.vector.SyncVectorEnv.step

    def pay(envs, actions):  # what the next of `means` says, in evaluations of one step
        obs, rewards, terminations, truncations, infos = envs_step(envs, actions)
        if now[0] is not None:
            return obs, rewards * 0 + now[0], terminations | True, truncations, infos
        return obs, rewards, terminations, truncations, infos

    def evaluate_once(run, *rest):
        now[0] = next(means)
        evaluate(run, *rest)
        now[0] = None

    monkeypatch.setattr(script.gym.vector.SyncVectorEnv, "step", pay)
    monkeypatch.setattr(script.Run, "evaluate", evaluate_once)
    script.main(run_args(script, total_timesteps=60, eval_frequency=20))
    (run_dir,) = run_dirs(tmp_path)
    best, last, whole = (
        torch.load(run_dir / f"{name}.pt", weights_only=True)
        for name in ("policy_best", "policy", "checkpoint")
    )
    assert (best["global_step"], best["best_return"]) == (40, 3.0)
    assert last["global_step"] == 60 and not {"optimizer", "q_optimizer", "buffer"} & last.keys()
    for name, value in whole["actor"].items():
        assert torch.equal(last["actor"][name], value)
    resume = run_args(script, total_timesteps=100, eval_frequency=20)
    resume.resume = str(run_dir / "checkpoint.pt")
    script.main(resume)
    best = torch.load(run_dir / "policy_best.pt", weights_only=True)
    assert (best["global_step"], best["best_return"]) == (40, 3.0)
    best["best_return"] = 9.0  # of a later evaluation than the checkpoint, before a kill
    torch.save(best, run_dir / "policy_best.pt")
    means, resume.total_timesteps = iter([8.0]), 120
    script.main(resume)
    assert torch.load(run_dir / "policy_best.pt", weights_only=True)["best_return"] == 9.0
    (run_dir / "policy_best.pt").write_bytes(b"broken")  # is told, not replaced
    with pytest.raises(SystemExit):
        script.main(resume)
    assert "policy_best.pt cannot be read" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        resume.resume = str(run_dir / "policy.pt")
        script.main(resume)
    assert "holds a policy alone" in capsys.readouterr().err


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_evaluation_heeds_signals(signum, tmp_path):
    flags = ["--env-id", "tests.scripted_env:Endless-v0", *SMALL, "--eval-frequency", "20"]
    command = [sys.executable, str(ROOT / "sac_continuous.py"), *flags]
    heed = partial(signal.signal, signum, signal.SIG_DFL)  # under nohup SIGHUP is ignored
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heed)
    while "evaluating" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signum)
    assert process.wait(timeout=60) == 128 + signum
    assert load(run_dirs(tmp_path)[0])["global_step"] == 20
    with pytest.raises(KeyError):  # it was cut short
        scalars(run_dirs(tmp_path)[0], "eval/episodic_return")


@pytest.mark.parametrize("half,frequency,due", [(1, 0, [60]), (2, 0, [60]), (2, 20, [20, 40, 60])])
def test_an_evaluation_cut_short_leaves_no_trace_and_is_made_up_for(
    half, frequency, due, monkeypatch, tmp_path
):
    """The first one, by a signal while the first or the second policy acts; then --resume."""
    reset, resets = sac.gym.vector.SyncVectorEnv.reset, []

    def signal_at(envs, **options):
        if envs.num_envs == 3:
            resets.append(None)
            if len(resets) == half:
                signal.raise_signal(signal.SIGTERM)
        return reset(envs, **options)

    monkeypatch.setattr(sac.gym.vector.SyncVectorEnv, "reset", signal_at)
    args = run_args(sac, total_timesteps=60, eval_frequency=frequency, eval_episodes=3)
    with pytest.raises(SystemExit) as exit_:
        sac.main(args)
    (run_dir,) = run_dirs(tmp_path)
    assert exit_.value.code == 128 + signal.SIGTERM and not (run_dir / "policy_best.pt").exists()
    with pytest.raises(KeyError):
        scalars(run_dir, "eval/episodic_return")
    args.resume = str(run_dir / "checkpoint.pt")
    sac.main(args)
    for name in ("episodic_return", "episodic_return_mean_action"):
        assert [step for step, _ in scalars(run_dir, f"eval/{name}")] == due
    assert load(run_dir)["evaluated"] == 60 and (run_dir / "policy_best.pt").exists()
