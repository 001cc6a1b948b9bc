"""Models: loading a pretrained model from a directory or hub, and starters, small ones that come as packages."""
