"""Makes steps on the CPU go the way that they go on CUDA, graphs included."""

import importlib

from recorded_graphs import RecordedGraphs

from stn_fast.training import capture, finite, optimizers, trainer


def as_on_cuda(monkeypatch):
    """The device decides on steps, optimizers keep all that they have on it, and graphs are recorded operations."""
    monkeypatch.setattr(finite, "_decides", lambda device: True)
    for module in (optimizers, capture, trainer):
        monkeypatch.setattr(module, "captures", lambda device: True)
    monkeypatch.setattr(capture, "CudaGraphs", lambda device: RecordedGraphs())
    for name in ("adam", "rmsprop"):
        module = importlib.import_module(f"torch.optim.{name}")
        monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda *given: ["cpu"])
