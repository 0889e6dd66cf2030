"""How each kind of module is converted: the rules of torch.nn's, timm's and transformers' modules, and your own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from stn_fast.conversion import attention, layers, norms, plain
from stn_fast.conversion.augment import Augment, TunedAugment
from stn_fast.conversion.converted import Converted, change_class, register_response
from stn_fast.conversion.functional_dropout import functional_dropouts
from stn_fast.conversion.libraries import is_conv1d, is_drop_path, norm_of_library
from stn_fast.conversion.reading import rates_in
from stn_fast.conversion.tuned import TunedHyperparameters
from stn_fast.hyperparameter import Hyperparameter, ResponseRank
from stn_fast.layers.gated import factors_to_use
from stn_fast.layers.regularisers import check_rate, check_scale, check_shared


@dataclass(frozen=True)
class Context:
    """What a rule is given besides the module.

    Attributes:
        name: dotted name of the module in the model.
        tuned: the model's hyperparameters; `tuned.space` has their names.
        response_rank: the argument of `convert`.
        example_dim: the dimension of the module's input that counts examples.
        hyperparameter: name of the hyperparameter that is the module's dropout rate; None if it has no rate.
        streams: numbers of random streams that no other layer uses.
    """

    name: str
    tuned: TunedHyperparameters
    response_rank: ResponseRank
    example_dim: int
    hyperparameter: str | None
    streams: Iterator[int]

    def become(self, module: nn.Module, converted: type[Converted]) -> None:
        """Changes the class of the module to ``converted``, a subclass of `Converted` and of the module's own class."""
        change_class(module, converted, self.tuned, self.name, self.example_dim)

    def add_response(self, module: nn.Module) -> None:
        """Registers `response_weight` of the shape of `weight`, `weight_gate`, and the same of a bias, if there is one.

        Dimension 0 of the weight counts the outputs. The response is 0 at the start.
        """
        weight: Any = module.weight
        bound = weight[0].numel() ** -0.5 if weight.ndim > 1 else 1.0
        register_response(module, len(self.tuned.space), outputs=len(weight), bound=bound)


Rule = Callable[[nn.Module, Context], None]
AnyRule = TypeVar("AnyRule", bound=Rule)

RULES: dict[type[nn.Module], Rule] = {}

# What becomes of modules that have no parameters, but read those of converted modules in them without calling these.
OPENED: dict[type[nn.Module], type[Converted]] = {
    nn.TransformerEncoderLayer: attention.TransformerEncoderLayer,
    nn.TransformerEncoder: attention.TransformerEncoder,
}


def converts(kind: type[nn.Module]) -> Callable[[AnyRule], AnyRule]:
    """Decorator: registers a function that converts modules of your own class, in every later call of `convert`.

    The rule is called as ``rule(module, context)`` for modules of exactly this class; `Context` says what it is given.
    It registers the parameters of the response and changes the class of the module:

        class Scale(nn.Module):  # y = x ⊙ weight
            def __init__(self, features):
                super().__init__()
                self.weight = nn.Parameter(torch.ones(features))

            def forward(self, x):
                return x * self.weight

        class TunedScale(Converted, Scale):  # y = x ⊙ (weight + (h Gwᵀ) ⊙ R)
            def effective(self, h):
                return self.weight + (h @ self.weight_gate.T) * self.response_weight

            def forward(self, x):
                return x * self.effective(self.response(self.weight))  # h is (B, n), or (n,) if all examples share it

            def folded(self, response):
                return {"weight": self.effective(response)}

        @stn.converts(Scale)
        def convert_scale(module, context):
            context.add_response(module)
            context.become(module, TunedScale)

    `Converted` is in `stn_fast.conversion`; its `split` and `response_of_rows` are for inputs with several rows per
    example.

    Raises:
        TypeError: ``kind`` is not a class of modules.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"converts: the class must be a subclass of torch.nn.Module, got {kind!r}")

    def register(rule: AnyRule) -> AnyRule:
        RULES[kind] = rule
        return rule

    return register


def rule_of(module: nn.Module) -> Rule | None:
    """The rule for a module of exactly this class; None if there is none."""
    kind = type(module)
    if kind in RULES:
        return RULES[kind]
    if is_drop_path(module):
        return _drop_path
    if is_conv1d(module):
        return _table
    return _norm if norm_of_library(module) is not None else None


def drops(module: nn.Module) -> bool:
    """Whether its class is one of dropout or noise, or is named like one of stochastic depth."""
    known = isinstance(module, _DropoutNd | plain.LockedDropout | plain.GaussianNoise)
    return known or type(module).__name__.endswith(("DropPath", "StochasticDepth"))


def is_quantised(module: nn.Module) -> bool:
    """Whether it is one of torch's quantised modules, which have no floating point weight."""
    return type(module).__module__.startswith(("torch.ao.nn.", "torch.nn.quantized."))


def is_closed(module: nn.Module) -> bool:
    """Whether the modules in it are not converted by themselves, because it reads their parameters."""
    if isinstance(module, nn.TransformerEncoderLayer):
        return type(module) not in OPENED
    return isinstance(module, nn.MultiheadAttention) or is_parametrized(module)


def drops_by_itself(module: nn.Module) -> bool:
    """Whether it has no rule and no parameters of its own, but code that drops activations."""
    return not has_parameters(module) and _own_dropout(module) is not None


def has_parameters(module: nn.Module) -> bool:
    """Whether it has parameters of its own."""
    return any(parameter is not None for parameter in module._parameters.values())


def _own_dropout(module: nn.Module) -> str | None:
    """How the code of a module without a rule drops activations; None if it does not, or its class tells so."""
    if drops(module) or rule_of(module) is not None:
        return None
    rates = rates_in(module) if not has_parameters(module) else {}
    shown = ", ".join(f"{name} = {rate:g}" for name, rate in rates.items())
    told = [f"its dropout rate is a number, {shown}, which stays the same for all examples"] if rates else []
    calls = [one for one in functional_dropouts(module) if not any(f" self.{name} = " in one for name in rates)]
    told += [f"its code calls {', '.join(calls)}, which stays the same for all examples"] if calls else []
    return "; ".join(told) or None


def is_known(module: nn.Module) -> bool:
    """Whether this package has a rule for its class."""
    if type(module) in RULES:
        return type(module) in KNOWN
    return is_drop_path(module) or is_conv1d(module) or norm_of_library(module) is not None


def rate_of(module: nn.Module) -> float | None:
    """The rate of a dropout module that has a rule, of an LSTM between its layers, or of attention; None for others.

    For noise, it is the standard deviation.
    """
    if type(module) in RECURRENT:
        assert isinstance(module, nn.RNNBase)
        return module.dropout if module.num_layers > 1 and module.dropout > 0 else None
    if type(module) is nn.MultiheadAttention:
        return module.dropout or None
    if is_noise(module):
        return module.std  # type: ignore[return-value]
    if type(module) in DROPOUTS or type(module) in SHARING:
        return float(module.p)  # type: ignore[arg-type]
    return float(module.drop_prob or 0) if is_drop_path(module) else None  # type: ignore[arg-type]


def streams_of(module: nn.Module) -> int:
    """How many random streams a module of dropout has, whether or not its rate is tuned."""
    if type(module) is plain.DropConnectLSTM:
        return module.num_layers * (2 if module.bidirectional else 1)
    return module.num_layers - 1 if isinstance(module, RECURRENT) else 1


def has_weights(module: nn.Module) -> bool:
    """Whether a module with a rule is one that weight decay is for; norms, dropout and augmentation are not."""
    without = (*NORMS, *DROPOUTS, plain.GaussianNoise, Augment)
    return type(module) not in without and not is_drop_path(module) and norm_of_library(module) is None


def is_noise(module: nn.Module) -> bool:
    """Whether its strength is a standard deviation."""
    return type(module) is plain.GaussianNoise


def check_strength(module: nn.Module, hyperparameter: Hyperparameter) -> None:
    """Raises ValueError if a hyperparameter can't be the rate of this module, or its standard deviation."""
    if is_noise(module):
        return check_scale(hyperparameter)
    check_rate(hyperparameter)
    if type(module) in SHARING:
        check_shared(hyperparameter, type(module).__name__)


def fixed_example_dim(module: nn.Module) -> int | None:
    """The only dimension of its input that can count examples; None if `example_dims` may declare another one."""
    if isinstance(module, (*RECURRENT, nn.MultiheadAttention)):
        return 0 if module.batch_first else 1
    if isinstance(module, TRANSFORMERS):
        attentions = (fixed_example_dim(one) for one in module.modules() if isinstance(one, nn.MultiheadAttention))
        return next(attentions, None)
    return 0 if issubclass(norm_of_library(module) or type(module), EXAMPLES_FIRST) else None


def reason_against(module: nn.Module) -> str | None:
    """Why a module is not converted although it has parameters or drops activations; None if it can be converted."""
    kind = type(module)
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return "its parameters are not initialised: call the model once before"
    if is_parametrized(module):
        return "its parameters are parametrized; torch.nn.utils.parametrize.remove_parametrizations makes them plain"
    if is_quantised(module):
        return "it is quantised"
    if is_closed(module) and rule_of(module) is None:
        return "its forward reads the parameters of its children directly"
    dropout = _own_dropout(module)
    if dropout is not None and not has_parameters(module):
        return dropout
    if rule_of(module) is None:
        bases = [base.__name__ for base in kind.__mro__[1:] if base in RULES]
        own = f"it is a subclass of {bases[0]}, whose forward may differ" if bases else "there is no rule for its class"
        return f"{own}; stn.converts adds a rule" + (f"; {dropout}" if dropout else "")
    return _reason_against_known(module) if is_known(module) else None


def _reason_against_known(module: nn.Module) -> str | None:
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
        return "max_norm and scale_grad_by_freq are not supported"
    if is_drop_path(module) and not getattr(module, "scale_by_keep", True):
        return "scale_by_keep=False is not supported"
    if isinstance(module, nn.LSTM) and module.proj_size:
        return "proj_size is not supported"
    if type(module) in (*DROPOUTS, plain.GaussianNoise, Augment) or is_drop_path(module):
        return None
    if isinstance(module, nn.MultiheadAttention):
        return _reason_against_attention(module)
    weight = module._parameters.get("weight_ih_l0" if isinstance(module, RECURRENT) else "weight")
    if weight is None:
        return "it has no parameter 'weight'"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    if not weight.requires_grad:
        return "its weight is frozen (requires_grad=False), so it cannot respond"
    return _reason_against_norm(module)


def _reason_against_attention(module: nn.MultiheadAttention) -> str | None:
    if type(module.out_proj) not in (nn.Linear, NonDynamicallyQuantizableLinear):
        return f"its out_proj is a {type(module.out_proj).__name__}"
    weights = [weight for name, weight in module.named_parameters() if name.endswith("weight")]
    if not all(weight.requires_grad for weight in weights):
        return "a weight of it is frozen (requires_grad=False), so it cannot respond"
    return None


def _reason_against_norm(module: nn.Module) -> str | None:
    converted = norm_of_library(module)
    if converted is norms.OwnNorm:
        return None if norms.takes_stacked_weights(module) else "its forward can't have a weight for each example"
    if converted is not None and getattr(module, "_fast_norm", False):
        return "timm's fast norm is not supported: timm.layers.set_fast_norm(False) before the model is made"
    return None


def _linear(module: nn.Module, context: Context) -> None:
    """A linear layer or a convolution."""
    assert isinstance(module.weight, nn.Parameter)
    shape = module.weight.shape
    groups = module.groups if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else 1
    factors = factors_to_use("convert", context.response_rank, shape, groups)
    bound = module.weight[0].numel() ** -0.5
    register_response(module, len(context.tuned.space), outputs=shape[0], factors=factors, bound=bound)
    context.become(module, LINEAR.get(type(module), layers.Linear))
    if isinstance(module, layers.Conv2d):
        module.join()


def _table(module: nn.Module, context: Context) -> None:
    """An embedding, or a linear layer whose weight is transposed."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    rows, outputs = weight.shape
    factors = factors_to_use("convert", context.response_rank, (outputs, rows))
    if factors is not None:
        factors = factors[0], factors[1][::-1]  # a table has a row for each input
    is_embedding = isinstance(module, nn.Embedding)
    bound = plain.EmbeddingWithDropout.BOUND if is_embedding else rows**-0.5
    register_response(module, len(context.tuned.space), outputs=outputs, factors=factors, bound=bound)
    if type(module) is plain.EmbeddingWithDropout:
        _bind(module, context, layers.EmbeddingWithDropout)
    else:
        context.become(module, layers.Embedding if is_embedding else layers.Conv1D)
    if isinstance(module, layers.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module._response_table[module.padding_idx].zero_()


def _recurrent(module: nn.Module, context: Context) -> None:
    assert isinstance(module, nn.LSTM | nn.GRU)
    gates = 3 if isinstance(module, nn.GRU) else 4
    outputs, bound = gates * module.hidden_size, module.hidden_size**-0.5
    for name, weight in list(module.named_parameters(recurse=False)):
        if name.startswith("weight"):
            factors = factors_to_use("convert", context.response_rank, weight.shape)
            ending = name.removeprefix("weight")
            register_response(
                module, len(context.tuned.space), outputs=outputs, factors=factors, bound=bound, ending=ending
            )
    streams = tuple(next(context.streams) for _ in range(streams_of(module)))
    module.__dict__.update(name=context.hyperparameter, streams=streams)
    kinds = {nn.LSTM: layers.LSTM, nn.GRU: layers.GRU, plain.DropConnectLSTM: layers.DropConnectLSTM}
    context.become(module, kinds[type(module)])


def _attention(module: nn.Module, context: Context) -> None:
    """All of it: `out_proj` becomes a converted Linear."""
    assert isinstance(module, nn.MultiheadAttention)
    named = module._parameters.items()
    weights = {name: weight for name, weight in named if name.endswith("_weight") and weight is not None}
    biases = [None] * len(weights) if module.in_proj_bias is None else module.in_proj_bias.chunk(len(weights))
    for (name, weight), bias in zip(weights.items(), biases, strict=True):
        register_response(
            module,
            len(context.tuned.space),
            outputs=len(weight),
            factors=factors_to_use("convert", context.response_rank, weight.shape),
            bound=weight.shape[1] ** -0.5,
            ending=f"_{name.removesuffix('_weight')}",
            plain=(weight, bias),
        )
    stream = next(context.streams) if context.hyperparameter is not None else 0
    module.__dict__.update(name=context.hyperparameter, stream=stream)
    context.become(module, attention.MultiheadAttention)
    _linear(module.out_proj, replace(context, name=f"{context.name}.out_proj".lstrip(".")))


def _norm(module: nn.Module, context: Context) -> None:
    weight, converted = module.weight, norm_of_library(module) or NORMS[type(module)]
    assert isinstance(weight, nn.Parameter)
    register_response(module, len(context.tuned.space), outputs=weight.numel())
    context.become(module, converted)


def _dropout(module: nn.Module, context: Context) -> None:
    _bind(module, context, DROPOUTS[type(module)])


def _noise(module: nn.Module, context: Context) -> None:
    _bind(module, context, layers.GaussianNoise)


def _drop_path(module: nn.Module, context: Context) -> None:
    _bind(module, context, layers.DropPath)


def _augment(module: nn.Module, context: Context) -> None:
    context.become(module, TunedAugment)


def _bind(module: nn.Module, context: Context, converted: type[Converted]) -> None:
    module.__dict__.update(name=context.hyperparameter, stream=next(context.streams))
    context.become(module, converted)


LINEAR: dict[type[nn.Module], type[Converted]] = {
    nn.Linear: layers.Linear,
    nn.Conv1d: layers.Conv1d,
    nn.Conv2d: layers.Conv2d,
    nn.Conv3d: layers.Conv3d,
    plain.ConvReLU2d: layers.ConvReLU2d,
}
NORMS: dict[type[nn.Module], type[Converted]] = {
    nn.LayerNorm: norms.LayerNorm,
    nn.RMSNorm: norms.RMSNorm,
    nn.GroupNorm: norms.GroupNorm,
    nn.BatchNorm1d: norms.BatchNorm1d,
    nn.BatchNorm2d: norms.BatchNorm2d,
    nn.BatchNorm3d: norms.BatchNorm3d,
}
DROPOUTS: dict[type[nn.Module], type[Converted]] = {
    nn.Dropout: layers.Dropout,
    nn.Dropout1d: layers.Dropout1d,
    nn.Dropout2d: layers.Dropout2d,
    nn.Dropout3d: layers.Dropout3d,
    plain.LockedDropout: layers.LockedDropout,
}
SHARING = (plain.EmbeddingWithDropout, plain.DropConnectLSTM)  # all examples share their draw, and so their rate
EXAMPLES_FIRST = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.Dropout1d,
    nn.Dropout2d, nn.Dropout3d, norms.LayerNorm2d, norms.RMSNorm2d, Augment,
)  # fmt: skip
TRANSFORMERS = (
    nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder, nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)  # fmt: skip
LAYERS = (
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)  # one batch_first for all in them
RECURRENT = (nn.LSTM, nn.GRU)
RULES |= dict.fromkeys(RECURRENT, _recurrent)
RULES |= {nn.Embedding: _table, nn.MultiheadAttention: _attention, Augment: _augment}
RULES |= {plain.EmbeddingWithDropout: _table, plain.DropConnectLSTM: _recurrent, plain.GaussianNoise: _noise}
RULES |= dict.fromkeys(LINEAR, _linear)
RULES |= dict.fromkeys(NORMS, _norm) | dict.fromkeys(DROPOUTS, _dropout)
KNOWN = frozenset(RULES)
