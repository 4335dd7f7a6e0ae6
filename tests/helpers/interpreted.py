"""The GPU's kernels: on a GPU where there is one, else on CPU tensors in Triton's interpreter."""

import weakref
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
with pytest.MonkeyPatch.context() as environment:
    if not HAS_GPU:
        environment.setenv("TRITON_INTERPRET", "1")  # read when the kernels are imported
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'rwkv-es[gpu]' (Linux only)")
    with suppress(
        ImportError
    ):  # Triton imports it at the first launch, where Python 3.10 stumbles over what is replaced
        import triton.experimental.gluon  # noqa: F401
    from rwkv_es.gpu import kernels as gpu_kernels  # noqa: F401
    from rwkv_es.gpu import loop_kernels, product_kernels  # noqa: F401
    from rwkv_es.noise import gpu_kernels as noise_kernels  # noqa: F401


class Patched:
    """What Triton replaces in its language while the interpreter runs, once for all of a kernel's functions."""

    def __init__(self, interpreter):
        self.interpreter, self.replace, self.scope, self.names = interpreter, interpreter._patch_lang, None, {}

    def language(self, function):
        if self.scope is not None:  # called by a function for which it was done
            return None
        tl = self.interpreter.tl
        self.scope = self.replace(
            SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
        )  # Triton's own functions too
        return self

    def restore(self):
        self.scope.restore()
        self.scope = None

    def builtin(self, package, builder, *scope):
        """Replace what is built in, without searching for it again."""
        core = self.interpreter.tl.core
        if package not in self.names:
            self.names[package] = [n for n in dir(package) if core.is_builtin(getattr(package, n))]
        for name in self.names[package]:
            if core.is_builtin(member := getattr(package, name)):
                self.interpreter._patch_attr(package, name, member, builder, *scope)


@pytest.fixture(autouse=True)
def in_the_interpreter(monkeypatch):
    """Spare most of the interpreter's time."""
    if HAS_GPU:
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # Triton imports parts of itself at the first call
    from triton.runtime import interpreter

    patched = Patched(interpreter)
    monkeypatch.setattr(interpreter, "_patch_builtin", patched.builtin)
    monkeypatch.setattr(interpreter, "_patch_lang", patched.language)


def on_device(model):
    return model._replace(params={name: tensor.to(DEVICE) for name, tensor in model.params.items()})


class NothingWaits(torch.utils._python_dispatch.TorchDispatchMode):
    """Fail on operations whose result the host would have to wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal"), func
        return func(*args, **(kwargs or {}))


def capture_that_keeps_nothing(run):
    """What a CUDA graph is: it repeats its work on the same memory, and keeps none of that alive."""
    work = weakref.ref(run)

    def replay():
        assert work() is not None, "the memory that the graph writes to was given back"
        with NothingWaits():
            work()()

    return replay
