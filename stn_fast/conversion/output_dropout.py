"""OutputDropout: dropout of the output of a module, as a forward hook.

A hook keeps the class of the module, which may be any, so that models can be pickled; torch.compile traces it, and
activation checkpointing runs it again with the module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from stn_fast import functional
from stn_fast.conversion.additions import Added, Dropout
from stn_fast.conversion.in_model import InModel
from stn_fast.conversion.tuned import TunedHyperparameters


class OutputDropout(InModel):
    """Drops the output of a module in its training mode: y = x · keep / (1 − rate[b]), each example at its own rate.

    Attributes:
        name: the hyperparameter that is the rate.
        stream: number of the random stream.
        handle: removes the hook. Others are those of `InModel`.
    """

    tensor = "output"

    def __init__(
        self, module: nn.Module, tuned: TunedHyperparameters, dotted_name: str, name: str, example_dim: int, stream: int
    ) -> None:
        self.tuned, self.dotted_name = tuned, dotted_name
        self.plain_class = getattr(module, "plain_class", type(module))
        self.name, self.example_dim, self.stream = name, example_dim, stream
        self.handle = module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if not module.training:
            return None
        hyper, x = self.tuned.in_use(), self.dropped(output)
        if hyper is None:
            raise self.no_batch_in_use()
        rows, draw = self.split(x, len(hyper)), hyper.draw(self.stream)
        y = functional.dropout(rows, hyper[self.name], **draw, example_dim=self.example_dim)
        return y.view_as(x)

    def dropped(self, output: Any) -> Tensor:
        """The output of the module.

        Raises:
            TypeError: it can't be dropped.
        """
        if not isinstance(output, Tensor) or not output.is_floating_point():
            got = output.dtype if isinstance(output, Tensor) else type(output).__name__
            raise TypeError(
                f"{self.shown}: its output must be a floating point tensor for "
                f"stn.Dropout to drop it, got {got}: give stn.Dropout a pattern that does not fit it"
            )
        return output

    @property
    def leave_out(self) -> str:
        return "give stn.Dropout another pattern"


def add_output_dropouts(
    model: nn.Module,
    added: Sequence[Added],
    tuned: TunedHyperparameters,
    example_dims: Mapping[str, int],
    streams: Iterator[int],
) -> None:
    """Adds the hooks of each `Dropout` to its modules, each with its own random stream."""
    for one in added:
        for name in one.modules if isinstance(one.addition, Dropout) else ():
            module = model.get_submodule(name)
            OutputDropout(module, tuned, name, one.hyperparameter, example_dims[name], next(streams))


def output_dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, OutputDropout]]:
    """The modules of the model whose output is dropped, and their hooks."""
    for module in model.modules():
        for hook in list(module._forward_hooks.values()):
            if isinstance(hook, OutputDropout):
                yield module, hook


def remove_output_dropouts(model: nn.Module) -> None:
    """Removes the hooks from the model."""
    for _, hook in output_dropouts(model):
        hook.handle.remove()
