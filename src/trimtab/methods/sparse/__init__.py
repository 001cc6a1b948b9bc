"""Methods of the sparse group: one file each."""
