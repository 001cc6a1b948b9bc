"""Adapters and models in the formats of others: read, written, converted, combined."""
