import pytest
import torch

import stn_fast as stn
from stn_fast import functional
from stn_fast.layers.regularisers import DropConnect

SPACE = stn.HyperparameterSpace(
    [
        stn.Hyperparameter("rate", low=0.0, high=0.9, init=0.4),
        stn.Hyperparameter("noise", low=0.0, init=0.5),
        stn.Hyperparameter("certain", low=0.0, high=1.0, init=0.5),
        stn.Hyperparameter("negative", low=-0.5, high=0.5, init=0.1),
    ]
)


def sampled(batch, step=0, first_example=0):
    return SPACE.sample(*SPACE.initial_state(), batch_size=batch, seed=5, step=step, first_example=first_example)


def test_dropout_takes_rate_seed_step_and_example_from_the_batch():
    layer, x, hyper = stn.PerExampleDropout("rate", stream=3), torch.randn(6, 20), sampled(6, 4, first_example=100)
    want = functional.dropout(x, hyper["rate"], seed=5, step=4, stream=3, first_example=100)
    assert torch.equal(layer(x, hyper), want)


def test_noise_takes_scale_seed_step_and_example_from_the_batch():
    layer, x, hyper = stn.PerExampleNoise("noise", stream=3), torch.randn(6, 20), sampled(6, 4, first_example=100)
    want = functional.noise(x, hyper["noise"], seed=5, step=4, stream=3, first_example=100)
    assert torch.equal(layer(x, hyper), want)


@pytest.mark.parametrize("layer", [stn.PerExampleDropout("rate", stream=1), stn.PerExampleNoise("noise", stream=1)])
def test_eval_mode_is_the_identity(layer):
    x = torch.randn(6, 20)
    assert layer.eval()(x, sampled(6)) is x
    assert not torch.equal(layer.train()(x, sampled(6)), x)


def test_locked_dropout_uses_one_mask_over_time():
    layer = stn.PerExampleDropout("rate", stream=1, shared_dims=(0,))
    y = layer(torch.ones(9, 4, 30), sampled(4), example_dim=1)
    assert ((y == 0) == (y[0] == 0)).all()
    assert (y == 0).any()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_dropout2d_drops_whole_channels_at_each_examples_rate(layout):
    layer, hyper = stn.PerExampleDropout2d("rate", stream=3), sampled(6, 4, first_example=100)
    x = torch.randn(6, 40, 5, 4).contiguous(memory_format=layout).requires_grad_()
    y = layer(x, hyper)
    kept = functional.dropout(torch.ones(6, 40), hyper["rate"], seed=5, step=4, stream=3, first_example=100)
    assert torch.equal(y, x * kept[:, :, None, None])
    assert 0 < (kept == 0).sum() < kept.numel()
    assert y.is_contiguous(memory_format=layout)
    dy = torch.randn_like(y)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], dy * kept[:, :, None, None])
    assert layer.eval()(x, hyper) is x


def test_dropout2d_of_anything_but_images_is_an_error():
    layer = stn.PerExampleDropout2d("rate", stream=1)
    with pytest.raises(ValueError, match=r"'rate'\): x must be images \(B, C, H, W\).*got x \(6, 40\)"):
        layer(torch.ones(6, 40), sampled(6))
    with pytest.raises(ValueError, match=r"example_dim=0, got.*example_dim=1"):
        layer(torch.ones(6, 6, 2, 2), sampled(6), example_dim=1)


def test_unperturbed_batches_regularise_at_their_location():
    location, _ = SPACE.initial_state()
    y = stn.PerExampleDropout("rate", stream=1)(torch.ones(50, 200), SPACE.at(location, batch_size=50, seed=1, step=2))
    assert (y == 0).float().mean().item() == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize(
    ("name", "bounds"), [("certain", "low=0.0, high=1.0"), ("negative", "low=-0.5"), ("noise", "high=None")]
)
def test_a_rate_that_could_leave_its_domain_is_refused(name, bounds):
    """Bounded by 1, a rate reaches it in float32, and inverted dropout divides 0 by 0."""
    with pytest.raises(ValueError, match=f"'{name}' is a dropout rate.*high < 1, got.*{bounds}"):
        stn.PerExampleDropout(name, stream=1)(torch.ones(3, 4), sampled(3))


def test_a_noise_scale_that_could_be_negative_is_refused():
    with pytest.raises(ValueError, match=r"'negative' is a noise scale.*got low=-0.5"):
        stn.PerExampleNoise("negative", stream=1)(torch.ones(3, 4), sampled(3))


def test_a_rate_of_whole_numbers_is_refused():
    space = stn.HyperparameterSpace([stn.Hyperparameter("whole", low=0.0, high=0.9, init=0.4, integer=True)])
    hyper = space.at(space.initial_state()[0], batch_size=3)
    with pytest.raises(ValueError, match="'whole' is a dropout rate, and with integer=True it could only be 0"):
        stn.PerExampleDropout("whole", stream=1)(torch.ones(3, 4), hyper)


@pytest.mark.parametrize(
    "layer",
    [
        stn.PerExampleDropout("rate", stream=1),
        stn.PerExampleDropout2d("rate", stream=1),
        stn.PerExampleNoise("noise", stream=1),
        DropConnect("rate", stream=1),
    ],
)
def test_regularisers_refuse_a_response_without_rng_coordinates(layer):
    with pytest.raises(TypeError, match=r"\('(rate|noise)'\): hyper must be a HyperBatch in training mode, got Tensor"):
        layer(torch.ones(3, 4, 2, 2), sampled(3).response)


def test_wrong_arguments_are_named_in_the_error():
    with pytest.raises(ValueError, match=r"stream must be an int >= 1.*got 0"):
        stn.PerExampleDropout("rate", stream=0)
    with pytest.raises(ValueError, match=r"x \(4, 2\) has 4 examples.*HyperBatch has 3"):
        stn.PerExampleDropout("rate", stream=1)(torch.ones(4, 2), sampled(3))
    with pytest.raises(KeyError, match="no hyperparameter 'rat'"):
        stn.PerExampleDropout("rat", stream=1)(torch.ones(3, 2), sampled(3))
