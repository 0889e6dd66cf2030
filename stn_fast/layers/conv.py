"""HyperConv2d: torch.nn.Conv2d whose filters respond to each example's hyperparameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stn_fast import functional
from stn_fast.hyperparameter import ResponseRank
from stn_fast.hyperparameters import HyperBatch
from stn_fast.layers.gated import GatedLayer, check_sizes, check_switches, factors_to_use, give_parameters
from stn_fast.ops.arguments import check_tensor
from stn_fast.ops.gated_conv2d import pair
from stn_fast.ops.halves import are_halves, make_halves

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class Halves(nn.Module):
    """W and R are stored as the halves of one tensor, so that calls need not concatenate them.

    They stay so when the module is moved or copied, until either is replaced by another parameter.
    """

    def _filters(self) -> tuple[nn.Parameter | None, nn.Parameter | None]:
        """W and R; None for one that is computed from other parameters, as by a parametrization."""
        return self._parameters.get("weight"), self._parameters.get("response_weight")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Halves:
        """`to`, `half` and others move each parameter separately; join halves of one tensor again afterwards."""
        were_halves = are_halves(*self._filters())
        super()._apply(fn, recurse)
        if were_halves:
            make_halves(*self._filters())
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_were_halves": are_halves(*self._filters())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """copy.deepcopy and pickle copy each parameter separately; join halves of one tensor again afterwards."""
        super().__setstate__({name: value for name, value in state.items() if name != "_were_halves"})
        if state.get("_were_halves", False):
            make_halves(*self._filters())


class HyperConv2d(Halves, GatedLayer):
    """y = conv(x, W) + b + (h Gwᵀ) ⊙ conv(x, R) + (h Gbᵀ) ⊙ r, optionally followed by ReLU.

    h is each example's response input. `weight` and `bias` are named and shaped as in torch.nn.Conv2d, so a plain
    checkpoint loads with strict=False. W and b are initialised uniformly in ±1/√fan_in, with
    fan_in = in_channels/groups · kh · kw, R and r to 0, and the gates such that output o responds
    to hyperparameter o mod n.

    With one group, `weight` and `response_weight` are stored as the halves of one tensor, so that calls need not
    concatenate them, until either is replaced by another parameter. torch.save of one of them therefore writes both;
    save a clone instead.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as in
            torch.nn.Conv2d: padding also "same" or "valid", padding_mode "zeros", "reflect", "replicate", "circular".
        num_hyperparameters: n, at least 1.
        relu: whether to apply ReLU to the result, in the same pass.
        response_rank: None for a full response; k for a response of rank k in each group, where B is a convolution
            like W with k output channels and A a 1 x 1 convolution of its result; "auto" for the largest k, at least
            1, that adds at most 5 % to the multiplications. If a full response costs no more than rank k, the layer
            has a full one, and its response_rank is None.

    Shapes: weight, response_weight (O, I/groups, kh, kw); bias, response_bias (O,); weight_gate, bias_gate (O, n).
    With a low rank, response_weight is A (O, k, 1, 1), initialised to 0, and response_projection is B
    (groups·k, I/groups, kh, kw), initialised like W.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        *,
        num_hyperparameters: int,
        relu: bool = False,
        response_rank: ResponseRank = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_sizes(
            "HyperConv2d",
            in_channels=in_channels,
            out_channels=out_channels,
            groups=groups,
            num_hyperparameters=num_hyperparameters,
        )
        check_switches("HyperConv2d", bias=bias, relu=relu)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ValueError(f"HyperConv2d: {name} must be divisible by groups={groups}, got {channels}")
        if padding_mode not in get_args(PaddingMode):
            raise ValueError(f"HyperConv2d: padding_mode must be one of {get_args(PaddingMode)}, got {padding_mode!r}")
        kernel = _pair("kernel_size", kernel_size, 1)
        shape = (out_channels, in_channels // groups, *kernel)
        factors = factors_to_use("HyperConv2d", response_rank, shape, groups)
        super().__init__(shape, bias, num_hyperparameters, device, dtype, factors=factors)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = kernel
        self.stride, self.dilation = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
        self.padding = padding if isinstance(padding, str) else _pair("padding", padding, 0)
        self.padding_mode, self.relu = padding_mode, relu
        if isinstance(self.padding, str) and self.padding not in ("same", "valid"):
            raise ValueError(f"HyperConv2d: padding must be numbers, 'same' or 'valid', got {padding!r}")
        if self.padding == "same" and self.stride != (1, 1):
            raise ValueError(f"HyperConv2d: padding='same' requires stride 1, as in torch, got stride={stride}")
        if groups == 1 and factors is None:
            make_halves(*self._filters())

    def forward(self, x: Tensor, hyper: HyperBatch | Tensor) -> Tensor:
        """(B, I, H, W) → (B, O, Ho, Wo); `hyper` is a HyperBatch or its response."""
        check_tensor("HyperConv2d", "x", x)
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"HyperConv2d: x must be (B, I, H, W) with I = in_channels={self.in_channels}, got {tuple(x.shape)}"
            )
        self._check_response(hyper)
        padding: str | tuple[int, int] = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._pads(), mode=self.padding_mode), (0, 0)
        return functional.gated_conv2d(
            x,
            *self.gated_parameters[:6],
            hyper,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
            relu=self.relu,
            response_projection=self.response_projection,
        )

    def _pads(self) -> tuple[int, int, int, int]:
        """(left, right, top, bottom)"""
        if self.padding == "same":
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            (top, bottom), (left, right) = ((t // 2, t - t // 2) for t in total)
            return left, right, top, bottom
        high, wide = (0, 0) if isinstance(self.padding, str) else self.padding
        return wide, wide, high, high

    def fold(self, response: Tensor) -> nn.Conv2d | nn.Sequential:
        """The plain layer that this one equals at one response input (n,); if `relu`, in a Sequential with nn.ReLU."""
        weight, bias = self._folded(response)
        plain = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            bias is not None,
            self.padding_mode,
            device="meta",
        )
        give_parameters(plain, weight, bias)
        return nn.Sequential(plain, nn.ReLU()) if self.relu else plain

    def extra_repr(self) -> str:
        arguments = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding!r}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, "
            f"padding_mode={self.padding_mode!r}, relu={self.relu}"
        )
        return ", ".join([arguments, *self._response_repr])


def _pair(name: str, value: int | tuple[int, int], least: int) -> tuple[int, int]:
    vertical, horizontal = pair("HyperConv2d", name, value, least)
    return vertical, horizontal
