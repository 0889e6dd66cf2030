"""Processes that share a batch: each has its own examples of it, and gradients are averaged over all examples."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from typing import Any, Literal, TypeVar, get_args
from uuid import uuid4

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.utils import _pytree as pytree

from stn_fast.errors import UserError
from stn_fast.ops.arguments import is_sharded
from stn_fast.ops.gates import wide
from stn_fast.training.batches import Batch, BatchSequence, as_batch, shares
from stn_fast.training.disk import CannotWrite
from stn_fast.training.parameters import listed

Result = TypeVar("Result")

TIMEOUT = timedelta(minutes=10)  # after which a process that waits for another one that hangs is an error
StepKind = Literal["training step", "validation step", "training pass", "response pass", "validation pass"]
STEP_KINDS: tuple[StepKind, ...] = get_args(StepKind)
CHECK_EVERY = 100  # steps after which the processes compare what they have learnt


class ProcessesDiffer(RuntimeError):
    """Processes that share batches hold different weights or hyperparameters; all of them raise it."""


def lost(error: RuntimeError) -> bool:
    """Whether torch.distributed has raised it because another process has ended or does not answer."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


@contextmanager
def launched(device: str) -> Iterator[Processes | None]:
    """The processes that torchrun has launched, with shares of any size; None if it has not, or only one.

    They talk by gloo; on CUDA, where each takes the GPU of its local rank, by NCCL about what is there.

    Raises:
        UserError: the environment says that there are several processes, but not which one this is.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield None
        return
    if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(f"WORLD_SIZE is set, but {', '.join(missing)} is not: launch several processes by torchrun")
    rank = int(os.environ["RANK"])
    on_cuda = device == "cuda" and torch.cuda.is_available()  # that there is none is an error of the run
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    import_module("torch.distributed.nn")  # before there is a group, which defaults of its functions would hold
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=TIMEOUT, store=_store(), rank=rank, world_size=size
    )
    processes = Processes(torch.distributed.group.WORLD)  # type: ignore[arg-type]
    try:
        yield processes
    finally:  # without references to the group, its threads end: one that frees a tensor while Python ends aborts
        del processes.group
        torch.distributed.destroy_process_group()


def _store() -> torch.distributed.Store:
    """Where the processes find each other.

    torchrun keeps one store for all of its attempts by default, with the addresses of processes that have died.
    """
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    return torch.distributed.PrefixStore(agreed(store, rank, size), store)


def agreed(store: torch.distributed.Store, rank: int, size: int) -> str:
    """A name that the processes of this attempt agree on, and that those of no earlier attempt had.

    torchrun numbers the attempts of each machine by itself, so the numbers of two machines may differ. But no process
    is left of an earlier attempt when one begins. So each process shows a name that is new; the first one lists the
    names until all have seen their own in the list, which is therefore of this attempt. Its own name is the result.

    Raises:
        RuntimeError: a process did not come within `TIMEOUT`.
    """
    own = uuid4().hex
    store.set(f"name_of_{rank}", own)
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while time.monotonic() < deadline:
        if rank == 0:
            names = [store.get(f"name_of_{other}").decode() for other in range(size)]
            store.set("names", ",".join(names))
            if all(store.check([f"{own}_seen_by_{other}"]) for other in range(1, size)):
                return own
        else:
            first, *others = store.get("names").decode().split(",")
            if own in others:
                store.set(f"{first}_seen_by_{rank}", "")
                return first
        time.sleep(0.02)
    raise RuntimeError(f"of {size} processes, not all have started within {TIMEOUT}")


class Processes:
    """A process group of torch.distributed, each process with a share of the examples of a batch.

    Args:
        group: the processes, all of which must call the methods.

    Attributes:
        size: how many processes there are.
        rank: the number of this one; its examples of the global batch come after those of all processes before it.
    """

    def __init__(self, group: torch.distributed.ProcessGroup) -> None:
        self.group = group
        self.size = torch.distributed.get_world_size(group)
        self.rank = torch.distributed.get_rank(group)
        self._has_cpu_backend = "cpu:" in torch.distributed.get_backend_config(group)

    def averages(self, tensors: Sequence[Tensor], examples: int) -> list[Tensor]:
        """The mean over the examples of all processes of each tensor, in float64.

        Args:
            tensors: means over the examples of this process.
            examples: how many they are.
        """
        shapes = [tensor.shape for tensor in tensors]
        count = torch.ones(1, dtype=torch.double, device=tensors[0].device)
        joined = torch.cat([*(tensor.detach().double().flatten() for tensor in tensors), count]).mul_(examples)
        torch.distributed.all_reduce(joined, group=self.group)
        parts = (joined[:-1] / joined[-1]).split([shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    @torch.no_grad()
    def average_(self, tensors: Sequence[Tensor], examples: int) -> None:
        """Replaces each tensor, a mean over the examples of this process, by the mean over those of all.

        One reduction for each dtype, in float32 or wider. The host does not wait for a CUDA device.
        """
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            same = [tensor for tensor in tensors if tensor.dtype == dtype]
            count = same[0].new_ones(1)
            joined = torch.cat([*(tensor.flatten() for tensor in same), count]).to(wide(dtype)).mul_(examples)
            torch.distributed.all_reduce(joined, group=self.group)
            joined /= joined[-1:].clone()
            parts = joined[:-1].split([tensor.numel() for tensor in same])
            for tensor, part in zip(same, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))

    def counts(self, examples: int, kind: StepKind, step: int, device: torch.device) -> list[int]:
        """How many examples each process has, and whether all of them take the same step.

        One reduction, by a backend for the CPU if the group has one; else the host waits for a CUDA ``device``.

        Args:
            examples: those of this process.
            kind: what this process does.
            step: the number of its draw.

        Raises:
            ValueError: in all processes, that they take steps of different kinds, or with different numbers.
        """
        joined = torch.zeros(self.size, 3, dtype=torch.int64)
        joined[self.rank] = torch.tensor([examples, STEP_KINDS.index(kind), step])
        if not self._has_cpu_backend:
            joined = joined.to(device)
        torch.distributed.all_reduce(joined, group=self.group)
        counts, *steps = zip(*joined.tolist(), strict=True)
        if any(len(set(one)) > 1 for one in steps):
            told = [
                f"process {rank} takes a {STEP_KINDS[kind]} with draw {number}"
                for rank, (kind, number) in enumerate(zip(*steps, strict=True))
            ]
            raise ValueError(
                f"process_group: {listed(told, 8)}, but they share every batch: all must take the same steps in the "
                "same order, with as many training and validation batches in each"
            )
        return list(counts)

    @torch.no_grad()
    def align(self, model: nn.Module) -> None:
        """Gives all processes the parameters and buffers of the first one; sharded parameters have no copies."""
        for tensor in (*model.parameters(), *model.buffers()):
            if is_sharded(tensor):
                continue
            sent = tensor.detach().contiguous()
            torch.distributed.broadcast(sent, group=self.group, group_src=0)
            tensor.copy_(sent)

    def differing(self, numbers: Tensor) -> list[int]:
        """The indices at which the numbers, an int64 vector, are not the same in all processes.

        One reduction, for which the host waits.
        """
        joined = torch.cat([numbers, ~numbers])  # ~x = −x − 1 is largest where x is smallest, and can't overflow
        torch.distributed.all_reduce(joined, torch.distributed.ReduceOp.MAX, group=self.group)
        most, least = joined.chunk(2)
        found: list[int] = (most != ~least).nonzero().flatten().tolist()
        return found

    def share(self, examples: int) -> slice:
        """The examples of this process in a batch; shares differ by one example at most."""
        return shares(examples, self.size)[self.rank]

    def gathered(self, value: Any) -> list[Any]:
        """The value of each process; tensors in it must be on the CPU."""
        values = [None] * self.size
        torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    def most(self, number: int) -> int:
        """The largest number of any process, by a backend for the CPU: the host does not wait for a CUDA device."""
        joined = torch.tensor(number)
        torch.distributed.all_reduce(joined, torch.distributed.ReduceOp.MAX, group=self.group)
        return int(joined)

    def first(self, call: Callable[[], Result]) -> Result | None:
        """Calls it in the first process alone, once all are here; the others get None.

        An error there is one in all of them: a UserError, a CannotWrite, or else a RuntimeError.
        """
        torch.distributed.barrier(group=self.group)
        result, error = None, None
        if self.rank == 0:
            try:
                result = call()
            except Exception as raised:
                error = raised
        # Not the error itself, which may not be read back from a pickle.
        kind = next((kind for kind in (UserError, CannotWrite) if isinstance(error, kind)), RuntimeError)
        told = [None if error is None else (kind, str(error))]
        torch.distributed.broadcast_object_list(told, group=self.group, group_src=0)
        if error is not None:
            raise error
        if told[0] is not None:
            kind, text = told[0]
            raise kind(text)
        return result


def first_of(processes: Processes | None) -> bool:
    """Whether this is the first process, or the only one."""
    return processes is None or processes.rank == 0


def in_first(processes: Processes | None, call: Callable[[], Result]) -> Result | None:
    """`Processes.first`, or the call itself where there is only one process."""
    return call() if processes is None else processes.first(call)


class Shares:
    """A `BatchSequence` of the share that one process has of each batch of another sequence."""

    def __init__(self, whole: BatchSequence, processes: Processes, device: torch.device) -> None:
        self.whole, self.processes, self.device = whole, processes, device
        self.examples, self.per_pass = whole.examples, whole.per_pass

    def __getitem__(self, index: int) -> Batch:
        return part_of(self.whole[index], self.processes, self.device)

    def examples_of(self, steps: int) -> int:
        """Those of all processes."""
        return self.whole.examples_of(steps)

    def state_dict(self) -> dict[str, Any]:
        """The states of all processes, which must all call this."""
        own = pytree.tree_map_only(Tensor, Tensor.cpu, self.whole.state_dict())
        return {SHARES: self.processes.gathered(own)} if own else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores this process's part of what ``state_dict`` returned."""
        load_share(self, state, self.processes)


def part_of(batch: Any, processes: Processes, device: torch.device) -> Batch:
    """The share of this process, which may be empty.

    Raises:
        UserError: batches of this kind can't be shared.
    """
    batch = as_batch(batch, device)
    if not hasattr(batch, "part"):
        raise UserError(
            f"several processes can't share a batch that is a {type(batch).__name__}, without a method part"
        )
    part: Batch = batch.part(processes.share(batch.examples))
    return part


SHARES = "of_processes"


def load_share(sequence: Any, state: dict[str, Any], processes: Processes | None) -> None:
    """Loads the state of this process, if as many processes saved theirs.

    Otherwise no part fits: a text continues in the right window, but from a zero state.
    """
    states, rank, size = state.get(SHARES, [state]), 0, 1
    if processes is not None:
        rank, size = processes.rank, processes.size
    sequence = sequence.whole if isinstance(sequence, Shares) else sequence
    sequence.load_state_dict(states[rank] if len(states) == size else states[0])
    if len(states) != size and states[0]:
        sequence.forget()
