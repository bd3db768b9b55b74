"""Networks for control and games."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.layers import mlp


class ActorCritic(nn.Module):
    """A shared trunk with the mean and log deviation of an action and a value."""

    def __init__(self, state: int = 9, actions: int = 3):
        super().__init__()
        self.trunk = mlp(state, 24, 20, act=nn.Tanh)
        self.actor, self.critic = nn.Linear(20, actions), mlp(20, 14, 1, act=nn.Tanh)
        self.log_std = nn.Parameter(torch.zeros(actions))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.trunk(x).tanh()
        mean = self.actor(y)
        return mean, self.log_std.exp().expand_as(mean), self.critic(y).squeeze(-1)


class DuelingQ(nn.Module):
    """Frames to action values: a state value plus advantages less their mean."""

    def __init__(self, actions: int = 5):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(4, 12, 8, 4),
            nn.ReLU(),
            nn.Conv2d(12, 16, 4, 2),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3),
            nn.ReLU(),
        )
        self.value, self.advantage = mlp(16 * 3 * 5, 24, 1), mlp(16 * 3 * 5, 20, actions)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x / 4).view(x.size(0), -1)
        advantage = self.advantage(y)
        return self.value(y) + advantage - advantage.mean(1, keepdim=True)


class DistributionalQ(nn.Module):
    """Action values as distributions over atoms (Rainbow), with noisy linear layers."""

    def __init__(self, state: int = 9, actions: int = 3, atoms: int = 7, width: int = 20):
        super().__init__()
        self.actions, self.atoms = actions, atoms
        self.inp = nn.Linear(state, width)
        self.mu, self.sigma = (
            nn.Parameter(torch.randn(24, width) / 4),
            nn.Parameter(torch.full((24, width), 0.1)),
        )
        self.register_buffer("noise", torch.randn(24, width))
        self.out = nn.Linear(24, actions * atoms)
        self.register_buffer("support", torch.linspace(-1, 1, atoms))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inp(x).relu()
        y = F.linear(y, self.mu + self.sigma * self.noise).relu()
        p = self.out(y).view(-1, self.actions, self.atoms).softmax(-1)
        return (p * self.support).sum(-1)


class GameTower(nn.Module):
    """AlphaZero: a residual tower with a policy and a value head."""

    def __init__(self, planes: int = 5, width: int = 16, blocks: int = 2, board: int = 5):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(planes, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
            )
            for _ in range(blocks)
        )  # fmt: skip
        self.policy = nn.Sequential(
            nn.Conv2d(width, 2, 1),
            nn.BatchNorm2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * board**2, board**2 + 1),
        )
        self.value = nn.Sequential(
            nn.Conv2d(width, 1, 1), nn.BatchNorm2d(1), nn.ReLU(), nn.Flatten(),
            nn.Linear(board**2, 20), nn.ReLU(), nn.Linear(20, 1), nn.Tanh(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.policy(x), self.value(x)


class WorldModel(nn.Module):
    """A latent state with stochastic classes rolled forward by a GRU cell (Dreamer)."""

    def __init__(self, state: int = 9, action: int = 3, width: int = 16, groups: int = 3, classes: int = 4):
        super().__init__()
        self.groups, self.classes, self.width = groups, classes, width
        self.encode = mlp(state, 20, 14)
        self.cell = nn.GRUCell(18, width)
        self.mix = nn.Sequential(nn.Linear(groups * classes + action, 18), nn.ELU())
        self.prior, self.post = mlp(width, 20, groups * classes), mlp(width + 14, 20, groups * classes)
        self.decode, self.reward = (
            mlp(width + groups * classes, 22, state),
            mlp(width + groups * classes, 10, 1),
        )

    def forward(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, t, _ = states.shape
        h, z = states.new_zeros(n, self.width), states.new_zeros(n, self.groups * self.classes)
        found, priors = [], []
        for i in range(t):
            h = self.cell(self.mix(torch.cat((z, actions[:, i]), 1)), h)
            priors.append(self.prior(h))
            logits = self.post(torch.cat((h, self.encode(states[:, i])), 1))
            z = logits.view(n, self.groups, self.classes).softmax(-1).flatten(1)
            found.append(torch.cat((h, z), 1))
        y = torch.stack(found, 1)
        return self.decode(y), self.reward(y), torch.stack(priors, 1)
