"""Known ways to break each kernel, and the check that must notice every one of them."""
