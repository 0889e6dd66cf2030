"""Models whose parameters `torch.distributed.fsdp.fully_shard` (FSDP2) has sharded over processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stn_fast.hyperparameters import HyperBatch
from stn_fast.ops.arguments import is_sharded
from stn_fast.training.distributed import Processes
from stn_fast.training.parameters import listed


def local(tensor: Any) -> Tensor:
    """What this process has of a tensor: itself, if it is not sharded. It shares memory with it."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def full(tensor: Any) -> Tensor:
    """The whole tensor, which all processes must call."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def replicated_like(sharded: Any, tensor: Tensor) -> Tensor:
    """The same tensor of all processes, to compute with a sharded one."""
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(tensor, sharded.device_mesh, [Replicate()], run_check=False)


def norms_of_shards(gradients: Sequence[Tensor]) -> Tensor:
    """(k,): the Euclidean norms of sharded gradients, all of one mesh, in float32 or wider; one reduction for all."""
    group = gradients[0].device_mesh.get_group()  # type: ignore[attr-defined]
    squares = torch.stack([torch.linalg.vector_norm(local(one), dtype=torch.float64).square() for one in gradients])
    torch.distributed.all_reduce(squares, group=group)
    dtypes = {torch.promote_types(one.dtype, torch.float32) for one in gradients}
    return squares.sqrt().to(torch.float64 if torch.float64 in dtypes else torch.float32)


class Sharding:
    """How the parameters of a converted model are sharded, and what needs whole ones.

    FSDP2 replaces a module's sharded parameters by whole ones around its forward and backward pass. It averages their
    gradients over the processes itself. Those of λ and ρ, which are buffers, are averaged as in any shared step.

    Attributes:
        group: the processes, which all call the methods.
    """

    def __init__(self, model: nn.Module, processes: Processes | None) -> None:
        self._modules: list[Any] = [one for one in model.modules() if hasattr(type(one), "set_requires_gradient_sync")]
        self.reshard()
        _check(dict(model.named_parameters()), processes)
        self._own = {module: own for module in model.modules() if (own := dict(module.named_parameters(recurse=False)))}
        first: Any = next(model.parameters())
        self.group, self.device = first.device_mesh.get_group(), first.to_local().device

    def reshard(self) -> None:
        """Makes the sharded parameters those of the modules.

        FSDP2 leaves whole ones in the root after a forward pass, and then does not notice whether they are held.
        """
        for module in self._modules:
            module.reshard()

    def anywhere(self, here: bool) -> bool:
        """Whether it is true in any of the processes, so that all go on in the same way."""
        joined = torch.tensor(int(here), device=self.device)
        torch.distributed.all_reduce(joined, torch.distributed.ReduceOp.MAX, group=self.group)
        return bool(joined)

    def penalty(self, layer: nn.Module, hyper: HyperBatch, decay: Tensor) -> Tensor:
        """``layer.weight_decay_penalty(hyper, decay)``, for the examples of this process.

        The weights of a layer are whole only while it is computed; the backward pass gathers them again.
        """
        found: Tensor = checkpoint(partial(self._of_whole, layer, hyper, decay), use_reentrant=False)
        return found

    def _of_whole(self, layer: Any, hyper: HyperBatch, decay: Tensor) -> Tensor:
        with ExitStack() as stack:
            for module in layer.modules():
                if module in self._own:
                    stack.enter_context(_whole(module, self._own[module]))
            found: Tensor = layer.weight_decay_penalty(hyper, decay)
        return found


class _Whole(dict[str, Any]):
    """Sharded parameters of a module, each gathered when it is first read."""

    def __init__(self, sharded: Mapping[str, Any]) -> None:
        super().__init__(sharded)
        self._gathered: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Any:
        from torch.distributed.tensor import Partial

        if name not in self._gathered and (one := super().__getitem__(name)) is not None:
            # Each process has a part of the gradient of the mean, that of its own examples.
            self._gathered[name] = one.full_tensor(grad_placements=[Partial("avg")])
        return self._gathered.get(name)


@contextmanager
def _whole(module: nn.Module, sharded: Mapping[str, Any]) -> Iterator[None]:
    """Inside, reading a parameter of the module gathers it."""
    before = module.__dict__["_parameters"]
    module.__dict__["_parameters"] = _Whole(before | sharded)
    try:
        yield
    finally:
        module.__dict__["_parameters"] = before


def sharding_of(model: nn.Module, processes: Processes | None) -> Sharding | None:
    """The sharding of a model; None if it has no sharded parameters.

    Raises:
        ValueError: only some are sharded, or by something else than `fully_shard` over the same processes.
    """
    return Sharding(model, processes) if any(map(is_sharded, model.parameters())) else None


def _check(parameters: Mapping[str, Any], processes: Processes | None) -> None:
    if plain := [name for name, one in parameters.items() if not is_sharded(one)]:
        raise ValueError(
            f"SelfTuner: {listed(plain)} are not sharded, but others are: call fully_shard on the model itself, too, "
            "after its blocks, without ignored_params"
        )
    for name, one in parameters.items():
        mesh = one.device_mesh
        if mesh.ndim != 1 or not one.placements[0].is_shard(0):
            raise ValueError(
                f"SelfTuner: {name} has the placements {one.placements} on a mesh of {mesh.ndim} dimensions: only "
                "fully_shard of dimension 0 over a mesh of one dimension is supported, without other parallelism"
            )
        if one.to_local().device.type != mesh.device_type:
            raise ValueError(
                f"SelfTuner: {name} is on {one.to_local().device.type}, and its mesh on {mesh.device_type}: "
                "fully_shard with CPUOffloadPolicy is not supported"
            )
        members = mesh.mesh.flatten().tolist()
        if processes is None and len(members) > 1:
            raise ValueError(
                f"SelfTuner: the model is sharded over {len(members)} processes: give process_group, such as "
                "mesh.get_group()"
            )
        if processes is not None and torch.distributed.get_process_group_ranks(processes.group) != members:
            raise ValueError(
                f"SelfTuner: process_group has the processes "
                f"{torch.distributed.get_process_group_ranks(processes.group)}, but {name} is sharded over {members}"
            )
