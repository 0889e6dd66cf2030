"""The papers' networks, and small ones for tests and first experiments."""

from stn_fast.models.alexnet import alexnet
from stn_fast.models.convnet import ConvNet, ImageClassifier
from stn_fast.models.fashion_cnn import fashion_cnn
from stn_fast.models.language_model import LanguageModel
from stn_fast.models.mlp import MLP, mlp
from stn_fast.models.resnet import ResNet, resnet18, wide_resnet
from stn_fast.models.vgg import vgg16

__all__ = [
    "MLP",
    "ConvNet",
    "ImageClassifier",
    "LanguageModel",
    "ResNet",
    "alexnet",
    "fashion_cnn",
    "mlp",
    "resnet18",
    "vgg16",
    "wide_resnet",
]
