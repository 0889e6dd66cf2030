"""A self-tuning LSTM language model with those of the STN paper's regularisers that its space names."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from stn_fast.hyperparameter import ResponseRank
from stn_fast.hyperparameters import HyperBatch, HyperparameterSpace
from stn_fast.layers import EmbeddingDropout, HyperEmbedding, HyperLSTM, PerExampleDropout
from stn_fast.layers.gated import check_sizes
from stn_fast.ops.linear import linear

# Random streams of the layers, whether or not the space has the others; the LSTM uses LSTM_STREAM and following ones.
EMBEDDING_STREAM, INPUT_STREAM, OUTPUT_STREAM, LSTM_STREAM = 1, 2, 3, 4


class Outputs(NamedTuple):
    """Output of a language model for a window: logits (T, B, words) and the state after the window.

    `raw` and `dropped` (T, B, H) are the hidden states of the last layer before and after output dropout, for penalties
    on activations.
    """

    logits: Tensor
    state: tuple[Tensor, Tensor]
    raw: Tensor
    dropped: Tensor


class LanguageModel(nn.Module):
    """Embedding, LSTM and a decoder to words; the embedding and the LSTM respond to the hyperparameters.

    The decoder shares `weight` with the embedding and has its own bias; neither is gated in the decoder. It has those
    of the following dropouts that the space names:

    - `embedding_dropout`: drops words everywhere in the batch, with one rate per batch;
    - `input_dropout`, `hidden_dropout`, `output_dropout`: dropout before, between and after the layers of the LSTM,
      with one mask per example that is locked over time (Gal and Ghahramani, 2016);
    - `recurrent_dropout`: drops hidden-to-hidden weights, with one mask for W and R and one rate per batch (Merity et
      al., 2018).

    Other names in the space, such as `activation_regularization`, are left to the training objective.

    Args:
        space: the hyperparameters.
        words: size of the vocabulary.
        embedding, hidden: sizes of the word embeddings and of the LSTM's hidden state; must be equal, because the
            decoder is tied to the embedding.
        layers: number of layers of the LSTM.
        response_rank: passed to `HyperEmbedding` and `HyperLSTM`.

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
                "LanguageModel: hidden must equal embedding, because the decoder is tied to the embedding, got "
                f"{hidden} and {embedding}"
            )
        names, n = space.names, len(space)
        if "hidden_dropout" in names and layers == 1:
            raise ValueError("hidden_dropout is applied between layers, so it needs layers >= 2, got 1")

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
        """Tokens (T, B), each column an example, and the state before them (None for zeros) → `Outputs`."""
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
