"""Tables and figures of single families, for the documentation and the demo."""
