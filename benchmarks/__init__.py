"""Speed of the operations against relevant baselines, on the available device."""

import os

# Peak memory on the CPU is read from torch.profiler, whose messages would bury the tables.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
