"""Writing and reading self-contained blocks of bytes: GGUF's types, TensorCast's, and dense int32 words.

`codec` encodes and decodes arrays of blocks by the type's name, `rows` tensors of any shape; the rest is one module for
each group of types. `core.formats.block_types` says which types there are.
"""
