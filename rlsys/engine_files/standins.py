"""Stand-ins for packages that only a GPU needs, installed as `sitecustomize` of the SGLang environment for a CPU.

SGLang's modules import triton, torchvision and sgl_kernel wherever they run: they decorate kernels, name types and read constants. On a
CPU nothing of it is called. Each name in MISSING that is not really installed becomes a package that holds whatever is asked for: a name
in CamelCase is an empty class, any other name a module that can also be called as a decorator.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

MISSING = [name for name in ("triton", "torchvision", "sgl_kernel") if importlib.util.find_spec(name) is None]
VERSIONS = {"triton": "3.0.0", "torchvision": "0.28.0"}
"""Some callers compare them."""


class _Constants(type):
    """Classes whose attributes (members of enumerations, mostly) are their own names."""

    def __getattr__(cls, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _Empty(metaclass=_Constants):
    """Base of every class that is asked for."""

    def __init__(self, *arguments, **options):
        self.arguments, self.options = arguments, options


class Config(_Empty):
    """One tuning of a kernel. Lists of them are read while SGLang's modules are imported."""

    def __init__(self, kwargs=None, num_warps=4, num_stages=2, **options):
        super().__init__(kwargs, **options)
        self.kwargs, self.num_warps, self.num_stages = dict(kwargs or {}), num_warps, num_stages


class constexpr(_Empty):  # noqa: N801
    """A constant of a kernel; only its value is read."""

    def __init__(self, value=None):
        super().__init__(value)
        self.value = value


class _Standin(ModuleType):
    """A module, a namespace and a decorator at once. As a value it is false and empty."""

    def __init__(self, name):
        super().__init__(name)
        self.__path__ = []
        self.__spec__ = ModuleSpec(name, _FINDER, is_package=True)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name[:1].isupper():
            made = type(_Empty)(name, (_Empty,), {"__module__": self.__name__})
        else:
            made = importlib.import_module(f"{self.__name__}.{name}")
        setattr(self, name, made)
        return made

    def __call__(self, *arguments, **options):
        if len(arguments) == 1 and not options and callable(arguments[0]):
            return arguments[0]
        return lambda decorated: decorated

    def __bool__(self):
        return False

    def __len__(self):
        return 0

    def __iter__(self):
        return iter(())


class _Finder:
    """Finds every module below the missing packages, and makes it."""

    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in MISSING else None

    def create_module(self, spec):
        return _Standin(spec.name)

    def exec_module(self, module):
        if module.__name__ in VERSIONS:
            module.__version__ = VERSIONS[module.__name__]
        if module.__name__ == "triton":
            module.Config = Config
            module.cdiv = lambda a, b: (a + b - 1) // b
            module.next_power_of_2 = lambda n: 1 << max(0, n - 1).bit_length()
        if module.__name__ == "triton.language":
            module.constexpr = constexpr


_FINDER = _Finder()
if MISSING:
    sys.meta_path.insert(0, _FINDER)
