"""The choice of backend: automatic, by name, and what is said when one doesn't run."""

import subprocess
import sys
import threading

import pytest
import torch

from stn_fast import dispatch as module
from stn_fast.dispatch import backends, choose, chosen, use_backend

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _forget_cached_answers():
    yield
    module._import_failure.cache_clear()
    module._automatic.cache_clear()


def without(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make ``import name`` fail, as on a machine that lacks it."""
    monkeypatch.setitem(sys.modules, name, None)
    module._import_failure.cache_clear()
    module._automatic.cache_clear()


def test_report_names_every_backend_and_says_why() -> None:
    report = backends()
    assert list(report) == ["cpp", "triton", "reference"]
    assert report["reference"].available
    assert all(status.description for status in report.values())
    lines = repr(report).splitlines()
    assert [line.split()[0] for line in lines] == list(report)
    assert all("available" in line or "missing" in line for line in lines)


def test_report_describes_the_built_core() -> None:
    core = pytest.importorskip("stn_fast._C")
    report = backends()["cpp"]
    assert report.available
    assert core.isa() in report.description
    assert any(library in report.description for library in ("by oneDNN", "by torch.mm"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
def test_report_says_that_triton_lacks_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    report = backends()["triton"]
    assert not report.available
    assert "no CUDA device" in report.description or "does not import" in report.description


def test_cpu_falls_back_quietly_to_the_reference_without_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "stn_fast._C")
    assert choose(CPU) == "reference"
    assert not backends()["cpp"].available
    assert "stn_fast._C" in backends()["cpp"].description


def test_cpu_uses_the_core_when_it_imports() -> None:
    pytest.importorskip("stn_fast._C")
    assert choose(CPU) == "cpp"


def test_cuda_uses_triton_when_it_imports_and_the_reference_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    assert choose(torch.device("cuda")) == "triton"
    without(monkeypatch, "triton")
    assert choose(torch.device("cuda")) == "reference"


def test_other_devices_use_the_reference() -> None:
    assert choose(torch.device("meta")) == "reference"


def test_a_missing_backend_asked_for_by_name_raises_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "stn_fast._C")
    with use_backend("cpp"), pytest.raises(RuntimeError, match=r"'cpp'.*does not import"):
        choose(CPU)


def test_a_backend_that_cannot_serve_the_device_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("stn_fast._C")
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with use_backend("cpp"), pytest.raises(RuntimeError, match="CPU tensors"):
        choose(torch.device("cuda"))
    with use_backend("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        choose(CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with use_backend("triton"):
        assert choose(CPU) == "triton"


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'cuda'.*'cpp'"), use_backend("cuda"):  # type: ignore[arg-type]
        pass


def test_blocks_nest_and_end_even_on_errors() -> None:
    automatic = choose(CPU)
    with use_backend("reference"):
        assert choose(CPU) == "reference"
        with use_backend("auto"):
            assert choose(CPU) == automatic
        with pytest.raises(KeyError), use_backend("auto"):
            raise KeyError
        assert choose(CPU) == "reference"
    assert choose(CPU) == automatic


def test_the_choice_of_one_thread_is_not_seen_by_another() -> None:
    seen: list[str] = []
    automatic = choose(CPU)
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(choose(CPU)))
        thread.start()
        thread.join()
    assert seen == [automatic]


def test_importing_and_choosing_on_the_cpu_starts_neither_cuda_nor_triton() -> None:
    """The import belongs in a process of its own: this one may have loaded everything."""
    code = (
        "import sys, torch, stn_fast.dispatch as b\n"
        "already = 'triton' in sys.modules\n"
        "b.choose(torch.device('cpu'))\n"
        "assert already or 'triton' not in sys.modules\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_backend_that_serves_a_device_is_told_with_the_reason_why_the_fast_one_does_not(monkeypatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert chosen(cpu) == ("cpp", None)
    with use_backend("reference"):
        assert chosen(cpu) == ("reference", "use_backend('reference') asks for it")
    for device, missing, says in ((cpu, "stn_fast._C", "the C++ core stn_fast._C"), (cuda, "triton", "Triton")):
        without(monkeypatch, missing)
        name, reason = chosen(device)
        assert name == "reference"
        assert reason is not None
        assert reason.startswith(f"{says} does not import (")
    assert chosen(torch.device("meta")) == ("reference", None)
