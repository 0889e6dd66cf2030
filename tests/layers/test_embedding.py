import pytest
import torch
from numerics import relative_error

import stn_fast as stn
from stn_fast import random
from stn_fast.ops.gated_embedding import reference
from stn_fast.training.methods import check_streams

SPACE = stn.HyperparameterSpace(
    [
        stn.Hyperparameter("rate", low=0.0, high=0.95, init=0.4, per_example=False),
        stn.Hyperparameter("own_rate", low=0.0, high=0.95, init=0.4),
        stn.Hyperparameter("certain", low=0.0, high=1.0, init=0.4, per_example=False),
    ]
)
N = len(SPACE)


def sampled(batch, step=0, first_example=0):
    return SPACE.sample(*SPACE.initial_state(), batch_size=batch, seed=5, step=step, first_example=first_example)


def words(*shape, count=30):
    return torch.randint(count, shape, generator=torch.Generator().manual_seed(0))


def layer_of(**arguments):
    return stn.HyperEmbedding(30, 8, num_hyperparameters=N, **arguments)


def test_computes_the_formula_with_its_own_parameters():
    layer, hyper, tokens = layer_of(), sampled(4), words(6, 4)
    want = reference(tokens.flatten(), layer.gated_parameters, hyper.response, None, 6)
    assert relative_error(layer(tokens, hyper, example_dim=1), want.view(6, 4, 8)) < 1e-6
    assert torch.equal(layer(tokens.T, hyper.response), layer(tokens, hyper, example_dim=1).transpose(0, 1))
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    assert shapes == {"weight": (30, 8), "response_weight": (30, 8), "weight_gate": (8, N)}


def test_a_plain_checkpoint_loads_into_it():
    plain, layer = torch.nn.Embedding(30, 8), layer_of()
    assert not layer.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    tokens = words(6)
    assert torch.equal(layer(tokens, torch.zeros(6, N)), plain(tokens))


def test_the_padding_row_learns_nothing():
    layer = layer_of(padding_idx=3)
    layer(words(40), sampled(40)).sum().backward()
    for table in (layer.weight, layer.response_weight):
        assert not table.grad[3].any()
        assert table.grad[words(40)[words(40) != 3]].any()
    assert (words(40) == 3).any()


def test_sparse_gradients_are_asked_for_as_in_torch():
    layer = layer_of(sparse=True)
    layer(words(4), sampled(4)).sum().backward()
    assert [p.grad.is_sparse for p in (layer.weight, layer.response_weight, layer.weight_gate)] == [True, True, False]


def test_fold_gives_the_same_plain_layer():
    layer, tokens = layer_of(padding_idx=2, sparse=True).double(), words(5, 4)
    response = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64)
    plain = layer.fold(response)
    assert type(plain) is torch.nn.Embedding
    assert plain.padding_idx == 2
    assert plain.sparse
    assert relative_error(plain(tokens), layer(tokens, response.expand(4, N), example_dim=1)) < 1e-14
    with pytest.raises(ValueError, match=r"response must have shape \(3,\), got \(2,\)"):
        layer.fold(torch.zeros(2))


def test_weight_decay_is_that_of_each_examples_effective_table():
    layer, hyper, decay = layer_of(), sampled(3), torch.rand(3)
    tables = [layer.weight + layer.response_weight * (layer.weight_gate @ row) for row in hyper.response]
    want = sum(0.5 * rate * table.square().sum() for rate, table in zip(decay, tables, strict=True)) / 3
    assert relative_error(layer.weight_decay_penalty(hyper, decay), want) < 1e-6


def test_dropout_drops_words_by_the_batchs_own_draw():
    layer, dropout, tokens = layer_of(), stn.EmbeddingDropout("rate", stream=3), words(50, 6)
    hyper = sampled(6, 4, first_example=100)
    drawn = torch.from_numpy(random.uniform(5, 4, 3, 1, 30))[0]  # of example 0, whichever part of the batch this is
    rate = hyper["rate"][0]
    want = layer(tokens, hyper, 1) * torch.where(drawn >= rate, 1 / (1 - rate), 0)[tokens][..., None]
    assert relative_error(dropout(layer, tokens, hyper, 1), want) < 1e-6
    assert (want == 0).any()
    assert not torch.equal(dropout(layer, tokens, sampled(6, 5), 1) == 0, want == 0)


def test_every_process_of_a_batch_drops_the_same_words():
    layer, dropout, tokens = layer_of(), stn.EmbeddingDropout("rate", stream=3), words(50, 6)
    whole = dropout(layer, tokens, sampled(6), 1)
    part = dropout(layer, tokens[:, 4:], sampled(2, first_example=4), 1)
    assert torch.equal(part == 0, whole[:, 4:] == 0)


def test_dropout_in_eval_mode_is_the_embedding():
    layer, dropout, tokens = layer_of(), stn.EmbeddingDropout("rate", stream=3).eval(), words(50, 6)
    assert torch.equal(dropout(layer, tokens, sampled(6), 1), layer(tokens, sampled(6), 1))


def test_a_per_example_rate_of_embedding_dropout_is_refused():
    with pytest.raises(ValueError, match=r"'own_rate' must have per_example=False, because EmbeddingDropout"):
        stn.EmbeddingDropout("own_rate", stream=1)(layer_of(), words(5, 4), sampled(4), 1)


def test_a_rate_that_could_reach_1_is_refused():
    with pytest.raises(ValueError, match=r"'certain' is a dropout rate"):
        stn.EmbeddingDropout("certain", stream=1)(layer_of(), words(5, 4), sampled(4), 1)


def test_two_layers_on_one_stream_are_noticed():
    layers = torch.nn.ModuleList([stn.EmbeddingDropout("rate", stream=1), stn.PerExampleDropout("own_rate", stream=1)])
    with pytest.raises(ValueError, match="both draw from stream 1"):
        check_streams(layers)


@pytest.mark.parametrize("change", [dict(num_embeddings=0), dict(embedding_dim=-1), dict(num_hyperparameters=0)])
def test_sizes_below_one_are_refused_by_name(change):
    (name,) = change
    with pytest.raises(ValueError, match=f"{name} must be an int >= 1.*got {change[name]}"):
        stn.HyperEmbedding(**(dict(num_embeddings=2, embedding_dim=2, num_hyperparameters=2) | change))


def test_wrong_arguments_are_named_in_the_error():
    layer = layer_of()
    with pytest.raises(ValueError, match=r"HyperBatch has 3 examples, but x \(5, 4\) has 4"):
        layer(words(5, 4), sampled(3), 1)
    with pytest.raises(ValueError, match=r"x \(5, 4\) has 5 in dimension 0; example_dim=1 fits"):
        layer(words(5, 4), sampled(4))
    with pytest.raises(ValueError, match=r"num_hyperparameters=3, but hyper has 2"):
        layer(words(4), torch.randn(4, 2))
    with pytest.raises(ValueError, match=r"padding_idx must be one of 30 rows, got 30"):
        layer_of(padding_idx=30)
    with pytest.raises(IndexError, match=r"30 rows, so tokens are 0 to 29; got 30"):
        layer(torch.tensor([30]), sampled(1))
    with pytest.raises(
        TypeError, match=r"HyperEmbedding: hyper must be a HyperBatch, or its response .*, got NoneType"
    ):
        layer(words(4), None)
    dropout = stn.EmbeddingDropout("rate", stream=1)
    with pytest.raises(TypeError, match="hyper must be a HyperBatch in training mode, got Tensor"):
        dropout(layer, words(5, 4), sampled(4).response, 1)
    with pytest.raises(TypeError, match="EmbeddingDropout: embedding must be a HyperEmbedding, got Embedding"):
        dropout(torch.nn.Embedding(3, 2), words(5, 4), sampled(4), 1)
