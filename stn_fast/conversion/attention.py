"""Converted attention of torch.nn, and its transformer encoders without their fast paths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stn_fast import functional
from stn_fast.conversion.converted import Converted
from stn_fast.hyperparameters import HyperBatch
from stn_fast.layers.gated import decay_penalty
from stn_fast.ops.gates import GatedParameters, fold


class MultiheadAttention(Converted, nn.MultiheadAttention):
    """torch's, with projections of queries, keys and values for each example; `out_proj` is a converted Linear.

    Each example has its own rate of dropout of the attention weights, and each of its rows and heads its own masks.
    """

    name: str | None
    stream: int
    _tuned_attribute = "dropout"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        self._check(query, key, value, attn_mask, is_causal)
        dim = self.example_dim
        if query.ndim == 2:
            query, key, value = (x.unsqueeze(dim) for x in (query, key, value))
            padding = None if key_padding_mask is None else key_padding_mask[None]
            y, weights = self.forward(
                query, key, value, padding, need_weights, attn_mask, average_attn_weights, is_causal
            )
            return y.squeeze(dim), None if weights is None else weights[0]
        q, k, v = (self._by_head(x) for x in self._projected(query, key, value))
        mask = self._mask(attn_mask, key_padding_mask, (len(q), self.num_heads, q.shape[2], k.shape[2]), query.dtype)
        k, v = self._extended(k, self.bias_k), self._extended(v, self.bias_v)
        if mask is not None:
            mask = F.pad(mask, (0, k.shape[2] - mask.shape[3]))
        drops = self.training and self.name is not None
        causal = is_causal and not need_weights and key_padding_mask is None  # then, as in torch, the mask is not read
        if not (need_weights or drops):
            y = F.scaled_dot_product_attention(q, k, v, None if causal else mask, is_causal=causal)
            return self.out_proj(self._joined(y)), None
        if causal:
            mask = self._added(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1), q.dtype)
        scores = (q * self.head_dim**-0.5) @ k.mT
        weights = F.softmax(scores if mask is None else scores + mask, -1)
        if drops:
            weights = self._dropped(weights)
        y = self.out_proj(self._joined(weights @ v))
        if not need_weights:
            return y, None
        return y, weights.mean(1) if average_attn_weights else weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool) -> None:
        if any(x.is_nested for x in (query, key, value)):
            raise TypeError(
                f"{self.shown}: nested tensors are not supported; a TransformerEncoder makes them unless its "
                "use_nested_tensor is False"
            )
        rows = key.shape[self.example_dim] == query.shape[self.example_dim] if query.ndim == 3 else True
        if not (query.ndim == key.ndim == value.ndim in (2, 3) and key.shape[:-1] == value.shape[:-1] and rows):
            shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
            layout = "(N, T, E)" if self.batch_first else "(T, N, E)"
            raise ValueError(f"{self.shown}: query, key and value must be {layout} or (T, E) and fit, got {shapes}")
        if is_causal and attn_mask is None:
            raise ValueError(f"{self.shown}: is_causal=True says what attn_mask is: give attn_mask, too")

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        """q, k and v, each (N, T, E), or (T, N, E)."""
        stored = [parameters for _, parameters in self._stored()]
        given = self.gating(stored[0].weight)
        if len(stored) == 1 and query is key is value:
            return self.gated_linear(query, stored[0], given).chunk(3, -1)
        sides = stored if len(stored) == 3 else _thirds(stored[0])
        return [self.gated_linear(x, side, given) for x, side in zip((query, key, value), sides, strict=True)]

    def _by_head(self, x: Tensor) -> Tensor:
        """(N, heads, T, E / heads)"""
        heads = x.unflatten(-1, (self.num_heads, self.head_dim))
        return heads.transpose(1, 2) if self.batch_first else heads.permute(1, 2, 0, 3)

    def _joined(self, y: Tensor) -> Tensor:
        """(N, heads, T, E / heads) to (N, T, E), or (T, N, E)."""
        return (y.transpose(1, 2) if self.batch_first else y.permute(2, 0, 1, 3)).flatten(2)

    def _extended(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Keys or values (N, heads, S, E / heads), with those that `add_bias_kv` and `add_zero_attn` add."""
        one = (len(x), self.num_heads, 1, self.head_dim)
        more = [] if bias is None else [bias.to(x.dtype).view(1, *one[1:]).expand(one)]
        more += [x.new_zeros(one)] if self.add_zero_attn else []
        return torch.cat([x, *more], 2) if more else x

    def _mask(
        self, attn_mask: Tensor | None, padding: Tensor | None, sizes: tuple[int, int, int, int], dtype: torch.dtype
    ) -> Tensor | None:
        """What is added to the scores, which have these sizes (N, heads, T, S)."""
        n, heads, time, keys = sizes
        masks: list[Tensor] = []
        if attn_mask is not None:
            if attn_mask.shape not in ((time, keys), (n * heads, time, keys)):
                raise ValueError(
                    f"{self.shown}: attn_mask must be {(time, keys)} or {(n * heads, time, keys)}, "
                    f"got {tuple(attn_mask.shape)}"
                )
            masks.append(attn_mask.view(n if attn_mask.ndim == 3 else 1, -1, time, keys))
        if padding is not None:
            if padding.shape != (n, keys):
                raise ValueError(f"{self.shown}: key_padding_mask must be {(n, keys)}, got {tuple(padding.shape)}")
            masks.append(padding.view(n, 1, 1, keys))
        added = [self._added(mask, dtype) for mask in masks]
        return sum(added[1:], added[0]) if added else None

    def _added(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        if mask.is_floating_point():
            return mask
        if mask.dtype != torch.bool:
            raise ValueError(f"{self.shown}: masks must be bool or floating point, got {mask.dtype}")
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))

    def _dropped(self, weights: Tensor) -> Tensor:
        """Attention weights (N, heads, T, S), dropped at the rate of their example."""
        hyper = self.hyper
        assert hyper is not None
        assert self.name is not None
        rows = weights.unflatten(0, (len(hyper), -1))
        return functional.dropout(rows, hyper[self.name], **hyper.draw(self.stream)).view_as(weights)

    def _stored(self) -> list[tuple[str, GatedParameters]]:
        """(name, parameters) of the projection of all three, or of those of queries, keys and values."""
        names = ("in_proj",) if self._qkv_same_embed_dim else ("q_proj", "k_proj", "v_proj")
        biases = [None] * len(names) if self.in_proj_bias is None else self.in_proj_bias.chunk(len(names))
        return [(name, self._named(name, bias)) for name, bias in zip(names, biases, strict=True)]

    def _named(self, name: str, bias: Tensor | None) -> GatedParameters:
        weight = getattr(self, f"{name}_weight")
        response = [getattr(self, f"{field}_{name}", None) for field in GatedParameters._fields[2:]]
        return GatedParameters._make([weight, bias, *response])

    def weight_decay_penalty(self, hyper: HyperBatch | Tensor, decay: Tensor) -> Tensor:
        """½ · mean_b decay[b] ‖W + diag(Gw h[b]) R‖², summed over all projections but `out_proj`, which has its own."""
        penalties = [
            decay_penalty(one.weight, one.response_weight, one.weight_gate, hyper, decay, one.response_projection)
            for _, one in self._stored()
        ]
        return torch.stack(penalties).sum()

    @torch.no_grad()
    def folded(self, response: Tensor) -> dict[str, Tensor]:
        folded = {name: fold(parameters, response.to(parameters.weight)) for name, parameters in self._stored()}
        found = {f"{name}_weight": weight for name, (weight, _) in folded.items()}
        biases = [bias for _, bias in folded.values() if bias is not None]
        return found | {"in_proj_bias": torch.cat(biases)} if biases else found


def _thirds(parameters: GatedParameters) -> list[GatedParameters]:
    """Those of the first third of the outputs, and so on; all with the same projection of the response."""
    parts = [[None] * 3 if tensor is None else tensor.chunk(3) for tensor in parameters[:6]]
    return [GatedParameters._make([*part, parameters.response_projection]) for part in zip(*parts, strict=True)]


class TransformerEncoderLayer(Converted, nn.TransformerEncoderLayer):
    """torch's, which always calls the modules in it."""

    @property
    def activation_relu_or_gelu(self) -> int:  # type: ignore[override]
        """0, with which torch's forward does not take its fast path."""
        return 0


class TransformerEncoder(Converted, nn.TransformerEncoder):
    """torch's, which never makes nested tensors of padded sequences: its layers compute padding, too."""

    @property
    def use_nested_tensor(self) -> bool:  # type: ignore[override]
        return False
