"""The part of `benchmarks.compare_commits` that runs in the files of one commit: its losses and times.

Runs as `python -c` with the text of this file, so that only the commit's own files are imported. It only uses parts
that seldom change: the command line of the trainer, and the cases of the benchmarks.

    losses RECIPE STEPS FOLDER SETTING...   prints what `losses` returns
    turns                                    answers requests, a line of JSON each: see `turns`
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

# Where the answers go; whatever else the commit prints goes to standard error.
ANSWERS = sys.stdout


def losses(recipe: str, steps: int, folder: str, settings: list[str]) -> dict[str, list[Any]]:
    """The value of every loss that is differentiated, as hexadecimal, and the seconds when each was.

    A training step differentiates its loss by torch.autograd.backward, a validation step by torch.autograd.grad.
    """
    from stn_fast.train import main

    seen: dict[str, list[Any]] = {"kind": [], "loss": [], "seconds": []}

    def recording(kind: str, differentiate: Any) -> Any:
        def call(outputs: Any, *arguments: Any, **named: Any) -> Any:
            loss = outputs[0] if isinstance(outputs, list | tuple) else outputs
            seen["kind"].append(kind)
            seen["loss"].append(float(loss.detach()).hex())
            seen["seconds"].append(time.perf_counter())
            return differentiate(outputs, *arguments, **named)

        return call

    torch.autograd.backward = recording("train", torch.autograd.backward)
    torch.autograd.grad = recording("valid", torch.autograd.grad)
    options = [part for setting in settings for part in ("--set", setting)]
    status = main([recipe, "--max-steps", str(steps), "--run-dir", folder, *options])
    if status:
        raise SystemExit(status)
    return seen


def turns() -> None:
    """Times cases of the benchmarks, a turn whenever asked.

    {"list": true} → the names of all cases. {"case": name} → microseconds of a call, after a warm-up.
    {"calls": n} → microseconds of a call, over n calls of the last case.
    """
    from benchmarks.cases import all_cases

    cases = {str(case): case for case in all_cases(torch.device("cpu"))}
    provider: Any = None

    def timed(calls: int) -> float:
        states = [provider.prepare() for _ in range(calls)]
        start = time.perf_counter_ns()
        for state in states:
            provider.call(state)
        return (time.perf_counter_ns() - start) / 1e3 / calls

    for line in sys.stdin:
        request = json.loads(line)
        if "list" in request:
            answer: Any = list(cases)
        elif "case" in request:
            provider = cases[request["case"]].providers()["stn_fast"]
            answer = min(timed(1) for _ in range(5))
        else:
            answer = timed(request["calls"])
        print(json.dumps(answer), file=ANSWERS, flush=True)


def main(arguments: list[str]) -> None:
    sys.stdout = sys.stderr
    if arguments[0] == "turns":
        turns()
    else:
        recipe, steps, folder, *settings = arguments[1:]
        print(json.dumps(losses(recipe, int(steps), folder, settings)), file=ANSWERS)


if __name__ == "__main__":
    main(sys.argv[1:])
