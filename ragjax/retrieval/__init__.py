"""Stage 1: the index, and the documents that it finds for a question."""
