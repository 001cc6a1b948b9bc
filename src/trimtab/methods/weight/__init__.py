"""Methods of the weight group: one file each."""
