"""What a conversion keeps, what it leaves out, what it reports, and what it refuses."""

import copy
import io
import pickle
from types import SimpleNamespace

import pytest
import torch
from converted_networks import NETWORKS, Block, Text, converted, inputs, plain, sampled
from numerics import relative_error
from torch import nn
from torch.nn.utils import parametrize

import stn_fast as stn
from stn_fast.conversion import Entry, TunedHyperparameters, rules
from stn_fast.training.parameters import is_response

RATE = stn.Hyperparameter("rate", low=0.0, high=0.9, init=0.2)
DECAY = stn.Hyperparameter("weight_decay", low=0.0, init=1e-3)


@pytest.mark.parametrize("kind", NETWORKS)
def test_parameters_buffers_names_and_settings_are_kept(kind):
    model = plain(kind, 0.3)
    model.requires_grad_(True)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    modules = dict(model.named_modules())
    tuned = stn.convert(model, quiet=True)
    assert tuned is model
    now = dict(tuned.named_parameters())
    assert all(now[name] is parameter for name, parameter in parameters.items())
    assert {name for name in now if name not in parameters} == {name for name in now if is_response(name)}
    assert all(now[name].dtype == torch.float64 for name in now)
    assert all(dict(tuned.named_buffers())[name] is buffer for name, buffer in buffers.items())
    assert all(dict(tuned.named_modules())[name] is module for name, module in modules.items())
    assert isinstance(tuned.tuned_hyperparameters, TunedHyperparameters)


def test_converted_modules_are_instances_of_their_plain_classes():
    tuned = stn.convert(Text(0.3), quiet=True)
    assert isinstance(tuned.lstm, nn.LSTM)
    assert isinstance(tuned.decoder, nn.Linear)


def test_the_state_of_the_plain_network_lacks_only_the_response_and_the_hyperparameters():
    model = Block(0.3)
    state = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    tuned = stn.convert(model, quiet=True)
    result = tuned.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert all(is_response(key) or key.startswith("tuned_hyperparameters.") for key in result.missing_keys)
    assert {"tuned_hyperparameters.location", "tuned_hyperparameters.raw_scale"} <= set(result.missing_keys)
    assert torch.equal(tuned.up.weight, state["up.weight"])


def test_the_response_starts_as_that_of_gated_layers():
    torch.manual_seed(0)
    table = nn.Embedding(99, 60, padding_idx=7)
    model = nn.ModuleList([nn.Linear(40, 30), nn.Conv2d(20, 30, 3), table, nn.LSTM(40, 30)])
    tuned = stn.convert(model, response_rank=2, quiet=True)
    for name, parameter in tuned.named_parameters():
        if "gate" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name  # of the only hyperparameter
        elif "response" in name and "projection" not in name:
            assert not parameter.any(), name
    bounds = {0: 40**-0.5, 1: (20 * 9) ** -0.5, 2: 0.1}
    for k, bound in bounds.items():
        projection = tuned[k].response_projection.detach()
        assert 0.9 * bound < projection.abs().max() <= bound
    assert not tuned[2].response_projection[7].any()


def test_hooks_are_kept_and_called():
    model, seen = nn.Sequential(nn.Linear(3, 2)), []
    model[0].register_forward_hook(lambda module, given, y: seen.append(type(module).__name__))
    tuned = stn.convert(model, quiet=True).eval()
    tuned(torch.randn(4, 3))
    stn.fold(tuned)(torch.randn(4, 3))
    assert seen == ["Linear", "Linear"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_its_own_hyperparameters_which_its_layers_use(copied):
    tuned, x = converted(plain("text", 0.3)), inputs("text")
    with tuned.tuned_hyperparameters.using(sampled(tuned)):
        twin = copied(tuned)
        want = tuned(x)
    own = twin.tuned_hyperparameters
    assert own.current is None
    assert own is not tuned.tuned_hyperparameters
    assert twin.lstm.tuned is own
    assert twin.embed.tuned is own
    assert twin.decoder.weight is twin.embed.weight
    with own.using(sampled(twin)):
        assert torch.equal(twin(x), want)
    before = tuned.eval()(x)
    own.location.add_(1.0)
    assert relative_error(twin.eval()(x), before) > 1e-3
    assert torch.equal(tuned(x), before)


def test_a_saved_state_restores_response_and_hyperparameters():
    tuned, x = converted(plain("block", 0.3)).eval(), inputs("block")
    file = io.BytesIO()
    torch.save(tuned.state_dict(), file)
    file.seek(0)
    other = stn.convert(plain("block", 0.3), quiet=True).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), tuned(x))


def test_casts_leave_the_hyperparameters_in_float32():
    tuned = stn.convert(nn.Sequential(nn.Linear(3, 2)), quiet=True)
    location = tuned.tuned_hyperparameters.location.clone()
    tuned.to(torch.bfloat16).double()
    assert tuned[0].response_weight.dtype == torch.float64
    assert torch.equal(tuned.tuned_hyperparameters.location, location)


def test_a_sequential_network_passes_its_output_on():
    model, x = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.2)).eval(), torch.randn(4, 3)
    want = model(x)
    assert torch.equal(stn.convert(model, quiet=True)(x), want)


def test_training_mode_needs_hyperparameters_per_example():
    tuned = stn.convert(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.2)), quiet=True)
    for layer in tuned[:2]:
        with pytest.raises(RuntimeError, match=r"[01] \(\w+\) is in training mode.*stn\.SelfTuner.*using\(hyper\)"):
            layer(torch.randn(4, 3))


def test_a_frozen_layer_and_its_children_are_left_alone():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    tuned = stn.convert(model, quiet=True)
    assert type(tuned[0]) is nn.Linear
    assert not tuned[0].weight.requires_grad
    assert "frozen" in tuned.tuned_hyperparameters.report[-1].reason


class Own(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnAttention(nn.MultiheadAttention):
    pass


class OwnEncoder(nn.TransformerEncoderLayer):
    pass


class Mixed(nn.Module):
    """A layer of every kind that is left out, and one that is converted."""

    def __init__(self):
        super().__init__()
        self.own = Own(3, 3)
        self.attention = OwnAttention(4, 2)
        self.encoder = OwnEncoder(4, 2, 8)
        self.rnn = nn.RNN(3, 3)
        self.transposed = nn.ConvTranspose1d(3, 3, 1)
        self.alpha = nn.AlphaDropout(0.1)
        self.lazy = nn.LazyLinear(3)
        self.bounded = nn.Embedding(5, 3, max_norm=1.0)
        self.projected = nn.LSTM(3, 3, proj_size=2)
        self.plain_norm = nn.LayerNorm(3, elementwise_affine=False)
        self.normed = parametrize.register_parametrization(nn.Linear(3, 3), "weight", nn.Identity())
        self.hooked = nn.Linear(3, 3)
        nn.utils.spectral_norm(self.hooked)
        self.quantised = torch.ao.nn.quantized.Quantize(0.1, 0, torch.quint8)
        self.token = nn.Parameter(torch.zeros(3))
        self.linear = nn.Linear(3, 3)


def test_modules_that_cannot_be_converted_are_listed_with_the_reason():
    model = Mixed()
    kinds = {name: type(module) for name, module in model.named_modules()}
    tuned = stn.convert(model, quiet=True)
    report = {entry.name: entry for entry in tuned.tuned_hyperparameters.report}
    assert report["linear"] == Entry("linear", "Linear")
    expected = {
        "": "no rule",
        "own": "subclass of Linear",
        "attention": "its children directly",
        "encoder": "its children directly",
        "rnn": "no rule",
        "transposed": "no rule",
        "alpha": "no rule",
        "lazy": "call the model once",
        "bounded": "max_norm",
        "projected": "proj_size",
        "normed": "parametrized",
        "hooked": "no parameter 'weight'",
        "quantised": "quantised",
    }
    assert report.keys() == {"linear", *expected}
    for name, reason in expected.items():
        assert reason in report[name].reason, name
    left_alone = (name for name in kinds if name != "linear")
    assert all(type(tuned.get_submodule(name)) is kinds[name] for name in left_alone)


def test_the_table_is_printed_once(capsys):
    stn.convert(Mixed())
    shown = capsys.readouterr().out
    assert shown.startswith("stn.convert: 1 of 14 modules converted (1 Linear)\n")
    assert "  left out: attention (OwnAttention): its forward reads the parameters of its children" in shown
    stn.convert(nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.2)) for _ in range(5))))
    shown = capsys.readouterr().out
    assert (
        shown
        == """\
stn.convert: 10 of 10 modules converted (5 Linear, 5 Dropout)
  tuned         starts at  range      use
  ------------  ---------  ---------  --------------------------------
  dropout       0.2        [0, 0.95)  rate of 0.1, 1.1, 2.1 and 2 more
  weight_decay  0.0001     [0, inf)   weights, in the training loss
"""
    )
    stn.convert(nn.Linear(3, 3), quiet=True)
    assert not capsys.readouterr().out


def test_layers_with_a_rate_are_counted_with_others_of_their_kind(capsys):
    stn.convert(nn.Sequential(nn.LSTM(3, 3, 2, dropout=0.2), nn.LSTM(3, 3)))
    assert capsys.readouterr().out.startswith("stn.convert: 2 of 2 modules converted (2 LSTM)\n")


def test_strict_refuses_what_is_left_out_but_not_what_is_excluded():
    with pytest.raises(ValueError, match=r"strict=True.*\n.*attention \(OwnAttention\)"):
        stn.convert(nn.ModuleDict({"attention": OwnAttention(4, 2), "out": nn.Linear(4, 2)}), strict=True)
    model = nn.Sequential(nn.Linear(3, 3), nn.RNN(3, 3))
    stn.convert(model, strict=True, exclude="1", quiet=True)


def test_include_and_exclude_are_patterns_that_fit_modules_and_all_in_them():
    def made():
        return nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "b": nn.Linear(2, 2)})

    def names(tuned):
        return [entry.name for entry in tuned.tuned_hyperparameters.report if entry.reason is None]

    assert names(stn.convert(made(), include="a", quiet=True)) == ["a.0", "a.1"]
    assert names(stn.convert(made(), exclude=["a.1", "b"], quiet=True)) == ["a.0"]
    assert names(stn.convert(made(), include="a.*", exclude="*.0", quiet=True)) == ["a.1"]
    tuned = stn.convert(made(), include="a", quiet=True)
    assert type(tuned["b"]) is nn.Linear


@pytest.mark.parametrize(
    "options",
    [dict(include="c*"), dict(exclude="c"), dict(example_dims={"c": 1}), dict(dropouts={"c": "rate"})],
    ids=str,
)
def test_a_pattern_that_fits_nothing_is_refused(options):
    (argument,) = options
    space = stn.HyperparameterSpace([RATE])
    with pytest.raises(ValueError, match=rf"convert: {argument} 'c\*?' fits the name of no module"):
        stn.convert(nn.ModuleDict({"a": nn.Linear(2, 2)}), space, **options)


def test_dropout_modules_have_the_hyperparameters_that_are_given_for_them():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1), nn.Dropout(0.2), nn.Dropout(0.3))
    space = stn.HyperparameterSpace([RATE, DECAY])
    tuned = stn.convert(model, space, dropouts={"1": "rate"}, quiet=True)
    assert (tuned[1].name, type(tuned[2]), type(tuned[3])) == ("rate", nn.Dropout, nn.Dropout)
    hyper = tuned.tuned_hyperparameters
    assert hyper.space is space
    reasons = [entry.reason for entry in hyper.report if entry.name in "23"]
    assert reasons == ["no hyperparameter of the space is its rate"] * 2


def test_a_changed_suggestion_keeps_its_rates():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1), nn.Dropout2d(0.2))
    suggested = stn.suggest_space(model)
    space = stn.HyperparameterSpace([one for one in suggested if one.name != "dropout2d"])
    tuned = stn.convert(model, space, quiet=True)
    assert tuned[1].name == "dropout"
    assert type(tuned[2]) is nn.Dropout2d


def test_streams_follow_those_that_layers_of_the_model_use():
    model = nn.ModuleList(
        [nn.Dropout(0.1), stn.PerExampleDropout("other", stream=7), nn.LSTM(2, 2, 3), nn.Dropout(0.1)]
    )
    tuned = stn.convert(model, quiet=True)
    assert (tuned[0].stream, tuned[2].streams, tuned[3].stream) == (8, (9, 10), 11)


def test_a_loss_may_use_a_hyperparameter_that_no_module_does():
    model = stn.convert(nn.Sequential(nn.Linear(3, 2)), stn.HyperparameterSpace([RATE, DECAY]), of_loss="rate")
    own, x = model.tuned_hyperparameters, torch.randn(4, 3)

    def loss(y, targets):
        return (y - targets).square().mean() + own.current["rate"].mean()

    tuner = stn.SelfTuner(model, torch.optim.SGD(model.parameters(), 0.1), loss, valid_loss=nn.functional.mse_loss)
    with torch.no_grad():
        without = nn.functional.mse_loss(model.eval()(x), torch.zeros(4, 2)).item()
    assert tuner.train_step((x, torch.zeros(4, 2))).item() > without + 0.01
    model[0].response_weight.data.normal_()
    before = own.values()
    tuner.valid_step((x, torch.zeros(4, 2)))
    assert own.values()["rate"] != before["rate"]


def test_wrong_arguments_are_named_and_change_nothing():
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.2))
    rate, decay = (stn.HyperparameterSpace([one]) for one in (RATE, DECAY))
    negative = stn.HyperparameterSpace([stn.Hyperparameter("rate", low=-1.0, high=0.9, init=0.2)])
    cases = [
        (dict(space=rate), ValueError, "nothing uses rate: .*name it in of_loss if your loss uses it"),
        (dict(of_loss=["other"]), ValueError, "of_loss names other, but the space has dropout, weight_decay"),
        (dict(space=rate, dropouts={"1": "other"}), ValueError, r"dropouts\['1'\] is 'other', but the space has rate"),
        (dict(dropouts={"1": "rate"}), ValueError, "give space, too"),
        (dict(space=negative, dropouts={"1": "rate"}), ValueError, "'rate' is a dropout rate, so its bounds"),
        (dict(include="1", space=decay), ValueError, "no module can be converted"),
        (dict(response_rank=0), ValueError, "response_rank must be"),
        (dict(group="kind"), ValueError, "group must be one of 'type', 'block', 'each', got 'kind'"),
        (dict(example_dims={"0": -1}), ValueError, r"example_dims\['0'\] must be an int >= 0"),
        (dict(strict="yes"), ValueError, "strict must be True or False"),
        (dict(quiet="yes"), ValueError, "quiet must be True or False"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            stn.convert(model, **options)
        assert type(model[0]) is nn.Linear
        assert len(model) == 2


@pytest.mark.parametrize(
    ("layer", "dim", "right"),
    [
        (nn.Conv1d(2, 2, 1), 1, 0),
        (nn.Conv2d(2, 2, 1), 1, 0),
        (nn.Conv3d(2, 2, 1), 1, 0),
        (nn.GroupNorm(1, 2), 1, 0),
        (nn.BatchNorm1d(2), 1, 0),
        (nn.BatchNorm2d(2), 2, 0),
        (nn.BatchNorm3d(2), 3, 0),
        (nn.Dropout2d(0.1), 1, 0),
        (stn.ConvReLU2d(2, 2, 1), 1, 0),
        (nn.LSTM(2, 2), 0, 1),
        (nn.LSTM(2, 2, batch_first=True), 1, 0),
        (nn.GRU(2, 2), 0, 1),
        (stn.DropConnectLSTM(2, 2, p=0.0), 0, 1),
        (stn.DropConnectLSTM(2, 2, p=0.0, batch_first=True), 1, 0),
        (nn.MultiheadAttention(2, 1), 0, 1),
        (nn.MultiheadAttention(2, 1, batch_first=True), 1, 0),
    ],
    ids=str,
)
def test_an_example_dimension_that_a_module_cannot_have_is_refused(layer, dim, right):
    model, kind = nn.ModuleDict({"linear": nn.Linear(2, 2), "layer": layer}), type(layer).__name__
    message = rf"example_dims\['\*'\] is {dim}, but dimension {right} of the input of layer \({kind}\) counts examples"
    with pytest.raises(ValueError, match=message + rf".*{{'layer': {right}}} before it"):
        stn.convert(model, example_dims={"*": dim})
    assert type(model["linear"]) is nn.Linear
    tuned = stn.convert(model, example_dims={"layer": right, "*": dim}, quiet=True)
    assert (tuned["layer"].example_dim, tuned["linear"].example_dim) == (right, dim)


def test_models_that_cannot_be_converted_are_refused():
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got int"):
        stn.convert(3)
    with pytest.raises(ValueError, match=r"no module can be converted\n  0 \(RNN\): there is no rule"):
        stn.convert(nn.Sequential(nn.RNN(3, 3)))
    with pytest.raises(ValueError, match=r"0\.weight is on the meta device|0\.bias is on the meta device"):
        stn.convert(nn.Sequential(nn.Linear(3, 3, device="meta")))
    tuned = stn.convert(nn.Sequential(nn.Linear(3, 3)), quiet=True)
    for again in (tuned, nn.Sequential(tuned), tuned[0]):
        with pytest.raises(ValueError, match="has been converted already"):
            stn.convert(again)
        with pytest.raises(ValueError, match="has been converted already"):
            stn.suggest_space(again)

    class OnTwoDevices(nn.Linear):
        def named_parameters(self, *args, **options):
            yield "weight", self.weight
            yield "bias", SimpleNamespace(device=torch.device("cuda:0"))

    with pytest.raises(ValueError, match=r"must be on one device, got weight on cpu, bias on cuda:0"):
        stn.convert(OnTwoDevices(3, 3))
    model = nn.Linear(3, 3)
    model.tuned_hyperparameters = 3
    with pytest.raises(ValueError, match="has an attribute tuned_hyperparameters"):
        stn.convert(model)


def test_norms_without_parameters_are_no_concern_of_strict():
    tuned = stn.convert(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False)), strict=True, quiet=True)
    assert [entry.kind for entry in tuned.tuned_hyperparameters.report] == ["Linear"]


def test_a_compiled_model_is_refused():
    with pytest.raises(ValueError, match="the model is compiled: convert the plain model"):
        stn.convert(torch.compile(nn.Linear(2, 2)))


def stored_bytes(tensor):
    return tensor.untyped_storage().nbytes()


def test_filters_keep_their_memory_format_and_have_memory_of_their_own_again_when_plain():
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16, 2)).to(memory_format=torch.channels_last)
    stn.convert(model, response_rank=None, quiet=True)
    weight, response = model[0].weight, model[0].response_weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert weight.untyped_storage().data_ptr() == response.untyped_storage().data_ptr()  # one tensor, for one product
    plain = stn.fold(model)[0].weight
    assert plain.is_contiguous(memory_format=torch.channels_last)
    assert stored_bytes(plain) == plain.nbytes == weight.nbytes


def test_a_conversion_that_fails_leaves_filters_memory_of_their_own(own_rule_that_fails):
    model = nn.Sequential(nn.Conv2d(8, 16, 3), own_rule_that_fails())
    with pytest.raises(RuntimeError, match="no rule"):
        stn.convert(model, response_rank=None, quiet=True)
    assert stored_bytes(model[0].weight) == model[0].weight.nbytes


@pytest.fixture
def own_rule_that_fails(monkeypatch):
    class Own(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)

    def rule(module, context):
        raise RuntimeError("no rule")

    monkeypatch.setitem(rules.RULES, Own, rule)
    return Own
