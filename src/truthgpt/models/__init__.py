"""Models and tokenizers: transformers' own, loaded or made from a configuration."""
