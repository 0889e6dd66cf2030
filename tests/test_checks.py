"""Numbers of NumPy are taken everywhere; what doesn't fit is a ValueError that names the argument."""

import numpy as np
import pytest
import torch

import stn_fast as stn
from stn_fast import checks, functional
from stn_fast.layers import PerExampleAugmentation

SPACE = stn.HyperparameterSpace([stn.Hyperparameter("rate", low=0.0, high=0.9, init=0.3)])
X, RATE = torch.ones(4, 8), torch.full((4,), 0.5)
IMAGES = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)


def dropped(**change):
    return functional.dropout(X, RATE, **dict(seed=3, step=5, stream=2, first_example=7) | change)


def noisy(**change):
    return functional.noise(X, RATE, **dict(seed=3, step=5, stream=2, first_example=7) | change)


def augmented(**change):
    draw = dict(seed=3, step=5, stream=2, first_example=7, crop_padding=1, flip=0.5)
    return functional.augment(IMAGES, {}, mean=[0.5] * 3, std=[0.5] * 3, **draw | change)


def looked_up(**change):
    tables = torch.ones(9, 3), torch.ones(9, 3), torch.ones(3, 1)
    draw = dict(rate=torch.full((1,), 0.5), seed=3, step=5, stream=2)
    return functional.gated_embedding(torch.arange(9)[None], *tables, torch.zeros(1, 1), **draw | change)


def sampled(**change):
    return SPACE.sample(*SPACE.initial_state(), **dict(batch_size=4, seed=3, step=5, first_example=7) | change).values


def unperturbed(**change):
    draw = dict(batch_size=4, seed=3, step=5, first_example=7)
    hyper = SPACE.at(SPACE.initial_state()[0], **draw | change)
    return torch.cat([hyper.values.flatten(), hyper.step[None]])


DRAWS = [dropped, noisy, augmented, sampled, unperturbed]


@pytest.mark.parametrize("draw", [*DRAWS, looked_up])
@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_numpys_integers_draw_what_ints_draw(draw, kind):
    numbers = dict(seed=3, step=5, first_example=7, stream=2, batch_size=4, crop_padding=1)
    taken = {name: number for name, number in numbers.items() if _takes(draw, name)}
    assert len(taken) >= 3
    want = draw()
    for name, number in taken.items():
        assert torch.equal(draw(**{name: kind(number)}), want), name


def _takes(draw, name):
    try:
        draw(**{name: 1})
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", True),
        ("seed", 2**64),
        ("seed", "3"),
        ("seed", np.float64(3.0)),
        ("seed", np.int64(-1)),
        ("step", 2**63),
        ("step", np.array([3])),
        ("step", None),
        ("step", False),
        ("first_example", 2**70),
        ("first_example", torch.tensor(3)),
        ("first_example", None),
    ],
)
def test_wrong_rng_coordinates_are_a_value_error_that_names_them(draw, name, value):
    with pytest.raises(ValueError, match=rf"\w+: {name} must be "):
        draw(**{name: value})


@pytest.mark.parametrize("draw", [dropped, noisy, augmented, sampled])
def test_a_tensor_below_zero_is_refused_as_a_step_where_it_draws(draw):
    with pytest.raises(ValueError, match=r"(dropout|noise|augment|perturb): step must be >= 0, got -3"):
        draw(step=torch.tensor(-3))


@pytest.mark.parametrize("draw", [dropped, noisy, augmented, looked_up])
@pytest.mark.parametrize("value", [1.5, 0, -1, 2**32, True, "2", None, torch.tensor(2)])
def test_a_wrong_stream_is_a_value_error_that_names_it(draw, value):
    with pytest.raises(ValueError, match=r"stream must be an int >= 1 and < 2\*\*32 .*, got "):
        draw(stream=value)


@pytest.mark.parametrize("make", [sampled, unperturbed])
@pytest.mark.parametrize("value", [-1, 1.0, True, "4", 2**63, np.float32(4), None])
def test_a_wrong_batch_size_is_a_value_error_that_names_it(make, value):
    with pytest.raises(ValueError, match=r"(sample|at): batch_size must be an int >= 0 "):
        make(batch_size=value)


def test_a_step_without_a_known_value_is_not_read():
    """Under torch.compile and on the meta device reading it would break the graph, or fail."""
    compiled = torch.compile(lambda step: dropped(step=step), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.tensor(5)), dropped())


@pytest.mark.parametrize("value", [1.5, True, "1", -1, None])
def test_a_layers_stream_and_padding_are_checked_where_it_is_made(value):
    with pytest.raises(ValueError, match="PerExampleNoise: stream must be an int >= 1"):
        stn.PerExampleNoise("rate", stream=value)
    with pytest.raises(ValueError, match="PerExampleAugmentation: crop_padding must be an int >= 0"):
        PerExampleAugmentation([], mean=[0.5], std=[0.5], stream=1, crop_padding=value)


def test_numpy_numbers_are_accepted_as_augmentation_settings():
    given = dict(crop_padding=np.int64(2), image_size=np.int32(4), flip=np.float32(0.5), stream=np.int64(3))
    layer = PerExampleAugmentation([], mean=[0.5] * 3, std=[0.5] * 3, **given)
    plain = PerExampleAugmentation([], mean=[0.5] * 3, std=[0.5] * 3, crop_padding=2, image_size=4, flip=0.5, stream=3)
    one, other = (SPACE.at(SPACE.initial_state()[0], batch_size=2) for _ in range(2))
    assert torch.equal(layer(IMAGES, one), plain(IMAGES, other))


@pytest.mark.parametrize("value", ["0.5", True, None, np.nan, torch.tensor(0.5)])
def test_a_flip_rate_that_is_not_a_number_is_named(value):
    with pytest.raises(ValueError, match="augment: flip must be a finite number, got"):
        augmented(flip=value)


def test_a_number_stays_the_kind_of_number_it_was():
    assert [type(checks.real_number("x", "y", value)) for value in (1, np.int8(1), 1.0, np.float16(1.0))] == [
        int,
        int,
        float,
        float,
    ]
