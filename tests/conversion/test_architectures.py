"""Small networks of timm and transformers: unchanged by conversion, per example, folded, with known rows.

``pytest -s -k table tests/conversion/test_architectures.py`` prints what is converted and what is left out, and why.
"""

import copy
import warnings
from collections import Counter
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from converted_networks import converted, sampled
from libraries import library
from numerics import relative_error
from torch import nn

import stn_fast as stn
from stn_fast.conversion import Converted, check_rows

EXAMPLES, CLASSES, WORDS, TIME = 3, 5, 50, 6
EXACT = 1e-10
EXACT_GRADIENT = {"GemmaForCausalLM": 1e-6}  # it multiplies by the weights of its norms in float32

TRANSFORMER = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)
WINDOWS = dict(img_size=32, window_size=4, embed_dim=12, depths=(2, 2), num_heads=(3, 3))
STAGES = dict(img_size=64, embed_dim=(32, 32, 32, 32), depths=(1, 1, 1, 1), stem_width=8)
MIXER = dict(img_size=32, patch_size=8, num_blocks=2, embed_dim=24)
TIMM = {
    "resnet18": dict(channels=(8, 8, 16, 16)),
    "resnext50_32x4d": dict(layers=(1, 1, 1, 1), channels=(16, 16, 16, 16), cardinality=4, base_width=4),
    "test_efficientnet": {},
    "mobilenetv3_small_050": {},
    "regnetx_002": {},
    "densenet121": dict(block_config=(2, 2, 2), growth_rate=8, drop_rate=0.1),
    "convnext_atto": dict(depths=(1, 1, 1, 1), dims=(8, 16, 16, 24), drop_path_rate=0.1),
    "vit_tiny_patch16_224": TRANSFORMER | dict(drop_path_rate=0.1),
    "deit_tiny_distilled_patch16_224": TRANSFORMER | dict(proj_drop_rate=0.1, attn_drop_rate=0.1),
    "beit_base_patch16_224": TRANSFORMER,
    "eva02_tiny_patch14_224": TRANSFORMER,
    "cait_xxs24_224": TRANSFORMER,
    "swin_tiny_patch4_window7_224": WINDOWS,
    "swinv2_tiny_window8_256": WINDOWS,
    "MlpMixer": MIXER,
    "gMLP": MIXER | dict(mlp_ratio=6),
    "ResMLP": MIXER | dict(mlp_ratio=4),
    "coatnet_0_rw_224": STAGES,
    "maxvit_tiny_rw_224": STAGES,
    "VGG": dict(mlp_ratio=0.01),
    "MetaFormer": dict(depths=(1, 1), dims=(8, 16)),
    "pvt_v2_b0": dict(depths=(1, 1, 1, 1), embed_dims=(8, 16, 16, 16), num_heads=(1, 1, 1, 1)),
    "edgenext_xx_small": dict(dims=(8, 16, 16, 24), depths=(1, 1, 1, 1)),
}
NARROW = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=WORDS, max_position_embeddings=16)
NARROW |= dict(intermediate_size=24, bos_token_id=0, eos_token_id=1, pad_token_id=0)
PAIR = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
PAIR |= dict(encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=WORDS, decoder_start_token_id=1)
TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=1)
TRANSFORMERS = {
    "GPT2LMHeadModel": dict(n_embd=16, n_layer=2, n_head=2, vocab_size=WORDS, n_positions=16) | TOKENS,
    "BertForSequenceClassification": NARROW,
    "DistilBertForSequenceClassification": dict(dim=16, n_layers=2, n_heads=2, hidden_dim=24, vocab_size=WORDS),
    "LlamaForCausalLM": NARROW | dict(num_key_value_heads=1),
    "GemmaForCausalLM": NARROW | dict(num_key_value_heads=1, head_dim=8),
    "Olmo2ForCausalLM": NARROW | dict(num_key_value_heads=1),
    "T5ForConditionalGeneration": dict(
        d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=WORDS, decoder_start_token_id=0
    ),
    "WhisperForConditionalGeneration": PAIR | TOKENS | dict(max_source_positions=8, num_mel_bins=4),
    "BartForConditionalGeneration": PAIR | TOKENS | dict(max_position_embeddings=16),
    "RobertaForSequenceClassification": NARROW,
    "ElectraForSequenceClassification": NARROW | dict(embedding_size=8),
    "GPTNeoXForCausalLM": NARROW,
    "OPTForCausalLM": dict(
        hidden_size=16, word_embed_proj_dim=8, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24, vocab_size=WORDS
    ),
    "AlbertForSequenceClassification": NARROW | dict(embedding_size=8),
    "BloomForCausalLM": dict(hidden_size=16, n_layer=2, n_head=2, vocab_size=WORDS) | TOKENS,
    "XLNetForSequenceClassification": dict(d_model=16, n_layer=2, n_head=2, d_inner=24, vocab_size=WORDS),
    "DebertaV2ForSequenceClassification": NARROW | dict(relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "ViTForImageClassification": dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=32, patch_size=8
    ),
    "SiglipVisionModel": dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=32, patch_size=8
    ),
    "SwinForImageClassification": dict(embed_dim=8, depths=(1, 2), num_heads=(2, 2), image_size=32, window_size=4),
}
# What can't be converted without a declaration, with the reason.
READS_QKV = {"*.attn.qkv": "its weight is passed to F.linear, with a bias made of two parameters"}
EXCLUDED: dict[str, dict[str, str]] = {
    "beit_base_patch16_224": READS_QKV,
    "eva02_tiny_patch14_224": READS_QKV,
    "swinv2_tiny_window8_256": READS_QKV | {"*.cpb_mlp": "it is called with a table of relative positions"},
    "T5ForConditionalGeneration": {"*.relative_attention_bias": "it is called with a table of relative positions"},
    "XLNetForSequenceClassification": {"*.rel_attn.dropout": "it is called with (B, heads, T, T) and with (T, B, D)"},
    "DebertaV2ForSequenceClassification": {
        "*.rel_embeddings": "its weight is read as a table of relative positions",
        "*.self.pos_*": "they are called with the table of relative positions",
    },
}
# {pattern: dimension that counts examples}
EXAMPLE_DIMS: dict[str, dict[str, int]] = {"XLNetForSequenceClassification": {"transformer": 1}}  # (T, B, D)

# Dropout modules that the library makes and never calls, and the tied embedding of T5, of which its stacks have copies.
UNCALLED = {
    "T5ForConditionalGeneration": {"shared"},
    "AlbertForSequenceClassification": {"albert.encoder.albert_layer_groups.0.albert_layers.0.dropout"},
    "XLNetForSequenceClassification": {"transformer.layer.0.dropout", "transformer.layer.1.dropout"},
}


def declared(name):
    """The arguments of convert for an architecture."""
    return dict(exclude=list(EXCLUDED.get(name, {})), example_dims=EXAMPLE_DIMS.get(name))


each_architecture = pytest.mark.parametrize("name", [*TIMM, *TRANSFORMERS])


@cache
def made(name):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = of_timm(name) if name in TIMM else of_transformers(name)
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1 and parameter.requires_grad:  # so that norms and scales of layers are not trivial
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def of_timm(name):
    timm = library("timm")
    mixers, options = timm.models.mlp_mixer, TIMM[name] | dict(num_classes=CLASSES)
    blocks = {
        "MlpMixer": {},
        "gMLP": dict(block_layer=mixers.SpatialGatingBlock, mlp_layer=mixers.GatedMlp),
        "ResMLP": dict(block_layer=partial(mixers.ResBlock, init_values=1e-4), norm_layer=mixers.Affine),
    }
    if name in blocks:
        return mixers.MlpMixer(**options, **blocks[name])
    if name == "MetaFormer":
        return timm.models.metaformer.MetaFormer(**options)
    if name == "VGG":
        return timm.models.vgg.VGG([8, "M", 16, "M", 16, "M", 16, "M", 16, "M"], **options)
    return timm.create_model(name, **options)


def of_transformers(name):
    transformers = library("transformers")
    kind = getattr(transformers, name)
    return kind(kind.config_class(**TRANSFORMERS[name]))


def arguments(name):
    generator = torch.Generator().manual_seed(1)
    size = 64 if TIMM.get(name, {}).get("img_size") == 64 or name == "edgenext_xx_small" else 32
    images = torch.randn(EXAMPLES, 3, size, size, generator=generator, dtype=torch.float64)
    tokens = torch.randint(2, WORDS, (EXAMPLES, TIME), generator=generator)
    if name in TIMM:
        return {"x": images}
    if name.startswith("Whisper"):
        spectra = torch.randn(EXAMPLES, 4, 16, generator=generator, dtype=torch.float64)
        return {"input_features": spectra, "decoder_input_ids": tokens}
    if "Image" in name or "Vision" in name:
        return {"pixel_values": images}
    return {"input_ids": tokens} | ({"decoder_input_ids": tokens} if "Conditional" in name else {})


def output(model, given):
    y = model(**given)
    return y if isinstance(y, torch.Tensor) else (y.logits if "logits" in y else y.pooler_output)


def plain(name):
    return copy.deepcopy(made(name))


def without_dropout(model):
    """Sets all dropout rates to 0, those that are attributes of modules with other names too."""
    for module in model.modules():
        rates = [key for key, value in vars(module).items() if isinstance(value, float) and "drop" in key]
        rates += ["p"] if isinstance(module, nn.modules.dropout._DropoutNd) else []
        for rate in rates:
            setattr(module, rate, 0.0)
    return model


def hyper_without_dropout(tuned):
    hyper = sampled(tuned, EXAMPLES)
    values = hyper.values.clone()
    for column, name in enumerate(hyper.space.names):
        if name != "weight_decay":
            values[:, column] = 0
    return replace(hyper, values=values)


def gradients(y, model):
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@each_architecture
@pytest.mark.parametrize("training", [True, False])
def test_conversion_changes_no_output_no_gradient_and_no_statistics(name, training):
    model, given = without_dropout(plain(name)).train(training), arguments(name)
    tuned = stn.convert(copy.deepcopy(model), quiet=True, **declared(name))
    want = output(model, given)
    expected = gradients(want, model)
    with tuned.tuned_hyperparameters.using(hyper_without_dropout(tuned)):
        y = output(tuned, given)
        found = gradients(y, tuned)
    assert relative_error(y, want) < EXACT
    for key, gradient in expected.items():
        assert (found[key] is None) == (gradient is None), key
        if gradient is not None and gradient.norm() > EXACT:
            assert relative_error(found[key], gradient) < EXACT_GRADIENT.get(name, EXACT), key
    buffers = dict(tuned.named_buffers())
    for key, buffer in model.named_buffers():
        assert relative_error(buffers[key], buffer) < EXACT, key


@each_architecture
def test_examples_fold_and_rows(name):
    given, original = arguments(name), plain(name).eval()
    tuned = converted(copy.deepcopy(original), **declared(name)).eval()
    check_rows(tuned, **given)

    hyper = sampled(tuned, EXAMPLES)
    with torch.no_grad(), tuned.tuned_hyperparameters.using(hyper):
        whole = output(tuned, given)
    assert relative_error(whole, output(original, given)) > 1e-4
    for i in range(EXAMPLES):
        own = {key: value[i : i + 1] for key, value in given.items()}
        with torch.no_grad(), tuned.tuned_hyperparameters.using(hyper[i : i + 1]):
            assert relative_error(output(tuned, own)[0], whole[i]) < EXACT

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", UserWarning)  # of tied weights, which become separate
        result, want = output(stn.fold(tuned), given), output(tuned, given)
    assert relative_error(result, want) < EXACT


@each_architecture
def test_no_norm_is_left_out(name):
    report = stn.convert(plain(name), quiet=True, **declared(name)).tuned_hyperparameters.report
    assert not [entry for entry in report if "Norm" in entry.kind and entry.reason is not None]


@each_architecture
def test_every_converted_module_is_called_in_training(name):
    tuned = stn.convert(plain(name), quiet=True, **declared(name)).train()
    modules = {module: key for key, module in tuned.named_modules() if isinstance(module, Converted)}
    missing = set(modules.values())
    for module, key in modules.items():
        module.register_forward_pre_hook(lambda module, args, key=key: missing.discard(key))
    with tuned.tuned_hyperparameters.using(sampled(tuned, EXAMPLES)):
        output(tuned, arguments(name)).sum().backward()
    assert missing == UNCALLED.get(name, set())


def table_of_architectures():
    """One line per architecture: what is converted, what is left out by whom, what is excluded."""
    lines = []
    for name in [*TIMM, *TRANSFORMERS]:
        tuned = stn.convert(plain(name), quiet=True, **declared(name))
        report = tuned.tuned_hyperparameters.report
        kinds = Counter(entry.kind for entry in report if entry.reason is None)
        lines.append(f"{name}: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()))
        reasons = Counter((entry.kind, entry.reason) for entry in report if entry.reason is not None)
        lines += [f"    left out {count} {kind}: {reason}" for (kind, reason), count in reasons.items()]
        lines += [f"    excluded {pattern}: {reason}" for pattern, reason in EXCLUDED.get(name, {}).items()]
    return "\n".join(lines)


def test_table():
    library("timm")
    library("transformers")
    table = table_of_architectures()
    print("\n" + table)
    shown = [line.partition(": ")[0] for line in table.splitlines() if not line.startswith(" ")]
    assert shown == [*TIMM, *TRANSFORMERS]
