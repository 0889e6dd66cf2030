"""What converted networks compute: the plain function at first, then that of the package's gated layers."""

import copy

import pytest
import torch
from converted_networks import NETWORKS, Text, converted, inputs, plain, sampled
from numerics import relative_error
from torch import nn

import stn_fast as stn

each_network = pytest.mark.parametrize("kind", NETWORKS)
WEIGHT_DECAY = stn.HyperparameterSpace([stn.Hyperparameter("weight_decay", low=0.0, init=1e-3)])


def gradients(y, model):
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@each_network
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("response_rank", ["auto", None])
def test_a_new_conversion_changes_no_output_and_no_gradient(kind, training, response_rank):
    model, x = plain(kind).train(training), inputs(kind)
    tuned = stn.convert(copy.deepcopy(model), WEIGHT_DECAY, response_rank=response_rank, quiet=True)
    want = model(x)
    expected = gradients(want, model)
    with tuned.tuned_hyperparameters.using(sampled(tuned)):
        y = tuned(x)
    assert relative_error(y, want) < 1e-12
    found = gradients(y, tuned)
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < 1e-12, name
    buffers = dict(tuned.named_buffers())
    for name, buffer in model.named_buffers():
        assert relative_error(buffers[name], buffer) < 1e-12, name


@each_network
def test_evaluation_outside_of_steps_is_at_the_current_hyperparameters(kind):
    tuned, x = converted(plain(kind, 0.3)).eval(), inputs(kind)
    own = tuned.tuned_hyperparameters
    with own.using(own.space.at(own.location, batch_size=4)):
        want = tuned(x)
    assert relative_error(tuned(x), want) < 1e-12
    own.location.add_(0.5)
    assert relative_error(tuned(x), want) > 1e-3


def layer(kind):
    """(a plain module, the package's gated one, its input and whether it takes one more argument)"""
    torch.manual_seed(0)
    options = dict(num_hyperparameters=2, dtype=torch.float64)
    images, vectors = (torch.randn(4, 6, 5, 5, dtype=torch.float64), torch.randn(4, 3, 6, dtype=torch.float64))
    made = {
        "linear": (nn.Linear(6, 8), stn.HyperLinear(6, 8, **options), vectors),
        "linear of rank 2": (nn.Linear(6, 8), stn.HyperLinear(6, 8, response_rank=2, **options), vectors),
        "conv": (nn.Conv2d(6, 8, 3, 2, 1), stn.HyperConv2d(6, 8, 3, 2, 1, **options), images),
        "embedding": (nn.Embedding(9, 6, 1), stn.HyperEmbedding(9, 6, 1, **options), torch.arange(8).view(4, 2)),
        "batch norm": (nn.BatchNorm2d(6), stn.HyperBatchNorm2d(6, **options), images),
        "lstm": (nn.LSTM(6, 5, 2), stn.HyperLSTM(6, 5, 2, **options), vectors.transpose(0, 1)),
        "dropout": (nn.Dropout(0.3), stn.PerExampleDropout("0", stream=1), vectors),
        "dropout2d": (nn.Dropout2d(0.3), stn.PerExampleDropout2d("0", stream=1), images),
    }
    return made[kind]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "kind", ["linear", "linear of rank 2", "conv", "embedding", "batch norm", "lstm", "dropout", "dropout2d"]
)
def test_a_converted_layer_is_the_gated_layer_of_its_kind_bit_for_bit(kind, training):
    module, gated, x = layer(kind)
    space = stn.HyperparameterSpace(
        [stn.Hyperparameter("0", low=0.0, high=0.9, init=0.3), stn.Hyperparameter("weight_decay", low=0.0, init=1e-3)]
    )
    holder = nn.ModuleList([module.double(), nn.Dropout(0.3)])
    rank = 2 if "rank" in kind else None
    tuned = converted(holder, space=space, dropouts={"*": "0"}, response_rank=rank).train(training)
    assert not gated.load_state_dict(tuned[0].state_dict()).missing_keys
    gated.train(training)
    with tuned.tuned_hyperparameters.using(sampled(tuned)):
        y = tuned[0](x)
    want = gated(x, sampled(tuned))
    if kind == "lstm":
        assert torch.equal(y[1][1], want[1][1])
        y, want = y[0], want[0]
    assert torch.equal(y, want)
    if dict(gated.named_parameters()):
        expected = gradients(want, gated)
        for name, gradient in gradients(y, tuned[0]).items():
            assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_a_batch_norm_of_volumes_is_torchs_with_a_scale_and_a_shift_for_each_example(training, memory_format):
    torch.manual_seed(0)
    plain = nn.BatchNorm3d(6, affine=False, dtype=torch.float64).train(training)
    tuned = converted(nn.Sequential(nn.BatchNorm3d(6, dtype=torch.float64))).train(training)
    x = torch.randn(4, 6, 2, 3, 5, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    hyper = sampled(tuned)
    with tuned.tuned_hyperparameters.using(hyper):
        y = tuned(x)
    of, h = dict(tuned[0].named_parameters()), hyper.response.double()
    scale = of["weight"] + h @ of["weight_gate"].T * of["response_weight"]
    shift = of["bias"] + h @ of["bias_gate"].T * of["response_bias"]
    want = plain(x) * scale[:, :, None, None, None] + shift[:, :, None, None, None]
    assert relative_error(y, want) < 1e-12
    weight = torch.randn_like(x)
    for one, other in zip(
        *(torch.autograd.grad((z * weight).sum(), [x, *of.values()]) for z in (y, want)), strict=True
    ):
        assert relative_error(one, other) < 1e-12
    assert relative_error(tuned[0].running_var, plain.running_var) < 1e-12
    assert tuned[0].num_batches_tracked == plain.num_batches_tracked == int(training)
    folded = stn.fold(tuned.eval())
    assert type(folded[0]) is nn.BatchNorm3d
    assert relative_error(folded(x), tuned(x)) < 1e-12


@pytest.mark.parametrize("response_rank", [2, None])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_of_signals_is_one_of_images_of_height_one(response_rank, groups):
    torch.manual_seed(0)
    made = nn.Conv1d(6, 8, 3, 2, 1, groups=groups), nn.Conv2d(6, 8, (1, 3), (1, 2), (0, 1), groups=groups)
    ours, theirs = (converted(nn.Sequential(one.double()), response_rank=response_rank) for one in made)
    with torch.no_grad():
        for name, parameter in ours[0].named_parameters():
            parameter.copy_(getattr(theirs[0], name).view_as(parameter))
    x = torch.randn(4, 6, 9, dtype=torch.float64)
    for training in (True, False):
        ours.train(training)
        theirs.train(training)
        with ours.tuned_hyperparameters.using(sampled(ours)), theirs.tuned_hyperparameters.using(sampled(theirs)):
            y, want = ours(x), theirs(x[:, :, None])
        assert relative_error(y, want[:, :, 0]) < 1e-12
        expected = gradients(want, theirs)
        for name, gradient in gradients(y, ours).items():
            assert relative_error(gradient, expected[name].view_as(gradient)) < 1e-12, name
        ours.zero_grad()
        theirs.zero_grad()
    assert relative_error(ours(x), theirs(x[:, :, None])[:, :, 0]) < 1e-12


@pytest.mark.parametrize("kind", ["block", "text", "norms", "signals"])
def test_each_example_gets_its_own_hyperparameters_and_masks(kind):
    tuned, x = converted(plain(kind, 0.3)), inputs(kind)
    own = tuned.tuned_hyperparameters
    with own.using(sampled(tuned)):
        whole = tuned(x)
    for i in range(4):
        with own.using(sampled(tuned)[i : i + 1]):
            assert relative_error(tuned(x[i : i + 1])[0], whole[i]) < 1e-12
    with own.using(sampled(tuned)[:1]):
        assert relative_error(tuned(x[1:2])[0], whole[1]) > 1e-3


def test_each_image_gets_its_own_hyperparameters_in_evaluation_mode():
    tuned, x = converted(plain("cnn", 0.3)).eval(), inputs("cnn")
    own, hyper = tuned.tuned_hyperparameters, sampled(tuned)
    with own.using(hyper):
        whole = tuned(x)
    for i in range(4):
        with own.using(hyper[i : i + 1]):
            assert relative_error(tuned(x[i : i + 1])[0], whole[i]) < 1e-12


def test_dropout_keeps_a_share_of_one_minus_the_rate_of_each_example():
    space = stn.HyperparameterSpace([stn.Hyperparameter("0", low=0.0, high=0.95, init=0.5, scale=2.0)])
    tuned = stn.convert(nn.ModuleList([nn.Dropout(0.5)]), space, quiet=True, dropouts={"0": "0"})
    own = tuned.tuned_hyperparameters
    hyper = own.space.sample(own.location, own.raw_scale, batch_size=5, seed=0, step=0)
    with own.using(hyper):
        y = tuned[0](torch.ones(5, 20000))
    for row, rate in zip(y, hyper["0"].tolist(), strict=True):
        assert (row != 0).float().mean().item() == pytest.approx(1 - rate, abs=0.02)
        assert row.max().item() == pytest.approx(1 / (1 - rate), rel=1e-5)


def test_the_dropout_between_the_layers_of_an_lstm_has_the_tuned_rate_and_a_mask_per_time_step():
    torch.manual_seed(0)
    model = nn.ModuleDict({"lstm": nn.LSTM(4, 8, 2, dropout=0.5)})
    tuned = stn.convert(model, quiet=True)
    assert tuned.tuned_hyperparameters.space.names == ("lstm_dropout", "weight_decay")
    own, seen, lstm = tuned.tuned_hyperparameters, [], tuned["lstm"]
    between = lstm._between
    object.__setattr__(lstm, "_between", lambda *given: seen.append(between(*given)) or seen[-1])
    with own.using(sampled(tuned, 3)):
        lstm(torch.randn(5, 3, 4))
    kept = seen[0] != 0
    assert 0 < kept.float().mean() < 1
    assert (kept[0] != kept[1]).any()
    assert (seen[1] != 0).all()


def test_the_penalty_of_weight_decay_is_that_of_the_effective_weights():
    from stn_fast.training.task import with_weight_decay

    tuned = converted(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)).double())
    hyper = sampled(tuned)
    layer = tuned[0]
    response = layer.response_projection
    matrix = layer.response_weight if response is None else layer.response_weight @ response
    scale = hyper.response.double() @ layer.weight_gate.T
    effective = layer.weight + scale[:, :, None] * matrix
    want = (0.5 * hyper["weight_decay"].double() * effective.square().sum((1, 2))).mean()
    assert relative_error(with_weight_decay(torch.zeros(()).double(), tuned, hyper), want) < 1e-6


def test_a_tied_weight_is_one_parameter_that_collects_both_gradients():
    tuned, x = converted(Text().double()), inputs("text")
    assert tuned.decoder.weight is tuned.embed.weight
    with tuned.tuned_hyperparameters.using(sampled(tuned)):
        tuned(x).square().sum().backward()
    assert tuned.embed.weight.grad.abs().sum(1).all()  # rows of words that don't occur get one from the decoder


def test_batch_norm_that_does_not_track_its_statistics_leaves_them():
    model = plain("cnn")
    model[1].track_running_stats = False
    tuned = stn.convert(copy.deepcopy(model), WEIGHT_DECAY, quiet=True)
    x = inputs("cnn")
    with tuned.tuned_hyperparameters.using(sampled(tuned)):
        torch.testing.assert_close(tuned.train()(x), model.train()(x))
    assert torch.equal(tuned[1].running_mean, torch.zeros_like(tuned[1].running_mean))
