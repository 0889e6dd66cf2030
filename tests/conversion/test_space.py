"""The space that a network suggests."""

import pytest
from torch import nn

import stn_fast as stn


class Layer(nn.Module):
    def __init__(self, rate):
        super().__init__()
        self.attn_drop, self.drop = nn.Dropout(rate), nn.Dropout(0.3)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.pos_drop = nn.Dropout(0.0)
        self.blocks = nn.ModuleList([Layer(0.1), Layer(0.2)])
        self.head = nn.Sequential(nn.Dropout2d(0.99), nn.Dropout(0.5))


def starts(group):
    return {one.name: one.init for one in stn.suggest_space(Network(), group) if one.name != "weight_decay"}


def test_one_rate_per_class_and_role():
    expected = {"pos_drop": 0.05, "attn_drop": 0.15, "drop": 0.3, "dropout2d": 0.9, "dropout": 0.5}
    assert starts("type") == pytest.approx(expected)


def test_one_rate_per_module():
    expected = {"pos_drop": 0.05, "blocks_0_attn_drop": 0.1, "blocks_0_drop": 0.3, "blocks_1_attn_drop": 0.2}
    assert starts("each") == pytest.approx(expected | {"blocks_1_drop": 0.3, "head_0": 0.9, "head_1": 0.5})


def test_one_rate_per_top_level_block():
    expected = {"pos_drop": 0.05, "blocks_0_dropout": 0.2, "blocks_1_dropout": 0.25, "head_dropout": 0.745}
    assert starts("block") == pytest.approx(expected)


def test_classes_with_the_same_role_have_their_own_rates():
    model = nn.ModuleDict(
        {"a": nn.ModuleDict({"drop": nn.Dropout(0.1)}), "b": nn.ModuleDict({"drop": nn.Dropout1d(0.2)})}
    )
    assert stn.suggest_space(model).names == ("drop_dropout", "drop_dropout1d", "weight_decay")


def test_ranges_and_weight_decay():
    *rates, decay = stn.suggest_space(Network())
    assert all((one.low, one.high, one.scale, one.per_example) == (0.0, 0.95, 1.0, True) for one in rates)
    assert decay == stn.Hyperparameter("weight_decay", low=0.0, init=1e-4, scale=1.0)


def test_modules_have_rates_of_their_own_whatever_their_names():
    model = nn.ModuleDict({name: nn.ModuleDict({part: nn.Dropout(rate)}) for name, part, rate in (
        ("a_b", "c", 0.1), ("a", "b_c", 0.9))})  # fmt: skip
    assert [one.init for one in stn.suggest_space(model, "each")][:2] == [0.1, 0.9]
    assert stn.suggest_space(nn.LSTM(2, 2, 2, dropout=0.1), "each").names[0] == "lstm_dropout"
    model = nn.ModuleDict({"weight_decay": nn.Dropout(0.1)})
    assert stn.suggest_space(model).names == ("weight_decay_dropout", "weight_decay")


def test_without_dropout_there_is_only_weight_decay():
    assert stn.suggest_space(nn.Linear(2, 2)).names == ("weight_decay",)


def test_dropout_in_modules_that_are_left_out_has_no_rate():
    own = type("Own", (nn.TransformerEncoderLayer,), {})
    assert stn.suggest_space(own(4, 2, 8)).names == ("weight_decay",)


def test_dropout_of_attention_weights_has_the_name_of_the_attention():
    names = stn.suggest_space(nn.TransformerEncoderLayer(4, 2, 8)).names
    assert names == ("self_attn_dropout", "dropout", "dropout1", "dropout2", "weight_decay")


@pytest.mark.parametrize("adapter", ["default", "french"])
def test_the_dropouts_of_adapters_of_peft_have_the_name_of_their_dict(adapter):
    model = nn.ModuleDict({"lora_dropout": nn.ModuleDict({adapter: nn.Dropout(0.3)}), "head": nn.Linear(2, 2)})
    assert stn.suggest_space(model).names == ("lora_dropout", "weight_decay")


def test_dropouts_in_other_dicts_have_their_own_names():
    model = nn.ModuleDict({"default": nn.Dropout(0.3), "parts": nn.ModuleDict({"drop": nn.Dropout(0.2)})})
    assert stn.suggest_space(nn.Sequential(model, nn.Linear(2, 2))).names == ("default", "drop", "weight_decay")


def test_convert_uses_the_suggestion():
    model = Network()
    space = stn.suggest_space(model, "each")
    tuned = stn.convert(model, group="each", quiet=True)
    assert tuned.tuned_hyperparameters.space == space
    assert tuned.blocks[1].attn_drop.name == "blocks_1_attn_drop"


def test_an_unknown_group_is_refused():
    with pytest.raises(ValueError, match="group must be one of 'type', 'block', 'each', got 'all'"):
        stn.suggest_space(Network(), "all")
