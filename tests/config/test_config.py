"""The configuration: defaults, overrides, and a clear word about everything that is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from omegaconf import OmegaConf
from pydantic import ValidationError

from ragjax.config import (
    Config,
    Mesh,
    Retriever,
    Train,
    default_config,
    dump_config,
    get_key,
    load_config,
    reference,
    schema,
)
from ragjax.errors import InputError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
SMALLEST = """\
output: runs/x
corpus: {source: passages.jsonl}
retriever: {source: some/encoder}
generator: {source: some/decoder}
"""


def sections_of(model: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """A section and those in it, each with its key."""
    yield name, model
    for key, field in model.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            yield from sections_of(field.annotation, f"{name}.{key}".strip("."))


SECTIONS: dict[str, Any] = dict(sections_of(Config))
EVERY = [f"{name}.{key}".strip(".") for name, section in SECTIONS.items() for key in section.model_fields]
KEYS = [key for key in EVERY if key not in SECTIONS]


def written(folder: Path, more: str = "", text: str = SMALLEST) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(text + more, encoding="utf-8")
    return path


def test_what_is_not_given_has_its_default(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, "train: {num_docs: 7}\n"))
    assert (config.train.num_docs, config.train.batch_size, config.decode.mode) == (7, 8, "thorough")
    assert config.retriever == Retriever(source="some/encoder")


def test_paths_follow_the_output_folder(tmp_path: Path) -> None:
    config = load_config(written(tmp_path), ["output=elsewhere"])
    assert config.index.path == "elsewhere/index"
    assert config.questions.dev == "elsewhere/index/questions/dev.jsonl"
    assert load_config(written(tmp_path), ["index.path=shared"]).questions.test == "shared/questions/test.jsonl"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configurations_load_and_come_back_equal(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["train.retriever_lr=1e-5", "generator.prompt_template=chat"])
    assert config.train.retriever_lr == 1e-5
    assert load_config(written(tmp_path, text=dump_config(config))) == config


def test_there_are_shipped_configurations() -> None:
    assert {"factbook.yaml", "tiny.yaml"} <= {path.name for path in CONFIGS}


def test_overrides_win_and_the_last_of_them_most(tmp_path: Path) -> None:
    config = load_config(
        written(tmp_path, "train: {steps: 5}\n"),
        [
            "train.steps=6",
            "train.steps=7",
            "train.frozen_params=[retriever,generator.embed]",
            "evaluate.max_questions=null",
        ],
    )
    assert (config.train.steps, config.train.frozen_params) == (7, ("retriever", "generator.embed"))
    assert config.evaluate.max_questions is None
    assert get_key(config, "train.steps") == 7


def test_a_configuration_cannot_be_changed(tmp_path: Path) -> None:
    config = load_config(written(tmp_path))
    with pytest.raises(ValidationError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", "unknown key 'train.stepz'; did you mean train.steps?"),
        ("trian.steps=3", "unknown key 'trian'; did you mean train?"),
        ("num_beams=3", "unknown key 'num_beams'; did you mean decode.num_beams?"),
        ("train.lr=1", "unknown key 'train.lr'; did you mean train.retriever_lr or train.generator_lr"),
        ("decode.beams=3", "unknown key 'decode.beams'; it is now decode.num_beams"),
        ("corpus.categories=[Geography]", "unknown key 'corpus.categories'; it is now corpus.factbook.categories"),
        ("mesh.quux=3", "unknown key 'mesh.quux'; known here: model, fsdp"),
        ("=3", "unknown key ''; known here: output, model, hf_compatible, seed"),
        ("train.steps=many", "train.steps is 'many'; expected a whole number"),
        ("train.steps='7'", "train.steps is '7'; expected a whole number"),
        ("train.steps=7.0", "train.steps is 7.0; expected a whole number"),
        ("train.steps=true", "train.steps is true; expected a whole number"),
        ("train.steps=", "train.steps is null; expected a whole number"),
        ("train.steps.more=3", "train.steps is {'more': 3}; expected a whole number"),
        ("train.remat=maybe", "train.remat is 'maybe'; expected true or false"),
        ("train.remat='yes'", "train.remat is 'yes'; expected true or false"),
        ("train.remat=1", "train.remat is 1; expected true or false"),
        ("train.max_grad_norm=[1]", "train.max_grad_norm is [1]; expected a number"),
        ("train.max_grad_norm=.nan", "train.max_grad_norm is nan; expected a finite number"),
        ("train.generator_lr=.inf", "train.generator_lr is inf; expected a finite number"),
        ("retriever.logit_scale=1e999", "retriever.logit_scale is inf; expected a finite number"),
        ("decode.length_penalty=-.inf", "decode.length_penalty is -inf; expected a finite number"),
        ("train=5", "train is 5; expected a section of keys: steps, batch_size"),
        ("train=", "train is null; expected a section of keys: steps, batch_size"),
        ("train=[1]", "train is [1]; expected a section of keys: steps"),
        ("train.frozen_params[0]=a", "train.frozen_params is {'0': 'a'}; expected a list"),
        ("train.frozen_params=a", "train.frozen_params is 'a'; expected a list"),
        ("train.frozen_params=[[a]]", "train.frozen_params[0] is ['a']; expected a text"),
        ("train.frozen_params=[a, '']", "train.frozen_params[1] is ''; expected a text that is not empty"),
        ("corpus.factbook.categories=[{a: 1}]", "corpus.factbook.categories[0] is {'a': 1}; expected a text"),
        ("output=''", "output is ''; expected a text that is not empty"),
        ("output=2026", "output is 2026; expected a text (in quotes where it looks like something else)"),
        ("train.steps", "'train.steps': an override is written key=value"),
        ("output=[a", "'output=[a': not readable as YAML"),
        ("[=3", "'[=3': not readable as YAML"),
        ("train.steps=0", "train.steps is 0; expected more than 0"),
        ("train.warmup_steps=-1", "train.warmup_steps is -1; expected 0 or more"),
        ("train.dropout=1", "train.dropout is 1; expected less than 1"),
        ("train.label_smoothing=1.0", "train.label_smoothing is 1.0; expected less than 1"),
        ("index.recall_target=1.5", "index.recall_target is 1.5; expected at most 1"),
        ("refresh.min_overlap=0", "refresh.min_overlap is 0; expected more than 0"),
        ("train.gradient_accumulation=3", "train.batch_size 8 is not divisible by train.gradient_accumulation 3"),
        ("dtype=float64", "dtype is 'float64'; expected one of float32, bfloat16"),
        ("corpus.format=csv", "corpus.format is 'csv'; expected one of auto, jsonl, dpr, factbook"),
        ("corpus.overlap_words=5", "corpus.overlap_words is for documents that are cut; set corpus.split_words, too"),
        (
            "corpus={source: c, split_words: 5, overlap_words: 5}",
            "corpus.overlap_words=5 must be smaller than corpus.spl",
        ),
        ("corpus.columns.text=[a]", "corpus.columns.text is "),
        ("corpus.columns.body=a", "unknown key 'corpus.columns.body'; known here: id, title, text"),
        ("decode.start_beams=9", "decode.start_beams must be at most decode.max_beams"),
        ("decode.prove=corpus", "decode.prove=corpus needs retriever.prior=corpus"),
        ("decode.mode=slow", "decode.mode is 'slow'; expected one of exact, thorough, certified, fast"),
        ("evaluate.modes=[slow]", "evaluate.modes[0] is 'slow'; expected one of exact, thorough, certified, fast"),
        ("evaluate.modes=[]", "evaluate.modes must name a mode, and each once"),
        ("evaluate.modes=[fast,fast]", "evaluate.modes must name a mode, and each once"),
        ("model=rag_words", "model is 'rag_words'; expected one of rag_sequence, rag_token"),
        ("decode.min_new_tokens=16", "decode.min_new_tokens must be smaller"),
        (
            "generator.prompt_template='{passage} only'",
            "generator.prompt_template must contain {question} once (or be the word chat)",
        ),
        (
            "generator.prompt_template='{passage}{passage}{question}'",
            "generator.prompt_template must contain {passage} once",
        ),
        (
            "generator.prompt_template='{passage} {question} {nope}'",
            "generator.prompt_template has the unknown slot {nope} (known are {passage}, {question})",
        ),
        ("generator.answer_template=chat", "generator.answer_template must contain {answer}"),
        (
            "generator.answer_template='{answer} {title}'",
            "generator.answer_template has the unknown slot {title} (known are {answer})",
        ),
        (
            "retriever.passage_template='{title}: {txt}'",
            "retriever.passage_template must contain {text} and has the unknown slot {txt} (known are {text}, {title})",
        ),
        ("generator.passage_template=nothing", "generator.passage_template must contain {text}"),
        ("index.path=${nowhere}", "index.path: Interpolation key 'nowhere' not found"),
        ("output=${index.path}", "output: Recursive interpolation detected"),
        ("train.steps=${output}", "train.steps is 'runs/x'; expected a whole number"),
        ("train=${train}", "train: Recursive interpolation detected"),
        ("output=${", "output"),
        ("seed=99999999999999999999", "seed is 99999999999999999999; expected at most 4294967295"),
        ("train.steps=2147483648", "train.steps is 2147483648; expected at most 2147483647"),
        (f"train.steps=0x{'f' * 5000}", "train.steps is a number of thousands of digits; expected at most 2147483647"),
        (f"train.max_grad_norm=1{'0' * 400}", "expected a number"),
        ("output=\ud800", "output"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, override: str, message: str) -> None:
    path = written(tmp_path)
    with pytest.raises(InputError, match=re.escape(message)) as refusal:
        load_config(path, [override])
    assert "\n" not in str(refusal.value)
    assert override == "train.steps" or str(refusal.value).startswith(str(path))


def test_several_impossible_values_are_told_together(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.num_docs is 0.*decode\.num_beams is -2"):
        load_config(written(tmp_path), ["train.num_docs=0", "decode.num_beams=-2"])


def test_the_corpus_prior_needs_an_exact_index(tmp_path: Path) -> None:
    assert load_config(written(tmp_path), ["retriever.prior=corpus"]).retriever.prior == "corpus"
    with pytest.raises(InputError, match=r"retriever\.prior=corpus needs every score, which index\.kind=HNSW32"):
        load_config(written(tmp_path), ["retriever.prior=corpus", "index.kind=HNSW32"])


def test_everything_that_must_be_given_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must be given") as refusal:
        load_config(written(tmp_path, text="seed: 3\n"))
    assert all(key in str(refusal.value) for key in ("corpus.source", "generator.source", "output", "retriever.source"))


def test_a_yaml_error_tells_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, "train: {steps: 3\nseed: 1\n")
    with pytest.raises(InputError, match=rf"{re.escape(str(path))}: not readable as YAML: .*line [56]"):
        load_config(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml: no such configuration file"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "corpus.source, generator.source, output, retriever.source must be given"),
        ("- output\n", "holds a list; expected keys with values"),
        ("3\n", "not readable as YAML"),
        ("hello\n", "unknown key 'hello'"),
        (SMALLEST + "output: twice\n", "duplicate key output"),
        (SMALLEST + "1: 2\n", "unknown key"),
        (SMALLEST + "train: {a b: 2}\n", "unknown key 'train.a b'"),
        (SMALLEST + "mesh: !!set {a}\n", "mesh"),
        (SMALLEST + "seed: !!binary aGVsbG8=\n", "seed is b'hello'; expected a whole number"),
        (SMALLEST + "train:\n", "train is null; expected a section"),
        (SMALLEST + "train: {steps: '???'}\n", "train.steps must be given"),
        (SMALLEST + "train: ${nope}\n", "train: Interpolation key 'nope' not found"),
        (SMALLEST + "mesh: {a: '${mesh}'}\n", "mesh.a: Interpolation to parent node detected"),
        (SMALLEST + "a: {b: '${c}', d: '${c}'}\nc: {e: '${a}', f: '${a}'}\n", "unknown key 'a'; known here"),
        (SMALLEST + "a\nb: 3\n", "not readable as YAML"),
        ("a: [" * 5000, "not readable as YAML"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text=text)
    with pytest.raises(InputError, match=re.escape(message)) as refusal:
        load_config(path)
    assert str(refusal.value).startswith(f"{path}: ") and "\n" not in str(refusal.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"output: \xff\xfe\n")
    with pytest.raises(InputError, match=r"config\.yaml: not readable as YAML"):
        load_config(path)


def test_the_override_that_is_wrong_is_named(tmp_path: Path) -> None:
    path = written(tmp_path)
    with pytest.raises(InputError) as refusal:
        load_config(path, ["train.steps=0", "train.batch_size=8"])
    assert str(refusal.value) == f"{path} with 'train.steps=0': train.steps is 0; expected more than 0"


def test_fields_are_told_before_what_does_not_go_together(tmp_path: Path) -> None:
    path, together = written(tmp_path), ["train.gradient_accumulation=3", "retriever.prior=corpus", "index.kind=HNSW32"]
    with pytest.raises(InputError) as refusal:
        load_config(path, together)
    where, _, told = str(refusal.value).partition(": ")
    assert where == f"{path} with {', '.join(map(repr, together))}"
    first, second = told.split("; ", 1)
    assert first.startswith("train.batch_size 8") and second.startswith("retriever.prior=corpus needs every score")
    with pytest.raises(InputError, match=r": train\.num_docs is 0; expected more than 0$"):
        load_config(path, [*together, "train.num_docs=0"])


def test_missing_keys_and_wrong_values_are_told_together(tmp_path: Path) -> None:
    with pytest.raises(InputError) as refusal:
        load_config(written(tmp_path, text="train: {steps: no}\nseed: -1\nindex: {kind: '${nope}'}\n"))
    _, missing, *wrong = re.split("experiment.yaml: |; (?!expected)", str(refusal.value))
    assert missing == "corpus.source, generator.source, output, retriever.source must be given"
    assert wrong == [
        "seed is -1; expected 0 or more",
        "train.steps is false; expected a whole number",
        "index.kind: Interpolation key 'nope' not found",
    ]


def test_a_whole_number_is_a_number_too(tmp_path: Path) -> None:
    config = load_config(written(tmp_path), ["train.max_grad_norm=1", "decode.length_penalty=-2"])
    assert (type(config.train.max_grad_norm), config.train.max_grad_norm, config.decode.length_penalty) == (
        float,
        1.0,
        -2.0,
    )


def test_an_override_of_a_section_changes_only_its_keys(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, "train: {num_docs: 7, steps: 3}\n"), ["train={steps: 4}"])
    assert (config.train.num_docs, config.train.steps) == (7, 4)


def test_sections_are_compared_and_hashed_by_value() -> None:
    one, other = Train(frozen_params=("retriever",), max_grad_norm=1), Train(frozen_params=("retriever",))
    assert one == other and hash(one) == hash(other) and one != Train()
    assert len({Mesh(), Mesh(model=1), Mesh(model=2)}) == 2


def test_replace_checks_what_it_replaces(tmp_path: Path) -> None:
    config = load_config(written(tmp_path))
    changed = config.replace(seed=7, train=config.train.replace(frozen_params=["generator"]))
    assert (changed.seed, changed.train.frozen_params, changed.decode) == (7, ("generator",), config.decode)
    assert (config.seed, config.train.frozen_params) == (0, ())
    with pytest.raises(
        InputError, match=r"^Train: steps is 0; expected more than 0; unknown key 'stepz'; did you mean"
    ):
        config.train.replace(steps=0, stepz=1)
    with pytest.raises(
        InputError, match=r"^Config: train\.batch_size 8 is not divisible by train\.gradient_accumulation 3$"
    ):
        config.replace(train=config.train.replace(gradient_accumulation=3))
    with pytest.raises(InputError, match=r"^Config: output is ''; expected a text that is not empty$"):
        config.replace(output="")


def test_the_defaults_are_a_configuration_but_for_what_must_be_given(tmp_path: Path) -> None:
    given = ["output=runs/x", "corpus.source=a", "retriever.source=b", "generator.source=c"]
    text = default_config()
    assert text.count("???") == len(given)
    minimal = load_config(written(tmp_path, text="{}\n"), given)
    assert load_config(written(tmp_path, text=text), given) == minimal


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1) | st.from_regex(r"\A[\\${}a?'\" ]+\Z")
TEXTS = TEXTS.filter(lambda text: text != "???")


@settings(deadline=None, max_examples=40)
@given(TEXTS, st.lists(TEXTS), st.floats(1e-300, 1e300))
def test_what_is_dumped_is_read_back(folder: Path, text: str, texts: list[str], number: float) -> None:
    config = load_config(written(folder))
    train = config.train.replace(frozen_params=texts, max_grad_norm=number)
    config = config.replace(output=text, train=train, corpus=config.corpus.replace(source=text + "/x"))
    assert load_config(written(folder, text=dump_config(config))) == config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configurations")


WORDS = st.sampled_from([*KEYS, *SECTIONS, *"??? ${output} ${train.steps} ${ ${a:b} a.b {nope} [ 1e9".split(), ""])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | WORDS
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | SCALARS, inner, max_size=3),
    max_leaves=8,
)
OVERRIDES = st.tuples(st.sampled_from(KEYS) | WORDS | TEXTS, VALUES | TEXTS).map(lambda pair: f"{pair[0]}={pair[1]}")


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(KEYS) | st.sampled_from(list(SECTIONS)) | TEXTS, VALUES, max_size=3),
    st.lists(OVERRIDES, max_size=3),
    st.sampled_from([SMALLEST, ""]),
)
def test_nothing_but_input_errors_leaves_the_reader(
    folder: Path, values: dict[str, Any], overrides: list[str], start: str
) -> None:
    tree: dict[str, Any] = yaml.safe_load(start) or {}
    for key, value in values.items():
        *section, name = key.split(".")
        at = tree
        for part in section:
            at = inner if isinstance(inner := at.setdefault(part, {}), dict) else {}
        at[name] = value
    check_reading(written(folder, text=yaml.safe_dump(tree, allow_unicode=True)), overrides)


@settings(deadline=None)
@given(st.text(), st.sampled_from([SMALLEST, ""]))
def test_nothing_but_input_errors_leaves_the_reader_of_any_text(folder: Path, text: str, start: str) -> None:
    path = folder / "experiment.yaml"
    path.write_bytes((start + text).encode(errors="surrogatepass"))
    check_reading(path, [])


def check_reading(path: Path, overrides: list[str]) -> None:
    try:
        config = load_config(path, overrides)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) > len(str(path)) + 2
    else:
        assert load_config(written(path.parent, text=dump_config(config))) == config


def test_no_key_lacks_a_description() -> None:
    for at, section in SECTIONS.items():
        assert section.__doc__ and section.__doc__.splitlines()[0].endswith(".")
        for name, key in section.model_fields.items():
            assert f"{at}.{name}".strip(".") in SECTIONS or re.fullmatch(r"[A-Z].+\.", key.description or ""), name


def test_every_key_is_on_the_reference_page() -> None:
    page = reference()
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    assert list(rows) == KEYS
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows.values())
    assert rows["decode.mode"].startswith('| `decode.mode` | `exact`, `thorough`, `certified`, `fast` | `"thorough"` |')
    assert rows["train.dropout"].startswith("| `train.dropout` | number, ≥ 0, < 1 | `0.0` |")
    assert rows["corpus.max_passages"].startswith("| `corpus.max_passages` | whole number, > 0 or null | `null` |")
    assert rows["output"].startswith("| `output` | text | must be given |")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configurations_name_the_schema_and_fulfil_it(path: Path) -> None:
    assert path.read_text(encoding="utf-8").splitlines()[0] == "# yaml-language-server: $schema=./schema.json"
    Draft202012Validator.check_schema(schema())
    Draft202012Validator(schema()).validate(OmegaConf.to_container(OmegaConf.load(path)))


def test_the_schema_refuses_what_the_reader_refuses() -> None:
    validator, smallest = Draft202012Validator(schema()), yaml.safe_load(SMALLEST)
    assert validator.is_valid(smallest)
    refused: list[dict[str, Any]] = [{"trian": {}}, {"train": {"stepz": 1}}, {"train": {"steps": 0}}]
    for wrong in (*refused, {"seed": "1"}, {"dtype": "float64"}):
        assert not validator.is_valid(smallest | wrong)
    assert not validator.is_valid({key: value for key, value in smallest.items() if key != "output"})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["train.gradient_error_every=10"],
            r"train\.gradient_error_every measures what train\.backprop_docs leaves out",
        ),
        (["model=rag_token", "train.backprop_docs=1"], r"train\.backprop_docs is for model=rag_sequence"),
        (["model=rag_token", "train.exclude_bos=true"], r"train\.exclude_bos is for model=rag_sequence"),
        (["model=rag_token", "retriever.prior=corpus"], r"retriever\.prior=corpus is for model=rag_sequence"),
        (["model=rag_token", "decode.mode=fast"], r"decode\.mode=fast is for model=rag_sequence"),
        (["model=rag_token", "evaluate.modes=[exact,fast]"], r"evaluate\.modes=fast is for model=rag_sequence"),
        (
            ["evaluate.modes=[exact]", "decode.length_penalty=1"],
            r"evaluate\.modes=exact needs decode\.length_penalty=0",
        ),
        (["hf_compatible=true", "decode.mode=fast"], r"decode\.mode=fast is for .*hf_compatible=false"),
        (["hf_compatible=true", "retriever.prior=corpus"], r"hf_compatible=true normalises over the top k"),
    ],
    ids=str,
)
def test_what_does_not_go_together(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(written(tmp_path), overrides)
