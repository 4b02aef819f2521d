"""The recipe language, without torch."""
