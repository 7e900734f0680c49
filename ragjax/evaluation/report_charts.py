"""The charts of a report: training, calibration, and the prior's mass over k; of one run or of two side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ragjax.evaluation.run_results import RunResults
from ragjax.metrics import CALIBRATION_BINS, calibration_bins
from ragjax.pages.charts import Chart, Series, chart

# what train.jsonl has, as charts: title, unit of y, whether it is a share, whether it spans orders of magnitude
Points = tuple[list[float], list[float]]  # x and y
MEANS = 12  # running means along a curve that do not overlap: steps differ as their questions do
CURVES = (
    ("loss", "Loss, −log p(y|x)", "nats", False, False),
    ("dev_loss", "Dev loss", "nats", False, False),
    ("recall", "Recall among the documents", "share", True, False),
    ("posterior_entropy", "Posterior entropy over documents", "nats", False, False),
    ("prior_top", "Prior of the best document", "p(z|x)", True, False),
    ("gradient_norm_retriever", "Gradient norm, retriever", "norm", False, True),
    ("gradient_norm_generator", "Gradient norm, generator", "norm", False, True),
)


def training_curves(runs: Sequence[RunResults]) -> list[Chart]:
    """What train.jsonl tells, over the steps."""
    charts = []
    for key, title, unit, share, log in CURVES:
        logged = [(run.name, [(step["step"], step[key]) for step in run.steps if key in step]) for run in runs]
        series = [
            Series(name, [x for x, _ in points], [y for _, y in points], window=max(1, len(points) // MEANS))
            for name, points in logged
            if points
        ]
        made = chart(title, series, "step", unit, unit=share, log_y=log)
        charts += [] if made is None else [made]
    return charts


def quality_charts(runs: Sequence[RunResults]) -> list[Chart]:
    """Calibration, and mass and recall over k."""
    made = [_calibration(runs), *_over_k(runs)]
    return [of for of in made if of is not None]


def _calibration(runs: Sequence[RunResults]) -> Chart | None:
    """The share of right answers over p(answer), by bins of equal width, as the calibration error counts them."""
    series = []
    for run in runs:
        predictions = run.predictions[run.model]
        if predictions:
            confidence = np.array([of.p_answer for of in predictions])
            bins = calibration_bins(confidence, np.array([of.right for of in predictions]))
            series.append(Series(run.name, [of.confidence for of in bins], [of.accuracy for of in bins], dots=True))
    return chart(
        f"Calibration, {CALIBRATION_BINS} bins: share right",
        series,
        "p(answer)",
        "share right",
        unit=True,
        diagonal=True,
    )


def _over_k(runs: Sequence[RunResults]) -> list[Chart | None]:
    """From evaluation, which measured up to k; or from `ragjax index-report`, which looks further, where it was run."""
    charts = []
    measures: tuple[tuple[str, str, Callable[[RunResults], Points]], ...] = (
        ("Prior mass over k", "share of the corpus’s softmax", _mass),
        ("Recall over k", "share of questions", _recall),
    )
    for title, unit, of in measures:
        series = [Series(run.name, *of(run), dots=True) for run in runs]
        charts.append(chart(title, [s for s in series if s.xs], "k, documents", unit, unit=True))
    return charts


def _mass(run: RunResults) -> Points:
    if run.mass:
        return [float(k) for k, _, _ in run.mass], [mass for _, mass, _ in run.mass]
    return _by_k(run.metrics["models"][run.model]["mass_over_k"] or [])


def _recall(run: RunResults) -> Points:
    if run.mass:
        return [float(k) for k, _, _ in run.mass], [answered for _, _, answered in run.mass]
    return _by_k(run.metrics["models"][run.model]["recall_over_k"])


def _by_k(values: Sequence[float]) -> Points:
    return [float(k) for k in range(1, len(values) + 1)], [float(value) for value in values]
