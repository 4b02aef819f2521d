"""All SQL of the domain, one module per aggregate. A function that writes asks for a `WriteSession`."""
