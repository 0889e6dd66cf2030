"""Optional libraries for tests: timm, transformers, peft, lightning_fabric and accelerate."""

from importlib.util import find_spec

import pytest
import torch

NON_MAXIMUM_SUPPRESSION = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def library(name):
    """The library, or a skipped test where it is not installed."""
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    make_torchvision_importable()
    return pytest.importorskip(name)


def make_torchvision_importable():
    """Declares two operators of torchvision if it can't be imported without them; nothing that is tested calls them.

    PyPI has torchvision only for torch's CUDA build, and its compiled operators can't be loaded beside a CPU build of
    torch. Most of it does without them, but torchvision 0.28 describes the shapes of these two as it is imported:
    "operator torchvision::nms does not exist". timm and transformers import it for their transforms of images.
    """
    if find_spec("torchvision") is None:
        return
    try:
        import torchvision
    except RuntimeError:
        torch.library.define("torchvision::nms", NON_MAXIMUM_SUPPRESSION)
        torch.library.define("torchvision::qnms", NON_MAXIMUM_SUPPRESSION)
        import torchvision  # noqa: F401
