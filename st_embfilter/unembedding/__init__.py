"""The unembedding matrix of a language model: which tensor it is, how it is stored."""
