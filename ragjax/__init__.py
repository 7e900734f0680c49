"""RAG-Sequence in JAX: train a retriever and a generator end to end, and decode thoroughly or fast."""
