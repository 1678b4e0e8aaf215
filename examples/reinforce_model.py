"""Environment and policy of the policy-gradient examples: a pole on a cart, and a small network that pushes it."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor, nn

MAX_STEPS = 200


class PoleOnCart:
    """A pole stands on a cart that is pushed left or right, by the same force each step, to keep the pole upright.

    The state is (position, velocity, angle, angular velocity) in m, m/s, rad, rad/s. An episode ends when the pole
    leans too far, the cart leaves the track, or after MAX_STEPS steps. Equations: Barto, Sutton and Anderson 1983
    (https://doi.org/10.1109/TSMC.1983.6313077), without friction.
    """

    gravity, cart_mass, pole_mass, half_length, force, step_s = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def reset(self, game: int) -> list[float]:
        """Start an episode and return its first state; all chance in it follows from the seed and its number."""
        self.random = random.Random(f"{self.seed}, {game}")
        self.num_steps = 0
        self.state = [self.random.uniform(-0.05, 0.05) for _ in range(4)]
        return self.state

    def step(self, action: int) -> tuple[list[float], bool]:
        """Push right (action 1) or left (0); return the next state and whether the episode is over."""
        _, velocity, angle, spin = self.state
        mass = self.cart_mass + self.pole_mass
        sine, cosine, moment = math.sin(angle), math.cos(angle), self.pole_mass * self.half_length
        push = (self.force if action == 1 else -self.force) + moment * spin**2 * sine
        spin_change = (self.gravity * sine - cosine * push / mass) / (
            self.half_length * (4 / 3 - self.pole_mass * cosine**2 / mass)
        )
        velocity_change = (push - moment * spin_change * cosine) / mass
        rates = (velocity, velocity_change, spin, spin_change)
        self.state = [value + self.step_s * rate for value, rate in zip(self.state, rates, strict=True)]
        self.num_steps += 1
        fallen = abs(self.state[0]) > 2.4 or abs(self.state[2]) > math.radians(12)
        return self.state, fallen or self.num_steps == MAX_STEPS


class Policy(nn.Module):
    """Log-probabilities of the two actions, of shape (2,), for a state of shape (4,).

    It keeps the log-probabilities of the actions taken in `saved_actions` until the next update.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))
        self.saved_actions: list[Tensor] = []

    def forward(self, state: Tensor) -> Tensor:
        return self.layers(state).log_softmax(dim=-1)


def discounted(num_steps: int, dtype: torch.dtype, discount: float = 0.99) -> Tensor:
    """What is still to come at each step of an episode that earns 1 per step: shape (num_steps,)."""
    return (1 - discount ** torch.arange(num_steps, 0, -1, dtype=dtype)) / (1 - discount)
