"""From a data file to token ids and a loss mask: reading, forms, encode, batches."""
