"""One of the processes of tests/training/test_shared_runs.py: runs recipes below FOLDER, one after the other.

python gloo_runs.py FOLDER PLACE:NAME,KEY=VALUE...
"""

import sys
from pathlib import Path

from stn_fast.recipes import recipe
from stn_fast.training.distributed import launched
from stn_fast.training.layering import resolve
from stn_fast.training.run import run

# Batches of 75 examples and of 7 and 3 columns of a text are not a whole number for each process.
DIGITS = (
    *("schedule.batch_size=75", "schedule.valid_batch_size=75", "schedule.eval_batch_size=333", "schedule.epochs=2"),
    *("method.warmup_epochs=0", "threads=1"),
)
TEXT = (
    *("schedule.batch_size=7", "schedule.valid_batch_size=3", "schedule.eval_batch_size=60", "schedule.epochs=2"),
    *("text.window=6", "text.width=12", "text.valid_streams=3", "method.warmup_epochs=0", "threads=1"),
)
ONE_PASS = ("method.name=one-pass", "schedule.max_steps=14", "method.train_steps=2")
RUNS = {
    "stn": ("digits", DIGITS),
    "delta-stn": ("digits", (*DIGITS, "method.name=delta-stn", "schedule.max_steps=14")),
    "fixed": ("digits", (*DIGITS, "method.name=fixed", "schedule.max_steps=5")),
    "one-pass": ("digits", (*DIGITS, *ONE_PASS)),
    "one-pass of adam": ("digits", (*DIGITS, *ONE_PASS, "optimizer.name=adam", "optimizer.learning_rate=0.002")),
    "text": ("text", TEXT),
    "text in parts": (
        "text",
        (*TEXT, "schedule.valid_batch_size=4", "schedule.accumulation=2", "method.name=delta-stn"),
    ),
}
# Sums over examples are rounded in another order, in float32, at each of about 30 steps.
ROUNDING = 2e-5
SENTENCES = ("the cat sat on the mat and the dog sat on the log", "a dog ran to the mat", "the cat and the log")


def write_texts(folder):
    for number, name in enumerate(("train", "valid", "test")):
        lines = [SENTENCES[(k + number) % 3] for k in range(30 // (number + 1))]
        (folder / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")


def run_in(folder, name, *more, **options):
    """The result of one of the `RUNS`, in a folder of its name."""
    module, settings = RUNS[name]
    module = recipe(module)
    given = {"run_dir": str(Path(folder) / name), "data_root": str(Path(folder).parent)}
    return run(resolve(module.config(), pairs=[*settings, *more], flags=given), module.build, **options)


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    with launched("cpu") as processes:
        assert processes is not None
        for name in names:
            place, _, name = name.partition(":")
            name, *more = name.split(",")
            run_in(Path(folder) / place, name, *more, processes=processes)
