"""Methods of the start group: one file each."""
