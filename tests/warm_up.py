"""Imported by the fork server only: computes what every command would compute again for itself."""

from __future__ import annotations

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

# Saving a first model compiles 870 regular expressions, which takes 70 ms.
get_checkpoint_conversion_mapping("gpt2")
