"""HyperEmbedding: torch.nn.Embedding whose vectors respond to each example's hyperparameters; dropout of words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stn_fast import functional
from stn_fast.hyperparameter import ResponseRank
from stn_fast.hyperparameters import HyperBatch, Hyperparameter
from stn_fast.layers.gated import (
    Gated,
    GatedLayer,
    check_folding,
    check_sizes,
    check_switches,
    decay_penalty,
    factors_to_use,
    start_gate,
    start_response,
)
from stn_fast.layers.regularisers import _PerBatchRegulariser, check_rate
from stn_fast.ops.arguments import check_tensor
from stn_fast.ops.gated_embedding import fold
from stn_fast.ops.gates import GatedParameters


class GatedTable(Gated):
    """Gated parameters whose outputs are the columns of W and R, as in an embedding."""

    @property
    def _response_table(self) -> Tensor:
        return self.response_weight if self.response_projection is None else self.response_projection

    @property
    def _as_linear(self) -> GatedParameters:
        """Those of the linear layer whose weight is this one's transposed."""
        table, projection = self.gated_parameters, self.response_projection
        response = table.response_weight.T if projection is None else table.response_weight
        transposed = None if projection is None else projection.T
        return table._replace(weight=table.weight.T, response_weight=response, response_projection=transposed)

    def weight_decay_penalty(self, hyper: HyperBatch | Tensor, decay: Tensor) -> Tensor:
        """½ · mean_b decay[b] ‖E + R diag(Gw h[b])‖², a scalar."""
        linear = self._as_linear
        return decay_penalty(
            linear.weight, linear.response_weight, linear.weight_gate, hyper, decay, linear.response_projection
        )

    @torch.no_grad()
    def _folded(self, response: Tensor) -> tuple[Tensor, None]:
        """The table of the plain embedding that this one equals at one response input (n,)."""
        check_folding(self.num_hyperparameters, response)
        return fold(self.gated_parameters, response.to(self.weight)), None


class HyperEmbedding(GatedTable, GatedLayer):
    """e = E[t] + (h Gwᵀ) ⊙ R[t], where h is each example's response input.

    `weight` is named and shaped as in torch.nn.Embedding, so a plain checkpoint loads with strict=False. E is
    initialised uniformly in ±0.1, R to 0, and the gate such that dimension d responds to hyperparameter d mod n; the
    rows of `padding_idx` stay 0.

    Args:
        num_embeddings, embedding_dim: V, D.
        padding_idx: a row that gets no gradient; -1 is the last.
        sparse: whether the gradients of E and R are sparse tensors, as for torch.nn.Embedding.
        num_hyperparameters: n, at least 1.
        response_rank: None for a full response; k for a response of rank k, made of a table of width k and a matrix
            from width k to D; "auto" for the largest k, at least 1, that adds at most 5 % to the size of E. If a full
            response is no larger than one of rank k, the layer has a full one, and its response_rank is None.

    Shapes: weight, response_weight (V, D); weight_gate (D, n). With a low rank, R = B Aᵀ, where response_weight is
    A (D, k), initialised to 0, and response_projection is B (V, k), initialised like E.

    Raises:
        ValueError: a size is below 1, or padding_idx is not a row; the message names it.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        num_hyperparameters: int,
        response_rank: ResponseRank = None,
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
            raise ValueError(f"HyperEmbedding: padding_idx must be one of {num_embeddings} rows, got {padding_idx}")
        self.num_embeddings, self.embedding_dim, self.sparse = num_embeddings, embedding_dim, sparse
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        factors = factors_to_use("HyperEmbedding", response_rank, (embedding_dim, num_embeddings))
        if factors is not None:
            factors = factors[0], factors[1][::-1]  # a table has a row for each input
        sizes = num_embeddings, embedding_dim
        super().__init__(sizes, False, num_hyperparameters, device, dtype, gated_dim=1, factors=factors)

    @property
    def bound(self) -> float:
        """E is initialised uniformly in ±bound."""
        return 0.1

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -self.bound, self.bound)
        start_response(self.response_weight, self.response_projection, self.bound)
        if self.padding_idx is not None:
            with torch.no_grad():
                for table in (self.weight, self._response_table):
                    table[self.padding_idx].zero_()
        start_gate(self.weight_gate)

    def forward(self, tokens: Tensor, hyper: HyperBatch | Tensor, example_dim: int = 0, **dropped: Any) -> Tensor:
        """Tokens (...) → (..., D); `hyper` is a HyperBatch or its response, `example_dim` counts the examples.

        `EmbeddingDropout` passes the rate and RNG coordinates of `stn_fast.functional.gated_embedding` in `dropped`.
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
            response_projection=self.response_projection,
            **dropped,
        )

    def fold(self, response: Tensor) -> nn.Embedding:
        """The plain layer that this one equals at one response input (n,)."""
        table, _ = self._folded(response)
        plain = nn.Embedding(
            self.num_embeddings, self.embedding_dim, self.padding_idx, sparse=self.sparse, device="meta"
        )
        plain.weight = nn.Parameter(table)
        return plain

    def extra_repr(self) -> str:
        given = [f"padding_idx={self.padding_idx}"] if self.padding_idx is not None else []
        given += ["sparse=True"] if self.sparse else []
        sizes = [f"{self.num_embeddings}, {self.embedding_dim}", *given]
        return ", ".join([*sizes, *self._response_repr])


class EmbeddingDropout(_PerBatchRegulariser):
    """Embedding dropout: in training mode, looks words up in a table with whole rows of E and R dropped.

    A dropped word is 0 at all its positions in the batch; the others are scaled by 1/(1 − rate). There is one draw per
    word of the vocabulary, the same in every process that shares the batch; backward draws again instead of storing it.

    Args:
        name: hyperparameter that is the rate, with bounds 0 <= low and high < 1, and per_example=False, because all
            examples read the same table.
        stream: number of the layer's random stream, at least 1 and different for every layer of the model.
    """

    def _check_range(self, hyperparameter: Hyperparameter) -> None:
        check_rate(hyperparameter)

    def forward(self, embedding: HyperEmbedding, tokens: Tensor, hyper: HyperBatch, example_dim: int = 0) -> Tensor:
        """`embedding(tokens, hyper, example_dim)`, with words dropped in training."""
        if not isinstance(embedding, HyperEmbedding):
            raise TypeError(f"EmbeddingDropout: embedding must be a HyperEmbedding, got {type(embedding).__name__}")
        if not self.training or len(rate := self._strength(hyper)) == 0:
            return embedding(tokens, hyper, example_dim)
        return embedding(tokens, hyper, example_dim, rate=rate, **self._draw(hyper))
