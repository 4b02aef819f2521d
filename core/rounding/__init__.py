"""Algorithms that choose codes; one file each."""
