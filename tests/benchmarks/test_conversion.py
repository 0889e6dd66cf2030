"""The command of `benchmarks.conversion` writes rows, its networks are the same, and its loss is the right one."""

import json
import re
import sys
from collections import defaultdict
from functools import partial

import pytest
import torch
from libraries import library
from random_response import respond

from benchmarks import conversion, gated, plain
from stn_fast.errors import UserError
from stn_fast.models import resnet
from stn_fast.training.batches import as_batch
from stn_fast.training.task import outputs

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shapes = {"resnet18": (4, 3, 32, 32), "gpt2": (2, 8), "alexnet": (2, 3, 32, 32)}
    shapes |= {"own-resnet18": (2, 3, 16, 16), "language": (5, 3, 6, 13)}
    monkeypatch.setattr(conversion, "SHAPES", shapes)
    for module in (gated, plain):
        monkeypatch.setattr(module, "FULLY_CONNECTED", (1024, 64, 64, 10))
    narrow = (8, 8, 16, 16)
    monkeypatch.setattr(gated, "STAGES", narrow)
    monkeypatch.setattr(resnet, "resnet18", partial(resnet.ResNet, resnet.BasicBlock, 8, narrow, 2, 3, 10))
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


@pytest.mark.parametrize("network", conversion.PAIRS)
def test_gated_and_converted_layers_take_turns(network, tmp_path):
    file = tmp_path / "rows.json"
    arguments = ["--networks", network, "--seconds", "0", "--rounds", "1"]
    assert conversion.main([*arguments, "--json", str(file)]) == 0
    found = {(row["mode"], row["provider"]): row["ratio_to_gated"] for row in json.loads(file.read_text())}
    assert found.keys() == {(mode, of) for mode in ("train", "valid") for of in ("gated", "converted")}
    assert all(ratio > 0 for ratio in found.values())


def parameters(model):
    """{name in a layer: the parameters with this name, in the order of the layers}, those of LSTMs as of one layer."""
    found = defaultdict(list)
    for name, parameter in model.named_parameters():
        found[re.sub(r"_l\d+$", "_l0", name.rpartition(".")[2])].append(parameter)
    return dict(sorted(found.items()))


@pytest.mark.parametrize("step", ["train", "valid"])
@pytest.mark.parametrize("network", conversion.PAIRS)
def test_the_gated_network_is_the_converted_one(network, step):
    """Same weights and draws in both: the same outputs, losses and gradients of weights or hyperparameters."""
    pair = conversion.PAIRS[network]()
    batch = as_batch(next(pair.batches(CPU)), CPU)
    ours, theirs = respond(pair.gated()), pair.converted()
    found, expected = parameters(ours), parameters(theirs)
    assert found.keys() == expected.keys()
    with torch.no_grad():
        for name, layers in found.items():
            for mine, other in zip(layers, expected[name], strict=True):
                other.copy_(mine)

    def computed(model):
        location, raw_scale = pair.space.initial_state()
        state = [location + 2, raw_scale]  # rates above those at the start, which drop almost nothing
        if step == "valid":
            of, model = [one.requires_grad_() for one in state], model.eval()
        else:
            of = [parameter for layers in parameters(model).values() for parameter in layers]

        def sample():
            return pair.space.sample(*state, batch_size=batch.examples, seed=0, step=0)

        loss = batch.finish(pair.losses[step == "valid"](model, batch, sample()))
        return outputs(model, sample(), batch.inputs), loss, torch.autograd.grad(loss, of)

    torch.testing.assert_close(computed(ours), computed(theirs))


def test_the_loss_compares_each_position_with_the_next_character():
    tokens, targets = conversion.gpt2_batch()
    assert torch.equal(targets[:, :-1], tokens[:, 1:])
    logits = torch.nn.functional.one_hot(targets, conversion.CHARACTERS) * 100.0
    assert conversion.loss(logits, targets) < 1e-6
