"The commands of foldbook. Each module below adds its own to `app` when it is imported."
from .core import app
from . import zq, run, use, simulate, propagate, cg

__all__ = ['app', 'cg', 'propagate', 'run', 'simulate', 'use', 'zq']
