"""Methods of the input group: one file each."""
