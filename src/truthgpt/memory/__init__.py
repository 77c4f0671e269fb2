"""Memory policies: how an optimizer step is fitted into memory."""
