"""InModel: what converted modules, and hooks on the outputs of modules, share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from stn_fast.conversion.tuned import TunedHyperparameters


class InModel:
    """Something that uses the hyperparameters of a converted model, and the rows of its examples.

    Attributes:
        tuned: the model's `TunedHyperparameters`; not a child of the module.
        dotted_name: name of the module in the model.
        plain_class: its class before the conversion.
        example_dim: the dimension of its ``tensor`` that counts examples.
        tensor: "input" or "output".
    """

    tuned: TunedHyperparameters
    dotted_name: str
    plain_class: type[nn.Module]
    example_dim: int
    tensor = "input"

    @property
    def shown(self) -> str:
        """Name and class of the module, for messages."""
        return f"{self.dotted_name or 'the model'} ({self.plain_class.__name__})"

    def no_batch_in_use(self) -> RuntimeError:
        """The error that the module is called in training mode outside `using`."""
        return RuntimeError(
            f"{self.shown} is in training mode, in which every example has its own hyperparameters: train with "
            "stn.SelfTuner, call the model inside `with model.tuned_hyperparameters.using(hyper):`, or call "
            "model.eval() to use the current hyperparameters"
        )

    def takes_any_examples(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape is of no example in particular, so that each gets a result."""
        return False

    def rows_per_example(self, x: Tensor, dim: int, examples: int) -> int:
        """k, if dimension `dim` of x counts k consecutive rows for each of the examples.

        Raises:
            ValueError: it is not a multiple of the examples.
        """
        rows = x.shape[dim] if dim < x.ndim else 0
        if rows == examples:
            return 1
        if rows < examples or rows % examples:
            raise self.wrong_rows(x, dim, examples)
        return rows // examples

    def split(self, x: Tensor, examples: int) -> Tensor:
        """x with its example dimension split into (B, k), if each example has several rows."""
        rows = self.rows_per_example(x, self.example_dim, examples)
        return x if rows == 1 else x.unflatten(self.example_dim, (examples, rows))

    def wrong_rows(self, x: Tensor, dim: int, examples: int) -> ValueError:
        """The error that dimension `dim` of x does not count the examples."""
        declared = f"convert(model, example_dims={{{self.dotted_name!r}: 1}})"
        return ValueError(
            f"{self.shown}: dimension {dim} of its {self.tensor} {tuple(x.shape)} must count the {examples} examples "
            "of the HyperBatch, or several consecutive rows of each. If another dimension counts them, declare it: "
            f"{declared}. If none does, {self.leave_out}"
        )

    @property
    def leave_out(self) -> str:
        """How to leave the module out."""
        return f"leave the module out, convert(model, exclude={self.dotted_name!r})"
