"""The domain of Bitmill: recipes, formats, the queue's rules, storage and the numerics.

Importing this package imports nothing heavy; the numeric wing (torch) is reached only by its own modules.
"""

__version__ = "0.1.0"
