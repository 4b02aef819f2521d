"""Layouts in which a quantised model leaves Bitmill, and what reads them back."""
