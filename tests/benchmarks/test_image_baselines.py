"""What the package is compared with on images computes what it stands for."""

import numpy as np
import pytest
import torch

from benchmarks import baselines, image_cases, published, steps
from benchmarks.cases import Case
from stn_fast.ops.augment import STRENGTHS
from stn_fast.recipes import recipe
from stn_fast.training.spaces import build_space
from stn_fast.training.task import outputs


def test_eager_gated_convolution_is_one_convolution_with_each_examples_own_filters() -> None:
    torch.manual_seed(0)
    x, weight, response = torch.randn(3, 2, 5, 5), torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    bias, response_bias, h = torch.randn(4), torch.randn(4), torch.randn(3, 6)
    gates = torch.randn(4, 6), torch.randn(4, 6)
    want = torch.cat(
        [
            torch.conv2d(
                x[b : b + 1],
                weight + (gates[0] @ h[b])[:, None, None, None] * response,
                bias + (gates[1] @ h[b]) * response_bias,
                stride=2,
                padding=1,
            )
            for b in range(3)
        ]
    )
    got = baselines.gated_conv2d(x, weight, bias, response, response_bias, *gates, h, stride=2, padding=1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    products = torch.conv2d(x, torch.cat([weight, response]), stride=2, padding=1)
    fused = baselines.gated_channels(products, bias, response_bias, *gates, h)
    torch.testing.assert_close(fused, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("mode", image_cases.GATED_CONV2D_MODES)
def test_convolutions_agree_in_the_layout_of_either_device(mode, device, monkeypatch) -> None:
    """The layouts of CUDA's cases, with the arithmetic on the CPU."""
    layouts = image_cases.layouts(torch.device(device))
    monkeypatch.setattr(image_cases, "layouts", lambda _: layouts)
    shape = (4, 5, 9, 9, 6, 3, 2)
    providers = Case(
        "gated_conv2d_alexnet", mode, shape, torch.float32, torch.device("cpu"), compiled=False
    ).providers()
    got, want = (providers[name].call(None) for name in ("stn_fast", "eager"))
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    products, (dx, _, _) = providers["limit_one_convolution"].call(None)
    assert dx.is_contiguous(memory_format=layouts[0])
    assert products.shape[1] == 2 * shape[4]
    assert {"channels_last_convolution", "contiguous_convolution"} & set(providers) == {
        "contiguous_convolution" if device == "cuda" else "channels_last_convolution"
    }


def test_the_published_network_is_the_packages_alexnet() -> None:
    """Same weights in both: the same logits, so their steps do the same arithmetic."""
    from stn_fast.models import alexnet, tuned

    space = build_space(recipe("cifar10").config())
    ours, theirs = tuned(alexnet(), space).eval(), published.AlexNet(len(space))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    gated = [module for module in ours.modules() if hasattr(module, "response_weight")]
    for mine, other in zip(gated, [*theirs.convolutions, *theirs.layers], strict=True):
        other.load_state_dict(mine.state_dict())
    x, h = torch.randn(2, 3, 32, 32), torch.randn(2, len(space))
    hyper = space.sample(*space.initial_state(), batch_size=2, seed=0, step=0)
    hyper.response = h
    with torch.no_grad():
        torch.testing.assert_close(outputs(ours, hyper, x), theirs(x, h, None), rtol=1e-3, atol=1e-4)


def test_the_published_steps_train_and_tune() -> None:
    config = recipe("cifar10").config()
    space = build_space(config)
    ranges = [baselines.Range(h.low, h.high, h.integer) for h in space]
    assert set(published.AUGMENTATIONS) == {name for name in space.names if name in STRENGTHS}
    trainer = published.Trainer(space.names, ranges, *space.initial_state())
    images, targets = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8), torch.arange(4)
    losses = [trainer.train_step(images, targets).item() for _ in range(2)]
    assert np.isfinite(losses).all()
    weight = trainer.model.layers[0].weight
    before, location = weight.detach().clone(), trainer.location.detach().clone()
    trainer.valid_step(images / 255, targets)
    assert torch.equal(weight, before)
    assert weight.grad is not None
    assert (trainer.location != location).all()


def test_the_command_for_steps_prints_a_ratio_and_writes_rows(tmp_path, capsys) -> None:
    file = tmp_path / "rows.json"
    assert steps.main(["--modes", "valid", "--batch", "2", "--seconds", "0", "--rounds", "2", "--json", str(file)]) == 0
    assert "ratio" in capsys.readouterr().out
    assert '"op": "alexnet_step"' in file.read_text()
