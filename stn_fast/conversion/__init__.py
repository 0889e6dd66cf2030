"""Conversion of a plain torch network to a self-tuning one, in place, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import TypeVar

from torch import nn

from stn_fast.checks import switch, whole_number
from stn_fast.conversion.additions import Added, Addition, Dropout, LabelSmoothing, WeightDecay
from stn_fast.conversion.augment import Augment
from stn_fast.conversion.converted import Converted, change_class
from stn_fast.conversion.folding import fold
from stn_fast.conversion.output_dropout import add_output_dropouts, remove_output_dropouts
from stn_fast.conversion.placing import additions_in, decay_names, placed, with_additions
from stn_fast.conversion.plain import (
    ConvReLU2d,
    DropConnectLSTM,
    EmbeddingWithDropout,
    GaussianNoise,
    LockedDropout,
)
from stn_fast.conversion.report import Entry, table
from stn_fast.conversion.rows import check_rows
from stn_fast.conversion.rules import (
    LAYERS,
    OPENED,
    TRANSFORMERS,
    Context,
    check_strength,
    converts,
    fixed_example_dim,
    has_weights,
    is_known,
    rate_of,
    rule_of,
    streams_of,
)
from stn_fast.conversion.selection import (
    Named,
    check_model,
    check_patterns,
    dropouts_of,
    matches,
    selected,
    strengths_of,
)
from stn_fast.conversion.space import Group, grouped, space_of, suggest_space
from stn_fast.conversion.tuned import TunedHyperparameters
from stn_fast.hyperparameter import ResponseRank
from stn_fast.hyperparameters import HyperparameterSpace
from stn_fast.layers.gated import factors_to_use
from stn_fast.layers.regularisers import _Regulariser

__all__ = [
    "Added",
    "Augment",
    "Context",
    "ConvReLU2d",
    "Converted",
    "DropConnectLSTM",
    "Dropout",
    "EmbeddingWithDropout",
    "Entry",
    "GaussianNoise",
    "LabelSmoothing",
    "LockedDropout",
    "TunedHyperparameters",
    "WeightDecay",
    "check_rows",
    "convert",
    "converts",
    "fold",
    "suggest_space",
]

Model = TypeVar("Model", bound=nn.Module)


def convert(
    model: Model,
    space: HyperparameterSpace | Sequence[Addition] | None = None,
    *,
    dropouts: Mapping[str, str] | None = None,
    of_loss: str | Sequence[str] = (),
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    example_dims: Mapping[str, int] | None = None,
    response_rank: ResponseRank = "auto",
    group: Group = "type",
    strict: bool = False,
    quiet: bool = False,
) -> Model:
    """Makes a plain network self-tuning, in place, and returns it. It computes the same function as before.

    The classes of its layers change to ones that respond to hyperparameters, and its dropout modules drop each example
    at its own rate. Parameters, tied ones too, buffers, names, hooks and devices are kept, so a plain checkpoint loads
    with ``strict=False``. Weights of convolutions with a full response move to other memory, beside it. Each layer gets
    the response parameters of the gated layer of its kind, such as `stn_fast.HyperLinear`; the response is 0 at the
    start. Make the optimizer afterwards, with all parameters.

    The root gets a child `tuned_hyperparameters`, a `TunedHyperparameters` with the space, the location λ and the
    report. Train with `stn_fast.fit` or `stn_fast.SelfTuner`, or call the model inside
    ``model.tuned_hyperparameters.using(hyper)``. In evaluation mode outside of it, layers use the current λ and dropout
    is off; in training mode, that is an error.

    Converted are Linear, Conv1d, Conv2d, Conv3d, Embedding, LSTM, GRU, MultiheadAttention, LayerNorm, RMSNorm,
    GroupNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, Dropout, Dropout1d, Dropout2d and Dropout3d of torch.nn; of timm,
    DropPath and the norms LayerNorm, LayerNorm2d, RmsNorm, RmsNorm2d, GroupNorm, GroupNorm1, GroupNormAct,
    GroupNorm1Act and BatchNormAct2d; of transformers, Conv1D and the norms with only a weight, such as LlamaRMSNorm,
    GemmaRMSNorm and T5LayerNorm; `stn_fast.Augment`, `stn_fast.ConvReLU2d`, `stn_fast.DropConnectLSTM`,
    `stn_fast.EmbeddingWithDropout`, `stn_fast.GaussianNoise` and `stn_fast.LockedDropout`; and classes with a rule
    added by `stn_fast.converts`.
    Subclasses are not, but for those of timm's norms that inherit forward. The dropout between the layers of an LSTM or
    GRU and that of attention weights become tuned, too, if there is any. Other modules stay as they are, such as RNN,
    parametrized modules and frozen layers. The report lists them.

    Attention with a tuned rate computes its weights in full in training mode, without a fused kernel.
    TransformerEncoder and TransformerEncoderLayer call the modules in them also in evaluation mode, without torch's
    fast path, so their results at padded positions are not 0. A GRU has no fused kernel: it is computed in plain torch,
    one time step after the other.

    The first dimension of a layer's input counts examples, or consecutive rows of each: a layer that is called with
    k·B rows for B examples uses the hyperparameters of example i for rows k·i to k·i + k − 1. An Embedding that is
    called with tokens (1, ...), such as position numbers, returns a result for each example. Exclude a layer that is
    called with a table of positions, such as (T, D) or numbers (T,): with T = B, its rows would be taken for examples.
    `SelfTuner` checks this at its first step or pass; inside `using`, call `stn_fast.conversion.check_rows` yourself.

    A dropout module is left out if the module that contains it reads its rate, as fused attention does; so are rates
    that are plain numbers, and functions that the code of a module calls, such as `F.dropout`. Exclude a layer whose
    weight the network reads itself, as in ``F.linear(x, self.embedding.weight)``: the check refuses it, too.

    Patterns are matched by fnmatch on dotted names; a pattern that fits a module fits all modules in it.

    Args:
        model: on one device, with its weights.
        space: the hyperparameters; by default `suggest_space(model, group)`. A list of regularisers that the model
            lacks, `stn_fast.Dropout`, `stn_fast.WeightDecay` and `stn_fast.LabelSmoothing`, adds them: the space is the
            suggested one and their hyperparameters.
        dropouts: {pattern: name of a hyperparameter of `space`} for dropout modules, the first that fits; others stay
            plain. By default, a dropout module has the hyperparameter with the name that `suggest_space` gives it.
            Not with a list of additions. A layer whose own rate is above 0 and has no hyperparameter stays plain, too.
        of_loss: hyperparameters of `space` that your loss looks up, such as the weight of a penalty, as
            ``model.tuned_hyperparameters.current["name"]``, (B,). Only weight_decay needs no mention.
        include, exclude: patterns of modules to convert, and of those to leave out.
        example_dims: {pattern: dimension that counts examples}, the first that fits, for inputs such as (T, B, D). It
            applies to Linear, Embedding, EmbeddingWithDropout, LayerNorm, RMSNorm, Dropout, LockedDropout,
            GaussianNoise and DropPath, and to outputs that a `stn_fast.Dropout` drops; by default it is the first, or
            what `batch_first` says in transformers of torch.nn. LSTM, GRU, DropConnectLSTM, MultiheadAttention and all
            in a TransformerEncoderLayer or TransformerDecoderLayer follow `batch_first`, and in the inputs of others it
            is always the first; another one is an error.
        response_rank: as for `HyperLinear`. Norms always have a full response.
        group: how dropout modules share rates, as for `suggest_space`; not used with `dropouts`.
        strict: whether it is an error if a module with parameters or dropout is left out for another reason than
            include and exclude.
        quiet: whether to print no table.

    Raises:
        TypeError: `model` is not a module, or `space` is something else.
        ValueError: nothing can be converted; the model has been converted, is on the meta device or on several; a
            pattern fits nothing, or declares a dimension that a module can't have; a hyperparameter other than
            weight_decay has no use, is lacking, or can't be a dropout rate; an addition fits nothing, or its name is
            used; `strict` and a module is left out. The message names it, and the model is unchanged.
    """
    check_model("convert", model)
    additions = additions_in(space)
    switch("convert", "strict", strict)
    switch("convert", "quiet", quiet)
    factors_to_use("convert", response_rank, (2, 2))
    of_loss = [of_loss] if isinstance(of_loss, str) else list(of_loss)
    include, exclude = ([given] if isinstance(given, str) else list(given) for given in (include, exclude))
    example_dims = dict(example_dims or {})
    for argument, patterns in (("include", include), ("exclude", exclude), ("example_dims", example_dims)):
        check_patterns(argument, model, patterns)
    for pattern, dim in example_dims.items():
        whole_number("convert", f"example_dims[{pattern!r}]", dim, 0)
    chosen, left_out = selected(model, include, exclude)
    space, rates = _rates(model, chosen, space, dropouts, group)
    without_rate = [one for one in dropouts_of(chosen) if one.name not in rates]
    plain = {one.name for one in without_rate if rate_of(one.module) or not has_weights(one.module)}
    for one in chosen:
        if one.name in plain:
            also = ", so its weights do not respond either" if has_weights(one.module) else ""
            left_out.append(one.left_out(f"no hyperparameter of the space is its rate{also}"))
    places, chosen = chosen, [one for one in chosen if one.name not in plain]
    _check_chosen(chosen, left_out, strict)
    added = placed(model, chosen, additions or ())
    _check_rates(space, rates, chosen, added, of_loss)

    dropped = {name for one in added if isinstance(one.addition, Dropout) for name in one.modules}
    concerned = [*chosen, *(Named(name, model.get_submodule(name)) for name in dropped)]
    dims = _example_dims(model, concerned, example_dims)

    report = [Entry(one.name, one.kind, rates.get(one.name)) for one in chosen] + left_out
    tuned = TunedHyperparameters(space, report, added, response_rank).train(model.training)
    tuned.to(next(iter(model.parameters()), tuned.location).device)
    streams, decays = _free_streams(model), decay_names(added)
    before = [(module, {*module._parameters}, {*module.__dict__}) for module in model.modules()]
    try:
        for one in places:
            if one.name in plain:
                for _ in range(streams_of(one.module)):  # so that draws do not depend on which rates are tuned
                    next(streams)
                continue
            rule = rule_of(one.module)
            assert rule is not None
            rule(one.module, Context(one.name, tuned, response_rank, dims[one.name], rates.get(one.name), streams))
            if decays:
                _decay(one.module, decays.get(one.name))
        _open(model, tuned)
        add_output_dropouts(model, added, tuned, dims, streams)
    except Exception:
        remove_output_dropouts(model)
        for module in model.modules():
            if isinstance(module, Converted):
                Converted.revert(module, {})
        for module, parameters, attributes in before:  # what a rule has added to a module that is not `Converted` yet
            for kept, those in ((module._parameters, parameters), (module.__dict__, attributes)):
                for name in {*kept} - those:
                    del kept[name]
        raise
    tuned.converted = [name for name, module in model.named_modules() if isinstance(module, Converted)]
    tuned.untuned = [one.name for one in without_rate]
    model.add_module("tuned_hyperparameters", tuned)
    if not quiet:
        print(table(report, space, added))
    return model


def _decay(module: nn.Module, hyperparameter: str | None) -> None:
    """Sets what decays the weights of a module, and of those in it that its rule has converted."""
    for one in module.modules():
        if isinstance(one, Converted):
            one.__dict__["decay_name"] = hyperparameter


def _open(model: nn.Module, tuned: TunedHyperparameters) -> None:
    """Changes the modules that would not call the converted ones in them."""
    for name, module in model.named_modules():
        if type(module) in OPENED and any(isinstance(one, Converted) for one in module.modules()):
            change_class(module, OPENED[type(module)], tuned, name, fixed_example_dim(module) or 0)


def _rates(
    model: nn.Module,
    chosen: Sequence[Named],
    space: HyperparameterSpace | Sequence[Addition] | None,
    dropouts: Mapping[str, str] | None,
    group: Group,
) -> tuple[HyperparameterSpace, dict[str, str]]:
    """The space, and {name of a module: the hyperparameter that is its dropout rate}."""
    if dropouts is None:
        groups = grouped(dropouts_of(chosen), group)
        if not isinstance(space, HyperparameterSpace):
            space = with_additions(space_of(groups, strengths_of(chosen)), space or ())
        return space, {one.name: name for name, group in groups.items() if name in space for one in group}
    if not isinstance(space, HyperparameterSpace):
        raise ValueError(
            "convert: dropouts names hyperparameters of a space: give space, too, as a HyperparameterSpace"
        )
    check_patterns("dropouts", model, dropouts)
    for pattern, name in dropouts.items():
        if name not in space:
            raise ValueError(f"convert: dropouts[{pattern!r}] is {name!r}, but the space has {', '.join(space.names)}")
    rates: dict[str, str] = {}
    for one in chosen:
        if rate_of(one.module) is not None or not is_known(one.module):
            found = [name for pattern, name in dropouts.items() if matches(one.name, [pattern])]
            rates |= {one.name: found[0]} if found else {}
    return space, rates


def _check_chosen(chosen: Sequence[Named], left_out: Sequence[Entry], strict: bool) -> None:
    shown = [f"{entry.name or 'the model itself'} ({entry.kind}): {entry.reason}" for entry in left_out]
    if not chosen:
        raise ValueError("convert: no module can be converted" + "".join(f"\n  {line}" for line in shown))
    against = [line for entry, line in zip(left_out, shown, strict=True) if not entry.asked]
    if strict and against:
        raise ValueError("convert: strict=True, but modules are left out:" + "".join(f"\n  {line}" for line in against))


def _check_rates(
    space: HyperparameterSpace,
    rates: Mapping[str, str],
    chosen: Sequence[Named],
    added: Sequence[Added],
    of_loss: Sequence[str],
) -> None:
    """Modules with a rule of the user's own may use any hyperparameter, and as something else than a rate."""
    own = {one.name for one in chosen if not is_known(one.module)}
    strengths = [one.name for one in strengths_of(chosen)]
    missing = [name for name in strengths if name not in space]
    if missing:
        raise ValueError(f"convert: the space lacks {', '.join(missing)}, which stn.Augment needs")
    unknown = [name for name in of_loss if name not in space]
    if unknown:
        raise ValueError(f"convert: of_loss names {', '.join(unknown)}, but the space has {', '.join(space.names)}")
    used = {"weight_decay", *rates.values(), *strengths, *(one.hyperparameter for one in added), *of_loss}
    unused = [name for name in space.names if name not in used]
    if unused and not own:
        raise ValueError(
            f"convert: nothing uses {', '.join(unused)}: give the dropout modules with this rate in dropouts, name it "
            "in of_loss if your loss uses it, or leave it out of the space"
        )
    for one in chosen:
        if one.name in rates and one.name not in own:
            check_strength(one.module, space[rates[one.name]])


def _example_dims(model: nn.Module, chosen: Sequence[Named], example_dims: Mapping[str, int]) -> dict[str, int]:
    """{name of a module: the dimension of its input that counts examples}"""
    dims: dict[str, int] = {}
    transformers = {
        f"{name}.".lstrip("."): fixed_example_dim(module) or 0
        for name, module in model.named_modules()
        if isinstance(module, (*TRANSFORMERS, nn.MultiheadAttention))
    }
    layers = {prefix: dim for prefix, dim in transformers.items() if type(model.get_submodule(prefix[:-1])) in LAYERS}
    projections = [
        f"{one.name}.out_proj".lstrip(".") for one in chosen if isinstance(one.module, nn.MultiheadAttention)
    ]
    for one in (*chosen, *(Named(name, model.get_submodule(name)) for name in projections)):
        fixed = fixed_example_dim(one.module)
        if fixed is None:
            fixed = next((dim for prefix, dim in layers.items() if one.name.startswith(prefix)), None)
        pattern = next((pattern for pattern in example_dims if matches(one.name, [pattern])), None)
        default = next((dim for prefix, dim in transformers.items() if one.name.startswith(prefix)), 0)
        if isinstance(one.module, LockedDropout) and one.module.dim == default:
            default = 1 - default  # (T, B, D) if the mask is the same for all of T
        dims[one.name] = (default if fixed is None else fixed) if pattern is None else example_dims[pattern]
        if fixed is not None and dims[one.name] != fixed:
            raise ValueError(
                f"convert: example_dims[{pattern!r}] is {dims[one.name]}, but dimension {fixed} of the input of "
                f"{one.name or 'the model'} ({one.kind}) counts examples: use a narrower pattern, or put "
                f"{{{one.name!r}: {fixed}}} before it"
            )
    return dims


def _free_streams(model: nn.Module) -> Iterator[int]:
    """Numbers of random streams that no layer of the model uses."""
    used: Iterable[int] = (module.stream for module in model.modules() if isinstance(module, _Regulariser))
    return count(max(used, default=0) + 1)
