"""Which modules an addition concerns, its hyperparameter, what is reported, and what is refused."""

import pytest
from torch import nn

import stn_fast as stn


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x):
        return x + self.down(self.up(x))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.layer4 = nn.Linear(5, 6), nn.Sequential(Part(), Part())
        self.parts, self.head = nn.ModuleList([Part()]), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.parts[0](self.layer4(self.stem(x))))


def dropped_names(*additions):
    model = stn.convert(Network(), list(additions), quiet=True)
    return [list(one.modules) for one in model.tuned_hyperparameters.added]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("layer4.*", ["layer4.0", "layer4.1"]),
        ("layer4.?.up", ["layer4.0.up", "layer4.1.up"]),
        ("layer4", ["layer4"]),
        ("*.up", ["layer4.0.up", "layer4.1.up", "parts.0.up"]),
        ("parts*", ["parts.0"]),
        ("*", ["stem", "layer4", "parts.0", "head"]),
    ],
)
def test_the_pattern_fits_the_outermost_modules_that_are_called(pattern, names):
    assert dropped_names(stn.Dropout(pattern)) == [names]


def test_a_module_has_the_rate_of_the_first_entry_that_fits_it():
    first, second = stn.Dropout("layer4.1", init=0.5), stn.Dropout("layer4.*", init=0.2, name="others")
    assert dropped_names(first, second) == [["layer4.1"], ["layer4.0"]]
    assert dropped_names(stn.Dropout("layer4.0.up"), second) == [["layer4.0.up"], ["layer4.0", "layer4.1"]]


def test_names_and_ranges():
    one = stn.Dropout("layer4.*", init=0.3, high=0.8, scale=0.5).hyperparameter
    assert one == stn.Hyperparameter("dropout_layer4", low=0.0, high=0.8, init=0.3, scale=0.5)
    assert stn.Dropout("*").hyperparameter == stn.Hyperparameter("dropout", low=0.0, high=0.95, init=0.1, scale=1.0)
    space = stn.convert(Network(), [stn.Dropout("head"), stn.WeightDecay()], quiet=True).tuned_hyperparameters.space
    assert space.names == ("dropout_head", "weight_decay")


def test_the_table_says_what_was_added_and_where(capsys):
    stn.convert(Network(), [stn.Dropout("layer4.*")])
    shown = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert ["dropout_layer4", "0.1", "[0, 0.95)  added as Dropout of layer4.0, layer4.1"] in shown


def test_wrong_entries_are_named_and_change_nothing():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.2), nn.ModuleList([nn.ReLU()]))
    cases = [
        (stn.Dropout("9"), "no module for Dropout.*must fit a module that is called"),
        (stn.Dropout("2"), r"no module for Dropout\(pattern='2'"),
        (stn.Dropout("*"), "would be the hyperparameter 'dropout', which is another one: give it another name"),
        (stn.Dropout("0", name="weight_decay"), "would be the hyperparameter 'weight_decay', which is another"),
    ]
    for addition, message in cases:
        for more in ([], [stn.WeightDecay(name="decay")]):
            with pytest.raises(ValueError, match=message):
                stn.convert(model, [*more, addition])
        assert not any(module._forward_hooks for module in model.modules())
        assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(init=0.0), r"'dropout_a': init=0\.0 must be strictly inside"),
        (dict(init=0.96), r"'dropout_a': init=0\.96 must be strictly inside"),
        (dict(high=1.0), "'dropout_a' is a dropout rate, so its bounds must be 0 <= low and high < 1"),
        (dict(low=-0.5), "'dropout_a' is a dropout rate, so its bounds"),
        (dict(pattern=""), "Dropout: pattern must be a non-empty string"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        stn.Dropout(**dict(pattern="a") | options)
