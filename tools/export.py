"""Export a policy as ONNX, or as a program of torch.export.

    python tools/export.py runs/RUN/policy_best.pt policy.onnx
    python tools/export.py runs/RUN/policy_best.pt policy.pt2 --mean-action

Normaliser, diffusion chain and the scaling of actions are inside. Inputs, float32:

    obs      (batch, obs_dim), as the environment gives them
    noise    (draws, batch, action_dim), standard normal: 1 draw for a Gaussian policy, K + 1 for a
             diffusion policy, with K = --diffusion-steps; zeros for the mean action

Output: actions (batch, action_dim) in the environment's units. With `--mean-action` noise is zero
inside, and obs the only input. ONNX needs the packages onnx and onnxscript.
"""

import importlib.util
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import nn
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.enjoy import fail, load_actor  # noqa: E402


@dataclass
class Args:
    checkpoint: tyro.conf.Positional[Path]  # policy or checkpoint of one of the scripts
    to: tyro.conf.Positional[Path]  # name.onnx or name.pt2
    mean_action: bool = False  # without noise as an input


class Given(TorchFunctionMode):
    """Gives `noise` to the one call that an actor makes for random numbers."""

    def __init__(self, noise):
        self.noise = noise

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.randn, torch.randn_like):
            return self.noise
        return function(*args, **(kwargs or {}))


class Policy(nn.Module):
    """From observations and noise to actions, as in the module's docstring."""

    def __init__(self, actor, checkpoint):
        super().__init__()
        self.actor, self.obs_rms = actor.actor, actor.obs_rms
        low, high = (torch.tensor(checkpoint[f"action_{end}"]) for end in ("low", "high"))
        self.centre, self.half_width = nn.Buffer((low + high) / 2), nn.Buffer((high - low) / 2)
        steps = getattr(self.actor, "steps", None)
        self.draws, self.single = 1 + (steps or 0), steps is None

    def forward(self, obs, noise=None):
        if noise is None:
            noise = torch.zeros(self.draws, obs.shape[0], len(self.centre))
        with Given(noise[0] if self.single else noise):
            actions, _ = self.actor.sample(self.obs_rms(obs))
        return self.centre + self.half_width * actions


def main(args: Args):
    if args.to.suffix not in (".onnx", ".pt2"):
        fail(f"{args.to} should end in .onnx or .pt2")
    if args.to.suffix == ".onnx" and not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        fail("ONNX needs two packages: pip install onnx onnxscript")
    actor, checkpoint, _ = load_actor(args.checkpoint)
    policy, batch = Policy(actor, checkpoint).eval(), torch.export.Dim("batch")
    inputs = {"obs": torch.zeros(2, len(checkpoint["obs_rms"]["mean"]))}
    shapes = {"obs": {0: batch}}
    if not args.mean_action:
        inputs["noise"] = torch.zeros(policy.draws, 2, len(policy.centre))
        shapes["noise"] = {1: batch}
    program = torch.export.export(policy, (), inputs, dynamic_shapes=shapes)
    args.to.parent.mkdir(parents=True, exist_ok=True)
    if args.to.suffix == ".pt2":
        torch.export.save(program, args.to)
    else:
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells of packages not needed
        torch.onnx.export(program, output_names=["actions"], verbose=False).save(args.to)
    sizes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())
    print(f"{args.to}: {sizes} -> actions {(2, len(policy.centre))}; 2 stands for any batch size")


if __name__ == "__main__":
    main(tyro.cli(Args))
