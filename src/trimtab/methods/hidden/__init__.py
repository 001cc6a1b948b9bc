"""Methods of the hidden group: one file each."""
