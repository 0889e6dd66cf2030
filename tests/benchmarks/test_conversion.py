"""The command of `benchmarks.conversion` writes rows, and its loss is that of the next character."""

import json
import sys

import pytest
import torch
from libraries import library
from random_response import respond

from benchmarks import conversion, gated
from stn_fast.errors import UserError
from stn_fast.training.task import outputs


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shapes = {"resnet18": (4, 3, 32, 32), "gpt2": (2, 8), "alexnet": (2, 3, 32, 32)}
    monkeypatch.setattr(conversion, "SHAPES", shapes)
    monkeypatch.setattr(conversion, "RESNET18", dict(num_classes=10, channels=(8, 8, 16, 16)))
    monkeypatch.setattr(conversion, "GPT2", dict(n_layer=1, n_head=2, n_embd=8, n_positions=8))


def test_the_command_writes_a_row_for_everyone(tmp_path, capsys):
    library("timm")
    library("transformers")
    file = tmp_path / "rows.json"
    assert conversion.main(["--seconds", "0.01", "--rounds", "2", "--json", str(file)]) == 0
    rows = {(len(row["shape"]), row["mode"], row["provider"]): row for row in json.loads(file.read_text())}
    for dimensions in (4, 2):
        for mode, providers in (("train", conversion.PROVIDERS[:3]), ("valid", ("converted", "plain"))):
            assert all(rows[dimensions, mode, name]["ratio_to_plain"] > 0 for name in providers)
    assert "ratio to plain" in capsys.readouterr().out


@pytest.mark.parametrize(("network", "missing"), [("resnet18", "timm"), ("gpt2", "transformers")])
def test_a_missing_library_is_named_with_the_extra_that_installs_it(network, missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=rf"{missing} is missing: pip install 'stn-fast\[examples\]'"):
        conversion.main(["--networks", network])


def test_gated_and_converted_layers_take_turns(tmp_path):
    file = tmp_path / "rows.json"
    arguments = ["--networks", "alexnet", "--seconds", "0", "--rounds", "1", "--modes", "valid"]
    assert conversion.main([*arguments, "--json", str(file)]) == 0
    found = {row["provider"]: row["ratio_to_gated"] for row in json.loads(file.read_text())}
    assert found.keys() == {"gated", "converted"}
    assert all(ratio > 0 for ratio in found.values())


def test_the_gated_network_is_the_converted_one():
    """Same weights and draws in both: the same logits, in training mode too."""
    space = conversion.dropout_rates()
    ours, theirs = respond(gated.AlexNet(len(space))), conversion.converted_alexnet(space)
    with torch.no_grad():
        layers = [module for module in theirs.modules() if hasattr(module, "response_weight")]
        for mine, other in zip([*ours.convolutions, *ours.layers], layers, strict=True):
            for name, parameter in mine.named_parameters():
                other.get_parameter(name).copy_(parameter)
        images, start = torch.randn(2, 3, 32, 32), space.initial_state()
        found, expected = (
            outputs(model, space.sample(*start, batch_size=2, seed=0, step=0), images) for model in (ours, theirs)
        )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_the_loss_compares_each_position_with_the_next_character():
    tokens, targets = conversion.gpt2_batch()
    assert torch.equal(targets[:, :-1], tokens[:, 1:])
    logits = torch.nn.functional.one_hot(targets, conversion.CHARACTERS) * 100.0
    assert conversion.loss(logits, targets) < 1e-6
