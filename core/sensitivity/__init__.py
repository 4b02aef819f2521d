"""What tells how much an error in a tensor costs."""
