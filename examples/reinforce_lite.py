"""Learn to keep a pole upright on a cart by policy gradients (REINFORCE): no data loader, and state on the model.

reinforce_raw.py is a plain PyTorch loop for one device. reinforce_lite.py is the same loop with Lite, where each
process plays its own episodes:

    torchrun --nproc-per-node=2 examples/reinforce_lite.py
"""

from __future__ import annotations

import torch
from lite import Lite

from reinforce_model import PoleOnCart, Policy, discounted
from run_options import parse_arguments, record


def main() -> None:
    args = parse_arguments(__doc__, epochs=50, batch_size=8)
    lite = Lite(**args.settings)
    lite.seed_everything(args.seed)
    environment = PoleOnCart(args.seed)

    policy = Policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    policy, optimizer = lite.setup(policy, optimizer)
    dtype = next(policy.parameters()).dtype

    losses = []
    for epoch in range(args.epochs):
        returns = []
        first = (epoch * lite.world_size + lite.global_rank) * args.batch_size  # each rank plays its own games
        for game in range(first, first + args.batch_size):
            state, done = environment.reset(game), False
            while not done:
                log_probs = policy(torch.tensor(state, device=lite.device, dtype=dtype))
                action = int(environment.random.random() < log_probs[1].exp().item())
                policy.saved_actions.append(log_probs[action])
                state, done = environment.step(action)
            returns.append(discounted(environment.num_steps, log_probs.dtype))

        mine = lite.to_device(torch.cat(returns))
        earned = lite.all_gather(mine, cat=True)
        num_steps = len(earned) / (args.batch_size * lite.world_size)
        advantages = (mine - earned.mean()) / earned.std()
        # Ranks play different numbers of steps: each one's part of the mean over all of them.
        loss = -(torch.stack(policy.saved_actions) * advantages).sum() * lite.world_size / len(earned)
        optimizer.zero_grad()
        lite.backward(loss)
        optimizer.step()
        policy.saved_actions.clear()
        losses.append(loss.detach())
        if (epoch + 1) % 10 == 0 or epoch + 1 == args.epochs:
            lite.print(f"epoch {epoch + 1}: the pole stood for {num_steps:.1f} steps on average")

    record(args.losses, losses, policy)


if __name__ == "__main__":
    main()
