"""The command line: bad input ends with one clear line, code 2 and nothing half-written; help helps."""

from __future__ import annotations

import errno
import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from trained import STEPS, files, refused

from ragjax.cli import main
from ragjax.files import write_jsonl

Capture = pytest.CaptureFixture[str]
CONFIGS = Path(__file__).parents[1] / "configs"
COMMANDS = ("plan", "index", "train", "evaluate", "answer", "config")
PASSAGES = [{"id": f"{i}", "title": f"Land {i}", "text": f"The capital of land {i} is city {i}."} for i in range(4)]


@pytest.fixture
def own_run(run: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    text = (folder / "config.yaml").read_text(encoding="utf-8")
    (folder / "config.yaml").write_text(text.replace(f"output: {run}\n", f"output: {folder}\n"), encoding="utf-8")
    return folder


def lines(path: Path, *records: object) -> Path:
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records), encoding="utf-8")
    return path


def ask(world: Path) -> tuple[str, str, str]:
    return "answer", str(world / "config.yaml"), "What is the capital of Arland?"


# configurations and arguments


def test_errors_in_the_configuration(capsys: Capture, tmp_path: Path, world: Path) -> None:
    config = str(world / "config.yaml")
    for command in COMMANDS:
        more = ["why?", "--set"] if command == "answer" else []
        assert "unknown key 'train.stepz'" in refused(capsys, tmp_path, command, config, *more, "train.stepz=3")
        assert "train.steps is 'x'; expected a whole number" in refused(
            capsys, tmp_path, command, config, *more, "train.steps=x"
        )
        assert "no such configuration" in refused(capsys, tmp_path, command, str(tmp_path / "no"), *more, "seed=1")
    assert "decode.mode is 'magic'" in refused(capsys, tmp_path, *ask(world), "--set", "decode.mode=magic")


def test_overrides_may_stand_before_and_after_options(capsys: Capture, world: Path) -> None:
    given = "seed=3 --set train.num_docs=2 train.max_grad_norm=0.5 --set decode.num_docs=1".split()
    assert main(["config", str(world / "config.yaml"), *given]) == 0
    shown = capsys.readouterr().out
    assert all(line in shown for line in ("seed: 3\n", "  num_docs: 2\n", "  max_grad_norm: 0.5\n", "  num_docs: 1\n"))


def test_config_without_a_file_shows_all_defaults(capsys: Capture) -> None:
    assert main(["config"]) == 0
    shown = capsys.readouterr().out
    assert "output: ??? # The folder of the run.\n" in shown and "  steps: 1000 # Optimizer steps.\n" in shown
    assert main(["config", "--set", "train.num_docs=2"]) == 2
    assert "--set replaces values of a CONFIG" in capsys.readouterr().err


def test_config_prints_the_schema_that_the_ready_made_files_name(capsys: Capture) -> None:
    assert main(["config", "--schema"]) == 0
    kept = Path(__file__).parents[1] / "configs" / "schema.json"
    assert capsys.readouterr().out == kept.read_text(encoding="utf-8"), "ragjax config --schema > configs/schema.json"


@pytest.mark.parametrize("extra", [["--fast"], ["-x=3"], ["--json", "--no=1"]])
def test_unknown_options(capsys: Capture, world: Path, extra: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(world / "config.yaml"), *extra])
    assert stop.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


def test_an_unknown_mode_names_the_known_ones(capsys: Capture, world: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*ask(world), "--mode", "magic"])
    assert stop.value.code == 2
    assert "'magic'" in (err := capsys.readouterr().err) and "thorough" in err


@pytest.mark.parametrize(
    "command", [(), *((name,) for name in (*COMMANDS, "sweep", "compare"))], ids=lambda command: "".join(command)
)
def test_help_has_an_example(capsys: Capture, command: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert "example:\n  ragjax " in capsys.readouterr().out


# what CONFIG may be


def test_ready_made_configurations_have_names(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any folder; a file or a run of that name is nearer."""
    monkeypatch.chdir(tmp_path)
    assert main(["config", "--list"]) == 0
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert told.keys() == {path.stem for path in CONFIGS.glob("*.yaml")}
    assert told["tiny"].startswith("Random tiny models over part of the CIA World Factbook: ")
    assert all(line.endswith(".") for line in told.values())
    for name in told:
        assert main(["config", name]) == 0
        assert main(["config", str(CONFIGS / f"{name}.yaml")]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]
    (tmp_path / "tiny").mkdir()
    assert main(["config", "tiny", "seed=3"]) == 0
    for name in ("tiny/config.yaml", "factbook"):
        (tmp_path / name).write_text(
            "{output: mine, corpus: {source: x}, retriever: {source: x}, generator: {source: x}}"
        )
    capsys.readouterr()
    assert main(["config", "tiny"]) == main(["config", "factbook"]) == 0
    assert "output: tiny\n" in (shown := capsys.readouterr().out) and "output: mine\n" in shown
    assert "no such configuration file or run; the ready-made ones are factbook, " in refused(
        capsys, tmp_path, "config", "nope"
    )


def test_a_run_may_stand_where_a_configuration_does(capsys: Capture, own_run: Path) -> None:
    """Wherever it was moved; overrides are counted last."""
    moved = own_run.rename(own_run.parent / "a ${b} é")
    assert main(["config", str(moved), "decode.num_docs=1", "index.path=elsewhere"]) == 0
    shown = capsys.readouterr().out
    assert "path: elsewhere\n" in shown and "  num_docs: 1\n" in shown and "output: " in shown
    assert main(["answer", str(moved), "What is the capital of Arland?", "--json"]) == 0
    asked = capsys.readouterr()
    assert len(json.loads(asked.out)["documents"]) == 3 and "pretrained" not in asked.err
    assert "no run here (config.yaml is missing)" in refused(capsys, moved, "evaluate", str(moved / "checkpoints"))


def test_bash_completes_commands_and_configurations(capsys: Capture, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--print-completion", "bash"])
    assert stop.value.code == 0
    (tmp_path / "complete.sh").write_text(capsys.readouterr().out)
    (tmp_path / "factory.yaml").touch()
    for words, completed in (
        (["ind"], "index index-report"),
        (["train", "fact"], "factbook factbook_long factbook_warmup factory.yaml"),
        (["answer", "--mo"], "--mode"),
    ):
        script = f"source complete.sh; COMP_WORDS=(ragjax {' '.join(words)}); COMP_CWORD={len(words)}; _shtab_ragjax"
        command = ["bash", "-c", f'{script}; echo "${{COMPREPLY[@]}}"']
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert sorted(done.stdout.split()) == completed.split()


def test_the_module_runs(tmp_path: Path, world: Path) -> None:
    command = [sys.executable, "-m", "ragjax", "index", str(world / "config.yaml"), f"corpus.source={tmp_path / 'no'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ragjax: ") and done.stderr.count("\n") == 1


# the corpus


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "the corpus holds no passages"),
        ([PASSAGES[0], "{not json"], "corpus.jsonl:2: "),
        ([PASSAGES[0], {"id": "1", "title": "x"}], "corpus.jsonl:2: "),
        ([PASSAGES[0], {"id": "1", "title": "x", "text": " "}], "corpus.jsonl:2: "),
        ([*PASSAGES, PASSAGES[2]], "corpus.jsonl:5 have the same id '2'"),
    ],
    ids=["empty", "no JSON", "no text", "blank text", "twice the same id"],
)
def test_a_bad_corpus_leaves_no_index(
    capsys: Capture, tmp_path: Path, world: Path, records: list[object], message: str
) -> None:
    corpus = lines(tmp_path / "corpus.jsonl", *records)
    overrides = [f"corpus.source={corpus}", f"index.path={tmp_path / 'index'}"]
    assert message in refused(capsys, tmp_path, "index", str(world / "config.yaml"), *overrides)
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("corpus.source={tmp}/none.jsonl", "none.jsonl"),
        ("retriever.source={tmp}/none", "none"),
        ("generator.source={tmp}", "config.json"),
        ("index.kind=HNSW0x", "index.kind is 'HNSW0x', which FAISS does not accept"),
        ("retriever.max_passage_tokens=5000", "retriever.max_passage_tokens is 5000, but the model has 512 positions"),
        ("index.path={tmp}/a-file", "a-file: is a file"),
        ("index.path={tmp}/a-file/index", "cannot be created"),
    ],
)
def test_index_refuses(capsys: Capture, tmp_path: Path, world: Path, override: str, message: str) -> None:
    (tmp_path / "a-file").touch()
    settings = [f"index.path={tmp_path / 'index'}", override.replace("{tmp}", str(tmp_path))]
    assert message in refused(capsys, tmp_path, "index", str(world / "config.yaml"), *settings)


def test_a_disk_full_of_embeddings_leaves_the_old_index(
    capsys: Capture, tmp_path: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    shutil.copytree(world / "index", tmp_path / "index")
    corpus = lines(tmp_path / "corpus.jsonl", *PASSAGES)
    monkeypatch.setattr(os, "posix_fallocate", full)
    before, command = files(tmp_path), ["index", str(world / "config.yaml"), f"index.path={tmp_path / 'index'}"]
    assert main([*command, f"corpus.source={corpus}"]) == 2
    assert "the disk is full; the partial file was removed" in capsys.readouterr().err.splitlines()[-1]
    assert files(tmp_path) == before


def limited(size: int, command: list[str]) -> int:
    """As a full disk does, a limit on the size of files makes writing fail, for root too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        return main(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_full_of_text_leaves_no_index(capsys: Capture, tmp_path: Path, world: Path) -> None:
    command = ["index", str(world / "config.yaml"), f"index.path={tmp_path / 'index'}"]
    assert limited(1000, command) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# training and its questions


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("questions.train={tmp}/none.jsonl", "none.jsonl: no such file"),
        ("questions.train={tmp}/bad.jsonl", 'bad.jsonl:1: empty or missing "question"'),
        ("questions.train={tmp}/no.jsonl", "no.jsonl: holds no questions"),
        ("generator.max_answer_tokens=2", "every answer is longer than generator.max_answer_tokens=2"),
        ("train.num_docs=31", "k is 31 but the corpus has only 30 passages"),
        ("train.frozen_params=[retriever,reader]", "no parameters under 'reader'"),
        ("train.frozen_params=[retriever,generator]", "leaves nothing to train"),
        ("train.batch_size=13", "13 questions cannot be split over 2 devices"),
        ("seed=-1", "seed is -1"),
        ("retriever.pooling=cls", "the index was built by another encoder"),
        ("generator.passage_template='{text}'", "the index was built by another generator tokenizer"),
        ("index.path={tmp}/none", "the index does not exist; run: ragjax index CONFIG"),
        ("output={tmp}/bad.jsonl", "cannot be created"),
        ("output={tmp}/bad.jsonl/run", "cannot be created"),
    ],
)
def test_train_refuses(capsys: Capture, tmp_path: Path, world: Path, override: str, message: str) -> None:
    lines(tmp_path / "bad.jsonl", {"question": " ", "answer": ["x"]})
    lines(tmp_path / "no.jsonl")
    settings = [f"output={tmp_path / 'run'}", override.replace("{tmp}", str(tmp_path))]
    assert message in refused(capsys, tmp_path, "train", str(world / "config.yaml"), *settings)


def test_train_refuses_a_folder_with_another_experiment(capsys: Capture, own_run: Path) -> None:
    message = refused(
        capsys, own_run, "train", str(own_run / "config.yaml"), "train.batch_size=16", "decode.num_docs=2"
    )
    assert "train.batch_size was 8 and is 16" in message and "decode" not in message
    message = refused(capsys, own_run, "train", str(own_run / "config.yaml"), "train.steps=3")
    assert f"trained for {STEPS} steps already, and train.steps is 3; give {STEPS} or more" in message
    (own_run / "config.yaml").rename(own_run / "other.yaml")
    message = refused(capsys, own_run, "train", str(own_run / "other.yaml"))
    assert "has checkpoints but no config.yaml" in message


def cut(checkpoint: Path) -> None:
    largest = max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:1000])


def no_metadata(checkpoint: Path) -> None:
    for path in [*checkpoint.rglob("_METADATA"), *checkpoint.rglob("_CHECKPOINT_METADATA")]:
        path.unlink()


def emptied(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


@pytest.mark.parametrize("command", ["train", "evaluate", "answer"])
@pytest.mark.parametrize("damage", [cut, no_metadata, emptied])
def test_an_incomplete_checkpoint(capsys: Capture, own_run: Path, command: str, damage: Callable[[Path], None]) -> None:
    damage(own_run / "checkpoints" / str(STEPS))
    question = ["why?", "--set"] if command == "answer" else []
    message = refused(capsys, own_run, command, str(own_run / "config.yaml"), *question, "seed=0")
    assert f"checkpoints/{STEPS}: the checkpoint is incomplete or damaged" in message
    assert f"no other can be read: delete {own_run}/checkpoints to start anew" in message


def test_a_checkpoint_that_does_not_fit_on_the_disk(capsys: Capture, tmp_path: Path, world: Path, run: Path) -> None:
    command = ["train", str(run / "config.yaml"), f"output={tmp_path / 'run'}", "train.save_every=1"]
    assert limited(50_000, command) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("ragjax: ") and "checkpoints/1: the checkpoint could not be written" in last
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_full_disk_elsewhere(capsys: Capture, monkeypatch: pytest.MonkeyPatch, world: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x/train.jsonl")

    monkeypatch.setattr("ragjax.commands.train.load_artifacts", full)
    assert main(["train", str(world / "config.yaml"), "output=runs/none"]) == 2
    assert capsys.readouterr().err == "ragjax: runs/x/train.jsonl: the disk is full; free some space\n"


# evaluating and answering


@pytest.mark.parametrize("command", ["evaluate", "answer"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("decode.num_docs=31", "k is 31 but the corpus has only 30 passages"),
        ("retriever.normalize=false", "the index was built by another encoder"),
        ("index.path={tmp}/none", "the index does not exist"),
    ],
)
def test_evaluate_and_answer_refuse(
    capsys: Capture, tmp_path: Path, world: Path, command: str, override: str, message: str
) -> None:
    question = ["why?", "--set"] if command == "answer" else []
    override = override.replace("{tmp}", str(tmp_path))
    assert message in refused(capsys, tmp_path, command, str(world / "config.yaml"), *question, override)


def test_evaluate_refuses_missing_questions_and_a_file_as_output(capsys: Capture, tmp_path: Path, world: Path) -> None:
    config = str(world / "config.yaml")
    no_questions = f"questions.test={tmp_path / 'none.jsonl'}"
    assert "none.jsonl: no such file" in refused(capsys, tmp_path, "evaluate", config, no_questions)
    (tmp_path / "run").touch()
    message = refused(capsys, tmp_path, "evaluate", config, f"output={tmp_path / 'run'}")
    assert "cannot be created" in message


@pytest.mark.parametrize("command", ["evaluate", "index-report"])
@pytest.mark.parametrize(
    ("output", "message"), [("/proc/ragjax", "/proc/ragjax: cannot be created"), ("/proc", "/proc: cannot be written")]
)
def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    capsys: Capture,
    tmp_path: Path,
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    output: str,
    message: str,
) -> None:
    module = command.replace("-", "_")
    monkeypatch.setattr(f"ragjax.commands.{module}.load_artifacts", lambda config: pytest.fail("models are opened"))
    assert message in refused(capsys, tmp_path, command, str(world / "config.yaml"), f"output={output}")


@pytest.mark.parametrize("command", ["train", "evaluate", "index-report"])
def test_a_bad_question_is_refused_on_request(capsys: Capture, tmp_path: Path, world: Path, command: str) -> None:
    """By its line; what does not fit into a prompt is known once the tokenizers are."""
    good = {"question": "Where?", "answer": ["there"]}
    bad = lines(tmp_path / "bad.jsonl", good, {"question": "Where?", "answer": []})
    settings = ["questions.strict=true", f"output={tmp_path / 'run'}"]
    settings += [f"questions.{split}={bad}" for split in ("train", "test")]
    message = refused(capsys, tmp_path, command, str(world / "config.yaml"), *settings)
    assert f'{bad}:2: empty or missing "answers"' in message and "questions.strict=false" in message
    if command != "index-report":
        lines(bad, good, {"question": "long " * 60, "answer": ["x"]})
        message = refused(capsys, tmp_path, command, str(world / "config.yaml"), *settings)
        assert f"{bad}:2: a prompt needs" in message and "generator.max_prompt_tokens is 128" in message


@pytest.mark.parametrize("command", ["evaluate", "answer"])
def test_a_checkpoint_of_other_settings(capsys: Capture, own_run: Path, command: str) -> None:
    question = ["why?", "--set"] if command == "answer" else []
    message = refused(capsys, own_run, command, str(own_run / "config.yaml"), *question, "retriever.logit_scale=5")
    assert "trained with other settings: retriever.logit_scale was 10.0 and is 5.0" in message


def test_a_question_that_is_no_text(capsys: Capture, tmp_path: Path, world: Path) -> None:
    assert r"'\udcff' is not Unicode text" in refused(
        capsys, tmp_path, "answer", str(world / "config.yaml"), "\udcff", "--set", f"output={tmp_path / 'none'}"
    )


@pytest.mark.parametrize("questions", [[""], [" ", "\t"]])
def test_an_empty_question(capsys: Capture, tmp_path: Path, world: Path, questions: list[str]) -> None:
    assert "an empty question" in refused(capsys, tmp_path, "answer", str(world / "config.yaml"), *questions)


def test_the_corpus_prior_is_refused_with_an_approximate_index(capsys: Capture, tmp_path: Path, world: Path) -> None:
    config, folder = str(world / "config.yaml"), f"index.path={tmp_path / 'index'}"
    assert main(["index", config, folder, "index.kind=Flat"]) == 0
    message = refused(capsys, tmp_path, "train", config, folder, "retriever.prior=corpus", f"output={tmp_path / 'run'}")
    assert "the index was built by another kind: Flat" in message


def test_a_gzipped_corpus_smaller_than_five_passages_is_evaluated(capsys: Capture, tmp_path: Path, world: Path) -> None:
    corpus = tmp_path / "corpus.jsonl.gz"
    corpus.write_bytes(gzip.compress("".join(json.dumps(p) + "\n" for p in PASSAGES).encode()))
    write_jsonl(tmp_path / "test.jsonl", [{"question": "What is the capital of land 2?", "answer": ["city 2"]}])
    settings = [f"output={tmp_path / 'run'}", f"index.path={tmp_path / 'index'}", f"corpus.source={corpus}"]
    assert main(["index", str(world / "config.yaml"), *settings]) == 0
    capsys.readouterr()
    settings += [f"questions.test={tmp_path / 'test.jsonl'}", "evaluate.closed_book=false"]
    assert main(["evaluate", str(world / "config.yaml"), "--json", *settings]) == 0
    [measured] = json.loads(capsys.readouterr().out)["models"].values()
    assert measured["recall@5"] == 1


@pytest.mark.parametrize("arguments", [["config", "tiny"], ["config", "--schema"], ["--help"]])
def test_a_reader_that_has_seen_enough(arguments: list[str]) -> None:
    """As `| head`: no word on standard error, and no error code."""
    command = [sys.executable, "-m", "ragjax", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stderr is not None
        child.stdout.close()
        assert (child.stderr.read(), child.wait()) == ("", 0)
