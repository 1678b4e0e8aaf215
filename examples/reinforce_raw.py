"""Learn to keep a pole upright on a cart by policy gradients (REINFORCE): no data loader, and state on the model.

reinforce_raw.py is a plain PyTorch loop for one device. reinforce_lite.py is the same loop with Lite, where each
process plays its own episodes:

    torchrun --nproc-per-node=2 examples/reinforce_lite.py
"""

from __future__ import annotations

import torch

from reinforce_model import PoleOnCart, Policy, discounted
from run_options import parse_arguments, record


def main() -> None:
    args = parse_arguments(__doc__, epochs=50, batch_size=8)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = args.choose({"32-true": torch.float32, "64-true": torch.float64})
    torch.manual_seed(args.seed)
    environment = PoleOnCart(args.seed)

    policy = Policy()
    policy.to(device, dtype)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)

    losses = []
    for epoch in range(args.epochs):
        returns = []
        first = epoch * args.batch_size
        for game in range(first, first + args.batch_size):
            state, done = environment.reset(game), False
            while not done:
                log_probs = policy(torch.tensor(state, device=device, dtype=dtype))
                action = int(environment.random.random() < log_probs[1].exp().item())
                policy.saved_actions.append(log_probs[action])
                state, done = environment.step(action)
            returns.append(discounted(environment.num_steps, log_probs.dtype))

        earned = torch.cat(returns).to(device)
        num_steps = len(earned) / args.batch_size
        advantages = (earned - earned.mean()) / earned.std()
        loss = -(torch.stack(policy.saved_actions) * advantages).sum() / len(earned)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        policy.saved_actions.clear()
        losses.append(loss.detach())
        if (epoch + 1) % 10 == 0 or epoch + 1 == args.epochs:
            print(f"epoch {epoch + 1}: the pole stood for {num_steps:.1f} steps on average")

    record(args.losses, losses, policy)


if __name__ == "__main__":
    main()
