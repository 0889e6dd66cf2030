"""check_rows: rows of positions, or in another order, are never taken for rows of examples."""

import copy

import pytest
import torch
import torch.nn.functional as F
from converted_networks import NETWORKS, converted, inputs, plain
from torch import nn

import stn_fast as stn
from stn_fast.conversion import check_rows


class Positions(nn.Module):
    """Adds what a layer makes of a table of positions (T, 3), as relative position networks do."""

    def __init__(self, positions):
        super().__init__()
        self.register_buffer("table", torch.randn(positions, 3))
        self.bias, self.out = nn.Linear(3, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.out(x + self.bias(self.table).mean(0))


class TimeMajor(nn.Module):
    """Called with (B, T, 6), its layer with (T, B, 6)."""

    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.out(self.layer(x.transpose(0, 1)).mean(0))


class Flattened(nn.Module):
    """Its layer is called with (B·T, 6), or with (T·B, 6)."""

    def __init__(self, batch_first):
        super().__init__()
        self.batch_first, self.layer = batch_first, nn.Linear(6, 4)

    def forward(self, x):
        rows = x if self.batch_first else x.transpose(0, 1)
        return self.layer(rows.flatten(0, 1))


class Reordered(nn.Module):
    """Its layer, or its dropout, is called with rows in another order than the examples'."""

    def __init__(self, order, layer):
        super().__init__()
        self.order, self.layer = order, layer

    def forward(self, x):
        return self.layer(self.order(x))


ORDERS = {
    "sorted": lambda x: x[x[:, 0].argsort()],
    "reversed": lambda x: x.flip(0),
    "shifted": lambda x: x.roll(1, 0),
    "shuffled": lambda x: x[torch.randperm(len(x), generator=torch.Generator().manual_seed(5))],
    "twice, reversed": lambda x: torch.cat([x, x.flip(0)]),
    "twice, shifted": lambda x: torch.cat([x, x.roll(1, 0)]),
}


class EachInALoop(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x):
        return torch.stack([self.layer(one) for one in x])


class ForDicts(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *, x, labels, scale):
        return F.cross_entropy(scale * self.model(x), labels)


def vectors(*sizes):
    return torch.randn(*sizes, 6, generator=torch.Generator().manual_seed(0))


def tuner_of(model, loss=F.cross_entropy, **options):
    tuned = stn.convert(model, quiet=True, **options)
    return stn.SelfTuner(tuned, torch.optim.SGD(tuned.parameters(), lr=0.1), loss)


@pytest.mark.parametrize("positions", [8, 16, 4, 5])
def test_a_table_of_positions_is_refused_whatever_its_length(positions):
    tuner = tuner_of(Positions(positions))
    message = rf"bias \(Linear\) has inputs \({positions}, 3\) for 8 examples and \({positions}, 3\) for 4 of them.*"
    with pytest.raises(ValueError, match=message + r"exclude='bias'\)"):
        tuner.step((vectors(8), torch.zeros(8, dtype=torch.int64)))
    assert tuner.trained == 0


@pytest.mark.parametrize("positions", [8, 16])
def test_a_table_of_positions_is_fine_for_an_excluded_layer(positions):
    tuner = tuner_of(Positions(positions), exclude="bias")
    tuner.step((vectors(8), torch.zeros(8, dtype=torch.int64)))
    assert tuner.trained == 1


@pytest.mark.parametrize("time", [2, 4, 8])
def test_time_major_inputs_need_a_declared_dimension(time):
    x = vectors(4, time)
    with pytest.raises(
        ValueError, match=r"layer \(Linear\) has inputs.*declare.*example_dims=\{'layer': 1\}.*exclude="
    ):
        check_rows(stn.convert(TimeMajor(), quiet=True), x)
    check_rows(stn.convert(TimeMajor(), example_dims={"layer": 1}, quiet=True), x)


@pytest.mark.parametrize("examples", [1, 2, 5, 8])
def test_rows_of_examples_in_turn_are_refused_and_consecutive_ones_are_not(examples):
    x = vectors(examples, 3)
    check_rows(stn.convert(Flattened(True), quiet=True), x)
    with pytest.raises(ValueError, match=r"layer \(Linear\) has the examples in turn in dimension 0.*consecutive"):
        check_rows(stn.convert(Flattened(False), quiet=True), x)


def test_equal_rows_are_in_either_order():
    for batch_first in (True, False):
        check_rows(stn.convert(Flattened(batch_first), quiet=True), torch.ones(4, 3, 6))


class AfterZeros(nn.Module):
    """A layer with weights that are 0 at the start, and one that is called with its outputs, (T·B, 6)."""

    def __init__(self):
        super().__init__()
        self.first, self.layer = nn.Linear(6, 6), nn.Linear(6, 4)
        nn.init.zeros_(self.first.weight)

    def forward(self, x):
        time = x.shape[1]
        return self.layer(self.first(x).transpose(0, 1).reshape(-1, 6)).unflatten(0, (time, -1)).mean(0)


def test_equal_rows_are_named_because_their_order_is_not_known():
    assert check_rows(stn.convert(AfterZeros(), quiet=True), vectors(4, 3)) == ["layer"]
    assert check_rows(stn.convert(nn.Sequential(nn.Linear(6, 4)), quiet=True), vectors(4, 3)) == []


def test_rows_that_were_equal_at_the_first_step_are_checked_at_the_next():
    tuner = tuner_of(AfterZeros())
    batch = vectors(4, 3), torch.arange(4)
    tuner.step(batch)  # the weights are no longer 0
    with pytest.raises(ValueError, match=r"layer \(Linear\) has the examples in turn"):
        tuner.step(batch)


def test_rows_that_stay_equal_are_checked_at_ten_steps(monkeypatch):
    calls = []
    monkeypatch.setattr("stn_fast.training.tuner.check_rows", lambda *given, **named: calls.append(1) or ["layer"])
    tuner = tuner_of(nn.Linear(6, 4))
    for _ in range(12):
        tuner.train_step((vectors(8), torch.zeros(8, dtype=torch.int64)))
    assert len(calls) == 10


def test_a_layer_called_for_each_example_by_itself_is_refused():
    with pytest.raises(
        ValueError, match=r"layer \(Linear\) is called 4 times for 4 examples and 2 times for 2 of them"
    ):
        check_rows(stn.convert(EachInALoop(), quiet=True), vectors(4, 3))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("layer", [lambda: nn.Linear(6, 4), lambda: nn.Dropout(0.5)], ids=["linear", "dropout"])
@pytest.mark.parametrize("examples", [2, 3, 4, 9])
def test_rows_in_another_order_than_the_examples_are_refused(order, layer, examples):
    x = vectors(examples)
    with pytest.raises(ValueError, match=r"layer \(\w+\) has .*(order of the examples|in turn).*exclude='layer'"):
        check_rows(stn.convert(Reordered(ORDERS[order], layer()), quiet=True), x)


def test_a_model_that_sorts_is_refused_for_a_batch_that_is_sorted():
    x = vectors(6)
    with pytest.raises(ValueError, match="do not follow the order of the examples"):
        check_rows(stn.convert(Reordered(ORDERS["sorted"], nn.Linear(6, 4)), quiet=True), ORDERS["sorted"](x))


BESIDE_OTHERS = {
    "centred": lambda x: x - x.mean(0),
    "mixed": lambda x: x + 0.5 * x.flip(0),
    "numbered": lambda x: x + torch.arange(len(x))[:, None],
    "noisy": lambda x: x + torch.randn_like(x),
    "sorted and back": lambda x: x[x[:, 0].argsort()][x[:, 0].argsort().argsort()],
    "in half precision": lambda x: x.bfloat16().float(),
}


@pytest.mark.parametrize("order", BESIDE_OTHERS)
@pytest.mark.parametrize("examples", [2, 5, 512])
def test_rows_that_depend_on_the_batch_are_not_taken_for_another_order(order, examples):
    model = stn.convert(Reordered(BESIDE_OTHERS[order], nn.Linear(6, 4)), quiet=True)
    assert check_rows(model, vectors(examples)) == []


def test_a_model_that_needs_sorted_examples_is_not_refused():
    def order(x):
        assert (x[:, 0].diff() >= 0).all()
        return x

    check_rows(stn.convert(Reordered(order, nn.Linear(6, 4)), quiet=True), ORDERS["sorted"](vectors(6)))


def test_the_model_is_called_with_all_examples_twice_and_once_with_half_of_them():
    calls = []
    model = stn.convert(Reordered(lambda x: calls.append(len(x)) or x, nn.Linear(6, 4)), quiet=True)
    check_rows(model, vectors(8))
    assert sorted(calls) == [4, 8, 8]


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("examples", [1, 2, 3, 4])
def test_ordinary_networks_pass_and_do_not_change(kind, examples):
    tuned = converted(plain(kind, 0.3))
    before, generator = copy.deepcopy(tuned.state_dict()), torch.get_rng_state()
    check_rows(tuned, inputs(kind, examples))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tuned.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(module.training and not module._forward_pre_hooks for module in tuned.modules())


def test_one_example_is_repeated():
    check_rows(stn.convert(Positions(1), exclude="bias", quiet=True), vectors(1))
    with pytest.raises(ValueError, match=r"bias \(Linear\) has inputs \(1, 3\) for 2 examples"):
        check_rows(stn.convert(Positions(1), quiet=True), vectors(1))


def test_batches_that_are_dicts_are_halved_where_they_have_examples():
    labels = torch.zeros(8, dtype=torch.int64)
    given = dict(x=vectors(8), labels=labels, scale=torch.ones(1))
    tuner = tuner_of(ForDicts(nn.Linear(6, 4)), lambda loss, batch: loss)
    tuner.step(given)
    with pytest.raises(ValueError, match=r"model\.bias \(Linear\)"):
        tuner_of(ForDicts(Positions(8)), lambda loss, batch: loss).step(given)


def test_a_step_is_bit_for_bit_the_same_after_the_check():
    found = []
    for check in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 4))
        model.append(nn.AlphaDropout(0.2))  # plain, so it draws from torch's generator
        tuned = stn.convert(model, quiet=True)
        optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
        tuner = stn.SelfTuner(tuned, optimizer, F.cross_entropy, check_rows=check)
        for _ in range(3):
            tuner.step((vectors(8), torch.zeros(8, dtype=torch.int64)), (vectors(6), torch.zeros(6, dtype=torch.int64)))
        found.append(tuned.state_dict())
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_each_structure_of_batch_is_checked_once(monkeypatch):
    calls = []
    monkeypatch.setattr("stn_fast.training.tuner.check_rows", lambda model, *args, **kwargs: calls.append(args))
    tuner = tuner_of(nn.Linear(6, 4))
    labels = torch.zeros(8, dtype=torch.int64)
    for _ in range(2):
        tuner.step((vectors(8), labels), (vectors(4), labels[:4]))
    assert len(calls) == 1
    tuner.loss = lambda output, target: F.cross_entropy(output.mean(1), target)
    tuner.train_step((vectors(8, 3), labels))
    assert len(calls) == 2


def test_a_batch_that_failed_is_checked_again():
    tuner = tuner_of(Positions(8))
    for _ in range(2):
        with pytest.raises(ValueError, match="bias"):
            tuner.step((vectors(8), torch.zeros(8, dtype=torch.int64)))


def test_inside_using_the_hyperparameters_in_use_are_kept():
    tuned = stn.convert(nn.Sequential(nn.Linear(6, 4)), quiet=True)
    own = tuned.tuned_hyperparameters
    with own.using(own.space.at(own.location, batch_size=4)):
        before = own.current
        check_rows(tuned, vectors(4))
        assert own.current is before


def test_a_compiled_model_is_checked_without_compiling():
    compiled = torch.compile(stn.convert(Positions(8), quiet=True), backend=lambda *given: pytest.fail("compiled"))
    with pytest.raises(ValueError, match=r"bias \(Linear\)"):
        check_rows(compiled, vectors(8))


class OfFour(nn.Linear):
    def forward(self, x):
        return super().forward(x.view(4, 6))


def test_a_model_of_a_fixed_number_of_examples_is_told_how_to_go_on():
    model = stn.convert(nn.Sequential(nn.Linear(6, 6), OfFour(6, 4)), quiet=True)
    with pytest.raises(RuntimeError, match=r"with 4 examples, but not with 2 of them.*check_rows=False"):
        check_rows(model, vectors(4))


def test_models_and_inputs_that_cannot_be_checked_are_refused():
    with pytest.raises(TypeError, match=r"check_rows: model must be one that stn\.convert has converted"):
        check_rows(nn.Linear(6, 4), vectors(4))
    tuned = stn.convert(nn.Sequential(nn.Linear(6, 4)), quiet=True)
    for given in ((), (torch.tensor(1.0),), (vectors(0),)):
        with pytest.raises(TypeError, match="check_rows: the first tensor"):
            check_rows(tuned, *given)
