"""`ragjax serve`: questions over HTTP. One worker answers in batches (`batching.py`); `guard.py` keeps it safe."""
