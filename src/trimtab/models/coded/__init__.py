"""Models whose linear weights other tools have quantized: their codes as ours, never decoded and coded again."""
