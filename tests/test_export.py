"""tools/export.py: an exported policy acts as the script's own actor."""

import onnxruntime
import pytest
import torch

import diffsac_continuous
from tests.common import make_actor, make_args, randomise, save_policy
from tools import export


def make_policy(script, path, low=-2.0, high=1.0):
    """A checkpoint with a random actor, statistics and bounds; the actor and its statistics."""
    args, actor = make_args(script, hidden_dim=16), make_actor(script, hidden_dim=16)
    randomise(actor, 0.1)  # more would saturate tanh now and then
    save_policy(script, path, args, actor)
    obs_rms = script.RunningMeanStd(3)
    obs_rms.update(3 + 2 * torch.randn(100, 3))
    bounds = {"action_low": [low], "action_high": [high]}
    checkpoint = torch.load(path, weights_only=True)
    torch.save(checkpoint | bounds | {"obs_rms": obs_rms.state_dict()}, path)
    return actor, obs_rms


@pytest.mark.filterwarnings("ignore")
def test_exported_policy_is_the_actor(script, monkeypatch, tmp_path):
    """With the same noise to 1e-5, for a batch and for a single observation."""
    actor, obs_rms = make_policy(script, tmp_path / "policy.pt")
    export.main(export.Args(tmp_path / "policy.pt", tmp_path / "policy.onnx"))
    export.main(export.Args(tmp_path / "policy.pt", tmp_path / "mean.onnx", mean_action=True))
    session, mean = (
        onnxruntime.InferenceSession(tmp_path / f"{name}.onnx") for name in ("policy", "mean")
    )
    steps = getattr(actor, "steps", 0)
    for batch in (50, 1):
        obs, noise = torch.randn(batch, 3) + 3, torch.randn(1 + steps, batch, 1)
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(torch, "randn", lambda *_, noise=noise, **__: noise)
            patch.setattr(torch, "randn_like", lambda _, noise=noise: noise[0])
            expected = -0.5 + 1.5 * actor.sample(obs_rms(obs))[0]
        assert expected.std() > 0.01 or batch == 1
        (actions,) = session.run(None, {"obs": obs.numpy(), "noise": noise.numpy()})
        torch.testing.assert_close(torch.from_numpy(actions), expected, rtol=0, atol=1e-5)
        (actions,) = mean.run(None, {"obs": obs.numpy()})
        expected = -0.5 + 1.5 * actor.mean_action(obs_rms(obs)).detach()
        torch.testing.assert_close(torch.from_numpy(actions), expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_program_of_torch_export_and_refusals(tmp_path, capsys):
    actor, obs_rms = make_policy(diffsac_continuous, tmp_path / "policy.pt")
    export.main(export.Args(tmp_path / "policy.pt", tmp_path / "a" / "policy.pt2"))
    policy = torch.export.load(tmp_path / "a" / "policy.pt2").module()
    obs = torch.randn(4, 3)
    expected = -0.5 + 1.5 * actor.mean_action(obs_rms(obs))
    torch.testing.assert_close(policy(obs=obs, noise=torch.zeros(9, 4, 1)), expected)
    for path, to in (("policy.pt", "policy.txt"), ("nothing.pt", "policy.onnx")):
        with pytest.raises(SystemExit) as exit_:
            export.main(export.Args(tmp_path / path, tmp_path / to))
        assert exit_.value.code == 2 and capsys.readouterr().err.startswith("error: ")
