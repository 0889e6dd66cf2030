"""FSDP2: a model sharded over processes tunes itself, and goes on from its last checkpoint.

    torchrun --standalone --nproc-per-node=2 examples/fsdp_loop.py
    torchrun --standalone --nproc-per-node=8 examples/fsdp_loop.py --device cuda

`fully_shard` splits W, its response and the state of the optimizer among the processes; λ and σ are in each of them.
Every process has an equal share of each batch, and all begin with the same weights.
"""

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import stn_fast as stn


def converted() -> nn.Sequential:
    """The same in every process: 8 rows of an image are 8 tokens."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.5, batch_first=True)
    blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
    network = nn.Sequential(nn.Linear(8, 64), blocks, nn.Flatten(), nn.Dropout(0.5), nn.Linear(8 * 64, 10))
    return stn.convert(network, quiet=True)


def main(arguments: list[str] | None = None) -> None:
    it = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    it.add_argument("--steps", type=int, default=40)
    it.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    it.add_argument("--checkpoints", help="a directory that all processes see, to go on from and to save in")
    flags = it.parse_args(arguments)

    dist.init_process_group("cpu:gloo,cuda:nccl" if flags.device == "cuda" else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    if flags.device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    mesh = init_device_mesh(flags.device, (size,))

    tuned = converted().to(flags.device)
    for block in tuned.modules():
        if isinstance(block, nn.TransformerEncoderLayer):
            fully_shard(block, mesh=mesh)
    fully_shard(tuned, mesh=mesh)
    optimizer = torch.optim.AdamW(tuned.parameters(), 2e-3, weight_decay=0)
    tuner = stn.SelfTuner(tuned, optimizer, F.cross_entropy, process_group=mesh.get_group())
    if flags.checkpoints:
        tuner.load(flags.checkpoints)  # None at first

    x, y = (torch.from_numpy(array).to(flags.device) for array in load_digits(return_X_y=True))
    x = x.float().view(-1, 8, 8) / 16
    while tuner.trained < flags.steps:
        numbers = torch.Generator().manual_seed(tuner.trained)  # of the examples of all processes
        own, held = (torch.randperm(200, generator=numbers)[:96].chunk(size)[rank] + first for first in (0, 200))
        tuner.step((x[own], y[own]), (x[held], y[held]))
        if flags.checkpoints and tuner.trained % 10 == 0:
            tuner.save(flags.checkpoints)

    whole = get_model_state_dict(tuned, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        gathered = converted()
        gathered.load_state_dict(whole)
        plain = stn.fold(gathered).eval()
        accuracy = (plain(x[400:].cpu()).argmax(1) == y[400:].cpu()).float().mean()
        print(f"{tuner.values()}\ntest accuracy {accuracy:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
