"""Self-Tuning Networks (MacKay, Vicol, Lorraine, Duvenaud, Grosse, 2019) in a file to be read from top to bottom.

    python examples/stn_in_120_lines.py

Hyperparameters λ have a best value: the one with which the trained weights w*(λ) have the least validation loss
F(w*(λ)). To follow its gradient, one must know how the trained weights change with λ. An STN learns that: each layer
computes with the weights

    W + s(λ) ⊙ R,  s(λ) = G (λ − λ₀),

where R and G are parameters like W, and s scales the rows of R, one for each output. Training takes turns:

1. The training loss trains W, R and G, each example under its own λ + σε, so that the weights become right for every λ
   nearby. It is never differentiated with respect to λ, so λ may be a dropout rate, which has no gradient there.
2. The validation loss trains λ, through the weights that respond to it, and σ, with an entropy that keeps it from 0.

Here, λ are the dropout rate of a hidden layer and the strength of weight decay of an MLP on ninety handwritten digits.
`stn_fast.convert` and `stn_fast.SelfTuner` do all of this for a network of yours.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import stn_fast as stn

RATE, DECAY = range(2)  # the places of the two hyperparameters in λ
HIGHEST = 0.9  # of the rate


def rate(λ: Tensor) -> Tensor:
    """λ is unconstrained; a sigmoid makes it a dropout rate."""
    return HIGHEST * torch.sigmoid(λ[..., RATE])


def decay(λ: Tensor) -> Tensor:
    return λ[..., DECAY].exp()


class Network(nn.Module):
    """64-128-10. Its layers compute x Wᵀ + s ⊙ (x Rᵀ), with s = G h for h = λ − λ₀, and a bias that responds, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = stn.HyperLinear(64, 128, num_hyperparameters=2)
        self.last = stn.HyperLinear(128, 10, num_hyperparameters=2)

    def forward(self, x: Tensor, λ: Tensor, λ0: Tensor) -> Tensor:
        """x (B, 64), and λ (B, 2): each example has its own."""
        h = λ - λ0
        hidden = F.relu(self.first(x, h))
        if self.training:
            kept = torch.rand_like(hidden) >= rate(λ)[:, None]
            hidden = hidden * kept / (1 - rate(λ)[:, None])
        return self.last(hidden, h)

    def penalty(self, λ: Tensor, λ0: Tensor) -> Tensor:
        """½·decay(λ)·‖W + s ⊙ R‖², the mean over the examples."""
        first, last = (layer.weight_decay_penalty(λ - λ0, decay(λ)) for layer in (self.first, self.last))
        return first + last


def main(arguments: list[str] | None = None) -> None:
    it = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    it.add_argument("--cycles", type=int, default=1000, help="of two training steps and a validation step")
    flags = it.parse_args(arguments)

    torch.manual_seed(0)
    x, y = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    x = x.float() / 16
    parts = torch.randperm(len(x)).split([90, 400, len(x) - 490])
    train, valid, test = ((x[part], y[part]) for part in parts)

    network = Network()
    λ0 = torch.tensor([0.0, -7.0])  # the first guess: rate .45, decay .001
    λ, log_σ = λ0.clone().requires_grad_(), torch.zeros(2, requires_grad=True)
    of_weights = torch.optim.Adam(network.parameters(), 3e-3)
    of_λ = torch.optim.Adam([λ, log_σ], 1e-2)

    def perturbed(examples: int) -> Tensor:
        return λ + log_σ.exp() * torch.randn(examples, 2)

    for cycle in range(flags.cycles):
        network.train()
        for _ in range(2):
            near = perturbed(len(train[0])).detach()  # no gradient of λ and σ from the training loss
            loss = F.cross_entropy(network(train[0], near, λ0), train[1]) + network.penalty(near, λ0)
            of_weights.zero_grad()
            loss.backward()
            of_weights.step()

        network.eval()  # no dropout
        loss = F.cross_entropy(network(valid[0], perturbed(len(valid[0])), λ0), valid[1])
        entropy = log_σ.sum()  # of a normal distribution, up to a constant
        λ.grad, log_σ.grad = torch.autograd.grad(loss - 1e-3 * entropy, [λ, log_σ])
        of_λ.step()

        if cycle % 100 == 0 or cycle == flags.cycles - 1:
            with torch.no_grad():
                of_test = F.cross_entropy(network(test[0], λ.expand(len(test[0]), 2), λ0), test[1])
            print(f"{cycle:4}  rate {rate(λ):.3f}  decay {decay(λ):.5f}  validation {loss:.3f}  test {of_test:.3f}")

    h = (λ - λ0).detach()  # with λ fixed, the network is a plain one, of weights W + s ⊙ R
    plain = nn.Sequential(network.first.fold(h), nn.ReLU(), network.last.fold(h))
    print(f"{plain}\ntest accuracy {(plain(test[0]).argmax(1) == test[1]).float().mean():.3f}")


if __name__ == "__main__":
    main()
