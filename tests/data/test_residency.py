"""Where data live: on the device where they fit, in host memory where they do not."""

import pytest
import torch

from stn_fast.data import DataSet, Split, placed, residency


def images(count):
    return Split(torch.zeros(count, 3, 4, 4, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64))


DATA = DataSet(images(5), images(3), images(2))
BYTES = 10 * (3 * 4 * 4 + 8)


def test_the_size_counts_inputs_and_targets_of_every_split():
    assert residency.size(DATA) == BYTES


def test_data_for_the_cpu_stay_where_they_are():
    assert all(one.inputs is other.inputs for one, other in zip(placed(DATA, "cpu"), DATA, strict=True))


@pytest.mark.parametrize(("free", "moves"), [(4 * BYTES, True), (4 * BYTES - 1, False)])
def test_data_go_to_a_cuda_device_where_they_take_a_quarter_of_its_free_memory_at_most(monkeypatch, free, moves):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10 * free))
    monkeypatch.setattr(Split, "to", lambda split, device: Split(*(part.to("meta") for part in split)))
    assert {part.device.type for split in placed(DATA, "cuda") for part in split} == {"meta" if moves else "cpu"}
