"""The examples with models and loops of other libraries run, tune, and end with a plain model."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from libraries import library
from torch import nn

import stn_fast as stn
from stn_fast.conversion import Converted
from stn_fast.data import Images, Split, cifar10, fashion_mnist, ptb
from stn_fast.data.text import Corpus

FOLDER = Path(__file__).parent.parent / "examples"
IMAGES = ["--epochs", "2", "--images", "48"]
EPOCHS = ["--epochs", "2"]
# name: (the library, arguments, some of what is tuned)
EXAMPLES = {
    "timm_resnet": ("timm", IMAGES, {"rotation", "drop_path", "dropout_1_global_pool", "weight_decay"}),
    "timm_vit": ("timm", IMAGES, {"hue", "proj_drop", "attn_drop", "drop_path1", "weight_decay"}),
    "gpt2": ("transformers", EPOCHS, {"drop", "resid_dropout", "dropout", "weight_decay"}),
    "bert": ("transformers", EPOCHS, {"dropout", "weight_decay"}),
    "lora": ("peft", EPOCHS, {"lora_dropout", "weight_decay", "label_smoothing"}),
    "tabular": ("sklearn", EPOCHS, {"dropout", "weight_decay"}),
    "fabric": ("lightning_fabric", EPOCHS, {"dropout", "weight_decay"}),
    "accelerate_loop": ("accelerate", EPOCHS, {"dropout", "weight_decay"}),
}


def few_images(channels, side):
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (128, channels, side, side), dtype=torch.uint8, generator=draw)
    split = Split(pixels, torch.arange(128) % 10)
    return Images(split, split, (0.5,) * channels, (0.25,) * channels)


def few_words():
    text = torch.arange(512) % 20
    return Corpus(text, text, text, tuple(map(str, range(20))))


@pytest.fixture
def data(monkeypatch):
    """Small data in place of the published ones."""
    monkeypatch.setattr(fashion_mnist, "load", lambda root: few_images(1, 28))
    monkeypatch.setattr(cifar10, "load", lambda root: few_images(3, 32))
    monkeypatch.setattr(ptb, "load", lambda root, train_fraction: few_words())


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_tunes_and_folds(name, data, monkeypatch, capsys):
    needed, arguments, tuned = EXAMPLES[name]
    module = library(needed)
    if name == "timm_vit":
        monkeypatch.setattr(module.layers.config, "_USE_FUSED_ATTN", 1)  # the example changes it; only for this test
    folds = []
    fold = stn.SelfTuner.fold
    monkeypatch.setattr(stn.SelfTuner, "fold", lambda tuner: folds.append((tuner, fold(tuner))) or folds[-1][1])
    importlib.import_module(name).main(arguments)
    ((tuner, plain),) = folds
    assert tuned <= set(tuner.values())
    assert tuner.values() != pytest.approx({one.name: one.init for one in tuner.method.space}, rel=1e-6)
    assert isinstance(plain, nn.Module)
    assert not [one for one in plain.modules() if isinstance(one, Converted)]
    scores = re.findall(r"(?:self-tuned|accuracy|error)\D* (\d+\.\d+)", capsys.readouterr().out)
    assert scores


def test_fsdp_loop_tunes_and_goes_on_from_its_checkpoint(tmp_path, monkeypatch, capsys):
    """As the only process, with its shards; tests/training/test_sharding.py has two."""
    library("sklearn")
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    for steps in (10, 12):
        importlib.import_module("fsdp_loop").main(["--steps", str(steps), "--checkpoints", str(tmp_path)])
        assert re.search(r"'weight_decay': .*\ntest accuracy 0\.\d+\n", capsys.readouterr().out)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000010"]


def test_stn_in_120_lines_tunes_and_folds(capsys):
    importlib.import_module("stn_in_120_lines").main(["--cycles", "60"])
    said = capsys.readouterr().out
    first, last = re.findall(r"rate (\S+)  decay (\S+)  validation (\S+)  test (\S+)", said)
    assert first[:2] != last[:2]
    assert float(last[2]) < 0.6 * float(first[2])
    assert float(last[3]) < 0.6 * float(first[3])
    accuracy = float(re.search(r"test accuracy (\S+)", said)[1])
    assert accuracy > 0.7


@pytest.mark.parametrize("name", [*EXAMPLES, "ray_train", "stn_in_120_lines"])
def test_example_is_short(name):
    lines = (FOLDER / f"{name}.py").read_text().count("\n")
    assert lines < (121 if name == "stn_in_120_lines" else 60)
