"""Answers and words of a real multilingual question set: ChatterBot's corpus, in ten languages."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from ragjax.checkpoints.hub import fetch
from ragjax.data.corpus import Passage
from ragjax.data.passage_store import shard_folder, write_store
from ragjax.metrics import ANY_PUNCTUATION, answer_words, contains_answer, exact_match
from ragjax.retrieval.bm25 import build_bm25, open_bm25

SOURCE = "pypi:chatterbot-corpus==1.3.3"
LANGUAGES = {  # its folders, and what evaluate.language says of them
    "chinese": "zh",
    "traditionalchinese": "zh",
    "japanese": "other",
    "korean": "other",
    "persian": "other",
    "english": "en",
    "french": "other",
    "german": "de",
    "indonesian": "other",
    "spanish": "es",
}
SUBJECTS = ("history", "literature", "science", "trivia")
UNSPACED = ("chinese", "traditionalchinese", "japanese")
MOST = 40  # characters of an answer; longer ones are remarks


def pairs(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Questions with their first, short answers, by language."""
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for language in LANGUAGES:
        for path in (path for subject in SUBJECTS for path in folder.rglob(f"data/{language}/{subject}.yml")):
            for question, answer, *_ in OmegaConf.load(path)["conversations"]:
                if len(str(answer)) <= MOST:
                    found[language].append((str(question), str(answer).strip()))
    return found


@pytest.mark.slow
def test_answers_and_words_of_real_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer is found in a sentence, and is equal to itself without its full stop; BM25 finds each passage."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    found = pairs(fetch(SOURCE).path)
    assert found.keys() == LANGUAGES.keys()
    for language, of in found.items():
        passages = [Passage(str(i), "", f"{question} — {answer}") for i, (question, answer) in enumerate(of)]
        write_store(shard_folder(tmp_path / language, 0), passages, lambda t: [[1] for _ in t], lambda p: p.text)
        build_bm25(tmp_path / language, "sha256:p")
        asked = [question for question, _ in of]
        first = open_bm25(tmp_path / language, "sha256:p", len(of)).search(asked, 1)[1][:, 0]
        recall = np.mean([asked[i] == question for i, question in zip(first, asked, strict=True)])
        plain = [ANY_PUNCTUATION.sub("", answer[-1:]) for _, answer in of]
        predicted = [answer[:-1] + last for (_, answer), last in zip(of, plain, strict=True)]
        together = list(zip(predicted, [answer for _, answer in of], strict=True))
        equal = {}
        for by in ("squad", "mlqa"):
            words = answer_words(by, LANGUAGES[language])
            equal[by] = np.mean([exact_match(one, [other], words) for one, other in together])
        contained = np.mean([contains_answer(passages[i].text, [answer]) for i, (_, answer) in enumerate(of)])
        measured = recall, contained, equal["squad"], equal["mlqa"]
        print(f"{language:20}{len(of):5}", *(f"{number:8.3f}" for number in measured), file=sys.stderr)
        assert contained == equal["mlqa"] == 1
        assert equal["squad"] < 0.95 or language not in UNSPACED, "SQuAD's rules leave 。 where it is"
        assert recall > 0.85
