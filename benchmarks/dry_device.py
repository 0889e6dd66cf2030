"""A CUDA device that computes nothing, to record the launches of a step on a machine without a GPU.

Within `dry_device`, tensors on "cuda" have shapes but no numbers (torch's meta device), and behave like CUDA tensors.
So Triton kernels are chosen and specialised as for a launch, but recorded instead of compiled and run. Torch's own
operators are recorded below autograd, as they would be launched.

TRITON_INTERPRET must be unset when kernels are defined, because interpreted kernels can't be recorded.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

DEVICE = torch.device("cuda", 0)
# The getters themselves: what a mode is told of an attribute.
_TENSOR: Any = Tensor
_device = _TENSOR.device.__get__


@dataclass(frozen=True)
class Variant:
    """A kernel as launches specialise it; sizes of 1 and absent tensors are constants, as Triton makes them.

    Attributes:
        kernel: "module:function".
        types: of the arguments that aren't constants, in Triton's spelling.
        constants: of the others.
        divisible: the pointers and sizes that are multiples of 16.
    """

    kernel: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int
    divisible: frozenset[str]


@dataclass
class Recording:
    """What has been launched: kernels of Triton, operators of torch, and what made the host wait.

    Attributes:
        operators: by name, those that compute. Each counts once, `convolution_backward` for every gradient that it is
            asked for; views and allocations launch nothing. Some are several kernels, such as a fused optimizer of
            many tensors.
        reads: values that the host has asked the device for, by operator.
    """

    triton: Counter[Variant] = field(default_factory=Counter)
    operators: Counter[str] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)

    def clear(self) -> None:
        for counter in (self.triton, self.operators, self.reads):
            counter.clear()

    @property
    def kernels(self) -> Counter[str]:
        """Launches of each Triton kernel, by the function's name."""
        names: Counter[str] = Counter()
        for variant, launches in self.triton.items():
            names[variant.kernel.split(":")[1]] += launches
        return names


class _Lstm(torch.autograd.Function):
    """torch.lstm as cuDNN computes it, in one call forward and one backward; on meta tensors torch takes it apart."""

    @staticmethod
    def forward(ctx: Any, recording: Recording, width: int, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, h_0, c_0, *_ = tensors
        ctx.recording, ctx.tensors = recording, tensors
        recording.operators["lstm"] += 1
        return x.new_empty(*x.shape[:2], width), torch.empty_like(h_0), torch.empty_like(c_0)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        ctx.recording.operators["lstm_backward"] += 1
        wanted = ctx.needs_input_grad[2:]
        return (
            None,
            None,
            *(torch.empty_like(t) if wants else None for t, wants in zip(ctx.tensors, wanted, strict=True)),
        )


class _Cuda(TorchFunctionMode):
    """Calls it "cuda" where torch says "meta", and emulates autocast, which leaves meta tensors alone."""

    _attributes: Mapping[Any, Callable[[Tensor, Any], Any]] = {
        _device: lambda t, real: DEVICE if real.type == "meta" else real,
        _TENSOR.is_cuda.__get__: lambda t, real: _device(t).type == "meta",
        _TENSOR.is_meta.__get__: lambda t, real: False,
        Tensor.data_ptr: lambda t, real: real or t.storage_offset() * t.element_size(),
    }
    _in_low_precision = frozenset(
        {torch.matmul, torch.mm, torch.addmm, torch.bmm, torch.conv2d, torch.nn.functional.linear,
         Tensor.matmul, Tensor.mm, Tensor.__matmul__, Tensor.__rmatmul__}
    )  # fmt: skip
    _in_float32 = frozenset({torch.nn.functional.cross_entropy})

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        kwargs = {key: _on_meta(value) for key, value in (kwargs or {}).items() if key != "pin_memory"}
        if func in self._attributes:
            return self._attributes[func](args[0], func(*args, **kwargs))
        if func is torch.lstm:
            x, (h_0, c_0), parameters = args[:3]
            bidirectional = kwargs["bidirectional"] if "bidirectional" in kwargs else args[7]
            width = h_0.shape[2] * (2 if bidirectional else 1)
            return _Lstm.apply(self._recording, width, x, h_0, c_0, *parameters)
        args = tuple(map(_on_meta, args))
        if torch.is_autocast_enabled("cuda"):
            low = func in self._in_low_precision
            if low or func in self._in_float32:
                dtype = torch.get_autocast_dtype("cuda") if low else torch.float32
                args = tuple(_cast(value, dtype) for value in args)
                kwargs = {key: _cast(value, dtype) for key, value in kwargs.items()}
        return func(*args, **kwargs)


def _on_meta(value: Any) -> Any:
    """A device argument as torch is to see it."""
    if isinstance(value, torch.device) or (isinstance(value, str) and value.startswith("cuda")):
        return torch.device("meta") if torch.device(value).type == "cuda" else value
    return value


def _cast(value: Any, dtype: torch.dtype) -> Any:
    castable = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if castable else value


class _Operators(TorchDispatchMode):
    """Records operators, and answers for the device what it can't."""

    _allocations = frozenset(
        {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "detach", "detach_",
         "_reshape_alias", "resize_", "set_", "alias", "lift_fresh", "is_pinned"}
    )  # fmt: skip

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # devices are asked for what they are
            return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func._schema.name.split("::")[1]
        if name in ("_local_scalar_dense", "equal"):
            if args[0].device.type != "meta":
                return func(*args, **kwargs)
            self.recording.reads[name] += 1
            is_bool = name == "equal" or args[0].dtype == torch.bool
            return True if is_bool else 1.0 if args[0].is_floating_point() else 1
        if name in ("_assert_async", "_fused_sgd_", "_fused_adam_", "_fused_adamw_"):
            self.recording.operators[name] += 1
            return None
        if name in ("copy_", "_to_copy") and (host := self._to_host(func, args, kwargs)) is not None:
            return host
        result = func(*args, **kwargs)
        if not (func.is_view or name in self._allocations) and self._on_device(args, result):
            self.recording.operators[name] += sum(args[-1]) if name == "convolution_backward" else 1
        return result

    def _to_host(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """The zeros that stand for numbers brought to the host, or None where nothing is."""
        if func._schema.name == "aten::copy_":
            target, source, *_ = args
            if target.device.type != "cpu" or source.device.type != "meta":
                return None
            self.recording.operators["copy_ to the host"] += 1
            return target.zero_()
        if kwargs.get("device") != torch.device("cpu") or args[0].device.type != "meta":
            return None
        self.recording.reads["_to_copy"] += 1
        return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)

    @staticmethod
    def _on_device(args: Any, result: Any) -> bool:
        """Whether there is anything to do, on the device: operators on no numbers return without a launch."""
        results = result if isinstance(result, tuple | list) else (result,)
        tensors = [t for t in results if isinstance(t, Tensor)] or [t for t in args if isinstance(t, Tensor)]
        return any(t.device.type == "meta" and t.numel() for t in tensors)


class _Driver:
    """What Triton asks of a device before a launch."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self._target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


class _Kernel:
    """Takes the place of a compiled kernel."""

    function = packed_metadata = None

    def __init__(self, variant: Variant, launched: Callable[[Variant], None]) -> None:
        self._variant, self._launched = variant, launched

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *_: Any) -> None:
        self._launched(self._variant)


def variant_of(function: Any, signature: Any, constants: Any, options: Any, attributes: Any) -> Variant:
    """From what Triton's JITFunction would compile."""
    names = function.arg_names
    return Variant(
        f"{function.__module__}:{function.__name__}",
        tuple((name, kind) for name, kind in signature.items() if kind != "constexpr"),
        tuple(sorted((names[path[0]], value) for path, value in constants.items())),
        options.num_warps,
        options.num_stages,
        frozenset(names[path[0]] for path, found in attributes.items() if ["tt.divisibility", 16] in found),
    )


@contextlib.contextmanager
def recorded_launches(launched: Callable[[Variant], None], capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Triton launches on a device of this capability: `launched` is called, and nothing is compiled or run.

    Raises:
        RuntimeError: Triton interprets kernels in this process.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("launches can't be recorded where Triton interprets kernels: unset TRITON_INTERPRET")
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled_for: list[Any] = []

    def compile_nothing(
        self: Any, key: Any, signature: Any, device: int, constants: Any, options: Any, attributes: Any, *_: Any
    ) -> _Kernel:
        kernel = _Kernel(variant_of(self, signature, constants, options, attributes), launched)
        self.device_caches[device][0][key] = kernel
        compiled_for.append(self)
        return kernel

    before = driver._active if hasattr(driver, "_active") else None
    driver.set_active(_Driver(capability))
    try:
        with mock.patch.object(JITFunction, "_do_compile", compile_nothing):
            yield
    finally:
        for function in compiled_for:
            function.device_caches.clear()
        driver._active = before


@contextlib.contextmanager
def dry_device(capability: tuple[int, int] = (9, 0), candidates: bool = False) -> Iterator[Recording]:
    """A device "cuda" within the block, whose launches the `Recording` holds.

    The autotuner takes defaults; with `candidates` it launches all others too, as it does where it measures them.
    Kernels in CUDA C++ are left out, and are no candidates.
    A launch or a choice outside of `torch.cuda.device` raises RuntimeError: it would be on whatever device is current.
    """
    from stn_fast import dispatch
    from stn_fast.kernels import gated_lstm_persistent
    from stn_fast.kernels.autotune import Autotuner
    from stn_fast.ops import transforms

    recording, guards = Recording(), [0]

    @contextlib.contextmanager
    def guard(_: Any) -> Iterator[None]:
        guards[0] += 1
        yield
        guards[0] -= 1

    def check_guard(what: object) -> None:
        if not guards[0]:
            raise RuntimeError(f"outside of a device guard: {what}")

    def launched(variant: Variant) -> None:
        check_guard(variant.kernel)
        recording.triton[variant] += 1

    def choose(_: Any, problem: Any, names: Any, run: Callable[[str], object], default: str, device: Any) -> str:
        check_guard(problem)
        if candidates:
            for name in names:
                run(name)
        return default

    answers = {
        "is_available": lambda: True,
        "device": guard,
        "get_device_capability": lambda _=None: capability,
        "get_device_name": lambda _=None: "dry device",
        "is_bf16_supported": lambda *_: True,
        "is_current_stream_capturing": lambda: False,
        "mem_get_info": lambda _=None: (2**40, 2**40),
        "current_stream": lambda _=None: SimpleNamespace(cuda_stream=0),
        "synchronize": lambda _=None: None,
        "Event": lambda **_: SimpleNamespace(record=lambda *_: None, query=lambda: True, synchronize=lambda: None),
    }
    caches = (dispatch._automatic, dispatch._cuda_is_available)
    for cache in caches:
        cache.cache_clear()
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        # Optimizers would ask a real device, in a torch that is built for one, whether its stream is being captured.
        stack.enter_context(mock.patch.object(torch.accelerator, "current_accelerator", return_value=None))
        foreach = [*_foreach_utils._get_foreach_kernels_supported_devices(), "meta"]
        stack.enter_context(
            mock.patch.object(_foreach_utils, "_get_foreach_kernels_supported_devices", return_value=foreach)
        )
        stack.enter_context(mock.patch.object(transforms, "is_in_torch_dispatch_mode", return_value=False))
        stack.enter_context(mock.patch.object(Autotuner, "choose", choose))
        stack.enter_context(mock.patch.object(gated_lstm_persistent, "why_not", return_value="it isn't recorded"))
        for cache in caches:
            stack.callback(cache.cache_clear)
        stack.enter_context(recorded_launches(launched, capability))
        stack.enter_context(_Operators(recording))
        cuda = stack.enter_context(_Cuda(recording))
        engine = torch.autograd._engine_run_backward  # a mode is off within the call that it has been told of

        def run_backward(*args: Any, **kwargs: Any) -> Any:
            with cuda:
                return engine(*args, **kwargs)

        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", run_backward))
        yield recording
