"""`ragjax answer`, and the same from Python: `ragjax.load(run).answer(["…"])`."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich import box
from rich.markup import escape
from rich.table import Table

from ragjax.config import Config, replace
from ragjax.decode import Candidates, decode, decode_as_hugging_face, decode_together, read, score_tokens
from ragjax.errors import InputError
from ragjax.experiment import load_experiment
from ragjax.index import Index, check_k
from ragjax.loss import TokenScores, answer_nll
from ragjax.marginal import log_prior
from ragjax.mesh import local_mesh, shard_batch
from ragjax.models.generator import Memory
from ragjax.models.layers import Params
from ragjax.passages import PassageStore
from ragjax.prefixes import few_sizes
from ragjax.progress import Screen, terminal
from ragjax.questions import text_problem
from ragjax.rag import Rag, Retrieved, answer_tokens, prompt_problems, prompt_rows, retrieve
from ragjax.signals import check
from ragjax.terminal_text import visible
from ragjax.text import bucket, buckets_up_to, pad_rows
from ragjax.world import open_world, pretrained, restore_trained, trained_index

T = TypeVar("T")


def answer_modes(config: Config) -> tuple[str, ...]:
    """The ways in which the configuration's model can answer."""
    if config.model == "rag_token" or config.hf_compatible:
        return ("thorough", "closed_book")
    certified = ("certified",) if config.decode.length_penalty == 0 else ()
    return ("thorough", *certified, "fast", "closed_book")


def _check_mode(config: Config, mode: str | None) -> None:
    modes = answer_modes(config)
    if mode is not None and mode not in modes:
        kind = f"model={config.model} hf_compatible={str(config.hf_compatible).lower()}"
        raise InputError(f"mode is {mode!r}; with {kind} expected one of {', '.join(modes)}")


def most_documents(config: Config) -> int:
    """The documents that answering retrieves for a question."""
    return max(config.decode.k, config.train.k) if _rescores_as_hugging_face(config) else config.decode.k


def _rescores_as_hugging_face(config: Config) -> bool:
    return config.hf_compatible and config.model == "rag_sequence"


@dataclass(frozen=True)
class Document:
    """A retrieved passage; `prior` is p(z|x)."""

    id: str
    title: str
    text: str
    prior: float


@dataclass(frozen=True)
class Candidate:
    """A possible answer y. Lists have one entry a document; a marginal is None where its decoding did not run."""

    text: str
    finished: bool  # reached the end token
    fast: float | None  # p(y|x), documents that did not propose y contributing 0
    thorough: float | None  # p(y|x), y scored under every document
    proposed: list[float]  # p(y|x,z) by the beam search, 0 where z did not propose y
    given_document: list[float] | None  # p(y|x,z) under every document
    posterior: list[float] | None  # p(z|x,y)
    between: list[float] | None = None  # certified: the thorough p(y|x) is at least and at most this


@dataclass(frozen=True)
class Answer:
    """What was answered, how probable it is, and everything it was chosen from, best candidate first."""

    question: str
    text: str
    mode: str
    probability: float  # p(y|x) under the mode; certified, what it is at least
    documents: list[Document]
    candidates: list[Candidate]
    scores: list[int] | None = None  # certified: the p(y|x,z) computed beside the beam search, of how many for thorough


@dataclass(frozen=True)
class Answerer:
    """Models, index and passages, ready to answer."""

    rag: Rag
    params: Params
    index: Index
    store: PassageStore
    step: int | None  # of training; None for the pretrained models
    mesh: Mesh  # of this process, where `params` lie

    def retrieve(self, questions: Sequence[str]) -> Retrieved:
        """The documents that `candidates` reads, `decode.k` of each question.

        Hugging Face rescores under the training's number of documents, whatever the number that proposed: with
        `hf_compatible` there are as many as either needs, and the prior is 0 beyond `train.k`.
        """
        config = self.rag.config
        if not _rescores_as_hugging_face(config):
            return retrieve(self.rag, self.params, self.index, questions, config.decode.k, self.mesh)
        found = retrieve(self.rag, self.params, self.index, questions, most_documents(config), self.mesh)
        counted = (found.ids >= 0) & (np.arange(found.ids.shape[1]) < config.train.k)
        return dataclasses.replace(
            found, log_prior=np.asarray(log_prior(jnp.asarray(found.log_prior), jnp.asarray(counted)))
        )

    def answer(
        self, questions: str | Sequence[str], mode: str | None = None, n_best: int | None = None
    ) -> list[Answer]:
        """Answers questions, `evaluate.batch_size` at a time; a text is one question, and gives a list of one answer.

        `mode` is `thorough`, `certified`, `fast` or `closed_book`, by default as configured; `n_best` keeps so many
        candidates of each. Raises `InputError` for an unknown mode, and, before any is answered, for a question that is
        empty, no Unicode text or too long, naming it; `TypeError` for an argument of another type.
        """
        asked = _texts(questions)
        if n_best is not None and _whole_number("n_best", n_best) < 1:
            raise InputError(f"n_best is {n_best}; expected 1 or more")
        mode = self._mode(mode)
        for i, why in enumerate(self.problems(asked, mode)):
            if why:
                raise InputError(f"questions[{i}]: {why}")
        size = self.rag.config.evaluate.batch_size
        parts = [asked[start : start + size] for start in range(0, len(asked), size)]
        return [answer for part in parts for answer in self._batch(part, size, mode, n_best)]

    def problems(self, questions: Sequence[str], mode: str | None = None) -> list[str | None]:
        """Why each question cannot be answered, or None where it can."""
        closed_book = self._mode(mode) == "closed_book"
        problems = [text_problem(question) for question in questions]
        sound = [i for i, why in enumerate(problems) if why is None]
        told = prompt_problems(self.rag, [questions[i] for i in sound], not closed_book, closed_book)
        for i, why in zip(sound, told, strict=True):
            problems[i] = why
        return problems

    def _mode(self, mode: object) -> str:
        if mode is not None and not isinstance(mode, str):
            raise TypeError(f"mode: expected a text, not {type(mode).__name__}")
        mode = mode or self.rag.config.decode.mode
        _check_mode(self.rag.config, mode)
        return mode

    def _batch(self, questions: Sequence[str], most: int, mode: str, n_best: int | None) -> list[Answer]:
        """Filled up to one of a few sizes: each has programs of its own, which are compiled when it first comes."""
        count = len(questions)
        whole = fill_up(questions, min(few_sizes(count), max(most, count)))
        if mode == "closed_book":
            found, _ = self.candidates(whole, None, "fast")
            documents: list[list[Document]] = [[]] * count
        else:
            retrieved = self.retrieve(whole)
            found, _ = self.candidates(whole, retrieved, mode)
            documents = [self.documents(retrieved, b) for b in range(count)]
        return [self._answer(questions[b], mode, found[b], documents[b], n_best) for b in range(count)]

    def candidates(
        self, questions: Sequence[str], retrieved: Retrieved | None, mode: str, gold: Sequence[str] | None = None
    ) -> tuple[list[Candidates], np.ndarray | None]:
        """What the documents propose (without `retrieved`: the question alone), and log p(gold|x) [B] if asked."""
        graph, params, config = self.rag.generator.graph, self.params["generator"], self.rag.config
        if retrieved is None:
            ids, prior = np.zeros((len(questions), 1), np.int32), np.zeros((len(questions), 1), np.float32)
        else:
            ids, prior = retrieved.ids, retrieved.log_prior
        store = None if retrieved is None else self.store
        source, mask = prompt_rows(self.rag, store, questions, ids)
        source, mask = shard_batch(self.mesh, (source, mask), len(source))
        memory = read(graph, params, source, mask)
        settings, special = replace(config.decode, mode=mode), self.rag.special
        if retrieved is not None and _rescores_as_hugging_face(config):
            unmasked = read(graph, params, source, jnp.ones_like(mask))
            scoring = prior[:, : config.train.k]
            proposing = (ids >= 0) & (np.arange(ids.shape[1]) < config.decode.k)
            found = decode_as_hugging_face(graph, params, unmasked, memory, scoring, proposing, settings, special)
        elif retrieved is not None and config.model == "rag_token":
            found = decode_together(graph, params, memory, prior, settings, special, config.hf_compatible)
        else:
            found = decode(graph, params, memory, prior, settings, special)
        return found, None if gold is None else self._gold_logp(memory, prior, gold)

    def _gold_logp(self, memory: Memory, prior: np.ndarray, gold: Sequence[str]) -> np.ndarray:
        """log p(gold|x) [B], in nats, as answering counts it: any of the generator's end tokens ends it."""
        rows = [answer_tokens(self.rag, answer) for answer in gold]
        longest = max(self.rag.config.generator.answer_tokens, *map(len, rows))
        width = bucket(longest, [self.rag.config.generator.answer_tokens, *buckets_up_to(longest + 32)])
        answers, counted = pad_rows(rows, width, self.rag.special.pad)
        lengths = counted.sum(axis=1, dtype=np.int32)[:, None]
        graph, params = self.rag.generator.graph, self.params["generator"]
        logp = score_tokens(graph, params, memory, answers[:, None], lengths, self.rag.special)[:, :, 0]
        scores = TokenScores(logp, jnp.zeros_like(logp))
        return -np.asarray(answer_nll(self.rag, jnp.asarray(prior), scores, jnp.asarray(answers), jnp.asarray(counted)))

    def documents(self, retrieved: Retrieved, b: int) -> list[Document]:
        """The documents of question b, best first, and only those that are there."""
        pairs = zip(retrieved.ids[b], np.exp(retrieved.log_prior[b]), strict=True)
        return [Document(**dataclasses.asdict(self.store[int(i)]), prior=float(p)) for i, p in pairs if i >= 0]

    def text(self, tokens: Sequence[int]) -> str:
        """An answer's tokens as text, on one line."""
        return " ".join(self.rag.generator_tokenizer.decode(tokens).split())

    def _answer(
        self, question: str, mode: str, found: Candidates, documents: list[Document], n_best: int | None
    ) -> Answer:
        count, by = len(documents), "fast" if mode == "closed_book" else mode
        candidates = [
            Candidate(
                text=self.text(found.tokens[c]),
                finished=bool(found.finished[c]),
                fast=None if found.fast is None else math.exp(found.fast[c]),
                thorough=None if found.thorough is None else math.exp(found.thorough[c]),
                proposed=np.exp(found.proposed[:count, c]).tolist(),
                given_document=None if found.scored is None else np.exp(found.scored[:count, c]).tolist(),
                posterior=None if found.posterior is None else found.posterior[:count, c].tolist(),
                between=None if found.bounds is None else np.exp(found.bounds[:, c]).tolist(),
            )
            for c in found.best(by, len(found.tokens) if n_best is None else n_best)
        ]
        probability = math.exp(found.marginal(by)[found.best(by)[0]])
        scores = None if found.needed is None else list(found.needed)
        return Answer(question, candidates[0].text, mode, probability, documents, candidates, scores)


def fill_up(items: Sequence[T], size: int) -> list[T]:
    """Repeats the first until there are `size`."""
    return [*items, *[items[0]] * (size - len(items))]


def _texts(questions: object) -> list[str]:
    """A text as a list of one, a list of texts as it is. Raises `TypeError` for anything else."""
    if isinstance(questions, str):
        return [questions]
    if not isinstance(questions, Sequence) or isinstance(questions, bytes | bytearray | memoryview):
        raise TypeError(f"questions: expected a text or a list of texts, not {type(questions).__name__}")
    for i, question in enumerate(questions):
        if not isinstance(question, str):
            raise TypeError(f"questions[{i}]: expected a text, not {type(question).__name__}")
    return list(questions)


def _whole_number(name: str, value: object) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected a whole number, not {type(value).__name__}")
    return operator.index(value)  # type: ignore[arg-type]


def load(run: str | Path, untrained: bool = False) -> Answerer:
    """The newest checkpoint of a run (an `output` folder; with `train.keep_best` the best), or its pretrained models.

    Raises `InputError` if the folder holds no run, or its index or models are missing or do not fit, and `TypeError`
    for an argument of another type.
    """
    if not isinstance(run, str | os.PathLike):
        raise TypeError(f"run: expected the path of a folder, not {type(run).__name__}")
    if not isinstance(untrained, bool):
        raise TypeError(f"untrained: expected True or False, not {type(untrained).__name__}")
    return open_answerer(load_experiment(Path(run)), untrained)


def open_answerer(config: Config, untrained: bool = False) -> Answerer:
    """As `load`, for a configuration; without a checkpoint in its `output` the models are the pretrained ones.

    They lie on `mesh.model` devices.
    """
    rag, index, store = open_world(config)
    check_k(most_documents(config), len(index))
    mesh = local_mesh(config.mesh.model, data=1)
    trained = None if untrained else restore_trained(rag, mesh)
    params, step = trained or (pretrained(rag, mesh), None)
    index = index if step is None else trained_index(rag, index, step)
    return Answerer(rag, params, index, store, step, mesh)


@dataclass(frozen=True)
class _Asked:
    """A question from the command line: where it stands, and its text, or why it has none."""

    where: dict[str, int]  # the line of standard input, or the argument, from 1
    text: str
    problem: str | None

    def error(self, problem: str, as_json: bool) -> str:
        if as_json:
            return json.dumps(self.where | {"error": problem}, ensure_ascii=False)
        [(name, number)] = self.where.items()
        return f"ragjax: {name} {number}: {problem}"


def answer_from_command_line(
    config: Config, questions: Sequence[str], mode: str, untrained: bool, as_json: bool
) -> int:
    """Prints an answer with its documents and candidates for each question; `-` stands for standard input.

    A question that cannot be answered costs itself alone: a line on standard error names it, or, `as_json`,
    {"line": …, "error": …} stands in its place ("argument" where it is one). Returns 0, and 2 if there was one.
    Raises `InputError` where standard input cannot be read, and at once where no question can be one.
    """
    _check_mode(config, mode)
    if "-" not in questions and all(of.problem for of in _questions(questions)):
        raise InputError(str(next(_questions(questions)).problem))
    answerer = open_answerer(config, untrained)
    if answerer.step is None:
        why = "" if untrained else f": no checkpoint in {config.output}"
        terminal.print(f"these are the pretrained models{why}", soft_wrap=True)
    code = 0
    for asked in _questions(questions):
        check()
        if problem := asked.problem or answerer.problems([asked.text], mode)[0]:
            told = asked.error(problem, as_json)
            print(told if as_json else visible(told), file=sys.stdout if as_json else sys.stderr, flush=True)
            code = 2
            continue
        [answer] = answerer.answer([asked.text], mode)
        if as_json:
            print(json.dumps(dataclasses.asdict(answer), ensure_ascii=False), flush=True)
        else:
            print_answer(answer, Screen(highlight=False))
    return code


def _questions(given: Sequence[str]) -> Iterator[_Asked]:
    for number, question in enumerate(given, 1):
        if question == "-":
            yield from _input_lines()
        else:
            yield _Asked({"argument": number}, question, text_problem(question))


def _input_lines() -> Iterator[_Asked]:
    """The lines of standard input that are not empty, each as soon as it is there, decoded by itself."""
    if sys.stdin is None:
        raise InputError("standard input is closed; expected one question a line")
    number = 0
    try:
        for number, line in enumerate(sys.stdin.buffer, 1):
            try:
                text, problem = line.decode("utf-8-sig" if number == 1 else "utf-8").strip(), None
            except UnicodeDecodeError as error:
                text, problem = "", f"not UTF-8 ({error.reason} at byte {error.start + 1})"
            if text or problem:
                yield _Asked({"line": number}, text, problem)
    except OSError as error:
        raise InputError(f"standard input, line {number + 1}: cannot be read ({error.strerror or error})") from None


def print_answer(answer: Answer, console: Screen) -> None:
    """Documents with their priors and proposals, then candidates with both marginals, then the answer."""
    console.print(f"\n[bold]{_plain(answer.question)}[/bold]\n")
    if answer.documents:
        alone = any(p > 0 for c in answer.candidates for p in c.proposed)  # with RAG-Token no document proposes alone
        heads = ["", "p(z|x)", "document", *(["proposes  p(y|x,z)"] if alone else [])]
        documents = Table(*heads, box=box.SIMPLE_HEAD, title_justify="left")
        for z, document in enumerate(answer.documents):
            own = sorted(((c.proposed[z], c.text) for c in answer.candidates if c.proposed[z] > 0), reverse=True)
            proposals = "\n".join(f"{_plain(text) or '(empty)'}  {p:.3f}" for p, text in own)
            shown = (
                f"[bold]{_plain(document.title)}[/bold] {_plain(document.id)}\n{_plain(_shorten(document.text, 320))}"
            )
            documents.add_row(f"z{z + 1}", f"{document.prior:.3f}", shown, *([proposals] if alone else []))
        console.print(documents)
    modes = [mode for mode in ("thorough", "fast") if getattr(answer.candidates[0], mode) is not None]
    last = "certified p(y|x)" if answer.mode == "certified" else "p(z|x,y) by document"
    candidates = Table("candidate", *(f"{mode} p(y|x)" for mode in modes), last, box=box.SIMPLE_HEAD)
    for c in answer.candidates[:8]:
        name = (_plain(c.text) or "(empty)") + ("" if c.finished else " … (unfinished)")
        told = " ".join(f"{share:.2f}" for share in c.posterior or [])
        if c.between is not None:
            told = "{:.4f} … {:.4f}".format(*c.between)
        candidates.add_row(name, *(f"{getattr(c, mode):.4f}" for mode in modes), told)
    console.print(candidates)
    if len(answer.candidates) > 8:
        console.print(f"  and {len(answer.candidates) - 8} less probable candidates")
    least = "=" if answer.candidates[0].between is None else "≥"
    console.print(
        f"answer ({answer.mode}): [bold]{_plain(answer.text)}[/bold]   p(y|x) {least} {answer.probability:.3f}"
    )
    if answer.scores is not None:
        console.print("the best for certain after {} of {} scores".format(*answer.scores))


def _plain(text: str) -> str:
    """A text from outside, neither obeyed by the terminal nor read as markup."""
    return escape(visible(text))


def _shorten(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
