"""The configuration: `keys.py`, `data_keys.py`, `answer_keys.py`; YAML in `reading.py`, the rest in `derived.py`."""

from ragjax.config.answer_keys import Decode, Evaluate
from ragjax.config.data_keys import Corpus, PassageColumns, QuestionColumns, Questions
from ragjax.config.derived import (
    answer_modes,
    check_mode,
    most_documents,
    reads_corpus,
    refreshes,
    rescores_as_hugging_face,
)
from ragjax.config.keys import (
    ON_DEVICES,
    Config,
    Generator,
    Index,
    Mesh,
    Refresh,
    Retriever,
    Train,
    default_config,
    dump_config,
    get_key,
    load_config,
    reference,
    schema,
    structure,
)

__all__ = [
    "ON_DEVICES",
    "Config",
    "Corpus",
    "Decode",
    "Evaluate",
    "Generator",
    "Index",
    "Mesh",
    "PassageColumns",
    "QuestionColumns",
    "Questions",
    "Refresh",
    "Retriever",
    "Train",
    "answer_modes",
    "check_mode",
    "default_config",
    "dump_config",
    "get_key",
    "load_config",
    "most_documents",
    "reads_corpus",
    "reference",
    "refreshes",
    "rescores_as_hugging_face",
    "schema",
    "structure",
]
