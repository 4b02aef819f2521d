"""Tensors as they are stored: reading, writing, packing, encoding to the nearest code, exact decoding."""
