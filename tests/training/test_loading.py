"""load: trained networks from the run directories of fit, of recipes and of your own runs."""

import copy
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from run_files import result, rows
from torch import nn

import stn_fast as stn
from stn_fast.conversion import Converted
from stn_fast.conversion.rules import RULES
from stn_fast.data import digits as digits_data
from stn_fast.errors import UserError
from stn_fast.models import plain_mlp, tuned
from stn_fast.recipes import digits
from stn_fast.training import checkpoint
from stn_fast.training.config import Config
from stn_fast.training.layering import build, read_yaml
from stn_fast.training.methods import FixedHyperparameters
from stn_fast.training.spaces import build_space

X = torch.randn(40, 5, 6, generator=torch.Generator().manual_seed(3))
Y = X[:, 0, :2].argmax(1)


class Net(nn.Module):
    """Has a layer with examples in dimension 1, one that stays plain, and a dropout module without a rate."""

    def __init__(self, width=8):
        super().__init__()
        self.up, self.plain, self.down = nn.Linear(6, width), nn.Linear(width, width), nn.Linear(width, 2)
        self.drop, self.other = nn.Dropout(0.4), nn.Dropout(0.2)

    def forward(self, x):
        x = self.up(x.transpose(0, 1)).transpose(0, 1).mean(1)
        return self.down(self.other(self.drop(F.relu(self.plain(x)))))


def converted(seed=0):
    torch.manual_seed(seed)
    space = stn.HyperparameterSpace(
        [stn.Hyperparameter("rate", low=0, high=0.9, init=0.4), stn.Hyperparameter("weight_decay", low=0, init=1e-3)]
    )
    options = dict(dropouts={"drop": "rate"}, exclude="plain", example_dims={"up": 1}, response_rank=3)
    return stn.convert(Net(), space, quiet=True, **options)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A run whose last step is not its best."""
    batches = [(X[k : k + 10], Y[k : k + 10]) for k in range(0, 40, 10)]
    fit = stn.fit(
        converted(),
        batches[:2],
        batches[2:],
        loss=F.cross_entropy,
        optimizer=partial(torch.optim.Adam, lr=0.05),
        train_steps=1,
        epochs=12,
        run_dir=tmp_path_factory.mktemp("loading") / "fit",
        quiet=True,
    )
    assert fit.best.step < fit.last.step
    return fit


def loss_of(model, rows=slice(20, 40)):
    return F.cross_entropy(model(X[rows]), Y[rows]).item()


@pytest.mark.parametrize("make", [partial(Net, 8), partial(converted, 5)], ids=["plain", "converted"])
def test_a_fitted_model_is_loaded_into_a_plain_or_a_converted_one(fitted, make):
    torch.manual_seed(9)
    given = make()
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    state = torch.get_rng_state()
    model = stn.load(fitted.run_dir, given)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert torch.equal(model(X), fitted.best.model(X))
    assert loss_of(model) == pytest.approx(fitted.result["valid_loss"], rel=1e-5)
    assert model.tuned_hyperparameters.values() == fitted.result["hyperparameters"]
    plain = stn.fold(model)
    assert type(plain.up) is nn.Linear
    assert (plain.drop.p, plain.other.p) == (fitted.best.values()["rate"], 0.2)
    torch.testing.assert_close(plain(X), model(X))
    last = stn.load(str(fitted.run_dir), make(), which="last")
    assert torch.equal(last(X), fitted.last.model(X))
    assert not torch.equal(last(X), model(X))
    assert given.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.state_dict().items())


def test_a_model_of_another_kind_is_refused(fitted):
    with pytest.raises(UserError, match=r"holds a run of stn\.fit: give model, a network like the Net .* got NoneType"):
        stn.load(fitted.run_dir)
    with pytest.raises(UserError, match=r"step-\d+ does not fit this model .*size mismatch"):
        stn.load(fitted.run_dir, Net(9))
    with pytest.raises(UserError, match=r"model does not fit the run .* of a Net: .*'up' fits the name of no module"):
        stn.load(fitted.run_dir, nn.Sequential(nn.Linear(6, 8)))
    with pytest.raises(UserError, match="with drop, weight_decay, where the run has rate, weight_decay, in this order"):
        stn.load(fitted.run_dir, stn.convert(Net(), exclude="other", quiet=True))
    other = copy.deepcopy(fitted.best.model)
    first, *others = other.tuned_hyperparameters.space
    other.tuned_hyperparameters.space = stn.HyperparameterSpace([replace(first, init=0.3125), *others])
    with pytest.raises(UserError, match=rf"with .*init=0\.3125.*, where the run has .*init={first.init}"):
        stn.load(fitted.run_dir, other)
    with pytest.raises(UserError, match="which = 'lats': did you mean 'last'"):
        stn.load(fitted.run_dir, Net(), which="lats")


def two_rates(first, last, **options):
    layers = nn.Linear(6, 8), nn.Dropout(0.1), nn.Linear(8, 8), nn.Dropout(0.6), nn.Linear(8, 2)
    space = stn.HyperparameterSpace([stn.Hyperparameter(name, low=0.0, high=0.9, init=0.3) for name in "ab"])
    return stn.convert(nn.Sequential(*layers), space, dropouts={"1": first, "3": last}, quiet=True, **options)


def fitted_in(directory, model):
    batches = [(X[:20, 0], Y[:20])]
    make = partial(torch.optim.SGD, lr=0.1)
    return stn.fit(
        model, batches, batches, loss=F.cross_entropy, optimizer=make, epochs=1, run_dir=directory, quiet=True
    )


def test_a_converted_model_whose_modules_have_other_rates_is_refused(tmp_path):
    fit = fitted_in(tmp_path, two_rates("a", "b"))
    with pytest.raises(UserError, match=r"not converted as in .*: module '1' is .*rate='b'.*, where .*rate='a'"):
        stn.load(tmp_path, two_rates("b", "a"))
    with pytest.raises(UserError, match=r"not converted as in .*: module '2' is none, where the run has ModuleConfig"):
        stn.load(tmp_path, two_rates("a", "b", exclude="2"))
    loaded = stn.load(tmp_path, two_rates("a", "b"))
    assert [stn.fold(loaded)[k].p for k in (1, 3)] == [fit.best.values()[name] for name in "ab"]


def test_a_converted_model_with_another_addition_is_refused(tmp_path):
    def made(modules):
        layers = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)
        return stn.convert(nn.Sequential(*layers), [stn.Dropout(modules, init=0.2, name="rate")], quiet=True)

    fitted_in(tmp_path, made("0"))
    with pytest.raises(UserError, match=r"addition of 'rate' is 'Dropout of 1', where the run has 'Dropout of 0'"):
        stn.load(tmp_path, made("1"))


def test_a_directory_without_a_run_is_refused(fitted, tmp_path):
    with pytest.raises(UserError, match="is not a run directory: it has no config"):
        stn.load(tmp_path / "none", Net())
    shutil.copy(fitted.run_dir / "config.yaml", tmp_path)
    with pytest.raises(UserError, match="holds no checkpoint"):
        stn.load(tmp_path, Net())
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def test_a_damaged_last_checkpoint_falls_back_and_a_damaged_best_one_is_an_error(fitted, tmp_path):
    directory = shutil.copytree(fitted.run_dir, tmp_path / "hurt")
    found = checkpoint.steps(directory / "checkpoints")
    (checkpoint.path_of(directory / "checkpoints", found[-1]) / checkpoint.STATE).write_bytes(b"damaged")
    with pytest.warns(UserWarning, match=rf"step-{found[-1]:08d}.* falling back to the checkpoint before it"):
        last = stn.load(directory, Net(), which="last")
    state = checkpoint.read(checkpoint.path_of(directory / "checkpoints", found[-2]))["method"]["model"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in last.state_dict().items())
    shutil.rmtree(directory)
    shutil.copytree(fitted.run_dir, directory)
    (checkpoint.path_of(directory / "checkpoints", fitted.best.step) / checkpoint.STATE).write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"the best checkpoint is lost: .* is damaged .*which='last'"):
        stn.load(directory, Net())
    assert torch.equal(stn.load(directory, Net(), which="last")(X), fitted.last.model(X))


def valid_loss(trained):
    x, y = digits_data.load().valid
    with torch.no_grad():
        return F.cross_entropy(trained.model(x), y).item()


@pytest.mark.parametrize(
    "settings", [(), ("method.name=fixed",), ("method.name=delta-stn",), ("optimizer.average=0.9",)]
)
def test_a_recipe_gives_its_network_and_the_hyperparameters_to_call_it_with(train, settings):
    directory = train("schedule.epochs=3", *settings)
    trained = stn.load(directory)
    assert not trained.model.training
    assert valid_loss(trained) == pytest.approx(result(directory)["valid_loss"], rel=1e-5)
    assert trained.values() == result(directory)["hyperparameters"]
    last = stn.load(directory, which="last")
    assert valid_loss(last) == pytest.approx(rows(directory)[-1]["loss"], rel=1e-5)
    assert last.values() == result(directory)["hyperparameters_end"]


def test_your_own_run_is_loaded_into_the_network_that_is_given(whole, tmp_path):
    """Without the recipe, whose name the configuration need not tell."""
    directory = shutil.copytree(whole, tmp_path / "own")
    text = (directory / "config.yaml").read_text()
    (directory / "config.yaml").write_text(text.replace("recipe: digits", "recipe: my-digits"))
    with pytest.raises(
        UserError, match=r"own holds a run of an unknown recipe 'my-digits': .*; or give model, a network like its own"
    ):
        stn.load(directory)
    config = build(Config, read_yaml(str(directory / "config.yaml")))
    model = tuned(plain_mlp(digits.SIZES), build_space(config))
    trained = stn.load(directory, model)
    assert valid_loss(trained) == pytest.approx(result(directory)["valid_loss"], rel=1e-5)
    assert not isinstance(trained.method, FixedHyperparameters)
    with pytest.raises(UserError, match="does not fit this network"):
        stn.load(directory, tuned(plain_mlp((64, 20, 12, 10)), build_space(replace(config))))


def test_a_model_may_be_compiled_or_not(tmp_path):
    torch.manual_seed(0)
    tuned = stn.convert(nn.Sequential(nn.Linear(6, 2)), quiet=True)
    batches = [(X[:20, 0], Y[:20]), (X[20:, 0], Y[20:])]
    stn.fit(
        torch.compile(tuned, backend="eager"),
        batches,
        batches,
        loss=F.cross_entropy,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        epochs=1,
        run_dir=tmp_path,
        quiet=True,
    )
    loaded = stn.load(tmp_path, nn.Sequential(nn.Linear(6, 2)))
    assert torch.equal(loaded(X), tuned(X))
    assert torch.equal(stn.load(tmp_path, torch.compile(loaded, backend="eager"))._orig_mod(X), tuned(X))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 10, dropout=0.2, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


class Scale(nn.Module):
    """Has a rule of its own and a layer in it."""

    def __init__(self):
        super().__init__()
        self.weight, self.linear = nn.Parameter(torch.ones(6)), nn.Linear(6, 2)

    def forward(self, x):
        return self.linear(x.mean(1) * self.weight)


class TunedScale(Converted, Scale):
    def forward(self, x):
        h = self.response(self.weight)
        return self.linear(x.mean(1) * (self.weight + (h @ self.weight_gate.T) * self.response_weight))


def convert_scale(module, context):
    context.add_response(module)
    context.become(module, TunedScale)


@pytest.mark.parametrize(
    ("make", "exclude"),
    [(Encoder, ["encoder.layers.0.linear1", "encoder.layers.1"]), (lambda: nn.Sequential(Scale()), ["0.linear"])],
)
def test_what_was_excluded_within_a_converted_module_stays_plain(tmp_path, monkeypatch, make, exclude):
    monkeypatch.setitem(RULES, Scale, convert_scale)
    torch.manual_seed(0)
    space = stn.HyperparameterSpace([stn.Hyperparameter("weight_decay", low=0, init=1e-3)])
    tuned = stn.convert(make(), space, dropouts={}, exclude=exclude, quiet=True)
    batches = [(X[:20], Y[:20]), (X[20:], Y[20:])]
    sgd = partial(torch.optim.SGD, lr=0.1)
    fit = stn.fit(tuned, batches, batches, loss=F.cross_entropy, optimizer=sgd, epochs=1, run_dir=tmp_path, quiet=True)
    loaded = stn.load(tmp_path, make())
    assert loaded.state_dict().keys() == tuned.state_dict().keys()
    assert torch.equal(loaded(X), fit.best.model(X))


def test_a_run_with_added_regularisers_needs_a_model_converted_with_them(tmp_path):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))

    added = [stn.Dropout("0", init=0.3), stn.WeightDecay("2", init=0.1)]
    batches = [(X[:20, 0], Y[:20]), (X[20:, 0], Y[20:])]
    tuned = stn.convert(model(), added, quiet=True)
    stn.fit(
        tuned,
        batches,
        batches,
        loss=F.cross_entropy,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        epochs=1,
        run_dir=tmp_path / "run",
    )
    with pytest.raises(UserError, match="added regularisers, give the model converted in the same way"):
        stn.load(tmp_path / "run", model())
    assert stn.load(tmp_path / "run", stn.convert(model(), added, quiet=True)).tuned_hyperparameters.added
