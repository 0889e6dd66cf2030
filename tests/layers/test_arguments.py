"""What every layer says of an argument that isn't what it takes: the argument's name, and what would be right."""

import numpy as np
import pytest
import torch

import stn_fast as stn

SPACE = stn.HyperparameterSpace([stn.Hyperparameter("rate", low=0.0, high=0.9, init=0.4, per_example=False)])
ROWS, IMAGES, WORDS = np.zeros((3, 4), np.float32), np.zeros((3, 2, 5, 5), np.float32), np.zeros((3, 4), np.int64)

# (layer, its input as NumPy has it, what the layer calls it)
LAYERS = [
    (stn.HyperLinear(4, 3, num_hyperparameters=1), ROWS, "x"),
    (stn.HyperConv2d(2, 3, 3, num_hyperparameters=1), IMAGES, "x"),
    (stn.HyperLSTM(4, 3, num_hyperparameters=1), ROWS[None], "x"),
    (stn.HyperEmbedding(5, 3, num_hyperparameters=1), WORDS, "tokens"),
    (stn.HyperBatchNorm2d(2, num_hyperparameters=1), IMAGES, "x"),
    (stn.PerExampleDropout("rate", stream=1), ROWS, "x"),
    (stn.PerExampleDropout2d("rate", stream=1), IMAGES, "x"),
    (stn.PerExampleNoise("rate", stream=1), ROWS, "x"),
    (stn.PerExampleAugmentation([], mean=[0.5], std=[0.5], stream=1), IMAGES[:, :1].astype(np.uint8), "x"),
    (stn.DropConnect("rate", stream=1), ROWS, "weight"),
]


def sampled(batch=3):
    return SPACE.sample(*SPACE.initial_state(), batch_size=batch, seed=5, step=0)


@pytest.mark.parametrize(("layer", "array", "name"), LAYERS, ids=lambda value: type(value).__name__)
def test_the_error_for_a_numpy_array_says_how_to_convert_it(layer, array, name):
    says = f"{type(layer).__name__}: {name} must be a torch.Tensor, got numpy.ndarray; convert it by torch.from_numpy"
    with pytest.raises(TypeError, match=says):
        layer(array, sampled())
    layer(torch.from_numpy(array), sampled())


@pytest.mark.parametrize(("layer", "array", "name"), LAYERS, ids=lambda value: type(value).__name__)
def test_a_list_is_named(layer, array, name):
    with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got list"):
        layer(array.tolist(), sampled())


@pytest.mark.parametrize("operation", ["dropout", "noise"])
def test_operations_that_draw_name_an_array_of_numpy(operation):
    with pytest.raises(TypeError, match=f"{operation}: x must be a torch.Tensor, got numpy.ndarray"):
        getattr(stn.functional, operation)(ROWS, torch.full((3,), 0.5), seed=0, step=0, stream=1)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda **given: stn.HyperLinear(4, 3, num_hyperparameters=1, **given), "bias"),
        (lambda **given: stn.HyperConv2d(4, 3, 3, num_hyperparameters=1, **given), "bias"),
        (lambda **given: stn.HyperConv2d(4, 3, 3, num_hyperparameters=1, **given), "relu"),
        (lambda **given: stn.HyperEmbedding(4, 3, num_hyperparameters=1, **given), "sparse"),
        (lambda **given: stn.HyperLSTM(4, 3, num_hyperparameters=1, **given), "bias"),
        (lambda **given: stn.HyperLSTM(4, 3, num_hyperparameters=1, **given), "batch_first"),
        (lambda **given: stn.HyperLSTM(4, 3, num_hyperparameters=1, **given), "bidirectional"),
    ],
)
@pytest.mark.parametrize("value", ["False", "no", 0, None, torch.tensor(False)])
def test_a_switch_that_is_text_is_refused_and_not_taken_for_true(make, name, value):
    with pytest.raises(ValueError, match=rf"\w+: {name} must be True or False, got"):
        make(**{name: value})
    make(**{name: np.bool_(False)})


@pytest.mark.parametrize("value", [0, 2.5, "4", True, None])
def test_a_size_that_is_no_whole_number_is_named(value):
    with pytest.raises(ValueError, match="HyperLinear: in_features must be an int >= 1"):
        stn.HyperLinear(value, 3, num_hyperparameters=1)
    stn.HyperLinear(np.int64(4), np.int32(3), num_hyperparameters=np.int8(1))(torch.ones(3, 4), sampled())
