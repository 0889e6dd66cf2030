"""Batches: every example once a pass, orders that differ between passes and repeat between runs."""

from typing import NamedTuple

import pytest
import torch
from torch.utils import _pytree as pytree

from stn_fast.data import Split
from stn_fast.training import batches as batches_module
from stn_fast.training.batches import Batches, Examples, as_batch
from stn_fast.training.streams import Streams


def numbered(count):
    return Split(torch.arange(count), torch.arange(count) * 2)


def test_a_pass_gives_every_example_once():
    batches = Batches(numbered(12), 4, seed=0, stream=0)
    seen = torch.cat([batches[i].inputs for i in range(3)])
    assert sorted(seen.tolist()) == list(range(12))


def test_inputs_and_targets_stay_together():
    batch = Batches(numbered(12), 4, seed=0, stream=0)[1]
    assert torch.equal(batch.targets, batch.inputs * 2)


def test_the_order_depends_on_pass_seed_and_stream_alone():
    def order(seed, stream, number):
        return Batches(numbered(50), 50, seed=seed, stream=stream)[number].inputs.tolist()

    assert order(0, 0, 3) == order(0, 0, 3)
    assert len({tuple(order(*key)) for key in [(0, 0, 0), (0, 0, 1), (1, 0, 0), (0, 1, 0)]}) == 4


def test_every_batch_has_the_same_size_when_a_pass_leaves_some_over():
    batches = Batches(numbered(10), 4, seed=0, stream=0)
    assert batches.per_pass == 2
    assert [len(batches[i].inputs) for i in range(5)] == [4] * 5


@pytest.mark.parametrize("size", [0, 11])
def test_a_batch_size_that_cannot_be_filled_is_refused(size):
    with pytest.raises(ValueError, match="batch_size must be from 1 to 10"):
        Batches(numbered(10), size, seed=0, stream=0)


class FakeStaging:
    """Keeps count of what is sent, and gives out nothing but the batch that was sent last."""

    def __init__(self, split, batch_size, device):
        self.split, self.sent, self.last = split, [], None

    def send(self, chosen):
        self.sent.append(chosen.tolist())
        self.last = Split(self.split.inputs[chosen], self.split.targets[chosen])
        return self.last

    def receive(self, batch):
        assert batch is self.last
        return batch


def test_batches_from_host_memory_are_the_same_and_sent_one_ahead(monkeypatch):
    monkeypatch.setattr(batches_module, "Staging", FakeStaging)
    here = Batches(numbered(10), 4, seed=0, stream=0)
    there = Batches(numbered(10), 4, seed=0, stream=0, device=torch.device("cuda"))
    sent = there._staging.sent
    for count, index in enumerate([0, 1, 2, 3]):  # over the end of a pass
        assert torch.equal(there[index].inputs, here[index].inputs)
        assert len(sent) == count + 2
        assert sent[-1] == here[index + 1].inputs.tolist()
    assert torch.equal(there[7].inputs, here[7].inputs)  # as after resuming
    assert sent[-2:] == [here[7].inputs.tolist(), here[8].inputs.tolist()]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_from_host_memory_reach_the_device_whole_while_it_is_busy():
    device = torch.device("cuda", torch.cuda.current_device())
    images = torch.randint(256, (1000, 3, 32, 32), dtype=torch.uint8)
    split = Split(images, torch.arange(1000))
    here, there = (Batches(split, 256, seed=0, stream=0, device=where) for where in (None, device))
    busy = torch.randn(4096, 4096, device=device)
    kept = []
    for index in range(40):
        batch = there[index]
        assert batch.inputs.device == batch.targets.device == device
        busy = busy @ busy / 64  # the device falls behind, so a buffer used too soon would show
        kept.append((batch.inputs.float().sum((1, 2, 3)), batch.targets + 0))
        del batch
    for index, (sums, targets) in enumerate(kept):
        expected = here[index]
        assert torch.equal(targets.cpu(), expected.targets)
        assert torch.equal(sums.cpu(), expected.inputs.float().sum((1, 2, 3)))


X, Y = torch.arange(12.0).view(4, 3), torch.tensor([0, 1, 0, 1])


class Pair(NamedTuple):
    """Its fields the other way round."""

    targets: torch.Tensor
    inputs: torch.Tensor


@pytest.mark.parametrize(
    ("batch", "inputs"),
    [
        ((X, Y), X),
        ([X, Y], X),
        (Split(X, Y), X),
        ({"inputs": X, "targets": Y}, X),
        ({"targets": Y, "inputs": X}, X),
        (Pair(Y, X), X),
        ((X, 2 * X, Y), (X, 2 * X)),
        ({"targets": Y, "words": X, "mask": 2 * X}, {"words": X, "mask": 2 * X}),
        ({"targets": Y, "words": X}, {"words": X}),
        (((X, 2 * X), Y), (X, 2 * X)),
        (({"words": X}, Y), {"words": X}),
        ((X.numpy(), Y.numpy()), X),
        ({"inputs": X.numpy(), "targets": Y}, X),
        (((X.numpy(), 2 * X), Y.numpy()), (X, 2 * X)),
    ],
)
def test_batches_of_a_loader_are_split_into_inputs_and_targets(batch, inputs):
    examples = as_batch(batch, torch.device("cpu"))
    assert torch.equal(examples.targets, Y)
    assert examples.examples == 4
    got, want = pytree.tree_flatten(examples.inputs), pytree.tree_flatten(inputs)
    assert got[1] == want[1]
    assert all(map(torch.equal, got[0], want[0]))


def test_examples_are_counted_by_the_targets():
    assert as_batch((X.T, X, Y), torch.device("cpu")).examples == 4
    assert as_batch((X.T, (Y, X)), torch.device("cpu")).examples == 4
    assert as_batch((X.T, {"boxes": X, "labels": Y}), torch.device("cpu")).examples == 4


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        (X, "got Tensor"),
        ((X,), "got tuple"),
        ([], "got list"),
        (None, "got NoneType"),
        ({"inputs": X, "labels": Y}, "got a dict with the keys inputs, labels"),
        ({"targets": Y}, "got a dict with the keys targets"),
        ({}, r"got a dict with the keys \(none\)"),
    ],
)
def test_the_error_for_a_wrong_batch_says_what_would_be_right(batch, got):
    with pytest.raises(TypeError, match=rf"a batch must be \(inputs, targets\).*a dict with 'targets'.*{got}$"):
        as_batch(batch, torch.device("cpu"))


@pytest.mark.parametrize(
    ("targets", "got"),
    [
        (None, "got NoneType"),
        (3, "got int"),
        (torch.tensor(3), "got a tensor without dimensions"),
        ([], "got NoneType"),
    ],
)
def test_targets_that_count_no_examples_are_named(targets, got):
    with pytest.raises(TypeError, match=f"first dimension counts the examples, {got}"):
        as_batch((X, targets), torch.device("cpu"))


def test_a_state_that_nothing_carries_is_an_error():
    batch = as_batch((X, Y), torch.device("cpu"))
    with pytest.raises(TypeError, match="only a Window of Streams"):
        batch.finish((torch.zeros(()), torch.zeros(3)))
    assert batch.finish(torch.ones(())) == 1


def test_a_batch_object_is_returned_unchanged():
    examples = Examples({"words": X}, Y)
    window = Streams(Split(Y, Y), 2, 2, seed=0, stream=0)[0]
    assert all(as_batch(batch, torch.device("cpu")) is batch for batch in (examples, window))
