"""RAG-Sequence in JAX: train a retriever and a generator end to end, and decode thoroughly or fast.

import ragjax
[answer] = ragjax.load("runs/factbook").answer(["What is the capital of France?"])
print(answer.text, answer.probability, [document.title for document in answer.documents])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ragjax.errors import InputError

if TYPE_CHECKING:
    from ragjax.answerer import Answer, Answerer, Candidate, Document, load

__all__ = ["Answer", "Answerer", "Candidate", "Document", "InputError", "load"]


def __getattr__(name: str) -> Any:
    """Imports JAX only when it is needed, so that `ragjax --help` and `ragjax config` are instant."""
    if name in __all__:
        from ragjax import answerer as answer

        return getattr(answer, name)
    raise AttributeError(f"module 'ragjax' has no attribute {name!r}")
