"""Which rows of a layer's input belong to which example, and errors where that is not known."""

import pytest
import torch
from converted_networks import converted, sampled
from numerics import relative_error
from torch import nn

import stn_fast as stn

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "conv": (lambda: nn.Conv2d(2, 4, 3), (2, 5, 5)),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3), (2, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), (2, 3, 3, 3)),
    "embedding": (lambda: nn.Embedding(9, 6), (3,)),
    "layer norm": (lambda: nn.LayerNorm(6), (3, 6)),
    "rms norm": (lambda: nn.RMSNorm(6), (6,)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 3)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(4), (4, 3)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(4), (4, 3, 2)),
    "batch norm 3d": (lambda: nn.BatchNorm3d(4), (4, 3, 2, 2)),
    "lstm": (lambda: nn.LSTM(6, 5, 2, batch_first=True), (3, 6)),
    "dropout": (lambda: nn.Dropout(0.4), (3, 6)),
    "dropout1d": (lambda: nn.Dropout1d(0.4), (8, 3)),
    "dropout2d": (lambda: nn.Dropout2d(0.4), (8, 3, 2)),
    "dropout3d": (lambda: nn.Dropout3d(0.4), (8, 3, 2, 2)),
    "noise": (lambda: stn.GaussianNoise(0.4), (3, 6)),
    "locked dropout": (lambda: stn.LockedDropout(0.4, dim=1), (3, 9)),
    "embedding of some words": (lambda: stn.EmbeddingWithDropout(9, 6, p=0.4), (3,)),
    "drop connect lstm": (lambda: stn.DropConnectLSTM(6, 5, 2, p=0.4, batch_first=True), (3, 6)),
    "conv relu": (lambda: stn.ConvReLU2d(2, 4, 3), (2, 5, 5)),
}
NEED_THEIR_OUTPUT = ("lstm", "drop connect lstm", "conv relu")  # for the backward pass
each_layer = pytest.mark.parametrize("kind", LAYERS)


class Holder(nn.Module):
    """A model with one layer, called ``inner.layer``."""

    def __init__(self, layer):
        super().__init__()
        self.inner = nn.ModuleDict({"layer": layer})

    def forward(self, x):
        y = self.inner["layer"](x)
        return y[0] if isinstance(y, tuple) else y


def model(kind, **options):
    torch.manual_seed(0)
    return converted(Holder(LAYERS[kind][0]().double()), **options)


def rows(kind, *sizes):
    shape = (*sizes, *LAYERS[kind][1])
    generator = torch.Generator().manual_seed(1)
    if "embedding" in kind:
        return torch.randint(9, shape, generator=generator)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@each_layer
def test_consecutive_rows_share_the_hyperparameters_of_their_example(kind):
    tuned, x = model(kind), rows(kind, 8)
    if "batch" in kind:
        tuned.eval()
    own, hyper = tuned.tuned_hyperparameters, sampled(tuned, 2)
    with own.using(hyper):
        y = tuned(x)
    for i in range(2):
        with own.using(sampled(tuned, 2)[i : i + 1]):
            assert relative_error(tuned(x[4 * i : 4 * i + 4]), y[4 * i : 4 * i + 4]) < 1e-12
    if "dropout" in kind:
        kept = y.flatten(1) != 0
        assert (kept[0] != kept[1:4]).any()  # each row has its own mask
        assert not kept.all()


@pytest.mark.parametrize("kind", ["dropout1d", "dropout2d", "dropout3d"])
def test_whole_channels_are_dropped(kind):
    tuned, x = model(kind), rows(kind, 8)
    with tuned.tuned_hyperparameters.using(sampled(tuned, 2)):
        kept = (tuned(x) != 0).flatten(2)
    assert (kept.all(2) | ~kept.any(2)).all()
    assert kept.any()
    assert not kept.all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_channels_of_images_are_dropped_as_by_the_layer_for_them_in_their_memory_format(layout):
    tuned, x = model("dropout2d"), rows("dropout2d", 4).contiguous(memory_format=layout)
    with tuned.tuned_hyperparameters.using(sampled(tuned)):
        y = tuned(x)
    assert torch.equal(y, stn.PerExampleDropout2d("layer", stream=1)(x, sampled(tuned)))
    assert y.is_contiguous(memory_format=layout)
    assert not y.all()


@pytest.mark.parametrize("kind", ["linear", "embedding", "embedding of some words", "layer norm", "dropout", "noise"])
def test_a_declared_dimension_counts_the_examples(kind):
    tuned, plain_dims = model(kind, example_dims={"inner": 1}), model(kind)
    x = rows(kind, 4)
    with tuned.tuned_hyperparameters.using(sampled(tuned)):
        y = tuned(x.transpose(0, 1))
    with plain_dims.tuned_hyperparameters.using(sampled(tuned)):
        want = plain_dims(x)
    if kind not in ("dropout", "noise"):
        assert relative_error(y.transpose(0, 1), want) < 1e-12
    for i in range(4):
        with tuned.tuned_hyperparameters.using(sampled(tuned)[i : i + 1]):
            assert relative_error(tuned(x[i : i + 1].transpose(0, 1))[:, 0], y[:, i]) < 1e-12


def test_rows_of_a_declared_dimension_may_be_several_per_example():
    tuned, x = model("linear", example_dims={"*": 1}), rows("linear", 4).transpose(0, 1)
    with tuned.tuned_hyperparameters.using(sampled(tuned, 2)):
        y = tuned(x)
    for i in range(2):
        with tuned.tuned_hyperparameters.using(sampled(tuned, 2)[i : i + 1]):
            assert relative_error(tuned(x[:, 2 * i : 2 * i + 2]), y[:, 2 * i : 2 * i + 2]) < 1e-12


def test_an_lstm_has_its_examples_where_batch_first_says():
    torch.manual_seed(0)
    tuned = converted(Holder(nn.LSTM(6, 5).double()))
    x = rows("lstm", 4).transpose(0, 1)
    with tuned.tuned_hyperparameters.using(sampled(tuned)):
        y = tuned(x)
    for i in range(4):
        with tuned.tuned_hyperparameters.using(sampled(tuned)[i : i + 1]):
            assert relative_error(tuned(x[:, i : i + 1]), y[:, i : i + 1]) < 1e-12


def test_position_numbers_of_one_row_are_looked_up_for_each_example():
    tuned, numbers = model("embedding"), torch.arange(7)[None]
    with tuned.tuned_hyperparameters.using(sampled(tuned)):
        assert torch.equal(tuned(numbers), tuned(numbers.expand(4, 7)))


def test_hyperparameters_shared_by_all_examples_need_no_rows():
    tuned, x = model("linear").eval(), rows("linear", 7)
    own = tuned.tuned_hyperparameters
    with own.using(own.space.at(own.location, batch_size=4)):
        assert torch.equal(tuned(x), tuned(x[None])[0])


@each_layer
def test_other_numbers_of_rows_are_refused_with_the_name_of_the_layer(kind):
    tuned, x = model(kind), rows(kind, 6)
    with (
        tuned.tuned_hyperparameters.using(sampled(tuned)),
        pytest.raises(ValueError, match=r"inner\.layer \(\w+\): dimension 0 of its input \(6.*must count the 4 exam"),
    ):
        tuned(x)


def test_the_error_says_how_to_declare_the_dimension_or_leave_the_layer_out():
    tuned = model("linear")
    with (
        tuned.tuned_hyperparameters.using(sampled(tuned)),
        pytest.raises(ValueError, match=r"example_dims=\{'inner\.layer': 1\}.*exclude='inner\.layer'"),
    ):
        tuned(rows("linear", 6))


def test_token_numbers_without_examples_are_refused_even_if_they_could_be_rows():
    tuned = model("embedding")
    with tuned.tuned_hyperparameters.using(sampled(tuned)), pytest.raises(ValueError, match="its input \\(8,\\) must"):
        tuned(torch.arange(8))


def test_an_example_dimension_that_a_norm_normalises_is_refused():
    tuned = model("layer norm", example_dims={"*": 2})
    with tuned.tuned_hyperparameters.using(sampled(tuned)), pytest.raises(ValueError, match="dimension 2 of its input"):
        tuned(rows("layer norm", 4))


@pytest.mark.parametrize("kind", ["linear", "conv", "conv relu", "conv1d", "conv3d"])
def test_an_input_without_a_batch_is_one_example(kind):
    tuned, x = model(kind), rows(kind, 1)
    x = x[0, 0] if kind == "linear" else x[0]
    with tuned.tuned_hyperparameters.using(sampled(tuned, 1)):
        assert relative_error(tuned(x), tuned(x[None])[0]) < 1e-14
    with (
        tuned.tuned_hyperparameters.using(sampled(tuned)),
        pytest.raises(ValueError, match="must count the 4 examples"),
    ):
        tuned(x)


def test_channel_dropout_needs_examples_and_channels():
    tuned = model("dropout2d")
    with tuned.tuned_hyperparameters.using(sampled(tuned)), pytest.raises(ValueError, match="must have 4 dimensions"):
        tuned(torch.randn(4, 3, 5))


def test_a_packed_sequence_is_refused_with_the_name_of_the_lstm():
    tuned = model("lstm")
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 6).double()])
    with tuned.tuned_hyperparameters.using(sampled(tuned)), pytest.raises(TypeError, match=r"inner\.layer \(LSTM\)"):
        tuned(packed)


def test_dropout_leaves_its_input_also_if_it_is_in_place():
    tuned = stn.convert(nn.ModuleList([nn.Dropout(0.5, inplace=True)]), quiet=True)
    x = torch.ones(4, 50)
    with tuned.tuned_hyperparameters.using(sampled(tuned)):
        assert not tuned[0](x).all()
    assert x.all()


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind not in NEED_THEIR_OUTPUT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_an_activation_may_change_the_output_of_a_layer_in_place(kind, dtype, training):
    found = []
    for activation in (torch.relu, torch.relu_):
        tuned, x = model(kind).to(dtype).train(training), rows(kind, 8)
        x = x.to(dtype).requires_grad_() * 1 if x.is_floating_point() else x
        with tuned.tuned_hyperparameters.using(sampled(tuned)):
            y = activation(tuned(x))
            y.square().sum().backward()
        found.append((y, *(parameter.grad for parameter in tuned.parameters())))
    assert all(map(torch.equal, *found))
