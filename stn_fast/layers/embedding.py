"""HyperEmbedding: torch.nn.Embedding whose vectors respond to each example's hyperparameters; dropout of words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stn_fast import functional
from stn_fast.hyperparameters import HyperBatch, Hyperparameter
from stn_fast.layers.gated import GatedLayer, check_folding, check_sizes, check_switches
from stn_fast.layers.regularisers import _PerBatchRegulariser, check_rate
from stn_fast.ops.arguments import check_tensor
from stn_fast.ops.gated_embedding import fold
from stn_fast.ops.gates import response_input


class HyperEmbedding(GatedLayer):
    """e = E[t] + (h Gwᵀ) ⊙ R[t], h being each example's response input.

    `weight` is named and shaped as in torch.nn.Embedding, so a plain checkpoint loads with strict=False. E and R start
    uniform in ±0.1 and the gate from N(0, 0.01²), as published; the rows of `padding_idx` start at 0 and stay there.

    Args:
        num_embeddings, embedding_dim: V, D.
        padding_idx: a row that gets no gradient; -1 is the last.
        sparse: whether the gradients of E and R are sparse tensors, as for torch.nn.Embedding.
        num_hyperparameters: n, at least 1.

    Shapes: weight, response_weight (V, D); weight_gate (D, n).

    Raises:
        ValueError: a size is below 1, or padding_idx is no row; the message names it.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        num_hyperparameters: int,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_sizes(
            "HyperEmbedding",
            num_embeddings=num_embeddings,
            embedding_dim=embedding_dim,
            num_hyperparameters=num_hyperparameters,
        )
        check_switches("HyperEmbedding", sparse=sparse)
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"HyperEmbedding wants padding_idx as one of {num_embeddings} rows; got {padding_idx}")
        self.num_embeddings, self.embedding_dim, self.sparse = num_embeddings, embedding_dim, sparse
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        super().__init__((num_embeddings, embedding_dim), False, num_hyperparameters, device, dtype, gated_dim=1)

    def reset_parameters(self) -> None:
        for table in (self.weight, self.response_weight):
            nn.init.uniform_(table, -0.1, 0.1)
            if self.padding_idx is not None:
                with torch.no_grad():
                    table[self.padding_idx].zero_()
        nn.init.normal_(self.weight_gate, std=0.01)

    def forward(self, tokens: Tensor, hyper: HyperBatch | Tensor, example_dim: int = 0, **dropped: Any) -> Tensor:
        """Tokens (...) → (..., D); `hyper` is a HyperBatch or its response, `example_dim` counts the examples.

        `dropped` are the rate and the draw of `stn_fast.functional.gated_embedding`, which `EmbeddingDropout` knows.
        """
        check_tensor("HyperEmbedding", "tokens", tokens)
        self._check_response(hyper)
        return functional.gated_embedding(
            tokens,
            self.weight,
            self.response_weight,
            self.weight_gate,
            hyper,
            example_dim=example_dim,
            padding_idx=self.padding_idx,
            sparse=self.sparse,
            **dropped,
        )

    def weight_decay_penalty(self, hyper: HyperBatch | Tensor, decay: Tensor) -> Tensor:
        """½ · mean_b decay[b] ‖E + R diag(Gw h[b])‖², a scalar."""
        h = response_input(hyper, self.weight)
        return functional.weight_decay_penalty(self.weight.T, self.response_weight.T, self.weight_gate, h, decay)

    @torch.no_grad()
    def fold(self, response: Tensor) -> nn.Embedding:
        """The plain layer this one is at one response input (n,)."""
        check_folding(self.num_hyperparameters, response)
        table = fold(self.gated_parameters, response.to(self.weight))
        plain = nn.Embedding(
            self.num_embeddings, self.embedding_dim, self.padding_idx, sparse=self.sparse, device="meta"
        )
        plain.weight = nn.Parameter(table)
        return plain

    def extra_repr(self) -> str:
        given = [f"padding_idx={self.padding_idx}"] if self.padding_idx is not None else []
        given += ["sparse=True"] if self.sparse else []
        sizes = [f"{self.num_embeddings}, {self.embedding_dim}", *given]
        return ", ".join([*sizes, f"num_hyperparameters={self.num_hyperparameters}"])


class EmbeddingDropout(_PerBatchRegulariser):
    """Embedding dropout: in training, looks words up in an embedding some of whose rows are dropped, E's and R's alike.

    A dropped word is dropped wherever it stands in the batch; the others are scaled up by 1/(1 − rate). There is one
    draw for every word of the vocabulary, the same in every process of a batch, and none of it is stored.

    Args:
        name: hyperparameter that is the rate, with bounds 0 <= low and high < 1, and per_example=False: all examples
            read the same rows.
        stream: see the base class.
    """

    def _check_range(self, hyperparameter: Hyperparameter) -> None:
        check_rate(hyperparameter)

    def forward(self, embedding: HyperEmbedding, tokens: Tensor, hyper: HyperBatch, example_dim: int = 0) -> Tensor:
        """`embedding(tokens, hyper, example_dim)`, with words dropped in training."""
        if not isinstance(embedding, HyperEmbedding):
            raise TypeError(f"EmbeddingDropout wants a HyperEmbedding; got {type(embedding).__name__}")
        if not self.training or len(rate := self._strength(hyper)) == 0:
            return embedding(tokens, hyper, example_dim)
        return embedding(tokens, hyper, example_dim, rate=rate, **self._draw(hyper))
