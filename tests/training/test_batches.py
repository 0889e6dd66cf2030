"""Batches: every example once a pass, orders that differ between passes and repeat between runs."""

import pytest
import torch

from stn_fast.data import Split
from stn_fast.training import batches as batches_module
from stn_fast.training.batches import Batches


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
    with pytest.raises(ValueError, match="batch_size wants 1 to 10"):
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
