"""check_rows: whether the rows of every layer's input belong to the examples that the layer takes them for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stn_fast.conversion.converted import Converted
from stn_fast.conversion.folding import tuned_of
from stn_fast.conversion.in_model import InModel
from stn_fast.conversion.output_dropout import OutputDropout, output_dropouts
from stn_fast.conversion.reading import ReadParameters
from stn_fast.conversion.rules import fixed_example_dim
from stn_fast.modes import evaluating


class _Call(NamedTuple):
    """One call of a converted module: the shape of its input, its rows, and a number for each of them.

    Of a module whose output is dropped, the same of its output.
    """

    shape: torch.Size
    rows: int
    marks: Tensor


_Calls = dict[InModel, list[_Call]]

SAME = 0.1  # two orders of rows differ clearly if one fits this many times better
NOISE = 1e-3  # relative; smaller differences can be rounding
EXACT = 1e-3  # two sets of rows are one set if they differ this much less than their orders


def check_rows(model: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
    """Raises an error if ``model(*args, **kwargs)`` calls a converted module with rows of unknown examples.

    A converted layer that is called with k·B rows for B examples uses the hyperparameters of example i for rows k·i to
    k·i + k − 1. That would be wrong for a table of positions (T, D) with T = k·B, and for rows in the order (T, B). So
    the model is called three times: with all B examples, with the first half of them, and with all in another order.
    The input of every converted module, and every output that a `stn_fast.Dropout` drops, must shrink to its first
    half, and its rows must change their order as the examples do. An Embedding may be called with tokens (1, ...), such
    as position numbers. `SelfTuner` does this at its first step or pass; inside `using`, do it yourself.

    One or two examples are repeated to make two or four. Rows that all examples share, as after a layer whose weight
    is 0, have no order that can be checked. Neither has a model that can't be called with the examples in another
    order, or whose rows depend on the places of the examples in the batch.

    The first dimension of the first tensor counts the examples; tensors with the same first dimension are halved. The
    model is called in evaluation mode at its current hyperparameters, without gradients, and not compiled. It does not
    change, and the state of torch's random number generators is restored. Modules that it does not call in evaluation
    mode are not checked.

    Returns the names of modules whose rows are the same for all examples, so that their order is not known.

    Raises:
        TypeError: the model has not been converted, or is called without a tensor.
        RuntimeError: the model can't be called with half of the examples.
        ValueError: rows of a module do not belong to examples, or are not known to; or the model computes with the
            parameters of a module without calling it. The message names the module and says what to do.
    """
    given = args, kwargs
    examples = _examples(given)
    if examples < 3:  # two have only one other order, which a model that swaps them would follow
        given, examples = _with_first_dimension(given, examples, lambda one: torch.cat([one, one])), 2 * examples
    half = examples // 2
    whole = _calls_of(model, given, examples)
    try:
        part = _calls_of(model, _with_first_dimension(given, examples, lambda tensor: tensor[:half]), half)
    except Exception as error:
        raise RuntimeError(
            f"check_rows: the model can be called with {examples} examples, but not with {half} of them: {error}. If "
            "it needs a fixed number of examples, check the inputs of its layers yourself, and use "
            "SelfTuner(..., check_rows=False)"
        ) from error
    for module in dict.fromkeys([*whole, *part]):
        _check(module, whole.get(module, []), part.get(module, []), examples, half)
    try:
        moved = _calls_of(model, _with_first_dimension(given, examples, _in_another_order), examples)
    except Exception:  # such as a model whose examples must be sorted
        return []
    return [
        module.dotted_name
        for module, calls in whole.items()
        if not _tells_apart(module, calls, moved.get(module, []), examples)
    ]


def structure(*given: Any) -> Any:
    """What decides how a model is called, except for sizes: keys, numbers of dimensions and dtypes. It is hashable."""
    leaves, tree = pytree.tree_flatten(given)
    kinds = [(leaf.ndim, leaf.dtype) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves]
    return str(tree), tuple(kinds)


def first_tensor(given: Any) -> Tensor | None:
    """The first tensor in a pytree; that of a model's inputs counts the examples by its first dimension."""
    return next((leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)), None)


def _examples(given: Any) -> int:
    first = first_tensor(given)
    if first is None or first.ndim == 0 or len(first) == 0:
        raise TypeError("check_rows: the first tensor that the model is called with must have examples in dimension 0")
    return len(first)


def _with_first_dimension(given: Any, examples: int, change: Any) -> Any:
    def changed(leaf: Any) -> Any:
        return change(leaf) if isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == examples else leaf

    return pytree.tree_map(changed, given)


def _calls_of(model: nn.Module, given: Any, examples: int) -> _Calls:
    """The calls of each converted module, in evaluation mode."""
    tuned, calls = tuned_of("check_rows", model), _Calls()
    devices = [tuned.location.device] if tuned.location.is_cuda else []
    args, kwargs = given
    with (
        torch.random.fork_rng(devices), torch.no_grad(), torch.compiler.set_stance("force_eager"), evaluating(model),
        tuned.at_location(), _recording(model, calls, examples),
    ):  # fmt: skip
        model(*args, **kwargs)
    return calls


@contextmanager
def _recording(model: nn.Module, calls: _Calls, examples: int) -> Iterator[None]:
    """Records the calls of converted modules, and raises an error if other code computes with their parameters."""
    converted = [module for module in model.modules() if isinstance(module, Converted)]
    owners: dict[int, tuple[nn.Module, str]] = {}

    def note(*given: Any) -> None:
        owners.update((id(own), (one, name)) for one in converted for name, own in one._parameters.items())

    note()
    reading = ReadParameters(owners)
    # Besides the converted modules: others with a parameter that is tied to one of theirs.
    readers = [one for one in model.modules() if any(id(own) in owners for own in one._parameters.values())]

    def record(module: nn.Module, args: Any, kwargs: Any) -> None:
        assert isinstance(module, Converted)
        x = first_tensor((args, kwargs))
        if x is not None:
            calls.setdefault(module, []).append(_call(x, module.example_dim, examples))

    def record_output(dropout: OutputDropout, module: nn.Module, args: Any, output: Any) -> None:
        calls.setdefault(dropout, []).append(_call(dropout.dropped(output), dropout.example_dim, examples))

    def enter(*given: Any) -> None:
        reading.running += 1

    def leave(*given: Any) -> None:
        reading.running -= 1

    hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for module in converted]
    hooks += [module.register_forward_pre_hook(enter, prepend=True) for module in readers]
    # FSDP2 has other parameters in a module while it is called.
    hooks += [one.register_forward_pre_hook(note) for one in model.modules() if hasattr(one, "unshard")]
    hooks += [module.register_forward_hook(partial(record_output, one)) for module, one in output_dropouts(model)]
    hooks += [module.register_forward_hook(leave, always_call=True) for module in readers]
    try:
        with reading:
            yield
    finally:
        for hook in hooks:
            hook.remove()
    if reading.found is not None:
        module, parameter, function = reading.found
        assert isinstance(module, Converted)
        raise ValueError(
            f"{module.shown} is not called where the model passes its {parameter} to {function}, so it does not "
            f"respond to hyperparameters there: {module.leave_out}"
        )


def _call(x: Tensor, dim: int, examples: int) -> _Call:
    rows = x.shape[dim] if dim < x.ndim else 0
    return _Call(x.shape, rows, _marks(x, dim) if rows >= examples else x.new_zeros(0))


def _marks(x: Tensor, dim: int) -> Tensor:
    """A number for each row, which tells different rows apart: a weighted sum."""
    rows = x.detach().movedim(dim, 0).flatten(1).float() if x.ndim > 1 else x.detach()[:, None].float()
    return rows @ torch.arange(1.0, rows.shape[1] + 1, device=x.device).cos()


def _check(module: InModel, whole: Sequence[_Call], part: Sequence[_Call], examples: int, half: int) -> None:
    if len(whole) != len(part):
        raise _error(
            module, f"is called {len(whole)} times for {examples} examples and {len(part)} times for {half} of them"
        )
    for one, other in zip(whole, part, strict=True):
        if module.takes_any_examples(one.shape) and module.takes_any_examples(other.shape):
            continue
        dim = module.example_dim
        rows, fewer = one.rows, other.rows
        if rows == 0 or rows % examples or rows * half != fewer * examples:
            counting = _counting(one.shape, other.shape, examples, half)
            raise _error(
                module,
                f"has {module.tensor}s {tuple(one.shape)} for {examples} examples and {tuple(other.shape)} for {half} "
                f"of them, but dimension {dim} must count the examples, or consecutive rows of each",
                () if isinstance(module, Converted) and fixed_example_dim(module) is not None else counting,
            )
        if rows > examples and _in_turn(one.marks, other.marks, examples, half):
            raise _error(
                module,
                f"has the examples in turn in dimension {dim} of its {module.tensor} {tuple(one.shape)}, but the "
                f"{rows // examples} rows of each of the {examples} examples must be consecutive, as in (B, T, ...) "
                "after flatten(0, 1)",
            )


def _counting(whole: Sequence[int], part: Sequence[int], examples: int, half: int) -> list[int]:
    """The dimensions that count examples."""
    sizes = list(zip(whole, part, strict=False))
    return [dim for dim, (size, less) in enumerate(sizes) if size == examples and less == half]


def _in_turn(whole: Tensor, part: Tensor, examples: int, half: int) -> bool:
    """Whether rows are of example 0, 1, ..., B − 1, 0, 1, ..., although they would be 0, ..., 0, 1, ..., 1."""
    consecutive = (whole[: len(part)] - part).norm()
    in_turn = (whole.view(-1, examples)[:, :half].flatten() - part).norm()
    return bool((in_turn < SAME * consecutive) & (consecutive > NOISE * part.norm()))


def _in_another_order(tensor: Tensor) -> Tensor:
    """The examples with the first in its place and the others moved by one.

    Reversing or shifting all examples, as a model may, gives another result before this than after it.
    """
    return torch.cat([tensor[:1], tensor[1:].roll(1, 0)])


def _tells_apart(module: InModel, whole: Sequence[_Call], moved: Sequence[_Call], examples: int) -> bool:
    """Whether the rows tell the examples apart.

    Raises:
        ValueError: they are the same rows for `moved` examples, but not in the order of these.
    """
    known = True
    for one, other in zip(whole, moved, strict=False):
        if module.takes_any_examples(one.shape) or one.shape != other.shape:
            continue
        marks = one.marks.view(examples, -1)
        expected, found = _in_another_order(marks), other.marks.view(examples, -1)
        wrong, least = (found - expected).norm(), NOISE * marks.norm()
        rearranged = (found.flatten().sort().values - marks.flatten().sort().values).norm()
        if bool((wrong > least) & (rearranged < EXACT * wrong)):
            raise _error(
                module,
                f"has rows in its {module.tensor} {tuple(one.shape)} that do not follow the order of the examples, but "
                f"dimension {module.example_dim} must count the examples in the order in which the model is called "
                "with them, or consecutive rows of each",
            )
        known = known and bool((marks - expected).norm() > least)
    return known


def _error(module: InModel, problem: str, dims: Sequence[int] = ()) -> ValueError:
    name = module.dotted_name
    declare = f"declare its dimension, convert(model, example_dims={{{name!r}: {dims[0]}}}), or " if dims else ""
    return ValueError(
        f"{module.shown} {problem}. So it is not known which example's hyperparameters a row needs: {declare}"
        f"{module.leave_out}"
    )
