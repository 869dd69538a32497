"""Which one-dimensional coordinate describes the folding of a protein, and how one proves it.

`import foldbook as fb` is quick: modules and the names below are loaded when they are first used.
"""
__version__ = "0.1.0"

from importlib import import_module as _import_module
from pkgutil import iter_modules as _iter_modules

_HOMES = dict(profile='zq', explain='verdicts', states_from='committor', fetch='data', rates='kinetics',
              load='coordinates', Student='distill', NonparametricCommittor='npne', Ensemble='frames')
_MODULES = {m.name for m in _iter_modules(__path__) if not m.name.startswith('_')}
__all__ = [*_HOMES, *_MODULES]


def __getattr__(name):
    if name in _HOMES: return getattr(_import_module(f'foldbook.{_HOMES[name]}'), name)
    if name in _MODULES: return _import_module(f'foldbook.{name}')
    raise AttributeError(f'foldbook has no {name!r}; it has {", ".join(sorted(__all__))}')


def __dir__(): return sorted([*globals(), *__all__])
