"""One sweep over the vocabulary, the same for every backend."""
