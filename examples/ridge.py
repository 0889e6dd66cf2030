"""Self-tuning finds the optimum of a bilevel problem whose optimum is known: ridge regression, a penalty per feature.

    python examples/ridge.py
    python examples/ridge.py --methods delta-stn --seeds 1 --plot ridge.png

X (N, d) and T (N, O) are training data. The map J (O, d) from features to targets minimises

    ½ mean‖T − X Jᵀ‖² + ½ Σ_j exp(λ_j) ‖J_j‖²,  which is  J*(λ)ᵀ = (XᵀX + N diag exp λ)⁻¹ XᵀT,

and the best λ (d,) is the one whose J*(λ) has the least validation loss F(J) = ½ mean‖T' − X' Jᵀ‖². With a smaller
penalty, J fits noise; with a larger one, it misses the signal. L-BFGS finds the best λ through the closed form.

Self-tuning knows nothing of the closed form: it trains J = U (I + response) on the training loss above, with a gated
layer for I + response, and follows F. Both methods start from λ = 0 and update weights or response four times in each
cycle: STN by four training steps, Δ-STN by two, which consist of a general and a response step. What is printed is
F(J*(λ)) at the λ that they found, so it depends on λ alone, and how much is left of the way from F(J*(0)) to its least
value.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import stn_fast as stn
from stn_fast.data import Split
from stn_fast.training.delta import DeltaSelfTuning
from stn_fast.training.methods import SelfTuning

FEATURES, TARGETS, TRAIN, VALID, NOISE = 8, 40, 50, 1000, 4.0
TRAIN_STEPS = {"stn": 4, "delta-stn": 2}  # in a cycle
METHODS: dict[str, type[SelfTuning]] = {"stn": SelfTuning, "delta-stn": DeltaSelfTuning}


class Problem(NamedTuple):
    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]

    def solution(self, penalties: Tensor) -> Tensor:
        """J*(λ)ᵀ (d, O) for λ (d,)."""
        inputs, targets = (part.double() for part in self.train)
        return torch.linalg.solve(inputs.T @ inputs + len(inputs) * penalties.exp().diag(), inputs.T @ targets)

    def valid_loss(self, penalties: Tensor) -> Tensor:
        """F(J*(λ))."""
        inputs, targets = (part.double() for part in self.valid)
        return half_mean_square(inputs @ self.solution(penalties), targets)

    def optimum(self) -> Tensor:
        """The λ (d,) with the smallest F(J*(λ)), in float64."""
        penalties = torch.zeros(FEATURES, dtype=torch.float64, requires_grad=True)
        search = torch.optim.LBFGS([penalties], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            search.zero_grad()
            value = self.valid_loss(penalties)
            value.backward()
            return value

        search.step(loss)
        return penalties.detach()


def problem(seed: int) -> Problem:
    """Features whose weights have standard deviations from .3 to 2, and noise of 4."""
    draw = torch.Generator().manual_seed(seed)
    weights = (
        torch.randn(FEATURES, TARGETS, generator=draw)
        * torch.logspace(math.log10(0.3), math.log10(2), FEATURES)[:, None]
    )

    def data(examples: int) -> tuple[Tensor, Tensor]:
        inputs = torch.randn(examples, FEATURES, generator=draw)
        return inputs, inputs @ weights + NOISE * torch.randn(examples, TARGETS, generator=draw)

    return Problem(data(TRAIN), data(VALID))


def half_mean_square(outputs: Tensor, targets: Tensor) -> Tensor:
    """½ mean‖targets − outputs‖², the mean over examples."""
    return (outputs - targets).square().sum(-1).mean() / 2


class Ridge(nn.Module):
    """J = U (I + response): the weight of the gated layer stays the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.gated = stn.HyperLinear(FEATURES, FEATURES, bias=False, num_hyperparameters=FEATURES)
        self.head = nn.Linear(FEATURES, TARGETS, bias=False)
        nn.init.eye_(self.gated.weight)
        self.gated.weight.requires_grad_(False)

    def forward(self, inputs: Tensor, hyper: stn.HyperBatch) -> Tensor:
        """(B, ..., d) to (B, ..., O)."""
        return self.head(self.gated(inputs, hyper))


def valid_objective(model: nn.Module, batch: Split, hyper: stn.HyperBatch) -> Tensor:
    """F."""
    return half_mean_square(model(batch.inputs, hyper), batch.targets)


def training_objective(model: nn.Module, batch: Split, hyper: stn.HyperBatch) -> Tensor:
    """With the penalty of each example's own λ̃ and J, whose columns are the model's outputs for unit vectors."""
    units = torch.eye(FEATURES).expand(len(batch.inputs), FEATURES, FEATURES)
    squares = model(units, hyper).square().sum(-1)  # ‖J_j‖², (B, d)
    penalties = torch.stack([hyper[f"log_penalty_{j}"] for j in range(FEATURES)], dim=-1)
    return valid_objective(model, batch, hyper) + (penalties.exp() * squares).sum(-1).mean() / 2


def space() -> stn.HyperparameterSpace:
    """λ, which starts at 0."""
    return stn.HyperparameterSpace(
        [stn.Hyperparameter(f"log_penalty_{j}", init=0.0, scale=0.3) for j in range(FEATURES)]
    )


def tune(method: str, of: Problem, seed: int, cycles: int) -> Tensor:
    """λ before each cycle of training steps and one validation step, and at the end: (cycles + 1, d).

    After half of the cycles, all learning rates fall to a tenth.
    """
    torch.manual_seed(seed)
    adam = partial(torch.optim.Adam, lr=1e-2)
    tuning = METHODS[method](
        Ridge(), space(), training_objective, valid_objective,
        optimizer=adam, hyper_optimizer=adam, entropy_weight=0.0, tune_scales=False, clip=None, seed=seed,
    )  # fmt: skip
    path = [tuning.location.detach().clone()]
    for cycle in range(cycles):
        if cycle == cycles // 2:
            tuning.learning_rate /= 10
            tuning.hyper_optimizer.param_groups[0]["lr"] /= 10
        for step in range(TRAIN_STEPS[method]):
            tuning.train_step(of.train, 5 * cycle + step)
        tuning.valid_step(of.valid, 5 * cycle + 4)
        path.append(tuning.location.detach().clone())
    return torch.stack(path)


def share_left(of: Problem, penalties: Tensor, optimum: Tensor) -> float:
    """(F(J*(λ)) − F(J*(λ*))) / (F(J*(0)) − F(J*(λ*))), with λ* the best λ."""
    found, least, start = (of.valid_loss(at) for at in (penalties, optimum, torch.zeros(FEATURES)))
    return float((found - least) / (start - least))


def draw(paths: dict[str, Tensor], optimum: Tensor, file: Path) -> None:
    """A picture of λ over the cycles, a panel for each method; dotted lines are the best values."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(paths), figsize=(4.2 * len(paths), 3.2), sharey=True, squeeze=False)
    for panel, (method, path) in zip(panels[0], paths.items(), strict=True):
        for j, values in enumerate(path.T):
            panel.plot(values, color=f"C{j}", linewidth=1)
            panel.axhline(float(optimum[j]), color=f"C{j}", linewidth=1, linestyle=":")
        panel.set(title=method, xlabel="cycle")
    panels[0][0].set_ylabel("log penalty of each feature")
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    it = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    it.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    it.add_argument("--seeds", type=int, default=5, help="seeds 0 to N - 1 of data and training (default: %(default)s)")
    it.add_argument("--cycles", type=int, default=1500)
    it.add_argument("--plot", metavar="FILE", type=Path, help="draw the paths of λ for seed 0")
    flags = it.parse_args(arguments)
    if flags.seeds < 1 or flags.cycles < 1:
        it.error(f"--seeds and --cycles must be at least 1; got {flags.seeds} and {flags.cycles}")
    if flags.plot and not flags.plot.parent.is_dir():
        it.error(f"--plot {flags.plot}: there is no folder {flags.plot.parent}")
    torch.set_num_threads(1)  # these tensors are too small to share
    print(f"{'':>10}  {'seed':>4}  validation loss: at λ = 0, found, least   share of the way left")
    for seed in range(flags.seeds):
        of = problem(seed)
        optimum = of.optimum()
        paths = {method: tune(method, of, seed, flags.cycles) for method in flags.methods}
        for method, path in paths.items():
            losses = [float(of.valid_loss(at)) for at in (path[0], path[-1], optimum)]
            shown = "  ".join(f"{loss:10.4f}" for loss in losses)
            print(f"{method:>10}  {seed:>4}       {shown}   {share_left(of, path[-1], optimum):.2%}", flush=True)
        if seed == 0 and flags.plot:
            draw(paths, optimum, flags.plot)


if __name__ == "__main__":
    main()
