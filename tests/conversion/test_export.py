"""Folded models leave the package: torch.export, ONNX run by onnxruntime, and safetensors give the same outputs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stn_fast as stn


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout2d(0.2), nn.MaxPool2d(2)
        )
        self.norm = nn.LayerNorm(6 * 4 * 3)
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(6 * 4 * 3, 5))

    def forward(self, x):
        return self.head(self.norm(self.features(x).flatten(1)))


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(11, 6), nn.LSTM(6, 7, num_layers=2, batch_first=True, dropout=0.1)
        self.drop, self.head = nn.Dropout(0.4), nn.Linear(7, 5)

    def forward(self, tokens):
        return self.head(self.drop(self.lstm(self.embedding(tokens))[0][:, -1]))


INPUTS = {
    ConvNet: lambda examples: torch.randn(examples, 1, 9, 7),
    Reader: lambda examples: torch.randint(11, (examples, 8)),
}


@pytest.fixture(params=INPUTS, ids=lambda kind: kind.__name__)
def folded(request):
    """A self-tuned and folded model, and what makes its inputs."""
    torch.manual_seed(0)
    model, inputs = stn.convert(request.param(), quiet=True), INPUTS[request.param]
    tuner = stn.SelfTuner(model, torch.optim.Adam(model.parameters(), 1e-2), F.cross_entropy)
    for _ in range(6):
        tuner.step((inputs(12), torch.randint(5, (12,))), (inputs(12), torch.randint(5, (12,))))
    plain = tuner.fold().eval()
    assert not any(type(module).__module__.startswith("stn_fast") for module in plain.modules())
    x = inputs(4)
    torch.testing.assert_close(plain(x), model.eval()(x))
    return plain, inputs


def test_a_folded_model_is_exported_by_torch(folded):
    plain, inputs = folded
    program = torch.export.export(plain, (inputs(4),), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    x = inputs(9)
    torch.testing.assert_close(program.module()(x), plain(x))


def test_onnxruntime_runs_a_folded_model(folded, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    plain, inputs = folded
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        plain, (inputs(4),), path, dynamo=True, verbose=False, input_names=["x"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=2)},),
    )  # fmt: skip
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = inputs(9)
    (y,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), plain(x).detach(), rtol=1e-4, atol=1e-5)


def test_safetensors_keeps_a_folded_model(folded, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    plain, inputs = folded
    safetensors.save_model(plain, tmp_path / "model.safetensors")
    loaded, x = type(plain)().eval(), inputs(3)
    safetensors.load_model(loaded, tmp_path / "model.safetensors")
    assert torch.equal(loaded(x), plain(x))
