"""One of the processes of tests/training/test_sharding.py: trains networks that fully_shard has sharded.

    python fsdp_process.py FOLDER "mlp" "transformer in passes" ...
    python fsdp_process.py FOLDER save
    python fsdp_process.py FOLDER load "load whole"

The environment says which process it is, as torchrun's does.
"""

import errno
import gc
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import stn_fast as stn
from stn_fast.training.disk import CannotWrite

STEPS, EXAMPLES, TOKENS, WORDS = 4, 8, 6, 11


class Block(nn.Module):
    """Attention and an MLP, each with a residual connection."""

    def __init__(self, width):
        super().__init__()
        self.before, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, 0.2, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.GELU(), nn.Dropout(0.3), nn.Linear(3 * width, width)
        )

    def forward(self, x):
        y = self.before(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(x)


class Transformer(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.words = nn.Embedding(WORDS, width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.last, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, tokens):
        x = self.words(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x).mean(1))


class LastStep(nn.Module):
    """The last output of an LSTM."""

    def __init__(self, inputs, width):
        super().__init__()
        self.lstm = nn.LSTM(inputs, width, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0][:, -1]


def mlp():
    return nn.Sequential(nn.Linear(TOKENS, 17), nn.Tanh(), nn.Dropout(0.3), nn.Linear(17, 3))


def convolutions():
    """Filters, of which some in groups, and a recurrent layer."""
    grouped = nn.Conv2d(4, 6, 3, groups=2, padding=1)
    head = nn.Flatten(2), LastStep(6, 5), nn.Linear(5, 3)
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Dropout(0.2),
        grouped, nn.ReLU(), *head,
    )  # fmt: skip


MODELS = {"mlp": mlp, "transformer": Transformer, "convolutions": convolutions}


def network(name, response_rank="auto", seed=0):
    """A converted one in float64, whose response is not 0 at the start."""
    torch.manual_seed(seed)
    model = MODELS[name]().double()
    rates = [replace(one, init=0.01) if one.name == "weight_decay" else one for one in stn.suggest_space(model)]
    tuned = stn.convert(model, stn.HyperparameterSpace(rates), quiet=True, response_rank=response_rank)
    for key, parameter in tuned.named_parameters():
        if "gate" in key or "response" in key:
            nn.init.normal_(parameter, std=0.5 if "gate" in key else 0.1)
    return tuned


def sharded(tuned, mesh, **options):
    for block in getattr(tuned, "blocks", [one for one in tuned.children() if isinstance(one, nn.Linear)]):
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(tuned, mesh=mesh, **options)


def batch(name, step, part=slice(None)):
    """(inputs, targets), and another pair to tune on: the whole of it, or the part of a process."""
    generator = torch.Generator().manual_seed(step)
    pairs = []
    for _ in range(2):
        words = torch.randint(WORDS, (EXAMPLES, TOKENS), generator=generator)
        targets = words.sum(1) % 3
        pairs.append((words[part] if name == "transformer" else words[part].double() / WORDS, targets[part]))
    return pairs


def part_of(rank, size):
    return slice(rank * EXAMPLES // size, (rank + 1) * EXAMPLES // size)


def in_steps(tuner, name, steps, part=slice(None)):
    return [tuner.step(*batch(name, step, part)).item() for step in steps]


def in_passes(tuner, optimizer, name, steps, part=slice(None)):
    """The same in a loop that calls backward itself; parts of a batch are accumulated, and gradients clipped."""
    losses, model = [], tuner.model
    for step in steps:
        (x, y), (held_x, held_y) = batch(name, step, part)
        for antithetic in (False, True):
            with tuner.training(len(x), antithetic=antithetic):
                loss = F.cross_entropy(model(x), y) + tuner.penalty()
                (loss / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with tuner.validating(len(held_x)):
            loss = F.cross_entropy(model(held_x), held_y)
        losses.append(tuner.hyper_step(loss).item())
    return losses


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-2, weight_decay=0),
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.3, momentum=0.9),
}


def train(name, optimizer="sgd", way="steps", response_rank="auto", mesh=None, rank=0, size=1, **options):
    """The losses, history and last weights of a network; sharded over a mesh, if it is given."""
    tuned = network(name, response_rank)
    if mesh is not None:
        sharded(tuned, mesh)
    made = OPTIMIZERS[optimizer](tuned.parameters())
    group = None if mesh is None else mesh.get_group()
    tuner = stn.SelfTuner(tuned, made, F.cross_entropy, process_group=group, **options)
    part = part_of(rank, size)
    if way == "steps":
        losses = in_steps(tuner, name, range(STEPS), part)
    else:
        losses = in_passes(tuner, made, name, range(STEPS), part)
    return result(tuner, losses)


def result(tuner, losses):
    weights = {name: whole(one.detach()) for name, one in tuner.model.named_parameters()}
    scales, location = tuner.scales(), tuner.model.tuned_hyperparameters.location.detach().clone()
    return {"losses": losses, "history": tuner.history, "scales": scales, "location": location, "weights": weights}


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


RUNS = {
    "mlp": dict(name="mlp", optimizer="adamw"),
    "transformer": dict(name="transformer"),
    "transformer in passes": dict(name="transformer", way="passes", response_rank=None, optimizer="adamw"),
    "convolutions": dict(name="convolutions", optimizer="adamw"),
    "delta-stn": dict(name="mlp", method="delta-stn", linearize=False),
}


def saved(folder, mesh, rank, size):
    """Of a run that saves a checkpoint after two of four steps."""
    tuner = tuner_to_save(mesh)
    in_steps(tuner, "mlp", range(2), part_of(rank, size))
    tuner.save(folder / "checkpoints")
    in_steps(tuner, "mlp", range(2, 4), part_of(rank, size))
    return result(tuner, []) | {"error": error_without_space(tuner, folder / "checkpoints", rank)}


def error_without_space(tuner, folder, rank):
    """That of a save while the second process can't write."""

    def fail(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    with mock.patch.object(HuggingFaceStorageWriter, "write_data", fail) if rank == 1 else nullcontext():
        try:
            tuner.save(folder)
        except CannotWrite as error:
            return str(error)


def loaded(folder, mesh, rank=0, size=1, shard=True):
    """Of a run that begins with this checkpoint."""
    tuner = tuner_to_save(mesh, seed=1, shard=shard)
    assert tuner.load(folder / "checkpoints") == folder / "checkpoints/step-00000002"
    in_steps(tuner, "mlp", range(2, 4), part_of(rank, size))
    return result(tuner, [])


def past_an_error(folder, mesh, rank, size):
    """How many steps a tuner has taken that loads, when the second process can't read the last of two checkpoints."""
    folder, tuner = folder / "two", tuner_to_save(mesh)
    for step in range(2):
        in_steps(tuner, "mlp", [step], part_of(rank, size))
        tuner.save(folder)
    read = Path.read_bytes

    def fail(path):
        if path == folder / "step-00000002/state.json":
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    with mock.patch.object(Path, "read_bytes", fail) if rank == 1 else nullcontext():
        tuner.load(folder)
    in_steps(tuner, "mlp", [1], part_of(rank, size))
    return tuner.trained


def unequal(mesh, rank, size):
    """The error of a step with other numbers of examples in each process."""
    try:
        in_steps(tuner_to_save(mesh), "mlp", [0], slice(rank, EXAMPLES))
    except ValueError as error:
        return str(error)


class WithOption(nn.Module):
    """Takes a second input, or none; targets come with the inputs, in a dict."""

    def __init__(self):
        super().__init__()
        self.first, self.dropout, self.last = nn.Linear(TOKENS, 5), nn.Dropout(0.3), nn.Linear(5, 3)

    def forward(self, x, targets, shift=None):
        y = self.first(x)
        return self.last(self.dropout((y if shift is None else y + shift).tanh()))


def with_option(mesh, rank, size):
    """Losses and checks of rows of steps; in the second, only the second process has the second input."""
    torch.manual_seed(0)
    tuned = stn.convert(WithOption().double(), quiet=True)
    fully_shard(tuned, mesh=mesh)
    optimizer = torch.optim.SGD(tuned.parameters(), 0.1)
    tuner = stn.SelfTuner(
        tuned, optimizer, lambda y, entries: F.cross_entropy(y, entries["targets"]), process_group=mesh.get_group()
    )
    losses, checks, evaluated = [], [], []
    tuned.register_forward_pre_hook(lambda module, _: evaluated.append(not module.training))
    for step in range(3):
        x, targets = batch("mlp", step, part_of(rank, size))[0]
        shift = {"shift": torch.zeros(len(x), 5)} if rank == step == 1 else {}
        losses.append(tuner.train_step({"x": x, "targets": targets} | shift).item())
        checks.append(sum(evaluated))
        evaluated.clear()
    return {"losses": losses, "checks": checks}


def tuner_to_save(mesh, seed=0, shard=True):
    tuned = network("mlp", seed=seed)
    if shard:
        sharded(tuned, mesh)
    group = mesh.get_group() if mesh.size() > 1 else None
    return stn.SelfTuner(tuned, OPTIMIZERS["adamw"](tuned.parameters()), F.cross_entropy, process_group=group)


def main(folder, *runs):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    folder, here = Path(folder), dict(mesh=mesh, rank=rank, size=size)
    ways = {run: partial(train, **options, **here) for run, options in RUNS.items()}
    ways["save"] = partial(saved, folder, **here)
    ways["past an error"] = partial(past_an_error, folder, **here)
    ways["unequal"] = partial(unequal, **here)
    ways["option"] = partial(with_option, **here)
    ways["load"] = partial(loaded, folder, **here)
    ways["load whole"] = partial(loaded, folder, shard=False, **here)
    for run in runs:
        torch.save(ways[run](), folder / f"{run} {rank}")
    gc.collect()  # a group that is still held when Python ends has threads that abort it
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
