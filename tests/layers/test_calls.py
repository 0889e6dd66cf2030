"""A layer that draws and is called again with one HyperBatch draws anew, and each draw can be repeated."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import stn_fast as stn
from stn_fast import functional

SPACE = stn.HyperparameterSpace(
    [
        stn.Hyperparameter("rate", low=0.0, high=0.9, init=0.5),
        stn.Hyperparameter("noise", low=0.0, init=0.5),
        stn.Hyperparameter("rotation", low=0.0, high=90.0, init=45.0),
        stn.Hyperparameter("connect", low=0.0, high=0.9, init=0.5, per_example=False),
    ]
)


def sampled(batch=6, step=4, first_example=0):
    return SPACE.sample(*SPACE.initial_state(), batch_size=batch, seed=5, step=step, first_example=first_example)


def augmentation():
    return stn.PerExampleAugmentation(["rotation"], mean=[0.5], std=[0.5], stream=3)


def images():
    return torch.arange(6 * 64, dtype=torch.uint8).view(6, 1, 8, 8)


LAYERS = [
    (stn.PerExampleDropout("rate", stream=3), torch.ones(6, 400)),
    (stn.PerExampleDropout("rate", stream=3, shared_dims=(1,)), torch.ones(6, 5, 400)),
    (stn.PerExampleDropout2d("rate", stream=3), torch.ones(6, 400, 2, 2)),
    (stn.PerExampleNoise("noise", stream=3), torch.ones(6, 400)),
    (augmentation(), images()),
]
each_layer = pytest.mark.parametrize(("layer", "x"), LAYERS, ids=lambda value: type(value).__name__)


@each_layer
def test_a_layer_at_several_places_draws_anew_at_each(layer, x):
    """As torch.nn.Dropout does; two layers of one mask regularise as one."""
    hyper = sampled()
    results = [layer(x, hyper) for _ in range(4)]
    for i in range(4):
        assert not any(torch.equal(results[i], results[j]) for j in range(i))


def test_masks_of_several_places_are_independent():
    layer, hyper = stn.PerExampleDropout("rate", stream=3), sampled(64)
    keep = torch.stack([layer(torch.ones(64, 4000), hyper) != 0 for _ in range(3)]).double()
    rate = 1 - hyper["rate"].double()
    for i, j in ((0, 1), (0, 2), (1, 2)):
        both = (keep[i] * keep[j]).mean(1)
        assert (both - rate.square()).abs().max() < 5 * 0.5 / 4000**0.5
    neighbour = stn.PerExampleDropout("rate", stream=4)(torch.ones(64, 4000), sampled(64)) != 0
    assert not torch.equal(keep[1].bool(), neighbour)


@each_layer
def test_a_batch_sampled_again_repeats_all_draws_in_their_order(layer, x):
    first, again = sampled(), sampled()
    for _ in range(3):
        assert torch.equal(layer(x, first), layer(x, again))


def test_the_first_call_draws_what_a_single_one_always_drew():
    layer, x, hyper = stn.PerExampleDropout("rate", stream=3), torch.ones(6, 50), sampled(first_example=100)
    want = functional.dropout(x, hyper["rate"], seed=5, step=4, stream=3, first_example=100)
    assert torch.equal(layer(x, hyper), want)
    assert not torch.equal(layer(x, hyper), want)


def test_backward_repeats_the_mask_of_each_call():
    layer, hyper = stn.PerExampleDropout("rate", stream=3), sampled()
    x = torch.ones(6, 50, requires_grad=True)
    results = [layer(x, hyper) for _ in range(3)]
    for y in reversed(results):
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(gradient, y)


def test_processes_that_share_a_batch_draw_at_every_call_what_one_draws():
    layer, x, whole = stn.PerExampleDropout("rate", stream=3), torch.ones(6, 50), sampled()
    halves = sampled(2), sampled(4, first_example=2)
    for _ in range(3):
        parts = layer(x[:2], halves[0]), layer(x[2:], halves[1])
        assert torch.equal(torch.cat(parts), layer(x, whole))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(("layer", "x"), LAYERS[:-1], ids=lambda value: type(value).__name__)
def test_activation_checkpointing_repeats_the_draw(layer, x, use_reentrant):
    def gradients(through):
        leaf, weight, hyper = x.clone().requires_grad_(), torch.ones_like(x).requires_grad_(), sampled()
        through(lambda x_: (layer(x_, hyper) * weight).sin(), leaf).sum().backward()
        return leaf.grad, weight.grad

    want = gradients(lambda segment, x_: segment(x_))
    got = gradients(lambda segment, x_: checkpoint(segment, x_, use_reentrant=use_reentrant))
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_of_a_layer_at_two_places_is_refused_and_not_guessed(use_reentrant):
    layer, hyper, x = stn.PerExampleDropout("rate", stream=3), sampled(), torch.ones(6, 50, requires_grad=True)
    y = checkpoint(lambda x_: layer(layer(x_, hyper).sin(), hyper).sin(), x, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match=r"stream 3 was called 2 times with one HyperBatch.*its own stream"):
        y.sum().backward()


def test_checkpointing_of_layers_with_streams_of_their_own_is_exact():
    layers, x = [stn.PerExampleDropout("rate", stream=k) for k in (3, 4)], torch.ones(6, 50, requires_grad=True)

    def run(hyper, through):
        y = x
        for layer in layers:
            y = through(lambda y_, layer=layer: layer(y_.sin(), hyper).sin(), y)
        return torch.autograd.grad(y.sum(), x)[0]

    plain = run(sampled(), lambda f, y: f(y))
    assert torch.equal(run(sampled(), lambda f, y: checkpoint(f, y, use_reentrant=False)), plain)


def test_compiled_calls_draw_what_eager_calls_draw():
    layer, x = stn.PerExampleDropout("rate", stream=3), torch.ones(6, 50)
    torch._dynamo.reset()
    compiled = torch.compile(lambda hyper: [layer(x, hyper), layer(x, hyper)], fullgraph=True, backend="aot_eager")
    for step in (4, 5, 6):
        hyper = sampled(step=step)
        want = [layer(x, hyper), layer(x, hyper)]
        assert all(map(torch.equal, compiled(sampled(step=step)), want))


def test_a_compiled_layer_called_often_with_one_batch_is_not_compiled_each_time():
    layer, x, graphs = stn.PerExampleDropout("rate", stream=3), torch.ones(6, 50), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled, hyper, eager = torch.compile(layer, fullgraph=True, backend=backend), sampled(), sampled()
    for _ in range(12):
        assert torch.equal(compiled(x, hyper), layer(x, eager))
    assert len(graphs) <= 4


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_checkpointing_repeats_the_draw(fullgraph):
    layer, x = stn.PerExampleDropout("rate", stream=3), torch.ones(6, 50, requires_grad=True)

    def run(hyper):
        return checkpoint(lambda x_: layer(x_.sin(), hyper).cos(), x, use_reentrant=False)

    (want,) = torch.autograd.grad(layer(x.sin(), sampled()).cos().sum(), x)
    torch._dynamo.reset()
    # The count of calls is what dynamo takes for a side effect of the segment; it isn't to be repeated.
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=fullgraph):
        y = torch.compile(run, fullgraph=fullgraph, backend="aot_eager")(sampled())
        (got,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(got, want)


def test_slices_and_copies_of_a_batch_count_with_it():
    layer, x = stn.PerExampleDropout("rate", stream=3), torch.ones(6, 50)
    hyper = sampled()
    results = layer(x, hyper)[:2], layer(x[:2], hyper[:2]), layer(x, hyper.to("cpu"))[:2]
    assert not any(torch.equal(results[i], results[j]) for i in range(3) for j in range(i))
    other = sampled()
    assert torch.equal(
        torch.cat([layer(x[rows], other[rows]) for rows in (slice(2), slice(2, 6))]), layer(x, sampled())
    )


def test_per_batch_masks_are_the_same_at_every_call():
    """W and R under DropConnect, and words of an embedding that is read twice."""
    connect, weight, hyper = stn.DropConnect("connect", stream=3), torch.ones(40, 50), sampled()
    assert torch.equal(connect(weight, hyper), connect(weight, hyper))
    words, drop = stn.HyperEmbedding(50, 8, num_hyperparameters=4), stn.EmbeddingDropout("connect", stream=3)
    tokens = torch.arange(50).expand(6, -1)
    assert torch.equal(drop(words, tokens, hyper), drop(words, tokens, hyper))


def test_an_lstm_at_two_places_has_other_locked_masks_and_the_same_connections():
    torch.manual_seed(0)
    options = dict(num_layers=2, dropout="rate", recurrent_dropout="connect", stream=3, num_hyperparameters=4)
    lstm, x, hyper = stn.HyperLSTM(5, 40, **options), torch.randn(3, 6, 5), sampled()
    first, second = lstm(x, hyper), lstm(x, hyper)
    assert torch.equal(first[1][0][0], second[1][0][0])
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("randomness", ["error", "different"])
@each_layer
def test_under_vmap_one_mask_for_all_slices_must_be_asked_for(layer, x, randomness):
    with pytest.raises(RuntimeError, match=rf"inside torch.vmap every slice draws the same.*got '{randomness}'"):
        torch.vmap(lambda x_: layer(x_, sampled()), randomness=randomness)(torch.stack([x, x]))
    y = torch.vmap(lambda x_: layer(x_, sampled()), randomness="same")(torch.stack([x, x]))
    assert torch.equal(y[0], y[1])
    torch.testing.assert_close(y[0], layer(x, sampled()))


def test_under_vmap_sampling_says_so_too_and_unperturbed_batches_need_not():
    locations = torch.stack([SPACE.initial_state()[0]] * 2)

    def values(location):
        return SPACE.sample(location, SPACE.initial_state()[1], batch_size=6, seed=5, step=4).values

    with pytest.raises(RuntimeError, match=r"sample: inside torch.vmap.*randomness='same'"):
        torch.vmap(values)(locations)
    assert torch.vmap(values, randomness="same")(locations).shape == (2, 6, 4)
    assert torch.vmap(lambda location: SPACE.at(location, batch_size=6).values)(locations).shape == (2, 6, 4)


def test_gradients_of_single_examples_by_vmap_of_grad():
    layer, x = stn.PerExampleDropout("rate", stream=3), torch.ones(3, 6, 50)
    gradient = torch.func.grad(lambda x_: layer(x_, sampled()).sum())
    with pytest.raises(RuntimeError, match="randomness='same'"):
        torch.vmap(gradient)(x)
    torch.testing.assert_close(torch.vmap(gradient, randomness="same")(x)[1], layer(x[1], sampled()))
    torch.testing.assert_close(gradient(x[0]), layer(x[0], sampled()))


def test_slices_that_share_examples_draw_anew_and_parts_of_a_batch_draw_what_the_whole_does():
    layer, x = stn.PerExampleDropout("rate", stream=3), torch.ones(6, 400)
    hyper = sampled()
    whole, again = layer(x, hyper), layer(x[2:], hyper[2:])
    assert not torch.equal(whole[2:], again)
    hyper = sampled()
    parts = [layer(x[:2], hyper[:2]), layer(x[2:], hyper[2:])]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(layer(x, hyper)[:2], parts[0])


def test_two_passes_over_one_batch_are_recomputed_each_by_its_own_mask():
    layer, hyper = stn.PerExampleDropout("rate", stream=3), sampled()
    for _ in range(2):
        x = torch.ones(6, 400, requires_grad=True)
        y = checkpoint(lambda x: layer(x, hyper) * x, x, use_reentrant=False)
        y.sum().backward()
        torch.testing.assert_close(x.grad, 2 * y.detach())
