"""`ragjax answer`: questions from the command line or standard input, and answers as tables or JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.markup import escape
from rich.table import Table

from ragjax.answerer import Answer, open_answerer
from ragjax.config import Config, check_mode
from ragjax.data.questions import text_problem
from ragjax.errors import InputError
from ragjax.pages.wording import proof_text
from ragjax.signals import check
from ragjax.terminal import Screen, terminal, visible


@dataclass(frozen=True)
class _InputQuestion:
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
    check_mode(config, mode)
    if "-" not in questions and all(of.problem for of in _questions(questions)):
        raise InputError(str(next(_questions(questions)).problem))
    answerer = open_answerer(config, untrained)
    if answerer.step is None:
        why = "" if untrained else f": no checkpoint in {config.output}"
        terminal.print(f"these are the pretrained models{why}", soft_wrap=True)
    code = 0
    for question in _questions(questions):
        check()
        if problem := question.problem or answerer.problems([question.text], mode)[0]:
            message = question.error(problem, as_json)
            print(message if as_json else visible(message), file=sys.stdout if as_json else sys.stderr, flush=True)
            code = 2
            continue
        [answer] = answerer.answer([question.text], mode)
        if as_json:
            print(json.dumps(dataclasses.asdict(answer), ensure_ascii=False), flush=True)
        else:
            print_answer(answer, Screen(highlight=False))
    if answerer.passage_cache is not None and (of := answerer.passage_cache.statistics).passages:
        terminal.print(
            f"passage cache: {of.hits} of {of.passages} passages had been read; {of.tokens_saved:.0%} of "
            f"{of.tokens:,} prompt tokens were not read again",
            soft_wrap=True,
        )
    return code


def _questions(given: Sequence[str]) -> Iterator[_InputQuestion]:
    for number, question in enumerate(given, 1):
        if question == "-":
            yield from input_lines()
        else:
            yield _InputQuestion({"argument": number}, question, text_problem(question))


def input_lines() -> Iterator[_InputQuestion]:
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
                yield _InputQuestion({"line": number}, text, problem)
    except OSError as error:
        raise InputError(f"standard input, line {number + 1}: cannot be read ({error.strerror or error})") from None


def print_answer(answer: Answer, console: Screen) -> None:
    """Documents with their priors and proposals, then candidates with both marginals, then the answer."""
    console.print(f"\n[bold]{_plain(answer.question)}[/bold]\n")
    if answer.documents:
        alone = any(
            p > 0 for c in answer.candidates for p in c.beam_probability
        )  # with RAG-Token no document proposes alone
        heads = ["", "p(z|x)", "document", *(["proposes  p(y|x,z)"] if alone else [])]
        documents = Table(*heads, box=box.SIMPLE_HEAD, title_justify="left")
        for z, document in enumerate(answer.documents):
            own = sorted(
                ((c.beam_probability[z], c.text) for c in answer.candidates if c.beam_probability[z] > 0), reverse=True
            )
            proposals = "\n".join(f"{_plain(text) or '(empty)'}  {p:.3f}" for p, text in own)
            description = (
                f"[bold]{_plain(document.title)}[/bold] {_plain(document.id)}\n{_plain(_shorten(document.text, 320))}"
            )
            documents.add_row(f"z{z + 1}", f"{document.prior:.3f}", description, *([proposals] if alone else []))
        console.print(documents)
    modes = [mode for mode in ("thorough", "fast") if getattr(answer.candidates[0], mode) is not None]
    intervals = answer.probability_bounds is not None and answer.candidates[0].posterior is None
    last = f"{answer.mode} p(y|x)" if intervals else "p(z|x,y) by document"
    candidates = Table("candidate", *(f"{mode} p(y|x)" for mode in modes), last, box=box.SIMPLE_HEAD)
    for c in answer.candidates[:8]:
        name = (_plain(c.text) or "(empty)") + ("" if c.finished else " … (unfinished)")
        last_cell = " ".join(f"{share:.2f}" for share in c.posterior or [])
        if intervals and c.probability_bounds is not None:
            last_cell = "{:.4f} … {:.4f}".format(*c.probability_bounds)
        candidates.add_row(name, *(f"{getattr(c, mode):.4f}" for mode in modes), last_cell)
    console.print(candidates)
    if len(answer.candidates) > 8:
        console.print(f"  and {len(answer.candidates) - 8} less probable candidates")
    low, high = answer.probability_bounds or (0.0, 0.0)
    least = "=" if low == high else "≥"
    console.print(
        f"answer ({answer.mode}): [bold]{_plain(answer.text)}[/bold]   p(y|x) {least} {answer.probability:.3f}"
    )
    if answer.scores is not None:
        console.print("the best for certain after {} of {} scores".format(*answer.scores))
    if answer.proved is not None:
        console.print(proof_text(dataclasses.asdict(answer)))


def _plain(text: str) -> str:
    """A text from outside, neither obeyed by the terminal nor read as markup."""
    return escape(visible(text))


def _shorten(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
