"""Key-value caches for generation."""
