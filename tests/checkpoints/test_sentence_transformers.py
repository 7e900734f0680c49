"""What a sentence-transformers folder says is what the configuration says, or it is refused with what mends it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ragjax.checkpoints.sentence_transformers import check_sentence_transformers
from ragjax.config import Retriever
from ragjax.errors import InputError

OLD, NEW = "sentence_transformers.models.", "sentence_transformers.sentence_transformer.modules.pooling."
ENCODER = Retriever(source="m")
MEAN = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}
CLS = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
MAX = {"pooling_mode_cls_token": False, "pooling_mode_max_tokens": True}
E5: dict[str, Any] = {"prompts": {"query": "query: ", "document": "passage: "}}


def write(
    folder: Path, pooling: Any = MEAN, dense: bool = False, normalize: bool = True, prefix: str = OLD, **about: Any
) -> Path:
    modules = [("Transformer", ""), ("Pooling", "1_Pooling")]
    modules += [("Dense", "2_Dense")] * dense + [("Normalize", "9_Normalize")] * normalize
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    listed = [{"idx": i, "name": str(i), "path": path, "type": prefix + kind} for i, (kind, path) in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps(listed))
    if about:
        (folder / "config_sentence_transformers.json").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize(
    ("folder", "settings"),
    [
        ({}, ENCODER),
        ({"pooling": {"pooling_mode": "mean"}, "prefix": NEW}, ENCODER),
        ({"pooling": {"pooling_mode": ["cls"]}}, ENCODER.replace(pooling="cls")),
        ({"pooling": CLS}, ENCODER.replace(pooling="cls")),
        ({"normalize": False}, ENCODER),  # it does not say by what its embeddings are compared
        ({"normalize": False}, ENCODER.replace(normalize=False)),
        ({"normalize": False, "similarity_fn_name": "cosine"}, ENCODER),
        ({"normalize": False, "similarity_fn_name": "dot"}, ENCODER.replace(normalize=False)),
        ({"prompts": {"query": "", "document": ""}, "default_prompt_name": None}, ENCODER),
        ({"prompts": {"document": "passage: "}}, ENCODER.replace(passage_template="passage: {title} {text}")),
        ({"prompts": {"clustering": "cluster: "}}, ENCODER),
    ],
)
def test_what_agrees_is_taken(tmp_path: Path, folder: dict[str, Any], settings: Retriever) -> None:
    check_sentence_transformers(write(tmp_path / "m", **folder), settings, questions=True, passages=True)


@pytest.mark.parametrize(
    ("folder", "settings", "message"),
    [
        (
            {"pooling": CLS},
            ENCODER,
            r"1_Pooling/config\.json: it pools by cls.*set retriever\.pooling=cls",
        ),
        ({}, ENCODER.replace(pooling="cls"), r"set retriever\.pooling=mean"),
        ({"pooling": MAX}, ENCODER, r"it pools by \['max_tokens'\]; supported are mean and cls"),
        ({"pooling": {"pooling_mode": ["cls", "mean"]}}, ENCODER, "it pools by"),
        ({"dense": True}, ENCODER, r"modules\.json: a Dense module is not supported"),
        ({}, ENCODER.replace(normalize=False), r"set retriever\.normalize=true"),
        ({"normalize": False, "similarity_fn_name": "dot"}, ENCODER, r"set retriever\.normalize=false"),
        (
            {"normalize": False, "similarity_fn_name": "cosine"},
            ENCODER.replace(normalize=False),
            r"normalize=true",
        ),
        (E5, ENCODER, r"questions begin with 'query: ', which is not supported yet"),
        ({"prompts": {"x": "q: "}, "default_prompt_name": "x"}, ENCODER, "questions begin with 'q: '"),
        ({"prompts": {"document": "p: "}}, ENCODER, r"set retriever\.passage_template='p: \{title\}: \{text\}'"),
        ({"prompts": ["query: "]}, ENCODER, "expected texts by name"),
    ],
)
def test_what_contradicts_is_refused(tmp_path: Path, folder: dict[str, Any], settings: Retriever, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_sentence_transformers(write(tmp_path / "m", **folder), settings, questions=True, passages=True)


def test_an_encoder_of_passages_alone_needs_no_prompt_for_questions(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", **E5)
    check_sentence_transformers(
        folder, ENCODER.replace(passage_template="passage: {text}"), questions=False, passages=True
    )


def test_an_older_layout_has_its_encoder_in_a_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", CLS)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(InputError, match=r"set retriever\.pooling=cls"):
        check_sentence_transformers(folder / "0_Transformer", ENCODER, True, True)
    check_sentence_transformers(folder / "another", ENCODER, True, True)
    check_sentence_transformers(tmp_path / "plain", ENCODER, True, True)
