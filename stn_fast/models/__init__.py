"""The papers' networks, and small ones for first experiments: plain modules, made self-tuning by `tuned`."""

from stn_fast.models.alexnet import alexnet
from stn_fast.models.classifier import ImageClassifier
from stn_fast.models.fashion_cnn import fashion_cnn
from stn_fast.models.language_model import LanguageModel
from stn_fast.models.mlp import MLP, mlp, plain_mlp
from stn_fast.models.resnet import ResNet, resnet18, wide_resnet
from stn_fast.models.tuned import tuned
from stn_fast.models.vgg import vgg16

__all__ = [
    "MLP",
    "ImageClassifier",
    "LanguageModel",
    "ResNet",
    "alexnet",
    "fashion_cnn",
    "mlp",
    "plain_mlp",
    "resnet18",
    "tuned",
    "vgg16",
    "wide_resnet",
]
