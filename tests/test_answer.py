"""Answers from Python and from the command line: what is shown adds up."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from processes import QUICK_TO_COMPILE
from reference import rounding
from safetensors.numpy import load_file, save_file
from trained import STEPS
from world import CAPITALS, LANDS, build, tiny_config

import ragjax
from ragjax.answerer import Answer, Answerer, Candidate, Document, open_answerer
from ragjax.checkpoints.random_init import write_random_checkpoint
from ragjax.cli import main
from ragjax.commands.answer import input_lines, print_answer
from ragjax.config import Config, answer_modes, dump_config
from ragjax.data.question_batch import question_batch, tokenize_answer
from ragjax.decoding.propose import prefill_documents
from ragjax.errors import InputError
from ragjax.files import read_json
from ragjax.parallel.mesh import local_mesh
from ragjax.parallel.sharding import put_global, replicated
from ragjax.rag import load_pipeline
from ragjax.retrieval.passage_cache import check_passage_cache
from ragjax.retrieval.retrieve import mass_outside
from ragjax.terminal import Screen

Capture = pytest.CaptureFixture[str]
QUESTIONS = [f"Capital of {land}?" for land in LANDS[:8]]
LETTERS = [capital[0] for capital in CAPITALS[:8]]


@pytest.fixture(scope="module")
def answerer(run: Path) -> Answerer:
    return ragjax.load(run)


@pytest.fixture(scope="module")
def together(answerer: Answerer) -> list[Answer]:
    return answerer.answer(QUESTIONS)


def test_what_was_learnt_is_answered(answerer: Answerer, together: list[Answer]) -> None:
    assert answerer.step == STEPS
    assert [answer.question for answer in together] == QUESTIONS
    assert sum(answer.text == letter for answer, letter in zip(together, LETTERS, strict=True)) >= 6


def test_every_probability_follows_from_the_others(together: list[Answer]) -> None:
    for answer in together:
        prior = np.array([document.prior for document in answer.documents])
        assert len(prior) == 3 and np.all(np.diff(prior) <= 0)
        np.testing.assert_allclose(prior.sum(), 1, rtol=1e-5)
        for candidate in answer.candidates:
            assert candidate.doc_probability and candidate.thorough is not None and candidate.posterior is not None
            assert candidate.fast is not None
            given, proposed = np.array(candidate.doc_probability), np.array(candidate.beam_probability)
            np.testing.assert_allclose(candidate.thorough, prior @ given, rtol=1e-4)
            np.testing.assert_allclose(candidate.fast, prior @ proposed, rtol=1e-4)
            np.testing.assert_allclose(candidate.posterior, prior * given / (prior @ given), rtol=1e-3, atol=1e-6)
            np.testing.assert_allclose(proposed[proposed > 0], given[proposed > 0], rtol=1e-3)
            assert candidate.thorough >= candidate.fast * (1 - 1e-5)


def test_the_best_comes_first_and_is_the_answer(together: list[Answer]) -> None:
    for answer in together:
        order = [(candidate.finished, candidate.thorough) for candidate in answer.candidates]
        assert order == sorted(order, reverse=True)
        assert (answer.text, answer.probability) == (answer.candidates[0].text, answer.candidates[0].thorough)
        assert answer.mode == "thorough"


def test_a_batch_equals_its_questions_one_at_a_time(answerer: Answerer, together: list[Answer]) -> None:
    for i in (0, 5):
        [alone] = answerer.answer([QUESTIONS[i]])
        assert [document.id for document in alone.documents] == [document.id for document in together[i].documents]
        assert [c.text for c in alone.candidates] == [c.text for c in together[i].candidates]
        for one, other in zip(alone.candidates, together[i].candidates, strict=True):
            assert one.thorough == pytest.approx(other.thorough, rel=1e-3)


def test_passages_are_read_once(answerer: Answerer, together: list[Answer], capsys: Capture) -> None:
    """By an answerer with a cache, which a second run over the questions finds full; another one begins anew."""

    def configured(gib: float, question_first: bool = False) -> Answerer:
        config, prompt = answerer.rag.config, dataclasses.replace(answerer.rag.prompt, question_first=question_first)
        with_cache = config.replace(decode=config.decode.replace(passage_cache_gib=gib))
        return dataclasses.replace(answerer, rag=dataclasses.replace(answerer.rag, config=with_cache, prompt=prompt))

    cached = configured(0.01)
    assert cached.passage_cache is not None and answerer.passage_cache is None
    for answers in (cached.answer(QUESTIONS), cached.answer(QUESTIONS)):
        for one, other in zip(answers, together, strict=True):
            assert [document.id for document in one.documents] == [document.id for document in other.documents]
            assert [c.text for c in one.candidates] == [c.text for c in other.candidates]
            for c, whole in zip(one.candidates, other.candidates, strict=True):
                assert c.doc_probability == pytest.approx(whole.doc_probability, rel=1e-3)
    each = -(-len(QUESTIONS) // answerer.mesh.shape["data"])  # a device keeps what its own questions need
    distinct = len({(i // each, document.id) for i, answer in enumerate(together) for document in answer.documents})
    told = cached.passage_cache.statistics
    assert (told.passages, told.hits) == (2 * 3 * len(QUESTIONS), 2 * 3 * len(QUESTIONS) - distinct)
    assert 0.3 < (told.tokens_saved or 0) < 0.9
    before = told.passages
    for one, other in zip(cached.answer(QUESTIONS, "exact"), answerer.answer(QUESTIONS, "exact"), strict=True):
        assert one.text == other.text and one.documents_read == other.documents_read
        assert one.probability == pytest.approx(other.probability, rel=1e-3)
    assert told.passages > before and told.hits == told.passages - distinct, "all of them were there"
    afresh = dataclasses.replace(cached, params=jax.tree.map(np.asarray, answerer.params)).passage_cache
    assert afresh is not None and afresh.statistics.passages == 0 and afresh.params is not cached.passage_cache.params

    few = r"has room for 1 passages of \d+ tokens, but the questions of one device may retrieve 6; give at least 0.001"
    with pytest.raises(InputError, match=few):
        check_passage_cache(configured(1e-5).rag, answerer.store, answerer.mesh)
    swapped = configured(0.01, question_first=True)
    check_passage_cache(swapped.rag, answerer.store, answerer.mesh)
    assert capsys.readouterr().err.startswith("decode.passage_cache_gib has no effect: the question stands before")
    assert swapped.passage_cache is None


def test_fast_sums_what_the_documents_proposed(answerer: Answerer, together: list[Answer]) -> None:
    for fast, thorough in zip(answerer.answer(QUESTIONS, mode="fast"), together, strict=True):
        assert fast.mode == "fast" and fast.probability == fast.candidates[0].fast
        assert {c.text for c in fast.candidates} == {c.text for c in thorough.candidates}
        order = [(c.finished, c.fast) for c in fast.candidates]
        assert order == sorted(order, reverse=True)
        assert all(c.thorough is c.doc_probability is c.posterior is None for c in fast.candidates)


def test_closed_book_reads_no_documents(answerer: Answerer) -> None:
    for answer in answerer.answer(QUESTIONS, mode="closed_book"):
        assert answer.documents == [] and all(c.beam_probability == [] for c in answer.candidates)
        assert 0 < answer.probability <= 1 and answer.text == answer.candidates[0].text


def test_n_best(answerer: Answerer, together: list[Answer]) -> None:
    for answer, of_all in zip(answerer.answer(QUESTIONS, n_best=2), together, strict=True):
        assert [c.text for c in answer.candidates] == [c.text for c in of_all.candidates[:2]]
        assert answer.probability == pytest.approx(of_all.probability, rel=1e-5)


def test_what_cannot_be_asked(answerer: Answerer) -> None:
    assert answerer.answer([]) == []
    for mode in ("thorough", "fast", "closed_book"):
        with pytest.raises(InputError, match=r"questions\[1\]: an empty question"):
            answerer.answer(["Where?", " "], mode=mode)
        with pytest.raises(InputError, match=r"questions\[2\]: the question '\\udcff' is not Unicode text"):
            answerer.answer(["Where?", "When?", "\udcff"], mode=mode)
        with pytest.raises(InputError, match=r"questions\[0\]: a prompt needs 3\d\d tokens .*max_prompt_tokens is 128"):
            answerer.answer("long " * 60, mode=mode)
    with pytest.raises(
        InputError, match=r"mode is .slow.; with model=rag_sequence .* of exact, thorough, certified, fast"
    ):
        answerer.answer(["Where?"], mode="slow")
    with pytest.raises(InputError, match="n_best is 0"):
        answerer.answer(["Where?"], n_best=0)


def test_a_text_is_one_question(answerer: Answerer, together: list[Answer]) -> None:
    [answer] = answerer.answer(QUESTIONS[0])
    assert (answer.question, answer.text) == (QUESTIONS[0], together[0].text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"questions": None}, "questions: expected a text or a list of texts, not NoneType"),
        ({"questions": 3}, "questions: expected a text or a list of texts, not int"),
        ({"questions": b"Where?"}, "questions: expected a text or a list of texts, not bytes"),
        ({"questions": (q for q in QUESTIONS)}, "questions: expected a text or a list of texts, not generator"),
        ({"questions": {"Where?": 1}}, "questions: expected a text or a list of texts, not dict"),
        ({"questions": np.array(QUESTIONS)}, "questions: expected a text or a list of texts, not ndarray"),
        ({"questions": ["Where?", 3]}, r"questions\[1\]: expected a text, not int"),
        ({"n_best": 2.0}, "n_best: expected a whole number, not float"),
        ({"n_best": True}, "n_best: expected a whole number, not bool"),
        ({"n_best": "2"}, "n_best: expected a whole number, not str"),
        ({"mode": 1}, "mode: expected a text, not int"),
    ],
)
def test_wrong_types_name_the_argument(answerer: Answerer, arguments: dict[str, Any], message: str) -> None:
    """As users meet them: without the type checker of the tests, which would be quicker."""
    with pytest.raises(TypeError, match=f"^{message}$"):
        inspect.unwrap(Answerer.answer)(answerer, **({"questions": QUESTIONS[:1]} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"), [((None,), "run: .*, not NoneType"), (("run", 1), "untrained: .*, not int")]
)
def test_wrong_types_to_load(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        inspect.unwrap(ragjax.load)(*arguments)


def test_the_error_is_offered_without_waiting_for_jax() -> None:
    program = "import sys, ragjax; assert issubclass(ragjax.InputError, Exception) and 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert ragjax.InputError is InputError and "InputError" in ragjax.__all__


def test_sizes_share_their_programs(
    answerer: Answerer, together: list[Answer], caplog: pytest.LogCaptureFixture
) -> None:
    """On one device: five questions are answered by the programs of six; more in parts of `evaluate.batch_size`."""
    mesh = local_mesh(data=1)
    alone = dataclasses.replace(answerer, mesh=mesh, params=put_global(answerer.params, replicated(mesh)))
    asked = sorted(QUESTIONS, key=len, reverse=True)  # else the sixth may be read at another width
    texts = {answer.question: answer.text for answer in together}

    def compiled(count: int, most: int, mode: str) -> int:
        config = answerer.rag.config
        of_size = config.replace(evaluate=config.evaluate.replace(batch_size=most))
        with_size = dataclasses.replace(alone, rag=dataclasses.replace(answerer.rag, config=of_size))
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            answers = with_size.answer(asked[:count], mode=mode)
        assert [answer.question for answer in answers] == asked[:count]
        if mode == "thorough":
            assert [answer.text for answer in answers] == [texts[question] for question in asked[:count]]
        return sum(record.getMessage().startswith("Compiling ") for record in caplog.records)

    for mode in ("thorough", "closed_book"):
        assert compiled(6, 8, mode) > 0
        assert compiled(5, 8, mode) == 0
        assert compiled(6, 6, mode) == compiled(6, 6, mode) == 0


def test_load_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no run here \(config\.yaml is missing\); run: ragjax train"):
        ragjax.load(tmp_path)


def test_a_run_that_was_moved_is_loaded_from_where_it_is(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    assert ragjax.load(moved).step is None  # the checkpoints stayed behind
    (moved / "checkpoints").symlink_to(run / "checkpoints")
    assert ragjax.load(moved).step == STEPS
    assert ragjax.load(moved, untrained=True).step is None


def given(data: bytes) -> io.TextIOWrapper:
    """What stands on standard input."""
    return io.TextIOWrapper(io.BytesIO(data))


def ask(run: Path, *arguments: str) -> int:
    return main(["answer", str(run / "config.yaml"), *arguments])


def test_the_table_shows_it_all(run: Path, together: list[Answer], capsys: Capture) -> None:
    assert ask(run, QUESTIONS[0]) == 0
    shown = capsys.readouterr().out
    answer = together[0]
    assert QUESTIONS[0] in shown
    for document in answer.documents:
        assert all(part in shown for part in (document.id, document.title, f"{document.prior:.3f}", document.text[:20]))
    for candidate in answer.candidates[:8]:
        assert all(f"{p:.4f}" in shown for p in (candidate.thorough, candidate.fast))
        assert " ".join(f"{share:.2f}" for share in candidate.posterior or []) in shown
    assert shown.rstrip().endswith(f"answer (thorough): {answer.text}   p(y|x) = {answer.probability:.3f}")


def test_json_is_one_object_a_line_and_a_dash_reads_input(
    run: Path, together: list[Answer], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", given(f"\ufeff{QUESTIONS[1]}\r\n\n{QUESTIONS[2]}".encode()))
    assert ask(run, QUESTIONS[0], "-", "--json", "--set", "decode.passage_cache_gib=0.01") == 0
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert re.search(r"^passage cache: \d of 9 passages had been read; -?\d+% of [\d,]+ prompt tokens were", err, re.M)
    assert [line["question"] for line in lines] == QUESTIONS[:3]
    for line, answer in zip(lines, together, strict=False):
        assert line.keys() == dataclasses.asdict(answer).keys()
        assert line["text"] == answer.text and line["probability"] == pytest.approx(answer.probability, rel=1e-3)
        assert [d["id"] for d in line["documents"]] == [d.id for d in answer.documents]


def test_a_bad_line_costs_one_question(
    run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten questions, of which the third is too long and the seventh not UTF-8; and the same as arguments."""
    asked = [question.encode() for question in [*QUESTIONS, *QUESTIONS[:2]]]
    asked[2], asked[6] = b"word " * 10_000, b"Wo liegt K\xf6ln?"
    monkeypatch.setattr("sys.stdin", given(b"\n".join(asked)))
    assert ask(run, "-", "--json", "--mode", "fast") == 2
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line.get("question") for line in lines] == [
        None if i in (2, 6) else question.decode() for i, question in enumerate(asked)
    ]
    assert [line["line"] for line in lines if "error" in line] == [3, 7]
    assert (
        "a prompt needs 50000 tokens" in lines[2]["error"] and "generator.max_prompt_tokens is 128" in lines[2]["error"]
    )
    assert lines[6] == {"line": 7, "error": "not UTF-8 (invalid start byte at byte 11)"}

    monkeypatch.setattr("sys.stdin", given(b"\n\xff\n"))
    assert ask(run, " ", QUESTIONS[0], "-", "--mode", "fast") == 2
    out, err = capfd.readouterr()
    assert out.count("answer (fast)") == 1 and QUESTIONS[0] in out
    assert err.splitlines() == [
        "ragjax: argument 1: an empty question; expected some text",
        "ragjax: line 2: not UTF-8 (invalid start byte at byte 1)",
    ]
    assert ask(run, "", QUESTIONS[0], "--json", "--mode", "fast") == 2
    first, second = map(json.loads, capfd.readouterr().out.splitlines())
    assert first == {"argument": 1, "error": "an empty question; expected some text"} and "text" in second


def test_a_line_is_read_as_soon_as_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    late = threading.Timer(20, os.close, [writing])  # else one that waits for more would wait for ever
    late.start()
    with os.fdopen(reading) as pipe:
        monkeypatch.setattr("sys.stdin", pipe)
        lines = input_lines()
        for number, text in enumerate(("first", "second", "third"), 1):
            os.write(writing, f"{text}\n".encode())
            asked = next(lines)
            assert (asked.where, asked.text) == ({"line": number}, text) and late.is_alive()
        late.cancel()
        os.close(writing)
        assert list(lines) == []


def test_standard_input_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with os.fdopen(os.open("/proc/self/mem", os.O_RDONLY)) as unreadable:
        monkeypatch.setattr("sys.stdin", unreadable)
        with pytest.raises(InputError, match="standard input, line 1: cannot be read"):
            next(input_lines())
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(InputError, match="standard input is closed"):
        next(input_lines())


COUNTING = """
import sys, jax.monitoring
from ragjax.cli import main
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rsplit("/")[-1]))
assert main(sys.argv[1:]) == 0
print(events.count("cache_misses"), events.count("cache_hits"))
"""


@pytest.mark.slow
def test_a_second_process_compiles_nothing_anew(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", COUNTING, "answer", str(run / "config.yaml"), QUESTIONS[0]]
    environment = os.environ | QUICK_TO_COMPILE | {"RAGJAX_CACHE": str(tmp_path)}
    outputs = [subprocess.check_output(command, env=environment, text=True) for _ in range(2)]
    (compiled, _), (compiled_anew, kept) = (map(int, out.splitlines()[-1].split()) for out in outputs)
    assert compiled_anew == 0 and kept >= compiled > 0


def test_mode_and_untrained(run: Path, world: Path, capsys: Capture) -> None:
    assert ask(run, QUESTIONS[0], "--json", "--mode", "fast", "--untrained", "--set", "decode.num_docs=2") == 0
    out, err = capsys.readouterr()
    line = json.loads(out)
    assert line["mode"] == "fast" and len(line["documents"]) == 2
    assert "these are the pretrained models" in err


def test_text_that_looks_like_markup_is_shown_as_it_is() -> None:
    candidates = [
        Candidate("[b]x[/b]", False, 0.5, None, [], None, None),
        Candidate("\\[i]\\", True, 0.25, None, [], None, None),
        Candidate("", True, 0.25, None, [0.1], None, None),
    ]
    candidates[:2] = [dataclasses.replace(c, beam_probability=[0.2]) for c in candidates[:2]]
    documents = [Document("doc[/a]", "[i]title", "[u]text", 0.5)]
    console = Screen(file=io.StringIO(), width=200)
    print_answer(Answer("[red]?", "[b]x[/b]", "fast", 0.5, documents, candidates), console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for text in ("[red]?", "[b]x[/b] … (unfinished)", "\\[i]\\", "(empty)", "[i]title doc[/a]", "[u]text"):
        assert text in shown


def test_the_corpus_prior_leaves_mass_to_other_documents(world: Path, tmp_path: Path) -> None:
    answerer = open_answerer(tiny_config(world, retriever__prior="corpus", output=str(tmp_path)))
    [answer] = answerer.answer([QUESTIONS[0]], mode="fast")
    assert 0 < sum(document.prior for document in answer.documents) < 0.9


@pytest.fixture(scope="module")
def two_ends(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A generator that says "A" and <|eot_id|>, a second end token beside that of its tokenizer."""
    folder = tmp_path_factory.mktemp("two-ends")
    write_random_checkpoint("llama", source := folder / "generator")
    backend = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    backend.add_special_tokens(["<|eot_id|>"])
    backend.save(str(source / "tokenizer.json"))
    vocabulary, eos = backend.get_vocab(), 2
    eot, a = vocabulary["<|eot_id|>"], vocabulary["A"]
    hf = read_json(source / "config.json") | {"vocab_size": eot + 1, "tie_word_embeddings": False}
    tensors = load_file(source / "model.safetensors")
    tensors = {name: x * (0 if "layers" in name and "norm" not in name else 1) for name, x in tensors.items()}
    embed, head = np.zeros((2, eot + 1, hf["hidden_size"]), np.float32)
    embed[:, 0], embed[a, 0], embed[a, 1] = 1, 0, 1
    head[a, 0], head[eot, 1], head[eos, :2] = 3, 3, -1
    tensors |= {"model.embed_tokens.weight": embed, "lm_head.weight": head}
    tensors["model.norm.weight"] = np.ones(hf["hidden_size"], np.float32)
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(hf))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos, eot]}))
    config = tiny_config(
        world,
        output=str(folder / "run"),
        index__path=str(folder / "index"),
        generator__source=str(source),
        generator__answer_template="{answer}",
    )
    build(config)
    return config


@pytest.mark.parametrize("model", ["rag_sequence", "rag_token"])
def test_every_end_token_ends_an_answer(two_ends: Config, model: str) -> None:
    """It stops at <|eot_id|>; the gold answer, taught with the tokenizer's own end, is as likely."""
    answerer = open_answerer(two_ends.replace(model=model), untrained=True)
    for mode in answer_modes(answerer.rag.config):
        [answer] = answerer.answer(["Who?"], mode)
        assert (answer.text, answer.candidates[0].finished) == ("A", True)
        np.testing.assert_allclose(answer.probability, 1, atol=1e-4)
    tokenizers = answerer.rag.tokenizers
    count = answerer.mesh.shape["data"]
    questions, gold_tokens = question_batch(tokenizers, ["Who?"] * count), [tokenize_answer(tokenizers, "A")] * count
    _, gold = answerer.candidates(questions, answerer.retrieve(questions, ["Who?"] * count), "thorough", gold_tokens)
    assert gold is not None and abs(gold[0]) < 1e-4


@pytest.mark.parametrize("ends", [[2, 900], [2, -1], ["2"], [True], 2.0, {"a": 2}])
def test_an_end_that_is_no_token_is_refused(two_ends: Config, ends: Any, tmp_path: Path) -> None:
    source = Path(shutil.copytree(two_ends.generator.source, tmp_path / "generator"))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    config = two_ends.replace(generator=two_ends.generator.replace(source=str(source)))
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id is .*; expected numbers of tokens"):
        load_pipeline(config)


def test_all_ends_are_exported(two_ends: Config, tmp_path: Path) -> None:
    """What transformers and ragjax load again ends at the same tokens."""
    run, eot = tmp_path / "run", read_json(Path(two_ends.generator.source) / "config.json")["vocab_size"] - 1
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(two_ends))
    assert main(["export", str(run), str(tmp_path / "exported")]) == 0
    exported = tmp_path / "exported" / "generator"
    assert read_json(exported / "generation_config.json")["eos_token_id"] == [2, eot]
    again = two_ends.replace(generator=two_ends.generator.replace(source=str(exported)))
    assert load_pipeline(again).special == load_pipeline(two_ends).special


@pytest.mark.slow
def test_neither_fcntl_nor_resource_is_needed(run: Path) -> None:
    """Windows has neither of them."""
    program = """
import sys
sys.modules.update(fcntl=None, resource=None)
import ragjax
from ragjax.resources import raise_open_file_limit
raise_open_file_limit(10**9)
[answer] = ragjax.load(sys.argv[1]).answer(sys.argv[2:])
print(answer.text)
"""
    command = [sys.executable, "-c", program, str(run), QUESTIONS[0]]
    environment = os.environ | QUICK_TO_COMPILE
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == f"{ragjax.load(run).answer(QUESTIONS[:1])[0].text}\n"


def test_exact_answers_tell_their_proof(answerer: Answerer, together: list[Answer]) -> None:
    """Nothing that was proved is below thorough decoding's choice; what was not read is scored for the probability."""
    found = answerer.answer(QUESTIONS, mode="exact")
    assert sum(answer.proved == {"top_k": 0, "corpus": None} for answer in found) < len(found)
    for answer, thorough in zip(found, together, strict=True):
        assert answer.mode == "exact" and answer.proved is not None and answer.proved["corpus"] is None
        assert answer.documents_read in (1, 2, 3) and answer.steps and answer.probability_bounds is not None
        assert answer.probability >= thorough.probability * 0.998 or not thorough.candidates[0].finished
        np.testing.assert_allclose(answer.probability_bounds, answer.probability, rtol=1e-5)
        assert answer.proved_set is not None and answer.proved_set["corpus"] is None
        assert answer.proved["top_k"] <= answer.proved_set["top_k"] <= len(answer.candidates)  # type: ignore[operator]
        prior = np.array([document.prior for document in answer.documents])
        for candidate in answer.candidates:
            assert candidate.doc_probability and candidate.thorough is not None and candidate.posterior is not None
            given = np.array(candidate.doc_probability)
            np.testing.assert_allclose(candidate.thorough, prior @ given, rtol=1e-3)
            np.testing.assert_allclose(candidate.posterior, prior * given / (prior @ given), rtol=1e-3, atol=1e-6)


def test_prompts_are_read_no_wider_than_they_are(answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs to the next sixteen tokens; a memory has the width of the whole batch all the same."""
    read = []

    def spy(graph: Any, params: Any, source: Any, mask: Any, width: int | None = None) -> Any:
        assert width is not None
        read.append((source.shape[1], width, int(np.asarray(mask).sum(axis=1).max())))
        return prefill_documents(graph, params, source, mask, width)

    monkeypatch.setattr("ragjax.answering.batch_answerer.prefill_documents", spy)
    answerer.answer(QUESTIONS, mode="exact")
    assert len(read) > 1 and all(longest <= width < longest + 16 and width <= most for most, width, longest in read)


def test_a_cpu_reads_few_prompts_at_a_time(answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of like lengths: as all of them read in one program."""
    mesh, rng = local_mesh(data=1), np.random.default_rng(0)
    alone = dataclasses.replace(answerer, mesh=mesh, params=put_global(answerer.params, replicated(mesh)))
    lengths = np.array([64, 9, 40, 12, 64, 33, 64, 30])
    source, mask = rng.integers(3, 20, (len(lengths), 64), np.int32), np.arange(64) < lengths[:, None]
    read = []

    def spy(graph: Any, params: Any, source: Any, mask: Any, width: int) -> Any:
        read.append((len(source), width, sorted(np.asarray(mask).sum(axis=1).tolist())))
        return prefill_documents(graph, params, source, mask, width)

    monkeypatch.setattr("ragjax.answering.batch_answerer.prefill_documents", spy)
    monkeypatch.setattr("ragjax.answering.batch_answerer.READ_TOGETHER", 3 * 64)
    found = alone._read(source, mask)
    assert read == [(3, 32, [9, 12, 30]), (3, 64, [33, 40, 64]), (3, 64, [9, 64, 64])]  # the last one is filled up
    whole = prefill_documents(answerer.rag.generator.graphdef, alone.params["generator"], source, mask)
    for name in ("mask", "offset", "start"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    counted = np.asarray(whole.mask)[None, :, :, None, None]
    for one, other in ((found.keys, whole.keys), (found.values, whole.values)):
        there = np.where(counted, other, 0)
        np.testing.assert_allclose(np.where(counted, one, 0), there, rtol=0, atol=rounding(there))


def test_exact_decoding_shares_programs(answerer: Answerer, caplog: pytest.LogCaptureFixture) -> None:
    """Forty questions, by rounds of documents and by beams: few programs, whatever each question needs."""
    config = answerer.rag.config
    decode = config.decode.replace(probability="interval", fallback="none")
    config = config.replace(decode=decode, evaluate=config.evaluate.replace(batch_size=8))
    of_eight = dataclasses.replace(answerer, rag=dataclasses.replace(answerer.rag, config=config))
    asked = [*(f"Capital of {land}?" for land in LANDS), *(f"Is {number} prime?" for number in range(10))]
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        answers = of_eight.answer(asked, mode="exact")
    programs = [record for record in caplog.records if "search_marginal" in record.getMessage()]
    compiled = sum(record.getMessage().startswith("Compiling ") for record in programs)
    assert 0 < compiled <= 12
    assert len({(answer.documents_read, answer.steps) for answer in answers}) > 1


def test_the_proof_is_told_in_a_line(capsys: Capture) -> None:
    candidate = Candidate("Paris", True, None, None, [0.0, 0.0], None, None, [0.5, 0.75])
    documents = [Document("d", "France", "text", 0.5), Document("e", "Chad", "text", 0.5)]
    answer = Answer("?", "Paris", "exact", 0.5, documents, [candidate], None, [0.5, 0.75], None, 1, 3)
    for proved, told in (
        ((1, 1), "proved: no other answer is likelier, whatever the other passages of the corpus say"),
        ((2, 0), "proved: no other answer is likelier under these documents"),
        ((0, None), "not proved: the likeliest of the answers found, and another one may be likelier"),
    ):
        console = Screen(file=io.StringIO(), width=200)
        print_answer(dataclasses.replace(answer, proved=dict(zip(("top_k", "corpus"), proved, strict=True))), console)
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        assert shown.rstrip().endswith(f"{told} (1 of 2 documents read, 3 steps)")
        assert "0.5000 … 0.7500" in shown and "p(y|x) ≥ 0.500" in shown


def test_an_exact_answer_under_the_whole_corpus(world: Path, tmp_path: Path) -> None:
    """With all thirty passages retrieved nothing but rounding is outside; with three, more than a half."""
    told = []
    for num_docs in (3, len(LANDS)):
        config = tiny_config(world, retriever__prior="corpus", output=str(tmp_path), decode__max_new_tokens=2)
        only = {"lazy": False, "fallback": "none", "max_beams": 2, "probability": "interval"}
        config = config.replace(decode=config.decode.replace(num_docs=num_docs, prove="corpus", **only))
        [answer] = open_answerer(config).answer([QUESTIONS[0]], mode="exact")
        assert answer.proved is not None and answer.probability_bounds is not None
        told.append((answer.proved["corpus"], np.diff(answer.probability_bounds)[0]))
    (few, wide), (every, narrow) = told
    assert few == 0 and wide > 0.5 and every is not None and 0 < narrow < 1e-3


def test_the_mass_outside_is_never_less_than_it_is() -> None:
    """It carries the rounding of float32 scores, however large."""
    rng = np.random.default_rng(0)
    for scale in (1.0, 20.0, 500.0):
        scores = -np.sort(-rng.normal(size=(200, 50)) * scale, axis=1)
        normalizer = np.logaddexp.reduce(scores, axis=1)
        rounded, true = normalizer.astype(np.float32), np.exp(scores[:, 10:] - normalizer[:, None]).sum(axis=1)
        found = mass_outside(scores[:, :10].astype(np.float32) - rounded[:, None], rounded)
        assert (found >= true).all() and (found <= true + 1e-4 * (1 + scale)).all()
