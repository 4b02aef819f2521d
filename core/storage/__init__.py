"""Where bytes live: the object store and its keys, checkpoints and their headers. Torch-free."""
