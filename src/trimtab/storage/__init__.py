"""Storage formats of frozen weights: one file, one format, named after it."""
