"""METRICS: what an evaluation measures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from truthgpt.factories.registry import NoOptions, Registry

if TYPE_CHECKING:
    from truthgpt.metrics.base import Metric

METRICS = Registry("metric", runtime=("tokenizer",))


@METRICS.register("loss", options=NoOptions)
def build_loss() -> Metric:
    """Cross-entropy in nats a token, over all supervised tokens."""
    from truthgpt.metrics.loss import LossMetric

    return LossMetric()


@METRICS.register("ppl", options=NoOptions)
def build_perplexity() -> Metric:
    """Perplexity: the exponential of the mean loss over all supervised tokens."""
    from truthgpt.metrics.perplexity import PerplexityMetric

    return PerplexityMetric()


@METRICS.register("bits_per_byte", options=NoOptions)
def build_bits_per_byte(tokenizer: Any) -> Metric:
    """Loss in bits a byte of text; comparable between tokenizers."""
    from truthgpt.metrics.bits_per_byte import BitsPerByteMetric
    from truthgpt.metrics.token_bytes import token_byte_lengths

    vocab_size = max(tokenizer.get_vocab().values()) + 1  # len(tokenizer) is less where ids have gaps
    return BitsPerByteMetric(token_byte_lengths(tokenizer, vocab_size))


@METRICS.register("accuracy", options=NoOptions)
def build_accuracy() -> Metric:
    """Share of the labels that the model gives the highest score."""
    from truthgpt.metrics.accuracy import AccuracyMetric

    return AccuracyMetric()
