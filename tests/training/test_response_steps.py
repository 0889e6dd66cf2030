"""Steps of the response: divided as documented in every gated layer, and stable wherever those of W are."""

import pytest
import torch
from torch import nn

import stn_fast as stn
from stn_fast.layers import HyperConv2d, HyperEmbedding, HyperLinear, HyperLSTM
from stn_fast.training.methods import SelfTuning
from stn_fast.training.response_steps import ResponseSteps

H = torch.tensor([[3.0, 0.1], [-5.0, 0.2], [1.0, -0.3]])
OF_FIRST = 35 / 3  # E[h²] of the first hyperparameter; that of the second is below 1
LAYERS = {
    "linear": lambda: HyperLinear(3, 4, num_hyperparameters=2),
    "linear of rank 1": lambda: HyperLinear(5, 4, num_hyperparameters=2, response_rank=1),
    "conv": lambda: HyperConv2d(3, 4, 3, num_hyperparameters=2),
    "square embedding": lambda: HyperEmbedding(4, 4, num_hyperparameters=2),
    "sparse embedding": lambda: HyperEmbedding(4, 4, num_hyperparameters=2, sparse=True),
    "embedding of rank 1": lambda: HyperEmbedding(9, 4, num_hyperparameters=2, response_rank=1),
    "lstm": lambda: HyperLSTM(3, 2, num_hyperparameters=2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_a_layer_are_divided_by_the_mean_square_of_its_gates(name):
    layer = LAYERS[name]()
    parameters = dict(layer.named_parameters())
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    if "sparse" in name:
        layer.response_weight.grad = torch.ones(4, 4).to_sparse(1)
    ResponseSteps(layer).shorten(list(parameters.values()), [H, -H])
    divided = 0
    for key, parameter in parameters.items():
        rows = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        if not key.startswith(("response_weight", "response_bias")):
            assert torch.equal(rows, torch.ones_like(rows)), key
            continue
        rows = rows.T if "embedding" in name and "rank" not in name else rows
        for output, row in enumerate(rows):  # output o responds to hyperparameter o mod 2
            torch.testing.assert_close(row, torch.full_like(row, 1 if output % 2 else 1 / OF_FIRST))
        divided += 1
    assert divided == (4 if name == "lstm" else 1 if "embedding" in name else 2)


def test_a_scale_of_several_dimensions_has_a_gate_of_each_entry():
    model = nn.Sequential(nn.LayerNorm((2, 3)), nn.Dropout(0.1), nn.Linear(3, 2), nn.Dropout(0.2))
    stn.convert(model)
    norm = model[0]
    norm.response_weight.grad = torch.ones(2, 3)
    h = torch.zeros(3, norm.weight_gate.shape[1])
    h[:, 0] = H[:, 0]
    ResponseSteps(model).shorten([norm.response_weight], [h])
    want = (1 / (norm.weight_gate[:, 0] ** 2 * OF_FIRST).clamp(min=1)).view(2, 3)
    assert want.min() < 0.1
    torch.testing.assert_close(norm.response_weight.grad, want)


@pytest.mark.parametrize("antithetic", [True, False])
def test_wide_perturbations_do_not_diverge_where_the_weights_converge(antithetic):
    """Of a linear map by SGD at half the rate at which W would diverge, with the widest perturbations there are."""
    torch.manual_seed(0)
    x, truth = torch.randn(64, 4), torch.randn(4, 3)
    space = stn.HyperparameterSpace([stn.Hyperparameter("noise", low=0.0, init=1e-3, scale=3.0)])
    layer = HyperLinear(4, 3, num_hyperparameters=1)

    def loss(model, batch, hyper):
        return (model(batch.inputs, hyper) - batch.targets).square().sum(1).mean() + 0 * hyper["noise"].mean()

    largest = torch.linalg.eigvalsh(2 * x.T @ x / len(x)).max().item()
    method = SelfTuning(
        layer, space, loss, loss, optimizer=lambda p: torch.optim.SGD(p, lr=1 / largest), clip=None,
        antithetic=antithetic, skip_nonfinite=10**6,
    )  # fmt: skip
    for step in range(300):
        last = method.train_step((x, x @ truth), step)
    assert method.skipped_steps == 0
    assert last < 1e-3
