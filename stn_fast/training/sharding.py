"""Models whose parameters `torch.distributed.fsdp.fully_shard` (FSDP2) has sharded over processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stn_fast.conversion.attention import MultiheadAttention
from stn_fast.hyperparameters import HyperBatch
from stn_fast.layers.embedding import GatedTable
from stn_fast.layers.gated import Gated
from stn_fast.ops.arguments import is_sharded
from stn_fast.training.distributed import Processes
from stn_fast.training.parameters import listed
from stn_fast.training.task import with_weight_decay


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
        parameters: the sharded ones, by name.
    """

    def __init__(self, model: nn.Module, processes: Processes | None) -> None:
        self._modules: list[Any] = [one for one in model.modules() if hasattr(type(one), "set_requires_gradient_sync")]
        if sparse := [name for name, one in model.named_modules() if getattr(one, "sparse", False) is True]:
            raise ValueError(
                f"SelfTuner: {listed(sparse)} has sparse gradients, which fully_shard can't average: use sparse=False"
            )
        self.reshard()
        self.parameters = dict(model.named_parameters())
        _check(self.parameters, processes)
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

    def with_weight_decay(self, loss: Tensor, model: nn.Module, hyper: HyperBatch) -> Tensor:
        """`stn_fast.training.task.with_weight_decay`, without the whole model.

        The penalty is a sum over the rows of W, so each process computes that of its rows, for the examples of all
        processes, by the moments of decay and h. The weights of a layer of another kind, such as an LSTM, are gathered
        while its penalty is computed, and again in the backward pass.
        """
        moments, of_rows = dict[Tensor, Tensor](), list[Tensor]()

        def penalty(layer: nn.Module, hyper: HyperBatch, decay: Tensor) -> Tensor:
            matrices = self._matrices(layer)
            if matrices is None:
                found: Tensor = checkpoint(partial(self._of_whole, layer, hyper, decay), use_reentrant=False)
                return found
            if decay not in moments:
                moments[decay] = self._moments(hyper, decay)
            of_rows.extend(matrix.penalty(moments[decay]) for matrix in matrices)
            return loss.new_zeros(())

        with torch.autocast(loss.device.type, enabled=False):  # as in the operation that computes other penalties
            loss = with_weight_decay(loss, model, hyper, penalty)
        if not of_rows:
            return loss
        own = torch.stack(of_rows).sum()
        whole = own.detach().clone()
        torch.distributed.all_reduce(whole, group=self.group)
        return loss + (own + (whole - own.detach()))  # the gradient is that of the own rows

    def _matrices(self, layer: Any) -> list[_Matrix] | None:
        """What this process has of the matrices that are decayed; None if they are not known."""
        own, kind = self._own.get(layer, {}), type(layer).weight_decay_penalty
        if kind is GatedTable.weight_decay_penalty:
            return [_of_table(**{name: own.get(name) for name in RESPONSE_OF_ROWS})]
        if kind is MultiheadAttention.weight_decay_penalty:
            parts = [name for name in ("in_proj", "q_proj", "k_proj", "v_proj") if f"weight_gate_{name}" in own]
            return [
                _of_linear(own[f"{part}_weight"], *(own.get(f"{name}_{part}") for name in RESPONSE_OF_ROWS[1:]))
                for part in parts
            ]
        if kind is Gated.weight_decay_penalty and (layer.groups == 1 or layer.response_projection is None):
            return [_of_linear(*(own.get(name) for name in RESPONSE_OF_ROWS))]
        return None

    @torch.no_grad()
    def _moments(self, hyper: HyperBatch, decay: Tensor) -> Tensor:
        """(1 + n, 1 + n): the mean of decay · (1, h)(1, h)ᵀ over the examples of all processes, in float64."""
        h = torch.cat([torch.ones_like(decay)[:, None], hyper.response], 1).double()
        found = (decay.double()[:, None] * h).T @ h / len(h) / torch.distributed.get_world_size(self.group)
        torch.distributed.all_reduce(found, group=self.group)
        return found

    def _of_whole(self, layer: Any, hyper: HyperBatch, decay: Tensor) -> Tensor:
        with ExitStack() as stack:
            for module in layer.modules():
                if module in self._own:
                    stack.enter_context(_whole(module, self._own[module]))
            found: Tensor = layer.weight_decay_penalty(hyper, decay)
        return found


RESPONSE_OF_ROWS = ("weight", "response_weight", "weight_gate", "response_projection")


class _Matrix(NamedTuple):
    """W (O, I), R (O, I) or A (O, k), and Gw (O, n); and B (k, I), if R = A B. Of O or of I, a process has a part."""

    weight: Tensor
    response: Tensor
    gate: Tensor
    projection: Tensor | None

    def penalty(self, moments: Tensor) -> Tensor:
        """½ · mean over examples of decay · ‖W + diag(Gw h) R‖², by the moments of these."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        weight, response, gate = self.weight.to(wide), self.response.to(wide), self.gate.to(wide)
        moments = moments.to(wide)
        if self.projection is None:
            product, square = (weight * response).sum(1), response.square().sum(1)
        else:  # without R itself
            narrow = self.projection.to(wide)
            product = (weight @ narrow.T * response).sum(1)
            square = (response @ (narrow @ narrow.T) * response).sum(1)
        first, second = gate @ moments[0, 1:], (gate @ moments[1:, 1:] * gate).sum(1)
        return 0.5 * (moments[0, 0] * weight.square().sum() + 2 * (first @ product) + second @ square)


def _of_linear(weight: Any, response_weight: Any, weight_gate: Any, response_projection: Any) -> _Matrix:
    """The own rows; all of B, which all rows need."""
    weight, response, gate = (one.to_local().flatten(1) for one in (weight, response_weight, weight_gate))
    return _Matrix(weight, response, gate, None if response_projection is None else _of_all(response_projection))


def _of_table(weight: Any, response_weight: Any, weight_gate: Any, response_projection: Any) -> _Matrix:
    """The own rows of a table, whose columns are the outputs."""
    weight, gate = weight.to_local().T, _of_all(weight_gate)
    if response_projection is None:
        return _Matrix(weight, response_weight.to_local().T, gate, None)
    return _Matrix(weight, _of_all(response_weight), gate, response_projection.to_local().T)


def _of_all(sharded: Any) -> Tensor:
    """The whole of a small parameter. Each process has a part of its gradient, that of its rows."""
    whole: Tensor = sharded.full_tensor(grad_placements=[_partial("sum")]).flatten(1)
    return whole


def _partial(reduction: str) -> Any:
    """That each process has a part of a gradient."""
    from torch.distributed.tensor import Partial

    return Partial(reduction)


class _Whole(dict[str, Any]):
    """Sharded parameters of a module, each gathered when it is first read."""

    def __init__(self, sharded: Mapping[str, Any]) -> None:
        super().__init__(sharded)
        self._gathered: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._gathered and (one := super().__getitem__(name)) is not None:
            # Each process has a part of the gradient of the mean, that of its own examples.
            self._gathered[name] = one.full_tensor(grad_placements=[_partial("avg")])
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
        ValueError: only some are sharded, or by something else than `fully_shard` over the same processes; or their
            gradients are sparse.
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
