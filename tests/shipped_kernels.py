"""Every kernel in every shipped configuration, as jobs to compile ahead of time: JOBS by label."""

import importlib
import itertools
from dataclasses import replace

import torch
import triton
from compile_ahead import Job

from stn_fast.kernels import augment, gated_embedding, gates, matmul, weight_decay
from stn_fast.kernels import gated_conv2d_backward as conv_backward
from stn_fast.kernels import gated_conv2d_epilogue as conv_epilogue
from stn_fast.kernels import gated_conv2d_gates as conv_gates
from stn_fast.kernels import gated_conv2d_implicit as conv
from stn_fast.kernels import gated_linear_epilogue as epilogue
from stn_fast.kernels.gated_lstm_cell import STEP_CONFIG
from stn_fast.kernels.matmul import config_name
from stn_fast.kernels.perturb import NUM_WARPS, PROGRAM_ELEMENTS
from stn_fast.kernels.tiles import TILES

CAPABILITIES = (80, 90)
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BOOLS = (False, True)


def typed(floats, *integers, **others):
    """Argument types: pointers to one dtype, 32-bit integers, and what differs."""
    return {**dict.fromkeys(POINTERS, f"*{floats}"), **dict.fromkeys(integers, "i32"), **others}


POINTERS = [
    *["p_x", "p_y", "p_q", "p_h", "p_dy", "p_dx", "p_g", "p_out", "p_weight", "p_bias", "p_response_weight"],
    *["p_response_bias", "p_weight_gate", "p_bias_gate", "p_d_weight", "p_d_bias", "p_d_response_weight"],
    *["p_d_response_bias", "p_d_weight_gate", "p_d_bias_gate", "p_both", "p_d_both"],
    *[
        "p_factor",
        "p_gates",
        "p_d_gates",
        "p_cells",
        "p_h_0",
        "p_c_0",
        "p_weights",
        "p_p",
        "p_response",
        "p_d_p",
        "p_d_q",
    ],
]
PARTIAL = dict.fromkeys(["p_dh_partial", "p_s_partial", "p_c_partial", "p_bias_partial"], "*fp32")
TABLES = dict.fromkeys(["p_scale", "p_shift", "p_scale_partial", "p_shift_partial"], "*fp32")
DRAW = {"p_step": "*i64", "first_example": "i64", "seed": "i64", "stream": "i32"}
SIZES = ("M", "I", "O", "n", "rank", "batch", "inner")


def matrix_jobs():
    for capability, floats, aligned in itertools.product(CAPABILITIES, FLOATS, BOOLS):
        shipped = matmul.configs(FLOATS[floats], aligned, divmod(capability, 10))
        # With masks along the sum or none; TF32. float16 compiles like bfloat16.
        variants = [("ieee", False)]
        if floats != "fp16":
            variants += [("ieee", True)] if aligned else []
            variants += [("tf32", False)] if floats == "fp32" else []
        for config, (precision, even) in itertools.product(shipped, variants):
            common = {"PRECISION": precision, "EVEN_K": even, **config.kwargs}
            for name, extra in (("fwd", {"HAS_SHIFT": True, "STORE_Q": True}), ("bwd_dx", {}), ("bwd_dw", {})):
                yield Job(
                    f"stn_fast.kernels.gated_linear_matmul:gated_linear_{name}_kernel",
                    f"{name}-sm{capability}-{floats}-{precision}-{config_name(config)}"
                    f"{'-aligned' if aligned else ''}{'-even' if even else ''}",
                    capability,
                    typed(floats, *SIZES, p_scale=f"*{floats}", p_shift=f"*{floats}"),
                    common | extra,
                    config.num_warps,
                    config.num_stages,
                    frozenset("IO") if aligned else frozenset(),
                )


def epilogue_jobs():
    of_rows = {"HAS_BIAS": True, "STORE_G": True, "WANT_H": True}
    of_gates = of_rows | {"WANT_S": True, "WANT_C": True}
    kernels = [
        ("fwd", "", {"HAS_BIAS": True}),
        ("bwd_rows", "", of_rows),
        ("bwd_gates", "", of_gates),
        ("bwd_gates", "-training", of_gates | {"WANT_H": False, "p_dh_partial": None}),
    ]
    variants = [("ieee", 16, False), ("ieee", 16, True), ("ieee", 32, False), ("tf32", 16, False), ("tf32", 16, True)]
    for capability, floats, (precision, n_pad, aligned) in itertools.product(CAPABILITIES, FLOATS, variants):
        if precision == "tf32" and floats != "fp32":
            continue
        # Q as it is stored, or on tensor cores made of u and A.
        ranks = (0,) if floats == "fp32" and precision == "ieee" else (0, epilogue.MAX_RANK)
        for (name, wanted, extra), k_pad in itertools.product(kernels, ranks):
            config = epilogue.backward_config(FLOATS[floats], n_pad, k_pad)
            if name == "fwd":
                config = epilogue.LOW_RANK_CONFIG if k_pad else epilogue.EPILOGUE_CONFIG
            yield Job(
                f"stn_fast.kernels.gated_linear_epilogue:gated_linear_epilogue_{name}_kernel",
                f"epilogue_{name}-sm{capability}-{floats}-{precision}-n{n_pad}{'-aligned' if aligned else ''}{wanted}"
                f"{f'-k{k_pad}' if k_pad else ''}",
                capability,
                typed(floats, *SIZES, tiles_each="i32", **PARTIAL),
                {"PRECISION": precision, "N_PAD": n_pad, "K_PAD": k_pad, **config.kwargs, **extra},
                config.num_warps,
                config.num_stages,
                frozenset({"O", "rank"}) if aligned else frozenset(),
            )
    for capability, floats, n_pad in itertools.product(CAPABILITIES, FLOATS, (16, 32)):
        finish, tables = epilogue.FINISH_CONFIG, gates.TABLES_CONFIG
        yield Job(
            "stn_fast.kernels.gated_linear_epilogue:gated_linear_gates_finish_kernel",
            f"gates_finish-sm{capability}-{floats}-n{n_pad}",
            capability,
            typed(floats, "O", "n", "splits", **PARTIAL),
            {"WANT_S": True, "WANT_C": True, "N_PAD": n_pad, **finish.kwargs},
            finish.num_warps,
            finish.num_stages,
        )
        # Of linear layers, and in float32 of convolutions.
        variants = [("ieee", table) for table in sorted({floats, "fp32"})]
        variants += [("tf32", "fp32")] if floats == "fp32" else []
        for aligned, (precision, table) in itertools.product(BOOLS, variants):
            yield Job(
                "stn_fast.kernels.gates:gate_tables_kernel",
                f"gate_tables-sm{capability}-{floats}-{precision}-{table}-n{n_pad}{'-aligned' if aligned else ''}",
                capability,
                typed(floats, "batch", "O", "n", p_scale=f"*{table}", p_shift=f"*{table}"),
                {"HAS_SHIFT": True, "PRECISION": precision, "N_PAD": n_pad, **tables.kwargs},
                tables.num_warps,
                tables.num_stages,
                frozenset("O") if aligned else frozenset(),
            )


def conv_jobs():
    sizes = ("M", "O", "channels", "height", "width", "out_pixels", "out_width", "q_row")
    sizes += ("stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w")
    ones = dict.fromkeys(("stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w"), 1)
    dots = [("bf16", "ieee"), ("fp16", "ieee"), ("fp32", "ieee"), ("fp32", "tf32")]
    for capability, (floats, precision), aligned in itertools.product(CAPABILITIES, dots, BOOLS):
        # 3x3 with stride, padding and dilation 1, as most layers are; and any other, with masks along channels.
        kernels = [(3, True, ones), (5, False, {})] if aligned else [(5, False, {})]
        configs = conv.conv_configs(FLOATS[floats], aligned, divmod(capability, 10), precision)
        for config, (side, even, constants) in itertools.product(configs, kernels):
            given = {"KERNEL_H": side, "KERNEL_W": side, "HAS_SHIFT": True, "RELU": True, "STORE_Q": True}
            yield Job(
                "stn_fast.kernels.gated_conv2d_implicit:gated_conv2d_fwd_kernel",
                f"conv-sm{capability}-{floats}-{precision}-{side}x{side}-{config_name(config)}"
                f"{'-aligned' if aligned else ''}",
                capability,
                typed(floats, *sizes, **TABLES),
                {**constants, **given, "PRECISION": precision, "EVEN_K": even, **config.kwargs},
                config.num_warps,
                config.num_stages,
                frozenset({"channels", "O", "q_row"}) if aligned else frozenset(),
            )


def conv_epilogue_jobs():
    sizes = ("rows", "columns", "O", "each", "pixels", "column_tiles", "batch", "tiles_each")
    sizes += ("q_batch", "q_group", "q_pixel", "both_pixel")
    layouts = {
        "contiguous": (False, False, False, conv_backward.CONTIGUOUS_TILES),
        "channels_last": (True, False, False, conv_backward.CHANNELS_LAST_TILES),
        "grouped channels_last": (True, True, False, conv_backward.CHANNELS_LAST_TILES),
        "grouped contiguous": (False, True, False, conv_backward.CONTIGUOUS_TILES),
        "apart contiguous": (False, False, True, conv_backward.CONTIGUOUS_TILES),
        "apart channels_last": (True, False, True, conv_backward.APART_LAST_TILES),
        "apart grouped": (True, True, True, conv_backward.APART_LAST_TILES),
    }
    wanted = {"RELU": True, "WANT_BOTH": True, "WANT_SCALE": True, "WANT_SHIFT": True}
    for capability, floats, layout in itertools.product(CAPABILITIES, FLOATS, layouts):
        channels_last, grouped, apart, tiles = layouts[layout]
        given = {"CHANNELS_LAST": channels_last, "GROUPED": grouped, "APART": apart}
        # Where 16 divides sizes, accesses are vectors; grouped channels_last ones never are.
        for aligned in BOOLS[: 1 if grouped and channels_last else 2]:
            suffix = f"sm{capability}-{floats}-{layout}{'-aligned' if aligned else ''}"
            forward_tiles = conv_epilogue.APART_TILES if apart else conv_epilogue.TILES
            for name, module, kind_tiles, extra, divisible in (
                ("fwd", "epilogue", forward_tiles, {"HAS_SHIFT": True, "RELU": True}, {"columns"}),
                ("bwd", "backward", tiles, wanted, {"q_batch", "q_group", "q_pixel", "both_pixel"}),
            ):
                # Forward, images apart have no groups, and contiguous ones none either.
                for tile in kind_tiles if name == "bwd" or not grouped or (channels_last and not apart) else ():
                    yield Job(
                        f"stn_fast.kernels.gated_conv2d_{module}:gated_conv2d_epilogue_{name}_kernel",
                        f"conv_epilogue_{name}-{suffix}-{'x'.join(map(str, tile.kwargs.values()))}",
                        capability,
                        typed(floats, *sizes, **TABLES),
                        {**given, **extra, **tile.kwargs},
                        tile.num_warps,
                        divisible=frozenset(divisible | {"O", "each", "pixels"} if aligned else ()),
                    )


LSTM_KEPT = {"HAS_SHIFT": True, "SAVE": True, "SAVE_RESPONSE": True}


def lstm_step_jobs():
    step = STEP_CONFIG.kwargs
    for capability, floats, aligned in itertools.product(CAPABILITIES, FLOATS, BOOLS):
        own = {"p_cell": "*fp32", "p_dc": "*fp32", **dict.fromkeys(["p_scale", "p_shift", "p_dh"], f"*{floats}")}
        for name, constants in (("fwd_step", LSTM_KEPT | step), ("bwd_step", step)):
            yield Job(
                f"stn_fast.kernels.gated_lstm_cell:gated_lstm_{name}_kernel",
                f"lstm_{name}-sm{capability}-{floats}{'-aligned' if aligned else ''}",
                capability,
                typed(floats, "t", "t_before", "batch", "H", "row", "p_row", "q_row", **own),
                constants,
                STEP_CONFIG.num_warps,
                divisible=frozenset({"H", "row", "p_row", "q_row"}) if aligned else frozenset(),
            )


def random_jobs():
    for capability, floats, tile in itertools.product(CAPABILITIES, FLOATS, TILES):
        suffix = f"sm{capability}-{floats}-{tile.kwargs['COLS']} columns"
        rows = dict.fromkeys(["rows", "batch", "columns", "e_outer", "column_tiles"], "i32") | DRAW
        for mode in (0, 1, 2, 3):
            yield Job(
                "stn_fast.kernels.dropout:dropout_kernel",
                f"dropout-mode{mode}-{suffix}",
                capability,
                typed(floats, "middle", "e_middle", "e_last", **rows, p_rate="*fp32"),
                {"MODE": mode, **tile.kwargs},
                tile.num_warps,
                divisible=frozenset() if mode % 2 else frozenset({"columns"}),
            )
        for backward, mode in itertools.product(BOOLS, (0, 1)):
            types = typed(floats, **rows, p_scale="*fp32")
            yield Job(
                "stn_fast.kernels.noise:noise_kernel",
                f"noise{'-backward' if backward else ''}-mode{mode}-{suffix}",
                capability,
                types | {"p_out": "*fp32"} if backward else types,
                {"BACKWARD": backward, "MODE": mode, **tile.kwargs},
                tile.num_warps,
                divisible=frozenset() if mode % 2 else frozenset({"columns"}),
            )
    sizes = {"n": "i32", "batch": "i32", "rho_min": "fp32", "rho_max": "fp32"}
    shared = ["p_location", "p_raw_scale", "p_table", "p_noise"]
    drawn = dict.fromkeys([*shared, "p_center", "p_values", "p_response"], "*fp32") | DRAW | sizes
    differentiated = dict.fromkeys([*shared, "p_d_values", "p_d_response", "p_partial"], "*fp32") | sizes
    for capability, n_pad in itertools.product(CAPABILITIES, (4, 16, 64)):
        tile = {"N_PAD": n_pad, "ROWS": PROGRAM_ELEMENTS // n_pad}
        for direction, types, flags in (
            ("fwd", drawn, {"SAVE_NOISE": True}),
            ("bwd", differentiated, {"HAS_D_VALUES": True, "HAS_D_RESPONSE": True}),
        ):
            yield Job(
                f"stn_fast.kernels.perturb:perturb_{direction}_kernel",
                f"perturb-{direction}-sm{capability}-n{n_pad}",
                capability,
                types,
                {**flags, **tile},
                NUM_WARPS,
            )


def augment_jobs():
    colours = ["mean_red", "mean_green", "mean_blue", "std_red", "std_green", "std_blue"]
    types = dict.fromkeys(["p_table", "p_grey", "p_out"], "*fp32") | {"p_images": "*u8"} | DRAW
    types |= dict.fromkeys([*colours, "flip"], "fp32")
    types |= dict.fromkeys(["images", "H", "W", "tiles", "crop_padding"], "i32")
    everything = 2**13 - 1
    of_colour = 2**augment.SATURATION.value | 2**augment.HUE.value
    variants = {"everything": (everything, 3), "grey": (everything & ~of_colour, 1), "nothing": (0, 3)}
    for capability, tile, (name, (on, channels)) in itertools.product(CAPABILITIES, augment.TILES, variants.items()):
        suffix = f"sm{capability}-{tile.kwargs['PIXELS']} pixels-{name}"
        constants = {"ON": on, "CHANNELS": channels, **tile.kwargs}
        kernels = [("augment", {"WHOLE": True, "p_grey": None, "ALIGNED": aligned}) for aligned in BOOLS]
        if tile is augment.TILES[-1] and on:
            kernels += [("augment", {"WHOLE": False, "ALIGNED": aligned}) for aligned in BOOLS]
            kernels += [("augment_grey", {})]
        for kernel, extra in kernels:
            flags = "".join(f"-{flag.lower()}" for flag, value in extra.items() if value)
            yield Job(
                f"stn_fast.kernels.augment:{kernel}_kernel",
                f"{kernel}-{suffix}{flags}",
                capability,
                types,
                constants | extra,
                tile.num_warps,
                divisible=frozenset("HW") if extra.get("ALIGNED") else frozenset(),
            )


def embedding_jobs():
    tables = {"p_tokens": "*i64", "p_s": "*fp32", "p_scale": "*fp32", "p_known": "*i32"}
    for capability, floats, tile in itertools.product(CAPABILITIES, FLOATS, gated_embedding.TILES):
        for aligned in BOOLS:
            yield Job(
                "stn_fast.kernels.gated_embedding:gated_embedding_fwd_kernel",
                f"embedding-sm{capability}-{floats}-{tile.kwargs['COLS']} columns{'-aligned' if aligned else ''}",
                capability,
                typed(floats, "rows", "words", "batch", "inner", "D", "column_tiles", **tables, p_e=f"*{floats}"),
                {"HAS_SCALE": True, **tile.kwargs},
                tile.num_warps,
                divisible=frozenset("D") if aligned else frozenset(),
            )


def small_jobs():
    """Kernels of the gates of convolutions and of weight decay, which compute in float32 whatever they read."""
    sizes = dict.fromkeys(["parts", "batch", "O", "n", "I"], "i32")
    tables = dict.fromkeys(["p_scale", "p_shift", "p_d_scale", "p_d_shift", "p_decay", "p_moments", "p_rows"], "*fp32")
    tables |= dict.fromkeys(["p_penalty", "p_d_penalty"], "*fp32")
    wants = {f"WANT_{what}": True for what in ("SCALE", "SHIFT", "WEIGHT", "RESPONSE", "GATE")}
    decay = triton.Config({"BLOCK_B": weight_decay.BLOCK_B, "BLOCK": 1024}, num_warps=weight_decay.NUM_WARPS)
    kernels = {
        "gated_conv2d_gates:gated_conv2d_bwd_gates": conv_gates.GATES_CONFIGS,
        "gated_conv2d_gates:gated_conv2d_bwd_response": conv_gates.RESPONSE_CONFIGS,
        **{f"weight_decay:{kernel}": decay for kernel in ("decay_moments", "weight_decay_fwd", "weight_decay_bwd")},
    }
    variants = [(16, ""), (16, "-aligned"), (16, "-all-aligned"), (32, "")]
    for capability, floats, (n_pad, aligned) in itertools.product(CAPABILITIES, ("bf16", "fp32"), variants):
        pointers = dict.fromkeys([*POINTERS, "p_gate", "p_d_gate", "p_dh"], f"*{floats}")
        for kernel, shipped in kernels.items():
            config = shipped[n_pad] if isinstance(shipped, dict) else shipped
            shift = {"HAS_SHIFT": True} if kernel.endswith("bwd_response") else {}
            length = "O" if "conv2d" in kernel else "n" if "moments" in kernel else "I"
            rest = set() if kernel.startswith("weight_decay:weight") else {"batch"}
            divisible = {"": set(), "-aligned": {length}, "-all-aligned": {length} | rest}[aligned]
            yield Job(
                f"stn_fast.kernels.{kernel}_kernel",
                f"{kernel.split(':')[1]}-sm{capability}-{floats}-n{n_pad}{aligned}",
                capability,
                {**pointers, **tables, **sizes},
                {"N_PAD": n_pad, **wants, **shift, **config.kwargs},
                config.num_warps,
                divisible=frozenset(divisible),
            )


GROUPS = (
    matrix_jobs,
    epilogue_jobs,
    random_jobs,
    augment_jobs,
    conv_jobs,
    conv_epilogue_jobs,
    embedding_jobs,
    small_jobs,
)
GROUPS += (lstm_step_jobs,)


def corner_jobs():
    """As Triton specialises sizes of 1 and absent tensors: they become constants. One of each kernel is enough."""
    absent = {
        "HAS_BIAS": ["p_bias", "p_response_bias", "p_bias_gate"],
        "STORE_Q": ["p_q"],
        "STORE_G": ["p_g"],
        "WANT_H": ["p_dh_partial"],
        "WANT_S": ["p_s_partial", "p_d_weight_gate"],
        "SAVE_NOISE": ["p_noise"],
        "HAS_D_VALUES": ["p_d_values"],
        "HAS_D_RESPONSE": ["p_d_response"],
        "HAS_SHIFT": ["p_shift", "p_bias", "p_response_bias", "p_bias_gate"],
        "HAS_SCALE": ["p_scale"],
        "RELU": [],
        "WANT_BOTH": ["p_d_both"],
        "WANT_SCALE": ["p_q", "p_scale_partial"],
        "WANT_SHIFT": ["p_shift_partial"],
        "SAVE": ["p_cells"],
        "SAVE_RESPONSE": ["p_response"],
    }
    never_specialised = {"first_example", "seed", "stream", "images", "crop_padding", "t", "t_before"}
    of_kernel = {}
    for job in itertools.chain(*(jobs() for jobs in GROUPS)):
        if job.capability == 90 and job.types.get("p_x") != "*fp32":
            kinds = [job.constants.get(kind) for kind in ("BACKWARD", "MODE", "CHANNELS_LAST", "GROUPED", "APART")]
            of_kernel.setdefault((job.kernel, *kinds), job)
    for (kernel, *kinds), job in of_kernel.items():
        label = "-".join([kernel.split(":")[1], *(str(kind) for kind in kinds if kind is not None)])
        sizes = [name for name, kind in job.types.items() if kind == "i32" and name not in never_specialised]
        flags = [flag for flag in absent if flag in job.constants]
        ones = dict.fromkeys(sizes, 1)
        yield replace(job, label=f"{label}-ones", constants=job.constants | ones)
        yield replace(job, label=f"{label}-inner one", constants=job.constants | {"inner": 1, "middle": 1, "splits": 1})
        for flag in flags:
            missing = {flag: False, **dict.fromkeys(absent[flag], None)}
            if flag == "RELU" and "WANT_BOTH" in job.constants:
                missing["p_y"] = None
            yield replace(job, label=f"{label}-without {flag}", constants=job.constants | missing)


def on_tensor_cores(job):
    """Products in float32 proper run on the ordinary units; wgmma has no tile for TF32 of fewer than 64 rows."""
    tf32 = job.constants.get("PRECISION") == "tf32" and job.constants["BLOCK_M"] >= 64
    return job.types.get("p_x") != "*fp32" or tf32


def specialised(job):
    """What Triton compiles for a job: of its types and constants only those that its kernel takes."""
    module, name = job.kernel.split(":")
    names = set(getattr(importlib.import_module(module), name).arg_names)
    constants = {(name, value) for name, value in job.constants.items() if name in names}
    types = {(name, kind) for name, kind in job.types.items() if name in names - job.constants.keys()}
    divisible = job.divisible & dict(types).keys()
    return job.kernel, job.capability, job.num_warps, job.num_stages, *map(frozenset, (constants, types, divisible))


def all_jobs():
    """What several groups name is compiled once."""
    seen = set()
    for jobs in (*GROUPS, corner_jobs):
        for job in jobs():
            if (compiled := specialised(job)) not in seen:
                seen.add(compiled)
                yield replace(job, tensor_cores=jobs in (matrix_jobs, conv_jobs) and on_tensor_cores(job))


def covering(parts):
    """Labels of few jobs that have all ``parts`` {label: set} of all together."""
    left, chosen = dict(parts), []
    missing = set().union(*left.values())
    while missing:
        label = max(left, key=lambda label: len(left[label] & missing))
        missing -= left.pop(label)
        chosen.append(label)
    return chosen


def tile(job):
    """What decides whether a kernel may ship on the tensor cores of a GPU."""
    sizes = frozenset(item for item in job.constants.items() if item[0].startswith(("BLOCK", "PRECISION")))
    return job.kernel, job.capability, sizes, job.num_warps, job.num_stages, "*bf16" in job.types.values()


def tested_jobs():
    """What `make test` compiles: each tile, and each value of each constant of a kernel; `make compile-ahead` all.

    float16 compiles like bfloat16. float32 for sm_80 needs no tensor cores, and less than the same tile for sm_90 has.
    """
    parts = {}
    for label, job in JOBS.items():
        dtypes = {"*bf16", "*fp16"} & set(job.types.values())
        if "*fp16" in dtypes or (not dtypes and job.capability == 80 and job.kernel in WITH_BFLOAT16):
            continue
        values = {(job.kernel, name, value) for name, value in job.constants.items()}
        parts[label] = values | {(job.kernel, job.capability), (job.kernel, job.num_warps)}
        if job.tensor_cores:
            parts[label].add(tile(job))
    return covering(parts)


def fewer_jobs():
    """What `make test` compiles with the oldest Triton, for sm_90: each kernel, and each tile that uses wgmma."""
    parts = {}
    for label, job in JOBS.items():
        if job.capability != 90:
            continue
        parts[label] = {job.kernel}
        if job.tensor_cores and job.types.get("p_x") != "*fp16":
            parts[label].add(tile(job))
    return covering(parts)


JOBS = {job.label: job for job in all_jobs()}
WITH_BFLOAT16 = {job.kernel for job in JOBS.values() if "*bf16" in job.types.values()}
TESTED_JOBS = {label: JOBS[label] for label in tested_jobs()}
FEWER_JOBS = {label: JOBS[label] for label in fewer_jobs()}
