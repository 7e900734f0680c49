"""RAG-Sequence in JAX: train a retriever and a generator end to end, and decode thoroughly or fast.

    p(y|x) = Σ_z p(z|x) · p(y|x,z)

A question x is answered in four stages:

1. Retrieval finds the K documents z whose embeddings score highest; softmax makes of their scores p(z|x).
   (`ragjax.retrieval`)
2. Beam search proposes answers y, under each document by itself. (`ragjax.decoding.propose`)
3. Marginalisation scores every proposed answer under every document, and sums over the documents.
   (`ragjax.decoding.rescore`, `ragjax.marginal`)
4. Selection takes the answer of the largest p(y|x). (`ragjax.decoding.decode`)

Training minimises −log p(y|x) of the known answer through stages 1 and 3, so that the retriever learns from the
generator. (`ragjax.training`)

    import ragjax
    [answer] = ragjax.load("runs/factbook").answer(["What is the capital of France?"])
    print(answer.text, answer.probability, [document.title for document in answer.documents])
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing takes time to import, in which Ctrl-C would show a traceback
if TYPE_CHECKING:
    from ragjax.answerer import Answerer, load
    from ragjax.answering.answers import Answer, Candidate, Document, Score
    from ragjax.config import Config
    from ragjax.errors import InputError

    __version__: str

__all__ = ["Answer", "Answerer", "Candidate", "Config", "Document", "InputError", "Score", "__version__", "load"]


def __getattr__(name: str) -> object:
    """Imports JAX only when it is needed, so that `ragjax --help` and `ragjax config` are instant."""
    if name == "__version__":
        from importlib.metadata import version

        return version("ragjax")
    if name == "InputError":
        from ragjax.errors import InputError

        return InputError
    if name == "Config":
        from ragjax.config import Config

        return Config
    if name in __all__:
        from ragjax import answerer

        return getattr(answerer, name)
    raise AttributeError(f"module 'ragjax' has no attribute {name!r}")
