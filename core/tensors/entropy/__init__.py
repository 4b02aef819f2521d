"""Lossless coding of integer codes at their entropy: what is stored, and the loops that write and read it.

`layout` documents the bytes, `coder` is the door for flat sequences, `matrix` for matrices whose rows or columns have
scales of their own, `huffman` the code that benchmarks compare with.
"""
