"""Number formats as value tables, without torch."""
