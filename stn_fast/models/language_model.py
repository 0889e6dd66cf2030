"""An LSTM language model with the STN paper's regularisers."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from stn_fast.conversion import DropConnectLSTM, EmbeddingWithDropout, LockedDropout
from stn_fast.layers.gated import check_sizes
from stn_fast.ops.linear import linear


class Outputs(NamedTuple):
    """Output of a language model for a window: logits (T, B, words) and the state after the window.

    `raw` and `dropped` (T, B, H) are the hidden states of the last layer before and after output dropout, for penalties
    on activations.
    """

    logits: Tensor
    state: tuple[Tensor, Tensor]
    raw: Tensor
    dropped: Tensor


class Decoder(nn.Linear):
    """`torch.nn.Linear` by the library that is fastest for its size. Its weight is that of the embedding."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class LanguageModel(nn.Module):
    """Embedding, LSTM and a decoder to words, which shares the weight of the embedding and has its own bias.

    Its regularisers, whose rates are 0 until `tuned` gives them hyperparameters:

    - `embedding_dropout`: drops words everywhere in the batch, with one rate per batch;
    - `input_dropout`, `hidden_dropout`, `output_dropout`: dropout before, between and after the layers of the LSTM,
      with one mask per example that is locked over time (Gal and Ghahramani, 2016);
    - `recurrent_dropout`: drops hidden-to-hidden weights, with one mask for W and R and one rate per batch (Merity et
      al., 2018).

    A batch has its examples in dimension 1. `stn_fast.SelfTuner` looks for them in dimension 0: for it, put the network
    into a module that transposes.

    The decoder does not respond to hyperparameters. So `stn_fast.fold` warns that its decoder has a weight of its own;
    to load that state, give ``decoder.weight`` a parameter of its own before.

    Args:
        words: size of the vocabulary.
        embedding, hidden: sizes of the word embeddings and of the LSTM's hidden state; must be equal, because the
            decoder is tied to the embedding.
        layers: number of layers of the LSTM.

    Raises:
        ValueError: embedding and hidden differ, or a size is below 1.
    """

    RATES: ClassVar = {"embedding": "embedding_dropout", "lstm": "recurrent_dropout"}
    EXAMPLE_DIMS: ClassVar = {"*": 1}

    def __init__(self, words: int, embedding: int = 650, hidden: int = 650, layers: int = 2):
        super().__init__()
        check_sizes("LanguageModel", words=words, embedding=embedding, hidden=hidden, layers=layers)
        if embedding != hidden:
            raise ValueError(
                "LanguageModel: hidden must equal embedding, because the decoder is tied to the embedding, got "
                f"{hidden} and {embedding}"
            )
        self.embedding = EmbeddingWithDropout(words, embedding, p=0.0)
        self.input_dropout, self.output_dropout = LockedDropout(0.0), LockedDropout(0.0)
        between = {f"hidden_dropout_{layer}": LockedDropout(0.0) for layer in range(1, layers)}
        self.between = nn.ModuleDict(between)
        self.lstm = nn.ModuleList(DropConnectLSTM(embedding, hidden, p=0.0) for _ in range(layers))
        self.decoder = Decoder(hidden, words)
        self.decoder.weight = self.embedding.weight
        nn.init.zeros_(self.decoder.bias)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        """As torch's; an error if the one weight of embedding and decoder would be loaded from two."""
        stored = [state_dict.get(f"{prefix}{name}.weight") for name in ("embedding", "decoder")]
        given = [one for one in stored if isinstance(one, Tensor)]
        if self.decoder.weight is self.embedding.weight and len(given) == 2 and not torch.equal(*given):
            errors.append(
                f"{prefix}decoder.weight differs from {prefix}embedding.weight, as in a folded LanguageModel: give "
                "decoder.weight a parameter of its own before"
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def forward(self, tokens: Tensor, state: tuple[Tensor, Tensor] | None = None) -> Outputs:
        """Tokens (T, B), each column an example, and the state before them (None for zeros) → `Outputs`."""
        raw = self.input_dropout(self.embedding(tokens))
        after: list[tuple[Tensor, Tensor]] = []
        for layer, lstm in enumerate(self.lstm):
            if layer:
                raw = self.between[f"hidden_dropout_{layer}"](raw)
            before = None if state is None else (state[0][layer : layer + 1], state[1][layer : layer + 1])
            raw, last = lstm(raw, before)
            after.append(last)
        dropped = self.output_dropout(raw)
        h, c = (torch.cat(parts) for parts in zip(*after, strict=True))
        return Outputs(self.decoder(dropped), (h, c), raw, dropped)
