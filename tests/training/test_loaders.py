"""Loaders: passes that can be read again up to any batch, and what is wrong with other ones."""

from contextlib import suppress

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from stn_fast.data import DataSet, Split, fingerprint
from stn_fast.errors import UserError
from stn_fast.training.batches import as_batch
from stn_fast.training.generators import OwnStates
from stn_fast.training.loaders import Loaded, LoaderBatches, LoaderBatching

CPU = torch.device("cpu")


class Noisy(torch.utils.data.Dataset):
    """Numbers to which reading adds noise of torch."""

    def __len__(self):
        return 11

    def __getitem__(self, index):
        return index + 0.1 * torch.rand(2), index


class Endless(IterableDataset):
    def __iter__(self):
        yield from ((torch.full((3,), float(k)), k) for k in torch.randperm(7).tolist())


class SelfIterating:
    """Returns itself as the iterator of each pass, in a new order."""

    def __init__(self, batches=5):
        self.batches = batches

    def __len__(self):
        return self.batches

    def __iter__(self):
        self.order = iter(torch.randperm(self.batches).tolist())
        return self

    def __next__(self):
        number = next(self.order)
        return torch.full((2, 3), float(number)), torch.full((2,), number)


def loaded(loader):
    return Loaded("fit: train_loader", loader, lambda entry: as_batch(entry, CPU), CPU)


def sequence(loader, seed=0, stream=0):
    return LoaderBatches(loaded(loader), 4, seed, stream)


def numbers(sequence, indices):
    return [torch.cat([batch.inputs.flatten(), batch.targets.float()]) for batch in map(sequence.__getitem__, indices)]


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


LOADERS = {
    "shuffled": lambda: DataLoader(Noisy(), 4, shuffle=True),
    "with a generator": lambda: DataLoader(Noisy(), 4, shuffle=True, generator=torch.Generator()),
    "without a length": lambda: DataLoader(Endless(), 3),
    "persistent workers": lambda: DataLoader(Noisy(), 4, shuffle=True, num_workers=1, persistent_workers=True),
    "self-iterating": SelfIterating,
}


@pytest.mark.parametrize("kind", LOADERS)
def test_a_sequence_begun_anywhere_gives_the_batches_of_one_begun_at_the_start(kind):
    whole = sequence(LOADERS[kind]())
    batches = numbers(whole, range(10))
    assert 3 <= whole.per_pass <= 5
    for start in (1, 4, 7):
        torch.manual_seed(start)  # random numbers drawn elsewhere don't matter
        assert same(numbers(sequence(LOADERS[kind]()), range(start, 10)), batches[start:])
    assert not same(batches[: whole.per_pass], batches[whole.per_pass : 2 * whole.per_pass])
    assert not same(numbers(sequence(LOADERS[kind](), seed=1), range(3)), batches[:3])
    assert not same(numbers(sequence(LOADERS[kind](), stream=1), range(3)), batches[:3])


def test_reading_leaves_generators_as_they_were():
    own = torch.Generator().manual_seed(5)
    loader = DataLoader(Noisy(), 4, shuffle=True, generator=own)
    before, own_before = torch.get_rng_state(), own.get_state()
    numbers(sequence(loader), range(4))
    list(LoaderBatching(0).whole(loaded(loader), 0, test=False))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(own.get_state(), own_before)


def test_generators_continue_where_they_were_left_and_are_put_back_after_an_error():
    states = OwnStates([torch.default_generator], (3, 1))
    torch.manual_seed(0)
    outside = torch.rand(3)
    torch.manual_seed(0)
    with states:
        first = torch.rand(2)
    second = torch.empty(0)
    with suppress(ValueError), states:
        second = torch.rand(2)
        raise ValueError
    assert torch.equal(torch.rand(3), outside)
    with OwnStates([torch.default_generator], (3, 1)):
        assert torch.equal(torch.rand(4), torch.cat([first, second]))


@pytest.mark.parametrize("kind", LOADERS)
def test_an_evaluation_in_the_middle_of_a_pass_does_not_change_its_batches(kind):
    """Even of a loader with a single iterator, which the evaluation uses."""
    want = numbers(sequence(LOADERS[kind]()), range(8))
    one = loaded(LOADERS[kind]())
    steps, found, evaluations = LoaderBatches(one, 4, 0, 0), [], []
    for index in range(8):
        found += numbers(steps, [index])
        batches = LoaderBatching(0).whole(one, 0, test=False)
        evaluations.append(torch.cat([batch.inputs.flatten() for batch in batches]))
    assert same(found, want)
    assert same(evaluations, [evaluations[0]] * 8)


def test_every_example_is_read_once_and_counted():
    loader = DataLoader(TensorDataset(torch.arange(11.0)[:, None], torch.arange(11)), 4, shuffle=True)
    one = loaded(loader)
    assert (one.batches, one.batch_size) == (3, 4)
    steps = LoaderBatches(one, 4, 0, 0)
    read = [steps[index] for index in range(4)]
    assert [batch.examples for batch in read] == [4, 4, 3, 4]
    assert torch.cat([batch.targets for batch in read[:3]]).sort().values.tolist() == list(range(11))
    assert steps.examples_of(4) == 15
    again = LoaderBatches(one, 4, 0, 0)
    again.load_state_dict(steps.state_dict())
    again[4]
    assert again.examples_of(5) == 19
    assert sum(batch.examples for batch in LoaderBatching(0).whole(one, 0, test=True)) == one.examples == 11


def test_the_size_of_batches_of_a_loader_without_one_is_that_of_the_first():
    batches = [(torch.zeros(examples, 2), torch.zeros(examples)) for examples in (5, 3)]
    assert loaded(batches).batch_size == 5
    assert loaded(DataLoader(Noisy(), batch_sampler=[[0, 1, 2], [3]])).batch_size == 3


@pytest.mark.parametrize(
    ("loader", "error", "says"),
    [
        (3, TypeError, "fit: train_loader must be a loader, an iterable of batches such as a DataLoader, got int"),
        ((batch for batch in []), UserError, "train_loader can be read only once, as it is a generator"),
        (zip([1], [2], strict=True), UserError, "can be read only once, as it is a zip"),
        ([], UserError, "train_loader gives no batch"),
        (DataLoader(Noisy(), 12, drop_last=True), UserError, "gives no batch.*drop_last=True"),
    ],
    ids=["int", "generator", "zip", "empty list", "dropped batch"],
)
def test_loaders_without_batches_are_refused(loader, error, says):
    with pytest.raises(error, match=says):
        loaded(loader)


class Shrinking(SelfIterating):
    """Has a batch less, or more, in each pass than it says."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def __len__(self):
        return 5

    def __iter__(self):
        self.batches += self.change
        return super().__iter__()


@pytest.mark.parametrize(("change", "found"), [(-1, "only 4"), (1, "more than 5")])
def test_a_pass_with_another_number_of_batches_is_an_error(change, found):
    says = rf"train_loader gave {found} batches in pass 1, but every pass must have 5, which is its len\(\)"
    with pytest.raises(UserError, match=says):
        numbers(sequence(Shrinking(change)), range(5))
    with pytest.raises(UserError, match=says):
        list(LoaderBatching(0).whole(loaded(Shrinking(change)), 0, test=False))


def test_examples_in_tensors_have_a_fingerprint():
    x, y = torch.randn(9, 2), torch.arange(9)
    data, rows = TensorDataset(x, y), [4, 0, 7]
    whole, part = loaded(DataLoader(data, 2)), loaded(DataLoader(Subset(data, rows), 2))
    want = fingerprint(DataSet(Split(x, y), Split(x[rows], y[rows]), Split(x, y)))
    assert fingerprint(DataSet(whole, part, None)) == {name: want[name] for name in ("train", "valid")}
    assert fingerprint(DataSet(whole, loaded([(x, y)]), loaded(DataLoader(Noisy(), 2)))) == {"train": want["train"]}
