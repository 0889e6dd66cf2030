"""With this folder on PYTHONPATH, Python finds kernels/ of this clone as stn_fast.kernels, as an installation would."""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "kernels"


class _Kernels:
    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "stn_fast.kernels":
            return None
        return spec_from_file_location(name, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)])


sys.meta_path.append(_Kernels)
