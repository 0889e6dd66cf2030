import pytest
import torch

import stn_fast as stn
from stn_fast import functional
from stn_fast.ops.augment import STRENGTHS
from stn_fast.training.methods import check_streams

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
HIGHEST = dict(hue=0.5, shear=80.0, cutout_length=8.0, cutout_holes=24.0, input_dropout=0.9)
SPACE = stn.HyperparameterSpace(
    [
        stn.Hyperparameter("unrelated", init=0.0),
        *[
            stn.Hyperparameter(
                name,
                low=0.0,
                high=HIGHEST.get(name),
                init=HIGHEST.get(name, 1.0) / 2,
                integer=name.startswith("cutout"),
            )
            for name in reversed(STRENGTHS)
        ],
    ]
)


def images(batch=6, channels=3, height=8, width=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, channels, height, width), dtype=torch.uint8, generator=generator)


def sampled(batch, step=0, first_example=0, space=SPACE):
    return space.sample(*space.initial_state(), batch_size=batch, seed=5, step=step, first_example=first_example)


def layer(names=STRENGTHS, **options):
    return stn.PerExampleAugmentation(names, **(dict(mean=MEAN, std=STD, stream=3) | options))


def test_strengths_are_looked_up_by_name_and_the_draw_comes_from_the_batch():
    hyper, x = sampled(6, step=4, first_example=100), images()
    names = ("rotation", "brightness", "cutout_holes", "cutout_length")
    got = layer(names, flip=0.5, crop_padding=2)(x, hyper)
    where = dict(seed=5, step=4, stream=3, first_example=100, flip=0.5, crop_padding=2)
    strengths = {name: hyper.values[:, SPACE.names.index(name)] for name in names}
    assert torch.equal(got, functional.augment(x, strengths, mean=MEAN, std=STD, **where))


def test_every_strength_is_taken():
    assert not layer()(images(), sampled(6)).isnan().any()


@pytest.mark.parametrize("channels", [1, 3])
def test_eval_mode_only_normalises_as_training_does_with_nothing_on(channels):
    x, options = images(channels=channels), dict(mean=MEAN[:channels], std=STD[:channels])
    strong = [name for name in STRENGTHS if channels == 3 or name not in ("saturation", "hue")]
    got = layer(strong, **options, flip=1.0, crop_padding=3).eval()(x, sampled(6))
    assert got.dtype == torch.float32
    mean, std = (torch.tensor(numbers[:channels], dtype=torch.float64).view(-1, 1, 1) for numbers in (MEAN, STD))
    torch.testing.assert_close(got, ((x / 255.0 - mean) / std).float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(got, layer([], **options).train()(x, sampled(6)), rtol=0, atol=1e-6)


def test_two_layers_of_one_stream_are_refused():
    model = torch.nn.Sequential(layer(), stn.PerExampleDropout("input_dropout", stream=3))
    with pytest.raises(ValueError, match="both draw from stream 3"):
        check_streams(model)


def test_it_adds_nothing_to_a_checkpoint_and_follows_its_network_to_other_devices():
    assert layer().state_dict() == {}
    assert layer().to("meta").eval()(images().to("meta"), None).device.type == "meta"


@pytest.mark.parametrize("training", [True, False])
def test_compiled_it_gives_the_same_images(training):
    augmentation, x = layer(flip=0.5).train(training), images()
    torch._dynamo.reset()
    compiled = torch.compile(augmentation, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, sampled(6)), augmentation(x, sampled(6)))


@pytest.mark.parametrize(
    ("name", "low", "high", "allowed"),
    [
        *[(name, -0.5, HIGHEST.get(name, 1.0), r"(finite and >= 0|in \[0)") for name in STRENGTHS],
        *[(name, None, HIGHEST.get(name, 1.0), r"(finite and >= 0|in \[0)") for name in STRENGTHS],
        ("hue", 0.0, 0.6, r"in \[0, 0.5\]"),
        ("hue", 0.0, None, r"in \[0, 0.5\]"),
        ("shear", 0.0, 90.0, r"in \[0, 90\)"),
        ("shear", 0.0, None, r"in \[0, 90\)"),
        ("input_dropout", 0.0, 1.0, r"in \[0, 1\)"),
        ("input_dropout", 0.0, None, r"in \[0, 1\)"),
        ("cutout_holes", 0.0, 25.0, r"in \[0, 24\]"),
        ("cutout_holes", 0.0, None, r"in \[0, 24\]"),
        ("cutout_length", 0.0, 9.0, r"in \[0, 8\] for images of 8 x 10"),
        ("cutout_length", 0.0, None, r"in \[0, 8\] for images of 8 x 10"),
    ],
)
def test_bounds_that_a_strength_could_leave_its_domain_in_are_refused(name, low, high, allowed):
    changed = stn.Hyperparameter(name, low=low, high=high, init=0.25)
    space = stn.HyperparameterSpace([changed if old.name == name else old for old in SPACE])
    says = rf"'{name}' is an augmentation strength.*keep it {allowed}.*; got low={low}, high={high}"
    with pytest.raises(ValueError, match=says):
        layer()(images(width=10), sampled(6, space=space))


@pytest.mark.parametrize("training", [True, False])
def test_the_images_have_the_dtype_of_the_model_in_training_as_in_evaluation(training):
    for dtype in (torch.float64, torch.bfloat16):
        assert layer().to(dtype).train(training)(images(), sampled(6)).dtype == dtype


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(std=(0.2, 0.0, 0.2)), r"std must be > 0 for every channel, got \[0.2, 0.0, 0.2\]"),
        (dict(mean=(0.2, float("nan"), 0.2)), "mean must be 3 finite numbers"),
        (dict(flip=1.5), r"flip, a probability, must be in \[0, 1\], got 1.5"),
        (dict(crop_padding=-1), "crop_padding must be an int >= 0.*got -1"),
        (dict(crop_padding=0.5), "crop_padding must be an int >= 0.*got 0.5"),
    ],
    ids=str,
)
def test_settings_are_refused_where_the_layer_is_made(options, message):
    with pytest.raises(ValueError, match=f"PerExampleAugmentation.*{message}"):
        layer(**options)


def test_wrong_arguments_are_named_in_the_error():
    with pytest.raises(ValueError, match="no strength 'brightnes'; did you mean 'brightness'"):
        layer(["brightnes"])
    with pytest.raises(ValueError, match="given twice: hue"):
        layer(["hue", "scale", "hue"])
    with pytest.raises(ValueError, match=r"for 1 or for 3 channels, got \(0.49, 0.48, 0.45\) and \(0.5,\)"):
        layer(std=(0.5,))
    with pytest.raises(ValueError, match=r"stream must be an int >= 1.*got 0"):
        layer(stream=0)
    with pytest.raises(ValueError, match=r"has 6 examples.*HyperBatch has 5"):
        layer()(images(), sampled(5))
    with pytest.raises(KeyError, match="no hyperparameter 'hue'"):
        layer(["hue"])(images(), sampled(6, space=stn.HyperparameterSpace([stn.Hyperparameter("x", init=0.0)])))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("x", "says"),
    [
        (images().float(), r"uint8 images \(B, 3, 8, 8\).*normalises them itself; got \(6, 3, 8, 8\) torch.float32"),
        (images(channels=1), r"\(B, 3, 8, 8\).*got \(6, 1, 8, 8\) torch.uint8"),
        (images()[0], r"\(B, 3, 8, 8\).*got \(3, 8, 8\) torch.uint8"),
        (images(width=9), r"\(B, 3, 8, 8\).*got \(6, 3, 8, 9\) torch.uint8"),
    ],
)
def test_other_images_than_the_network_takes_are_refused(x, says, training):
    with pytest.raises(ValueError, match=says):
        layer(image_size=8).train(training)(x, sampled(6))
