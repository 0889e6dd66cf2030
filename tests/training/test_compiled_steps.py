"""Steps of SelfTuner with a compiled model: one graph for training, one for validation, whatever λ is."""

import torch
import torch.nn.functional as F
from torch import nn

import stn_fast as stn


def network():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout2d(0.2), nn.Flatten(),
        nn.LayerNorm(6 * 35), nn.Linear(6 * 35, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 5),
    )  # fmt: skip


def test_a_hundred_alternating_steps_compile_two_graphs_and_equal_eager_ones():
    graphs, ends = [], []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    x, y = torch.randn(64, 1, 5, 7), torch.randint(5, (64,))
    orders = [torch.randperm(64) for _ in range(50)]
    plain = network()
    start = plain.state_dict()
    for compiled in (False, True):
        torch.manual_seed(0)
        model = network()
        model.load_state_dict(start)
        model = stn.convert(model, quiet=True)
        called = torch.compile(model, fullgraph=True, backend=keep) if compiled else model
        tuner = stn.SelfTuner(called, torch.optim.SGD(model.parameters(), 1e-2), F.cross_entropy)
        first = tuner.values()
        for order in orders:
            train, valid = order[:20], order[20:43]
            tuner.step((x[train], y[train]), (x[valid], y[valid]))
        assert all(tuner.values()[name] != value for name, value in first.items())
        ends.append([*model.state_dict().values(), model.tuned_hyperparameters.location])
    assert len(graphs) == 2
    torch.testing.assert_close(*ends)
