"""A self-tuning LSTM language model with the STN paper's regularisers, each where its space has it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from stn_fast.hyperparameter import ResponseRank
from stn_fast.hyperparameters import HyperBatch, HyperparameterSpace
from stn_fast.layers import EmbeddingDropout, HyperEmbedding, HyperLSTM, PerExampleDropout
from stn_fast.layers.gated import check_sizes
from stn_fast.ops.linear import linear

# What each layer draws from, whatever the space has of the others; the LSTM takes as many from its own as it wants.
EMBEDDING_STREAM, INPUT_STREAM, OUTPUT_STREAM, LSTM_STREAM = 1, 2, 3, 4


class Outputs(NamedTuple):
    """What a language model makes of a window: logits (T, B, words), the state after it, and h of the last layer.

    `raw` and `dropped` (T, B, H) are that h before and after output dropout, which penalties on activations look at.
    """

    logits: Tensor
    state: tuple[Tensor, Tensor]
    raw: Tensor
    dropped: Tensor


class LanguageModel(nn.Module):
    """Embedding, LSTM and a decoder to words; the first two respond to the hyperparameters.

    The decoder's weight is `weight` of the embedding, and its bias its own; neither is gated there. Dropouts are those
    that the space names:

    - `embedding_dropout`: words, everywhere in the batch (one rate a batch);
    - `input_dropout`, `hidden_dropout`, `output_dropout`: what goes into the LSTM, from layer to layer, and out of it,
      with one mask for each example that is locked over time (Gal and Ghahramani, 2016);
    - `recurrent_dropout`: weights from hidden to hidden, one mask for W and R, one rate a batch (Merity et al., 2018).

    Names the model has no use for, such as `activation_regularization`, are left to the training objective.

    Args:
        space: the hyperparameters.
        words: size of the vocabulary.
        embedding, hidden: width of a word's vector and of the LSTM's layers; they must agree, as the decoder is tied.
        layers: of the LSTM.
        response_rank: that of `HyperEmbedding` and `HyperLSTM`.

    Raises:
        ValueError: embedding and hidden differ, a size is below 1, or the space has a `hidden_dropout` and the LSTM
            only one layer.
    """

    def __init__(
        self,
        space: HyperparameterSpace,
        words: int,
        embedding: int = 650,
        hidden: int = 650,
        layers: int = 2,
        *,
        response_rank: ResponseRank = None,
    ):
        super().__init__()
        check_sizes("LanguageModel", words=words, embedding=embedding, hidden=hidden, layers=layers)
        if embedding != hidden:
            raise ValueError(
                f"LanguageModel ties its decoder to the embedding and wants hidden = embedding; got {hidden} and "
                f"{embedding}"
            )
        names, n = space.names, len(space)
        if "hidden_dropout" in names and layers == 1:
            raise ValueError("hidden_dropout is applied between layers, and layers = 1 leaves no place for it")

        def named(name: str) -> str | None:
            return name if name in names else None

        def locked(name: str, stream: int) -> PerExampleDropout | None:
            return PerExampleDropout(name, stream=stream, shared_dims=(0,)) if name in names else None

        self.embedding = HyperEmbedding(words, embedding, num_hyperparameters=n, response_rank=response_rank)
        self.embedding_dropout: EmbeddingDropout | None = None
        if "embedding_dropout" in names:
            self.embedding_dropout = EmbeddingDropout("embedding_dropout", stream=EMBEDDING_STREAM)
        self.input_dropout = locked("input_dropout", INPUT_STREAM)
        self.lstm = HyperLSTM(
            embedding,
            hidden,
            layers,
            dropout=named("hidden_dropout"),
            recurrent_dropout=named("recurrent_dropout"),
            num_hyperparameters=n,
            response_rank=response_rank,
            stream=LSTM_STREAM,
        )
        self.output_dropout = locked("output_dropout", OUTPUT_STREAM)
        self.decoder_bias = nn.Parameter(torch.zeros(words))

    def forward(self, tokens: Tensor, hyper: HyperBatch, state: tuple[Tensor, Tensor] | None = None) -> Outputs:
        """Tokens (T, B) and the state before them, None for zeros, → `Outputs`. A stream of the text is an example."""
        if self.embedding_dropout is not None:
            x = self.embedding_dropout(self.embedding, tokens, hyper, example_dim=1)
        else:
            x = self.embedding(tokens, hyper, example_dim=1)
        if self.input_dropout is not None:
            x = self.input_dropout(x, hyper, example_dim=1)
        raw, state = self.lstm(x, hyper, state)
        dropped = raw if self.output_dropout is None else self.output_dropout(raw, hyper, example_dim=1)
        logits = linear(dropped, self.embedding.weight, self.decoder_bias)
        return Outputs(logits, state, raw, dropped)
