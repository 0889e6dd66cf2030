"""Processes of one attempt find each other, whatever those of earlier ones have left in the store."""

import threading
from datetime import timedelta

import pytest
import torch.distributed

from stn_fast.training import distributed
from stn_fast.training.distributed import agreed


def agreement(store, ranks, size):
    """The name that each of these processes finds, which run at once."""
    found = {}

    def agree(rank):
        found[rank] = agreed(store, rank, size)

    threads = [threading.Thread(target=agree, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(found) == len(ranks)
    return set(found.values())


@pytest.mark.parametrize("ranks", [(0, 1, 2), (2, 1, 0)])
def test_every_attempt_agrees_on_a_name_of_its_own(ranks):
    store = torch.distributed.HashStore()
    attempts = [agreement(store, ranks, 3) for _ in range(3)]
    assert all(len(names) == 1 for names in attempts)
    assert len(set.union(*attempts)) == 3


@pytest.mark.parametrize("left", [{"name_of_1": "dead"}, {"name_of_0": "dead", "names": "dead,dead"}])
def test_what_processes_have_left_that_died_as_they_met_is_not_taken_for_the_others(left):
    store = torch.distributed.HashStore()
    for key, value in left.items():
        store.set(key, value)
    (name,) = agreement(store, (0, 1), 2)
    assert name != "dead"


def test_a_process_that_does_not_come_is_an_error(monkeypatch):
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=0.2))
    store = torch.distributed.HashStore()
    store.set("name_of_1", "dead")
    with pytest.raises(RuntimeError, match="of 2 processes, not all have started"):
        agreed(store, 0, 2)


def test_examples_are_counted_on_the_cpu_where_the_group_can(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        processes = distributed.Processes(torch.distributed.group.WORLD)
        assert processes.counts(3, "training step", 0, torch.device("meta")) == [3]
    finally:
        torch.distributed.destroy_process_group()
