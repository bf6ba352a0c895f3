"""Several recipes and widths side by side on one float model."""
