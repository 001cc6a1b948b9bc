"""One table per model family: which module plays which role. A file is found by its name; see `trimtab.core.family`."""
