"""The response step of Δ-STN against other ways to compute it, and a whole iteration against plain training.

    python -m benchmarks.response_step --json benchmarks/results/response-step-cpu.json

`response` is the linearised forward pass, the loss and its gradient with respect to the response; `iteration` a general
step and a response step with their optimizers, against a training step of the plain network. The networks are an MLP
784-1200-1200-10 on 128 examples, and the language model of `ptb-small` on windows of 35 words of 20 columns.

stn_fast          tangents of gated layers by kernels; stn_fast_rank16 with a response of rank 16
double_backward   the published way: the tangent as the gradient of a vector-Jacobian product, in eager torch
func_jvp          torch.func.jvp through the definitions of the gated layers in plain torch
plain             training of the plain torch.nn network, without regularisers except dropout

For the language model, `double_backward` is torch.func.vjp of torch.func.vjp through the definitions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import plain, whole_steps
from benchmarks.timing import Clock, Provider
from benchmarks.whole_steps import Makers
from stn_fast.command_line import run_command
from stn_fast.data import Split
from stn_fast.hyperparameter import ResponseRank
from stn_fast.hyperparameters import HyperBatch, Hyperparameter, HyperparameterSpace
from stn_fast.models import LanguageModel, plain_mlp, tuned
from stn_fast.training.delta import DeltaSelfTuning
from stn_fast.training.language import next_word_loss
from stn_fast.training.linearised import Linearised
from stn_fast.training.methods import default_optimizer
from stn_fast.training.parameters import is_response
from stn_fast.training.streams import Streams
from stn_fast.training.task import classification_loss, outputs

MODES = ("response", "iteration")
PROVIDERS = ("stn_fast", "stn_fast_rank16", "double_backward", "func_jvp", "plain")
SIZES = (784, 1200, 1200, 10)
BATCH = 128
WINDOW, COLUMNS, WIDTH, WORDS = 35, 20, 200, 10_000  # of ptb-small
CLIP = 1.0

Logits = Callable[[Tensor], Tensor]
MakeModel = Callable[[ResponseRank], nn.Module]  # a tuned network with a response of this rank


def space_of(*names: str) -> HyperparameterSpace:
    return HyperparameterSpace([Hyperparameter(name, low=0.0, high=0.9, init=plain.RATE) for name in names])


class EagerGated(nn.Module):
    """A gated linear layer as published: y = x Wᵀ + b + (h Gwᵀ) ⊙ (x Rᵀ) + (h Gbᵀ) ⊙ r"""

    def __init__(self, inputs: int, outputs: int, n: int):
        super().__init__()
        self.general, self.response = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs, bias=False)
        self.response_bias = nn.Parameter(torch.rand(outputs))
        self.weight_gate, self.bias_gate = nn.Linear(n, outputs, bias=False), nn.Linear(n, outputs, bias=False)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        gated = self.weight_gate(h) * self.response(x) + self.bias_gate(h) * self.response_bias
        return self.general(x) + gated


class EagerMLP(nn.Module):
    def __init__(self, n: int):
        super().__init__()
        self.layers = nn.ModuleList(EagerGated(i, o, n) for i, o in pairwise(SIZES))
        for layer in self.layers:
            layer.general.requires_grad_(False)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = F.dropout(x.relu() if i else x, plain.RATE)
            x = layer(x, h)
        return x


def gradients(model: nn.Module, loss: Tensor) -> object:
    """Those of the response."""
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


def by_double_backward(model: EagerMLP, x: Tensor, targets: Tensor, h: Tensor) -> object:
    """J h = ∂(vᵀ J) / ∂v · h, for any v, with graphs of both gradients."""
    at_zero = torch.zeros_like(h, requires_grad=True)
    z = model(x, at_zero)
    v = torch.zeros_like(z, requires_grad=True)
    (of_h,) = torch.autograd.grad(z, at_zero, v, create_graph=True)
    (dz,) = torch.autograd.grad(of_h, v, h, create_graph=True)
    return gradients(model, F.cross_entropy(z.detach() + dz, targets))


def by_two_vjps(logits: Logits, h: Tensor) -> Tensor:
    """The tangent of ``logits`` along h at 0, without forward mode."""
    vjp: Any = torch.func.vjp
    z, backward = vjp(logits, torch.zeros_like(h))
    _, transposed = vjp(lambda v: backward(v)[0], torch.zeros_like(z))
    return z.detach() + transposed(h)[0]


def by_jvp(logits: Logits, h: Tensor) -> Tensor:
    jvp: Any = torch.func.jvp
    z, dz = jvp(logits, (torch.zeros_like(h),), (h,))
    return z.detach() + dz


def hold_weights(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_response(name))
    return model


def sampled(space: HyperparameterSpace, batch: int, device: torch.device) -> HyperBatch:
    location, raw_scale = space.initial_state(device)
    return space.sample(location, raw_scale, batch_size=batch, seed=0, step=0, center=location)


def response_makers(
    space: HyperparameterSpace,
    model: MakeModel,
    inputs: Tensor,
    targets: Tensor,
    batch: int,
    published: Callable[[HyperBatch], object] | None,
) -> Makers:
    """Ways to the gradients of the response, of the network that ``model`` makes."""
    device = inputs.device
    hyper = sampled(space, batch, device)

    def held(rank: ResponseRank = None) -> nn.Module:
        torch.manual_seed(0)
        return hold_weights(model(rank).to(device))

    def logits(network: Any, given: HyperBatch) -> Tensor:
        found = outputs(network, given, inputs)
        return (found[0] if isinstance(found, tuple) else found).flatten(0, -2)

    def loss(found: Tensor) -> Tensor:
        return F.cross_entropy(found, targets.flatten())

    def ours(rank: ResponseRank) -> Provider:
        network = held(rank)
        linearised = Linearised(network)
        return Provider(lambda _: gradients(network, loss(logits(linearised, hyper))))

    def through(tangent: Callable[[Logits, Tensor], Tensor]) -> Provider:
        network = held()

        def at(response: Tensor) -> Tensor:
            return logits(network, replace(hyper, response=response, calls={}, open_calls={}))

        return Provider(lambda _: gradients(network, loss(tangent(at, hyper.response))))

    def double_backward() -> Provider:
        return through(by_two_vjps) if published is None else Provider(lambda _: published(hyper))

    return {
        "stn_fast": lambda: ours(None),
        "stn_fast_rank16": lambda: ours(16),
        "double_backward": double_backward,
        "func_jvp": lambda: through(by_jvp),
    }


def iteration_makers(
    space: HyperparameterSpace,
    model: MakeModel,
    losses: tuple[Any, Any],
    batches: Callable[[], Callable[[int], Any]],
    network: Callable[[], nn.Module],
    inputs: Tensor,
    targets: Tensor,
) -> Makers:
    """Whole iterations of Δ-STN, and a training step of the plain network."""
    device = inputs.device

    def ours(rank: ResponseRank) -> Provider:
        torch.manual_seed(0)
        network = model(rank).to(device)
        method = DeltaSelfTuning(network, space, *losses, clip=CLIP, antithetic=False)  # steps as published
        batch, count = batches(), iter(range(10**9))

        def step(_: None) -> None:
            number = next(count)
            method.train_step(batch(number), number)

        return Provider(step, whole_step=True)

    def of_plain() -> Provider:
        torch.manual_seed(0)
        training = plain.Training(network().to(device), default_optimizer, CLIP)
        return Provider(lambda _: training.step(inputs, targets), whole_step=True)

    return {"stn_fast": lambda: ours(None), "stn_fast_rank16": lambda: ours(16), "plain": of_plain}


def with_dropout() -> nn.Module:
    network = plain_mlp(SIZES)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = plain.RATE
    return network


def of_mlp(mode: str, device: torch.device) -> Makers:
    space = space_of("input_dropout", "hidden_dropout_1", "hidden_dropout_2")
    torch.manual_seed(0)
    x, targets = torch.randn(BATCH, SIZES[0]).to(device), torch.randint(SIZES[-1], (BATCH,)).to(device)

    def model(rank: ResponseRank) -> nn.Module:
        return tuned(plain_mlp(SIZES), space, rank)

    if mode == "response":
        eager = EagerMLP(len(space)).to(device)
        published = partial(_published, eager, x, targets)
        return response_makers(space, model, x, targets, BATCH, published)
    losses = classification_loss, classification_loss
    return iteration_makers(space, model, losses, lambda: lambda _: Split(x, targets), with_dropout, x, targets)


def _published(model: EagerMLP, x: Tensor, targets: Tensor, hyper: HyperBatch) -> object:
    return by_double_backward(model, x, targets, hyper.response)


def of_language(mode: str, device: torch.device) -> Makers:
    space = space_of("input_dropout", "hidden_dropout", "output_dropout")
    torch.manual_seed(0)
    text = torch.randint(WORDS, (50 * WINDOW * COLUMNS + 1,)).to(device)
    inputs = text[:-1][: WINDOW * COLUMNS].view(WINDOW, COLUMNS)
    targets = text[1:][: WINDOW * COLUMNS].view(WINDOW, COLUMNS)

    def model(rank: ResponseRank) -> nn.Module:
        return tuned(LanguageModel(WORDS, WIDTH, WIDTH, 2), space, rank)

    if mode == "response":
        return response_makers(space, model, inputs, targets, COLUMNS, None)

    def batches() -> Callable[[int], Any]:
        return Streams(Split(text[:-1], text[1:]), COLUMNS, WINDOW, seed=0, stream=0).__getitem__

    losses = next_word_loss, next_word_loss
    network = partial(plain.LanguageModel, WORDS, WIDTH, 2, COLUMNS)
    return iteration_makers(space, model, losses, batches, network, inputs, targets)


NETWORKS = {"mlp": of_mlp, "lstm": of_language}


def shape_of(network: str) -> tuple[int, ...]:
    return (BATCH, *SIZES) if network == "mlp" else (WINDOW, COLUMNS, WIDTH, WORDS)


def main(arguments: Sequence[str] | None = None, clock: Clock | None = None) -> int:
    """Measures and prints; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.response_step", description=__doc__.splitlines()[0])
    whole_steps.add_options(parser, MODES, PROVIDERS)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    options = parser.parse_args(arguments)

    def cases() -> Iterator[tuple[str, str, Sequence[int], Makers]]:
        device = torch.device(options.device)
        for name in options.networks:
            for mode in options.modes:
                yield name, mode, shape_of(name), NETWORKS[name](mode, device)

    options.providers = options.providers or list(PROVIDERS)
    return whole_steps.measure("response_step", cases(), options, clock, ("double_backward", "func_jvp"))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
