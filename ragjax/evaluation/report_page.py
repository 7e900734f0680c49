"""The report of one run, or of two side by side: what `pages/templates/report.html` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from ragjax.evaluation.comparison import compare
from ragjax.evaluation.metrics_table import MODES, metric_rows
from ragjax.evaluation.report_charts import quality_charts, training_curves
from ragjax.evaluation.run_results import Prediction, RunResults, answer_json
from ragjax.pages.four_stages import LOW, stages
from ragjax.pages.rendering import page, render
from ragjax.pages.wording import shortened

LARGEST = 1_900_000  # bytes of the whole page: what does not fit is left out, and told
LONGEST_PASSAGE = 600  # characters that are shown of a passage
LABELS = {"gold_nll": "−log p(gold answer)", "calibration_error": "calibration error"}
FILTERS = (
    ("wrong", "wrong"),
    ("differ", "modes differ"),
    ("missed", "right passage not retrieved"),
    ("low", "low probability"),
)


def report_page(runs: Sequence[RunResults]) -> str:
    """The HTML of the report of one run or of two, the second of which is compared with the first."""
    title = " and ".join(run.name for run in runs)
    names = [run.name for run in runs]
    about: dict[str, Any] = {
        "title": title,
        "names": names,
        "heads": [{"name": run.name, "about": _about(run), "figures": _figures(run)} for run in runs],
        "comparison": _comparison(*runs) if len(runs) == 2 else None,
        "curves": training_curves(runs),
        "metrics": _metrics(runs),
        "quality": quality_charts(runs),
        "modes": [table for run in runs if (table := _modes(run))],
        "footer": "; ".join(_footer(run) for run in runs),
    }
    room = LARGEST - len(_page(title, about | {"browse": _browse(runs, [])}).encode())
    return _page(title, about | {"browse": _browse(runs, _rows(runs), room)})


def _page(title: str, values: dict[str, Any]) -> str:
    return page(f"{title} – ragjax report", render("report.html", r=values), ("report.js",))


def _about(run: RunResults) -> str:
    """What was measured, in a line."""
    metrics, decode = run.metrics, run.config.decode.model_dump() | run.metrics["decode"]
    measured, step = metrics["models"][run.model], metrics["models"][run.model]["step"]
    trained = "the pretrained models" if step is None else f"step {step} of {run.config.train.steps}"
    documents, beams = (f"{n} {word}{'' if n == 1 else 's'}" for n, word in _searched(decode))
    documents += f", {words} of BM25" if (words := metrics.get("bm25_docs")) else ""
    return (
        f"{run.config.model}, {trained}; {measured['answered']} of {measured['questions']} {metrics['split']} "
        f"questions answered with {documents} and {beams}"
    )


def _searched(decode: dict[str, Any]) -> list[tuple[int, str]]:
    return [(decode["num_docs"], "document"), (decode["num_beams"], "beam")]


def _footer(run: RunResults) -> str:
    of = run.config
    return f"{of.output}: {of.retriever.source} over {of.corpus.source}, {of.generator.source}, seed {of.seed}"


def _figures(run: RunResults) -> list[dict[str, Any]]:
    """The few that one looks at first."""
    models = run.metrics["models"]
    now, before = models[run.model], models.get("untrained", {}) if run.model != "untrained" else {}
    figures = []
    for mode in run.modes[:1]:
        score, old = now[mode], before.get(mode, {}).get("exact_match")
        label = f"exact match, {mode.replace('_', ' ')}"
        figures.append(_figure(label, score["exact_match"], old, score["exact_match_interval"]))
    recall = f"recall@{run.metrics['decode'].get('num_docs')}"
    for key in (*([recall] if recall in now else []), "gold_nll", "calibration_error"):
        figures.append(_figure(LABELS.get(key, key), now[key], before.get(key)))
    return [figure for figure in figures if figure["value"] is not None]


def _figure(label: str, value: float | None, before: float | None, interval: Any = None) -> dict[str, Any]:
    return {"label": label, "value": value, "before": before, "interval": interval}


def _metrics(runs: Sequence[RunResults]) -> dict[str, Any]:
    columns = [(run, name, model) for run in runs for name, model in run.metrics["models"].items()]
    heads = [
        (f"{run.name}, " if len(runs) > 1 else "") + name + ("" if model["step"] is None else f", step {model['step']}")
        for run, name, model in columns
    ]
    paths = [(f"{i}." if len(runs) > 1 else "") + name for i, run in enumerate(runs) for name in run.metrics["models"]]
    return {
        "head": " and ".join(dict.fromkeys(f"{run.metrics['split']} questions" for run in runs)),
        "columns": heads,
        "models": paths,
        "rows": metric_rows([model for _, _, model in columns]),
    }


def _modes(run: RunResults) -> dict[str, Any] | None:
    """Thorough beside fast beside exact, as far as they were measured."""
    measured = run.metrics["models"][run.model]
    rows = [
        {
            "name": mode.replace("_", " "),
            "exact_match": (of := measured[mode])["exact_match"],
            "interval": of["exact_match_interval"],
            "f1": of["f1"],
            "proved": (of.get("proved") or {}).get("top_k"),
            "seconds": of.get("seconds_per_question"),
        }
        for mode in MODES
        if mode in measured
    ]
    differ = []
    for key, of in measured.items():
        if key.endswith("_differ") and isinstance(of, dict):
            pair = key.removesuffix("_differ").split("_and_")
            right = " and ".join(f"{mode} is right on {of.get(f'{mode}_right', 0)}" for mode in pair)
            count = of.get("questions", 0)
            difference = f"differ on {count} questions; {right} of them" if count else "agree everywhere"
            differ.append(f"{' and '.join(pair).capitalize()} {difference}.")
    return {"name": run.name, "rows": rows, "differ": differ} if len(rows) > 1 else None


def _comparison(ours: RunResults, theirs: RunResults) -> dict[str, Any]:
    """Tests of the difference over the questions that both answered, which may be none."""
    found = compare([ours], [theirs])
    rows = [(of.measure, of.difference) for of in found.measures]
    return {"questions": found.questions, "rows": rows, "warnings": found.warnings}


def _rows(runs: Sequence[RunResults]) -> list[list[tuple[RunResults, Prediction]]]:
    """The questions of the first run, each with what every run that has it answered; then those of the second alone."""
    by_question: dict[str, list[tuple[RunResults, Prediction]]] = {}
    for run in runs:
        for of in run.predictions[run.model]:
            by_question.setdefault(of.key, []).append((run, of))
    return list(by_question.values())


def _flags(row: Sequence[tuple[RunResults, Prediction]]) -> list[str]:
    holds = {
        "wrong": any(not of.right for _, of in row),
        "differ": any(of.differs for _, of in row),
        "missed": any(of.documents and not of.retrieved for _, of in row),
        "low": any(of.p_answer < LOW for _, of in row),
        "runs": len({of.answer for _, of in row}) > 1,
    }
    return [name for name, holding in holds.items() if holding]


def _browse(runs: Sequence[RunResults], rows: Sequence[Any], room: int = 0) -> dict[str, Any]:
    """The list of predictions, as many as there is room for: first those with something to look at."""
    filters = FILTERS + ((("runs", "runs differ"),) if len(runs) > 1 else ())
    by_interest = sorted(range(len(rows)), key=lambda i: -len(_flags(rows[i])))
    drawn: dict[int, dict[str, Any]] = {}
    for i in by_interest:
        made = _prediction(rows[i], dict(filters), level=4 if len(runs) > 1 else 3)
        room -= len(render("prediction.html", p=made, names=[run.name for run in runs]).encode())
        if room < 0:
            break
        drawn[i] = made
    answers = [drawn[i] for i in sorted(drawn)]
    left_out = len(rows) - len(answers)
    about = "Open a question to see the four stages of its answer."
    if left_out:
        about += f" {left_out} of {len(rows)} are left out of this page, those with the least to look at."
    return {
        "about": about,
        "filters": [
            {"name": name, "label": label, "count": sum(name in of["flags"] for of in answers)}
            for name, label in filters
        ],
        "predictions": answers,
    }


def _prediction(row: Sequence[tuple[RunResults, Prediction]], labels: dict[str, str], level: int) -> dict[str, Any]:
    flags = _flags(row)
    return {
        "question": row[0][1].question,
        "flags": flags,
        "notes": [labels[name] for name in flags if name in labels and name != "wrong"],
        "answers": [
            {
                "run": run.name,
                "text": shortened(of.answer, 200),
                "right": of.right,
                "p": of.p_answer,
                "modes": [(mode.replace("_", " "), shortened(text, 200)) for mode, text in of.answers.items()],
                "drawn": _drawn(run, of, level),
            }
            for run, of in row
        ],
    }


def _drawn(run: RunResults, of: Prediction, level: int) -> Markup:
    answer, right = answer_json(of, run.passages), [document.right for document in of.documents]
    drawing = stages(answer, of.gold, correct=of.right, right=right, longest=LONGEST_PASSAGE)
    return Markup(render("prediction_stages.html", stages=drawing, level=level))
