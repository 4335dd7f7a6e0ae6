"""numba's compiler for all CPU kernels: what it compiles is kept on the disk where that is possible, and used anyway.

Raises:
    ImportError: numba is missing, does not fit the installed numpy, or was told not to compile.
"""

import sys
from collections.abc import Callable
from typing import Any

import numba

if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
    raise ImportError("NUMBA_DISABLE_JIT is set: kernels that are not compiled would take hours")


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator like `numba.njit(cache=True)` that bears a cache which cannot be read or written."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            kernel = numba.njit(cache=True, **options)(function)
        except RuntimeError as error:  # numba's word for no folder to write to
            _say(str(error))
            kernel = numba.njit(**options)(function)
        kernel._cache = _Bearing(kernel._cache)
        return kernel

    return decorate


class _Bearing:
    """numba's cache of a kernel, whose failures cost time only."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def load_overload(self, *arguments: Any) -> Any:
        """Return a compiled kernel; None: it is compiled now."""
        found = self._tried(self._cache.load_overload, arguments)
        if found is None:
            _compiled.append(arguments[0])
        return found

    def save_overload(self, *arguments: Any) -> None:
        """Keep a compiled kernel."""
        self._tried(self._cache.save_overload, arguments)

    def _tried(self, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        try:
            return call(*arguments)
        except Exception as error:  # noqa: BLE001 - a full disk, a damaged index, a limit: of any type
            _say(f"{type(error).__name__}: {error}")
            return None


def num_compiled() -> int:
    """Count the kernels that this process has begun to compile, since they are not on the disk."""
    return len(_compiled)


_compiled: list[Any] = []  # signatures
_said: list[str] = []


def _say(reason: str) -> None:
    """Say on stderr, once, that the kernels are compiled anew in every process."""
    if not _said:
        _said.append(reason)
        print(
            f"rwkv-es: note: compiled kernels cannot be kept on this machine ({' '.join(reason.split())[:120]}), so "
            "every process compiles them, for half a minute; NUMBA_CACHE_DIR names a folder for them",
            file=sys.stderr,
        )
