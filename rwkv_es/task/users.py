"""Modules of a user's files, under names by which processes that these start can import them too (`spawn`)."""

import importlib.util
import os
import sys
from collections.abc import Sequence
from hashlib import sha256
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

__path__: list[str] = []  # a package: the modules below it are found by `_Finder`
_VARIABLE = "RWKV_ES_USERS_FILE_"  # environment variables that tell processes where a module's file is


def import_file(file: Path) -> ModuleType:
    """Import a .py file as a package of its own, so that it can import its neighbours relatively."""
    file = file.expanduser().resolve()
    name = sha256(os.fsencode(file)).hexdigest()[:16]
    os.environ[_VARIABLE + name.upper()] = str(file)
    found = _spec(f"{__name__}.{name}", file)
    assert found is not None and found.loader is not None, file
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    return module


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        file = os.environ.get(_VARIABLE + name.upper()) if package == __name__ else None
        return _spec(fullname, Path(file)) if file else None


def _spec(name: str, file: Path) -> ModuleSpec | None:
    return importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(file.parent)])


sys.meta_path.append(_Finder())
