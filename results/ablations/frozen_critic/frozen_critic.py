"""How far each actor gradient of DiffSAC gets while the critic Q stands still.

    python results/ablations/frozen_critic/frozen_critic.py runs/*/checkpoint.pt > frozen_critic.csv

From each checkpoint the actor is trained on with Q, temperature and normaliser fixed, and equation
(3) is measured (the same states and noises each time; lower is better). `chain` differentiates
(3); `step` is (7) to (9), with a latent critic that begins anew and learns 4,000 updates before the
actor does, and on; `exact` is (8) with the rest of the chain in place of the latent critic.
"""

import copy
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
import diffsac_continuous as diffsac  # noqa: E402

UPDATES, EVERY, BEFORE = 800, 200, 4000  # BEFORE: of the latent critic alone


def exact_loss(actor, qf, chain, alpha):
    """Equation (8), V being what the rest of the chain brings under a frozen copy."""
    rest = copy.deepcopy(actor).requires_grad_(False)
    costs = []
    for k in range(1, actor.steps + 1):
        rows = slice(k - 1, None, actor.steps)
        obs, latent = chain.obs[rows], chain.latents[k][rows]
        cost = 0.0
        for i in range(k, 0, -1):
            policy = actor if i == k else rest
            control, (decay, std) = policy.control(policy.fc_obs(obs), latent, i), policy.kernels()
            latent = decay[i - 1] * latent + std[i - 1] * (control + torch.randn_like(latent))
            cost = cost + 0.5 * alpha * control.square().sum(-1)
        costs.append(cost + alpha * actor.end_cost(latent) - qf(obs, torch.tanh(latent)).amin(0))
    return torch.cat(costs).mean()


def follow(checkpoint, gradient):
    """Values of (3) and of the entropy bound, every `EVERY` updates."""
    args, alpha = checkpoint["args"], checkpoint["temperature"]["log_alpha"].exp()
    obs_dim, action_dim = len(checkpoint["obs_rms"]["mean"]), len(checkpoint["action_low"])
    actor, average = (diffsac.Actor(obs_dim, action_dim, args) for _ in range(2))
    qf = diffsac.SoftQNetwork(obs_dim, action_dim, args)
    torch.manual_seed(3)
    vf = diffsac.latent_critic_network(obs_dim, action_dim, args)
    obs_rms = diffsac.RunningMeanStd(obs_dim, args.normalize_obs)
    buffer = diffsac.ReplayBuffer(checkpoint["buffer"]["size"], obs_dim, action_dim, "cpu")
    adam = partial(torch.optim.Adam, fused=True)
    optimizer, v_optimizer = adam(actor.parameters()), adam(vf.parameters(), lr=args.q_lr)
    parts = dict(actor=actor, average_actor=average, qf=qf, obs_rms=obs_rms, buffer=buffer)
    parts |= dict(actor_optimizer=optimizer)
    for name, part in parts.items():
        part.load_state_dict(copy.deepcopy(checkpoint[name]))

    torch.manual_seed(0)
    states = obs_rms(buffer.sample(8192).obs)
    torch.manual_seed(1)
    for update in range(-BEFORE if gradient == "step" else 0, UPDATES + 1):
        if update >= 0 and update % EVERY == 0:
            with torch.no_grad(), torch.random.fork_rng():
                torch.manual_seed(2)
                loss, log_ratio = diffsac.actor_loss(actor, qf, states, alpha)
            yield update, loss.item(), -log_ratio.mean().item()
        obs = obs_rms(buffer.sample(args.batch_size).obs)
        if gradient == "chain":
            loss = diffsac.actor_loss(actor, qf, obs, alpha)[0]
        else:
            with torch.no_grad():
                chain = actor.chain(obs)
                q = qf(obs, actor.outcome(chain)[0]).amin(0)
            if gradient == "exact":
                loss = exact_loss(actor, qf, chain, alpha)
            else:
                v_loss = diffsac.latent_critic_loss(actor, qf, vf, chain, q, alpha)
                diffsac.descend(v_optimizer, v_loss)
                loss = diffsac.step_actor_loss(actor, average, qf, vf, chain, alpha, args)[0]
        if update >= 0:
            diffsac.descend(optimizer, loss)
            diffsac.move_towards(average, actor, args.tau)


def main(paths):
    torch.set_num_threads(1)
    print("run,alpha,gradient,update,actor_loss,entropy_bound")
    for path in paths:
        checkpoint = diffsac.load_checkpoint(path)
        args, alpha = checkpoint["args"], checkpoint["temperature"]["log_alpha"].exp().item()
        for gradient in ("chain", "exact", "step"):
            for update, loss, bound in follow(checkpoint, gradient):
                name = f"{args.env_id}__{args.exp_name}__{args.seed}"
                print(f"{name},{alpha:.4f},{gradient},{update},{loss:.4f},{bound:.3f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
