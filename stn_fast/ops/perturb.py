"""perturb: samples and constrains the hyperparameters of every example in one differentiable call."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stn_fast import random
from stn_fast.checks import whole_number
from stn_fast.hyperparameter import BOTH_BOUNDS, LOWER_BOUND, RAW_SCALE_BOUNDS, UPPER_BOUND
from stn_fast.ops.draw import Coordinates, check_coordinates, check_randomness, step_number
from stn_fast.ops.memory import address, own_address
from stn_fast.ops.operation import Operation
from stn_fast.ops.serving import serving
from stn_fast.ops.transforms import in_transform

PERTURBATION_STREAM = 0


class Table(NamedTuple):
    """The columns of the (n, 6) float32 table that describes each hyperparameter to kernels."""

    kind: Tensor
    low: Tensor
    high: Tensor
    integer: Tensor
    per_example: Tensor
    responds_with_value: Tensor


class Perturbed(NamedTuple):
    """The results of `perturb`, each (B, n) float32."""

    values: Tensor
    response: Tensor


def constrain(unconstrained: Tensor, table: Tensor) -> Tensor:
    """Constrained values of unconstrained (..., n): the map of each column's kind, then floor for integers."""
    columns = Table(*table.to(unconstrained.dtype).unbind(1))
    low, high = columns.low, columns.high
    value = torch.where(columns.kind == LOWER_BOUND, low + F.softplus(unconstrained), unconstrained)
    value = torch.where(columns.kind == UPPER_BOUND, high - F.softplus(-unconstrained), value)
    value = torch.where(columns.kind == BOTH_BOUNDS, low + (high - low) * unconstrained.sigmoid(), value)
    return torch.where(columns.integer > 0, value.floor(), value)


def _constrain_derivative(unconstrained: Tensor, table: Tensor) -> Tensor:
    columns = Table(*table.to(unconstrained.dtype).unbind(1))
    gate = unconstrained.sigmoid()
    slope = torch.where(columns.kind == LOWER_BOUND, gate, torch.ones_like(gate))
    slope = torch.where(columns.kind == UPPER_BOUND, 1 - gate, slope)
    slope = torch.where(columns.kind == BOTH_BOUNDS, (columns.high - columns.low) * gate * (1 - gate), slope)
    return torch.where(columns.integer > 0, torch.zeros_like(slope), slope)


def perturbation_noise(table: Tensor, step: Tensor, seed: int, batch_size: int, first_example: int) -> Tensor:
    """The standard normal draws eps (B, n) of a perturbation, from the NumPy reference generator."""
    n, number = table.shape[0], step_number("perturb", step)
    draws = random.normal(seed, number, PERTURBATION_STREAM, batch_size, n, first_example)
    shared = random.normal(seed, number, PERTURBATION_STREAM, 1, n, 0)
    noise = torch.from_numpy(draws).to(table.device)
    return torch.where(table[:, 4] > 0, noise, torch.from_numpy(shared).to(table.device))


def reference(location: Tensor, raw_scale: Tensor, center: Tensor, table: Tensor, noise: Tensor) -> Perturbed:
    """The definition, in plain torch. Differentiable in every mode; kernels are tested against it."""
    unconstrained = location + F.softplus(raw_scale.clamp(*RAW_SCALE_BOUNDS)) * noise
    values = constrain(unconstrained, table)
    response = torch.where(table[:, 5] > 0, values, unconstrained - center)
    return Perturbed(values, response)


def _forward(
    location: Tensor,
    raw_scale: Tensor,
    center: Tensor,
    table: Tensor,
    step: Tensor,
    seed: int,
    batch_size: int,
    first_example: int,
    save_noise: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(values, response, noise): noise (n, B) is for backward, and empty unless ``save_noise``."""
    backend = serving(location)
    n = table.shape[0]
    if backend == "reference":
        drawn = perturbation_noise(table, step, seed, batch_size, first_example)
        values, response = reference(location, raw_scale, center, table, drawn)
        return values.T.contiguous().T, response, drawn.T.contiguous() if save_noise else location.new_empty(0)
    values = location.new_empty(n, batch_size)
    response = location.new_empty(batch_size, n)
    noise = location.new_empty((n, batch_size) if save_noise else 0)
    if backend == "triton":
        from stn_fast.kernels import perturb as kernels

        kernels.perturb_forward(
            location, raw_scale, center, table, step, values, response, noise if save_noise else None,
            seed, first_example, *RAW_SCALE_BOUNDS,
        )  # fmt: skip
    else:
        from stn_fast import _C

        _C.perturb_forward(
            address(location), address(raw_scale), address(center), address(table),
            own_address(values), own_address(response), own_address(noise) if save_noise else 0,
            n, batch_size, first_example, seed, step_number("perturb", step),
            *RAW_SCALE_BOUNDS, torch.get_num_threads(),
        )  # fmt: skip
    return values.T, response, noise


def _fake(
    location: Tensor,
    raw_scale: Tensor,
    center: Tensor,
    table: Tensor,
    step: Tensor,
    seed: int,
    batch_size: int,
    first_example: int,
    save_noise: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n = table.shape[0]
    noise = location.new_empty(n, batch_size) if save_noise else location.new_empty(0)
    return location.new_empty(n, batch_size).T, location.new_empty(batch_size, n), noise


def _backward(
    d_values: Tensor | None,
    d_response: Tensor | None,
    location: Tensor,
    raw_scale: Tensor,
    table: Tensor,
    noise: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    """The gradients of location and raw_scale, computed in one pass."""
    backend = serving(location)
    if backend == "reference":
        return _backward_reference(d_values, d_response, location, raw_scale, table, noise.T)
    if d_response is not None:
        d_response = d_response.contiguous()
    in_rows = d_values is not None and d_values.is_contiguous()
    if d_values is not None and (backend == "triton" or not in_rows):
        d_values = d_values.T.contiguous()
    if backend == "triton":
        from stn_fast.kernels import perturb as kernels

        return kernels.perturb_backward(d_values, d_response, location, raw_scale, table, noise, *RAW_SCALE_BOUNDS)
    from stn_fast import _C

    d_location, d_raw_scale = torch.empty_like(location), torch.empty_like(raw_scale)
    n, batch_size = noise.shape
    _C.perturb_backward(
        address(d_values), in_rows, address(d_response),
        address(location), address(raw_scale), address(table), address(noise),
        own_address(d_location), own_address(d_raw_scale), n, batch_size, *RAW_SCALE_BOUNDS, torch.get_num_threads(),
    )  # fmt: skip
    return d_location, d_raw_scale


def _backward_reference(
    d_values: Tensor | None,
    d_response: Tensor | None,
    location: Tensor,
    raw_scale: Tensor,
    table: Tensor,
    noise: Tensor,
) -> tuple[Tensor, Tensor]:
    clamped = raw_scale.clamp(*RAW_SCALE_BOUNDS)
    unconstrained = location + F.softplus(clamped) * noise
    slope = _constrain_derivative(unconstrained, table)
    upstream = torch.zeros_like(unconstrained)
    if d_values is not None:
        upstream = upstream + d_values * slope
    if d_response is not None:
        upstream = upstream + torch.where(table[:, 5] > 0, d_response * slope, d_response)
    inside = (clamped == raw_scale).to(raw_scale.dtype)
    return upstream.sum(0), (upstream * noise).sum(0) * raw_scale.sigmoid() * inside


_operation = Operation(
    "perturb",
    _forward,
    outputs=("values", "response", "noise"),
    fake=_fake,
    backward=_backward,
    differentiable=("location", "raw_scale"),
)


def perturb(
    location: Tensor,
    raw_scale: Tensor,
    center: Tensor,
    table: Tensor,
    *,
    step: Tensor | int,
    seed: int,
    batch_size: int,
    first_example: int = 0,
) -> Perturbed:
    """Samples a batch of hyperparameters around their location (MacKay et al. 2019, section 3.2).

    λ̃[b, k]        = location[k] + softplus(clamp(raw_scale[k])) · eps[b, k],  eps ~ N(0, 1)
    values[b, k]   = λ̃[b, k] mapped into the hyperparameter's range
    response[b, k] = λ̃[b, k] − center[k], or the value if the table says so

    eps is a function of (seed, step, first_example + b, k) only. If gradients are needed, it is stored, because B·n
    floats cost less than drawing them again. Gradients flow from both results to location and raw_scale, but not
    through the values of integers. Most users need `HyperparameterSpace.sample`, which calls this.

    Args:
        location: (n,) float32, unconstrained.
        raw_scale: (n,) float32; clamped into RAW_SCALE_BOUNDS.
        center: (n,) float32, not differentiated.
        table: (n, 6) float32, columns as in `Table`.
        step: an int, or a 0-dim int64 tensor on the device of location.
        seed: 0 <= seed < 2**63.
        batch_size: rows to draw.
        first_example: index of row 0 in the global batch.

    Returns:
        `Perturbed`: two (B, n) float32 tensors.

    Raises:
        ValueError: a shape or dtype does not fit; the message names the argument.
    """
    return perturb_for("perturb", location, raw_scale, center, table, step, seed, batch_size, first_example)[0]


def perturb_for(
    operation: str,
    location: Tensor,
    raw_scale: Tensor,
    center: Tensor,
    table: Tensor,
    step: Tensor | int,
    seed: int,
    batch_size: int,
    first_example: int,
) -> tuple[Perturbed, Coordinates]:
    """The result of `perturb`, and the RNG coordinates after their checks; errors name ``operation``."""
    _check(location, raw_scale, center, table)
    batch_size = whole_number(operation, "batch_size", batch_size, 0)
    check_randomness(operation)
    coordinates = check_coordinates(operation, table.device, seed, step, first_example)
    step, seed, first_example = coordinates
    if in_transform():
        noise = perturbation_noise(table, step, seed, batch_size, first_example)
        return reference(location, raw_scale, center, table, noise), coordinates
    save_noise = torch.is_grad_enabled() and (location.requires_grad or raw_scale.requires_grad)
    draw = (table, step, seed, batch_size, first_example, save_noise)
    values, response, _ = _operation(location.contiguous(), raw_scale.contiguous(), center.contiguous(), *draw)
    return Perturbed(values, response), coordinates


def _check(location: Tensor, raw_scale: Tensor, center: Tensor, table: Tensor) -> None:
    n = len(table)
    if table.shape != (n, 6) or table.dtype != torch.float32 or not table.is_contiguous():
        raise ValueError(
            f"perturb: table must be contiguous (n, 6) float32, as made by a HyperparameterSpace, "
            f"got {tuple(table.shape)} {table.dtype}"
        )
    for name, tensor in (("location", location), ("raw_scale", raw_scale), ("center", center)):
        if tensor.shape != (n,) or tensor.dtype != torch.float32:
            raise ValueError(
                f"perturb: {name} must be ({n},) float32, one entry per hyperparameter, "
                f"got {tuple(tensor.shape)} {tensor.dtype}"
            )
        if tensor.device != table.device:
            raise ValueError(f"perturb: {name} is on {tensor.device}, the table on {table.device}; move one of them")
