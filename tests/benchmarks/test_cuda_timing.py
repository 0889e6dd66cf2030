"""Timing on CUDA, on a simulated device with clocks of its own: what is reported is the device's time, not Python's."""

import json

import numpy as np
import pytest
import torch

from benchmarks import ratios
from benchmarks.cases import Case
from benchmarks.cuda_timing import CudaClock
from benchmarks.timing import Provider, interleave

CPU = torch.device("cpu")


class Device:
    """A host and a device that runs what the host launches, one launch after another; times in microseconds."""

    def __init__(self, most_pending: int = 1000):
        self.host = self.free_at = 0.0
        self.ends: list[float] = []
        self.most_pending = most_pending
        self.recording: list[float] | None = None
        self.largest_graph = 0

    def launch(self, host: float, device: float) -> None:
        self.host += host
        if self.recording is not None:
            self.recording.append(device)
            return
        self.ends = [end for end in self.ends if end > self.host]
        if len(self.ends) >= self.most_pending:  # the queue is full: the host waits for a place in it
            self.host = self.ends[-self.most_pending]
        self.free_at = max(self.free_at, self.host) + device
        self.ends.append(self.free_at)

    def now(self):
        return self.host

    def synchronize(self):
        self.host = max(self.host, self.free_at)

    def between_events(self, run, sleep):
        self.synchronize()
        begin = self.free_at = self.host + sleep
        run()
        hidden = self.host < begin
        self.synchronize()
        return self.free_at - begin, hidden

    def warm(self, run):
        run()

    def capture(self, prepare, call, calls):
        states = [prepare() for _ in range(calls)]
        self.recording = []
        try:
            for state in states:
                call(state)
            nodes = self.recording
        finally:
            self.recording = None
        self.largest_graph = max(self.largest_graph, len(nodes))
        return lambda: self.launch(10, sum(nodes))


def times(device: Device, **providers: Provider):
    return interleave(providers, CPU, seconds=0, min_rounds=3, clock=CudaClock(device))


def test_a_short_operation_takes_the_devices_time_and_the_hosts_is_told_apart() -> None:
    device = Device()
    timings = times(device, short=Provider(lambda _: device.launch(host=200, device=4)))
    np.testing.assert_allclose(timings.of("short"), 4)
    assert timings.turns["short"].host_us == pytest.approx(200)
    assert timings.turns["short"].captured is True
    assert device.largest_graph == 100  # as many calls as fill the turn, so that a replay's own cost does not count


def test_a_long_operation_is_one_call_of_a_graph() -> None:
    device = Device()
    timings = times(device, long=Provider(lambda _: [device.launch(20, 300) for _ in range(10)]))
    np.testing.assert_allclose(timings.of("long"), 3000)
    assert device.largest_graph == 10


def uncapturable(device: Device, launches: int, host: float, on_device: float) -> Provider:
    def call(_: object) -> None:
        for _ in range(launches):
            if device.recording is not None:
                raise RuntimeError("operation not permitted when stream is capturing\nand more")
            device.launch(host, on_device)

    return Provider(call)


def test_what_cannot_be_captured_says_so_and_is_still_timed_on_the_device() -> None:
    """100 calls of 460 us take the host 46 ms: longer than any fixed sleep of 2 ms."""
    device = Device()
    timings = times(device, eager=uncapturable(device, 1, 460, 5))
    turns = timings.turns["eager"]
    assert turns.captured is False
    assert turns.host_bound is False
    assert turns.why_not == "RuntimeError: operation not permitted when stream is capturing"
    np.testing.assert_allclose(timings.of("eager"), 5)


def test_more_launches_than_a_stream_holds_are_called_host_bound() -> None:
    device = Device()
    timings = times(device, eager=uncapturable(device, 3000, 20, 5))
    assert timings.turns["eager"].host_bound is True
    assert timings.percentile("eager", 50) > 1.5 * 3000 * 5


def test_whole_steps_take_what_a_user_waits_for() -> None:
    device = Device()
    step = Provider(lambda _: device.launch(host=700, device=300), whole_step=True)
    timings = times(device, step=step)
    np.testing.assert_allclose(timings.of("step"), 1000)  # an idle device to an idle device
    assert timings.turns["step"].captured is None
    assert device.largest_graph == 0


def test_states_are_prepared_outside_of_the_graph_and_of_its_time() -> None:
    device = Device()
    prepared = []

    def prepare() -> int:
        device.launch(5, 1000)
        prepared.append(device.recording)
        return len(prepared)

    seen = []
    timings = times(device, backward=Provider(lambda state: (seen.append(state), device.launch(5, 50)), prepare))
    np.testing.assert_allclose(timings.of("backward"), 50)
    assert all(recording is None for recording in prepared)
    assert len(set(seen)) == len(seen)  # no state is used twice


@pytest.mark.parametrize("captured", [True, False])
def test_no_state_is_used_twice_however_long_the_sleep_has_to_be(captured) -> None:
    """A backward pass frees its state. Here the host becomes slow after it has been timed, and the sleep grows."""
    device, used = Device(), []

    def backward(state: list) -> None:
        if device.recording is not None and not captured:
            raise RuntimeError("no graph of this")
        used.append(id(state))
        state.append("used")
        assert len(state) == 1
        device.launch(200 if len(used) < 9 else 4000, 50)

    timings = times(device, backward=Provider(backward, prepare=list))
    assert not timings.failed
    assert timings.turns["backward"].captured is captured
    assert timings.turns["backward"].host_bound is False
    np.testing.assert_allclose(timings.of("backward"), 50)


def test_one_provider_that_fails_costs_the_others_nothing(monkeypatch, capsys, tmp_path) -> None:
    def broken(_: object) -> None:
        raise MemoryError("no memory left")

    fine = Provider(lambda _: torch.ones(10))
    monkeypatch.setattr(Case, "providers", lambda _: {"stn_fast": fine, "eager": Provider(broken)})
    file = tmp_path / "rows.json"
    assert ratios.main(["--quick", "--ops", "perturb", "--modes", "forward", "--json", str(file)]) == 1
    (row,) = json.loads(file.read_text())
    assert row["provider"] == "stn_fast"
    assert row["ratio_to_eager"] is None
    captured = capsys.readouterr()
    assert "MemoryError: no memory left" in captured.out
    assert "1 failed" in captured.err


def test_one_case_that_fails_costs_the_others_nothing(monkeypatch, capsys, tmp_path) -> None:
    whole = Case.providers

    def providers(case: Case) -> dict[str, Provider]:
        if case.mode == "full":
            raise RuntimeError("no such kernel")
        return whole(case)

    monkeypatch.setattr(Case, "providers", providers)
    file = tmp_path / "rows.json"
    assert ratios.main(["--quick", "--ops", "perturb", "--json", str(file)]) == 1
    assert {row["mode"] for row in json.loads(file.read_text())} == {"forward", "valid"}
    assert "RuntimeError: no such kernel" in capsys.readouterr().out


def test_rows_tell_how_they_were_timed_on_cuda(monkeypatch) -> None:
    device = Device()
    monkeypatch.setattr(
        Case,
        "providers",
        lambda _: {"stn_fast": Provider(lambda _: device.launch(40, 4)), "eager": uncapturable(device, 2, 40, 4)},
    )
    case = Case("perturb", "forward", (8, 15), torch.float32, CPU, compiled=False)
    rows, _ = ratios.measure(case, 0, 2, clock=CudaClock(device))
    assert [row["captured"] for row in rows] == [True, False]
    assert [row["host_us"] for row in rows] == [40, 80]
    assert [row["host_bound"] for row in rows] == [False, False]
    assert [row["p50"] for row in rows] == [4, 8]
    assert [row["ratio_to_eager"] for row in rows] == [0.5, 1]
