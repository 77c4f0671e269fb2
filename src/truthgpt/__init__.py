"""TruthGPT Optimization Core: one YAML in, a trained, measured, resumable model out.

`from truthgpt import load_config, build_components, build_trainer`; the registries are importable the same way.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from truthgpt.version import __version__ as __version__

if TYPE_CHECKING:
    from truthgpt.build import build_components as build_components
    from truthgpt.build_trainer import build_trainer as build_trainer
    from truthgpt.factories.attention import ATTENTION_BACKENDS as ATTENTION_BACKENDS
    from truthgpt.factories.callbacks import CALLBACKS as CALLBACKS
    from truthgpt.factories.collate import COLLATORS as COLLATORS
    from truthgpt.factories.datasets import DATASETS as DATASETS
    from truthgpt.factories.kv_cache import KV_CACHES as KV_CACHES
    from truthgpt.factories.memory import MEMORY_POLICIES as MEMORY_POLICIES
    from truthgpt.factories.metrics import METRICS as METRICS
    from truthgpt.factories.optimizer import OPTIMIZERS as OPTIMIZERS
    from truthgpt.factories.scheduler import SCHEDULERS as SCHEDULERS
    from truthgpt.validate_config import load_config as load_config

_HOMES = {
    "load_config": "truthgpt.validate_config",
    "build_components": "truthgpt.build",
    "build_trainer": "truthgpt.build_trainer",
    "ATTENTION_BACKENDS": "truthgpt.factories.attention",
    "KV_CACHES": "truthgpt.factories.kv_cache",
    "MEMORY_POLICIES": "truthgpt.factories.memory",
    "OPTIMIZERS": "truthgpt.factories.optimizer",
    "SCHEDULERS": "truthgpt.factories.scheduler",
    "DATASETS": "truthgpt.factories.datasets",
    "COLLATORS": "truthgpt.factories.collate",
    "CALLBACKS": "truthgpt.factories.callbacks",
    "METRICS": "truthgpt.factories.metrics",
}

__all__ = sorted(_HOMES)


class _Package(types.ModuleType):
    """This package, with the public names looked up where they live on first use.

    `import truthgpt` alone loads neither torch nor pydantic. And importing the module `truthgpt.build_trainer` does not
    put the module over the function of the same name, as Python otherwise would.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'truthgpt' has no attribute {name!r}")
        return getattr(importlib.import_module(_HOMES[name]), name)

    def __dir__(self) -> list[str]:
        """The public names too, for the completion of an interactive Python."""
        return sorted({*super().__dir__(), *_HOMES})

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
