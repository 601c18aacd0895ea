"""Windows and splits: the published ones, leak-free ones, and reading that fits them."""
