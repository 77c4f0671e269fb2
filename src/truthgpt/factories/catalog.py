"""All nine registries by the name users know them under."""

from __future__ import annotations

from truthgpt.factories.attention import ATTENTION_BACKENDS
from truthgpt.factories.callbacks import CALLBACKS
from truthgpt.factories.collate import COLLATORS
from truthgpt.factories.datasets import DATASETS
from truthgpt.factories.kv_cache import KV_CACHES
from truthgpt.factories.memory import MEMORY_POLICIES
from truthgpt.factories.metrics import METRICS
from truthgpt.factories.optimizer import OPTIMIZERS
from truthgpt.factories.registry import Registry
from truthgpt.factories.scheduler import SCHEDULERS

REGISTRIES: dict[str, Registry] = {
    "ATTENTION_BACKENDS": ATTENTION_BACKENDS,
    "KV_CACHES": KV_CACHES,
    "MEMORY_POLICIES": MEMORY_POLICIES,
    "OPTIMIZERS": OPTIMIZERS,
    "SCHEDULERS": SCHEDULERS,
    "DATASETS": DATASETS,
    "COLLATORS": COLLATORS,
    "CALLBACKS": CALLBACKS,
    "METRICS": METRICS,
}
