"""Networks written with gated layers, whose forward pass takes the hyperparameters, for comparison with `convert`.

All responses are full.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.published import CHANNELS, FULLY_CONNECTED, POOLED, STRIDES
from stn_fast.hyperparameters import HyperBatch
from stn_fast.layers import (
    EmbeddingDropout,
    HyperBatchNorm2d,
    HyperConv2d,
    HyperEmbedding,
    HyperLinear,
    HyperLSTM,
    PerExampleDropout,
    PerExampleDropout2d,
)
from stn_fast.models.language_model import Decoder, Outputs

CONV_DROPOUTS = tuple(f"conv_dropout_{i}" for i in range(1, len(CHANNELS)))
FC_DROPOUTS = tuple(f"fc_dropout_{i}" for i in range(1, len(FULLY_CONNECTED) - 1))  # the last layer has none
STAGES = (64, 128, 256, 512)
BLOCKS = 2  # of each stage
BLOCK_DROPOUTS = tuple(f"block_dropout_{i}" for i in range(1, BLOCKS * len(STAGES) + 1))
LAST_DROPOUT = "last_dropout"


class AlexNet(nn.Module):
    """3-64-192-384-256-256, then 1024-4096-4096-10, with responses to n hyperparameters.

    Convolutions apply ReLU themselves. Dropout of whole channels, at the rates `CONV_DROPOUTS`, follows each of them,
    and dropout at the rates `FC_DROPOUTS` precedes each fully connected layer but the last.
    """

    def __init__(self, n: int):
        super().__init__()
        options: dict[str, Any] = dict(num_hyperparameters=n)
        filters = zip(pairwise(CHANNELS), STRIDES, strict=True)
        self.convolutions = nn.ModuleList(HyperConv2d(i, o, 3, s, 1, **options, relu=True) for (i, o), s in filters)
        self.layers = nn.ModuleList(HyperLinear(i, o, **options) for i, o in pairwise(FULLY_CONNECTED))
        self.dropouts = nn.ModuleDict()
        for stream, name in enumerate((*CONV_DROPOUTS, *FC_DROPOUTS), start=1):
            kind = PerExampleDropout2d if name in CONV_DROPOUTS else PerExampleDropout
            self.dropouts[name] = kind(name, stream=stream)

    def forward(self, x: Tensor, hyper: HyperBatch) -> Tensor:
        """Normalised images (B, 3, 32, 32) → logits (B, 10)."""
        for convolution, pooled, name in zip(self.convolutions, POOLED, CONV_DROPOUTS, strict=True):
            x = convolution(x, hyper)
            x = self.dropouts[name](F.max_pool2d(x, 2) if pooled else x, hyper)
        x = x.flatten(1)
        *hidden, last = self.layers
        for layer, name in zip(hidden, FC_DROPOUTS, strict=True):
            x = torch.relu(layer(self.dropouts[name](x, hyper), hyper))
        return last(x, hyper)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm and dropout between them, as `stn_fast.models.resnet.BasicBlock`."""

    def __init__(self, in_channels: int, channels: int, stride: int, n: int, name: str, stream: int):
        super().__init__()
        gated: dict[str, Any] = dict(num_hyperparameters=n)
        self.conv_1 = HyperConv2d(in_channels, channels, 3, stride, 1, bias=False, **gated)
        self.norm_1 = HyperBatchNorm2d(channels, **gated)
        self.dropout = PerExampleDropout(name, stream=stream)
        self.conv_2 = HyperConv2d(channels, channels, 3, 1, 1, bias=False, **gated)
        self.norm_2 = HyperBatchNorm2d(channels, **gated)
        self.projects = stride != 1 or in_channels != channels
        if self.projects:
            self.projection = HyperConv2d(in_channels, channels, 1, stride, bias=False, **gated)
            self.projection_norm = HyperBatchNorm2d(channels, **gated)

    def forward(self, x: Tensor, hyper: HyperBatch) -> Tensor:
        """(B, in_channels, H, W) → (B, channels, H/stride, W/stride)."""
        y = torch.relu(self.norm_1(self.conv_1(x, hyper), hyper))
        y = self.norm_2(self.conv_2(self.dropout(y, hyper), hyper), hyper)
        if self.projects:
            x = self.projection_norm(self.projection(x, hyper), hyper)
        return torch.relu(y + x)


class ResNet18(nn.Module):
    """`stn_fast.models.resnet18` with responses to n hyperparameters.

    Dropout at the rates `BLOCK_DROPOUTS` is in the blocks, and at the rate `LAST_DROPOUT` before the last layer.
    """

    def __init__(self, n: int):
        super().__init__()
        first, *_, last = STAGES
        self.conv = HyperConv2d(3, first, 3, 1, 1, bias=False, num_hyperparameters=n)
        self.norm = HyperBatchNorm2d(first, num_hyperparameters=n)
        self.blocks, before = nn.ModuleList(), first
        for number, name in enumerate(BLOCK_DROPOUTS):
            stage, place = divmod(number, BLOCKS)
            stride = 2 if stage and not place else 1
            self.blocks.append(BasicBlock(before, STAGES[stage], stride, n, name, stream=number + 1))
            before = STAGES[stage]
        self.dropout = PerExampleDropout(LAST_DROPOUT, stream=len(BLOCK_DROPOUTS) + 1)
        self.linear = HyperLinear(last, 10, num_hyperparameters=n)

    def forward(self, x: Tensor, hyper: HyperBatch) -> Tensor:
        """Normalised images (B, 3, 32, 32) → logits (B, 10)."""
        x = torch.relu(self.norm(self.conv(x, hyper), hyper))
        for block in self.blocks:
            x = block(x, hyper)
        return self.linear(self.dropout(x.mean((2, 3)), hyper), hyper)


class LanguageModel(nn.Module):
    """`stn_fast.models.LanguageModel` with responses to n hyperparameters, and all of its dropouts."""

    def __init__(self, words: int, width: int, layers: int, n: int):
        super().__init__()
        self.embedding = HyperEmbedding(words, width, num_hyperparameters=n)
        self.embedding_dropout = EmbeddingDropout("embedding_dropout", stream=1)
        self.input_dropout = PerExampleDropout("input_dropout", stream=2, shared_dims=(0,))
        self.output_dropout = PerExampleDropout("output_dropout", stream=3, shared_dims=(0,))
        dropouts: dict[str, Any] = dict(dropout="hidden_dropout", recurrent_dropout="recurrent_dropout", stream=4)
        self.lstm = HyperLSTM(width, width, layers, **dropouts, num_hyperparameters=n)
        self.decoder = Decoder(width, words)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor, hyper: HyperBatch, state: tuple[Tensor, Tensor] | None = None) -> Outputs:
        """Tokens (T, B), each column an example, and the state before them (None for zeros) → `Outputs`."""
        x = self.embedding_dropout(self.embedding, tokens, hyper, example_dim=1)
        raw, state = self.lstm(self.input_dropout(x, hyper, example_dim=1), hyper, state)
        dropped = self.output_dropout(raw, hyper, example_dim=1)
        return Outputs(self.decoder(dropped), state, raw, dropped)
