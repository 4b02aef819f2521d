"""How far a quantised model is from its reference, and on which text."""
