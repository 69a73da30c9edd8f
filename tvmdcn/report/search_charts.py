# SPDX-License-Identifier: Apache-2.0
"""The figures of the search."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tvmdcn.report.charts import COLORS, chart
from tvmdcn.report.data import Trial, TuningHistory
from tvmdcn.report.rendering import milliseconds, plural
from tvmdcn.report.trials import ABSENT, Correlation, Importance, decided, levels, measured_scores

if TYPE_CHECKING:
    from markupsafe import Markup

__all__ = ["draw_importance", "draw_model", "draw_overview", "draw_population", "draw_progress", "words_of"]

_DECISIONS_SHOWN = 8  # marginal plots of a tuning
# Without its ends, which cannot be seen on white and on black.
_RAMP: Any = {"name": "viridis", "extent": [0.15, 0.85]}


def words_of(trial: Trial) -> str:
    """Return the decisions of a trial in one line."""
    return ", ".join(value if name == "variant" else f"{name} {value}" for name, value in trial.decisions.items())


def _short(value: float | None, digits: int = 5) -> float | None:
    return None if value is None else float(f"{value:.{digits}g}")


def draw_overview(tunings: Sequence[tuple[str, TuningHistory]]) -> Markup | None:
    """Draw the best so far of every tuning in units of its first trial; None if nothing was measured."""
    import altair as alt

    values, gains = [], []
    for label, history in tunings:
        first, best = history.first, history.best
        if first is None or best is None or not first.time_ms or not best.time_ms:
            continue
        gains.append(first.time_ms / best.time_ms)
        before = None
        for trial, so_far in zip(history.trials, history.best_so_far(), strict=True):
            last = trial is history.trials[-1]
            if so_far is not None and (so_far != before or last):  # the steps suffice
                values.append({"layer": label, "trial": trial.index, "share": _short(so_far / first.time_ms)})
                before = so_far
    if not values:
        return None
    hover = alt.selection_point(fields=["layer"], on="pointerover", empty=False, name="overview")
    lines = (
        alt.Chart(alt.InlineData(values=values), width="container", height=240)
        .mark_line(interpolate="step-after", color=COLORS["ours"])
        .encode(
            x=alt.X("trial:Q", title="trial"),
            y=alt.Y("share:Q", title="best so far, first trial = 1", scale=alt.Scale(zero=False)),
            detail="layer:N",
            opacity=alt.condition(hover, alt.value(1), alt.value(0.35)),
            strokeWidth=alt.condition(hover, alt.value(3.5), alt.value(1.5)),
            tooltip=["layer:N", "trial:Q", alt.Tooltip("share:Q", format=".3f")],
        )
        .add_params(hover)
    )
    says = (
        f"The median of {plural(len(gains), 'tuning')} made its layer {statistics.median(gains):.2f}\u00d7 as fast "
        f"as the first schedule tried, the design space's own; the best {max(gains):.2f}\u00d7."
    )
    read = (
        "A line per tuning: the fastest schedule so far over the first one. Steps late on the right say that more "
        "trials would pay."
    )
    return chart(lines, says=says, read=read)


def draw_progress(history: TuningHistory) -> Markup | None:
    """Draw trials and the best so far, against trials and against time; None if nothing was measured."""
    import altair as alt

    best = history.best
    if best is None or not best.time_ms:
        return None
    highest = max(trial.time_ms for trial in history.trials if trial.time_ms is not None)
    values = [
        {
            "trial": trial.index,
            "elapsed_s": trial.elapsed_s,
            "time_ms": _short(trial.time_ms),
            "best_ms": _short(so_far),
            "failed": trial.reason if trial.time_ms is None else None,
            "decisions": words_of(trial),
        }
        for trial, so_far in zip(history.trials, history.best_so_far(), strict=True)
    ]
    failed = sum(trial.time_ms is None for trial in history.trials)
    scale = alt.Scale(type="log", domain=[best.time_ms / 1.05, highest * 1.15], nice=False)

    def view(field: str, title: str, y_title: str | None) -> Any:
        x = alt.X(f"{field}:Q", title=title)
        base = alt.Chart(width=480, height=230)
        tooltip = ["trial:Q", "elapsed_s:Q", "time_ms:Q", "best_ms:Q", "failed:N", "decisions:N"]
        dots = (
            base.mark_circle(size=45, color=COLORS["faint"], opacity=0.6)
            .encode(x=x, y=alt.Y("time_ms:Q", scale=scale, title=y_title), tooltip=tooltip)
            .transform_filter({"field": "time_ms", "valid": True})
        )
        line = (
            base.mark_line(interpolate="step-after", color=COLORS["ours"], strokeWidth=2.5)
            .encode(x=x, y=alt.Y("best_ms:Q", scale=scale))
            .transform_filter({"field": "best_ms", "valid": True})
        )
        crosses = (
            base.mark_point(shape="cross", angle=45, size=60, color=COLORS["bad"], filled=True)
            .encode(x=x, y=alt.datum(highest * 1.1), tooltip=tooltip)
            .transform_filter("datum.failed !== null")
        )
        return alt.layer(dots, line, *([crosses] if failed else []))

    views = [view("trial", "trial", "ms per call")]
    if any(trial.elapsed_s is not None for trial in history.trials):
        views.append(view("elapsed_s", "seconds of tuning", None))
    both = alt.hconcat(*views, data=alt.InlineData(values=values))
    when = f" after {best.elapsed_s:.0f} s" if best.elapsed_s is not None else ""
    says = (
        f"The best of {plural(len(values), 'trial')} takes {milliseconds(best.time_ms)} ms; it was number "
        f"{best.index}{when}."
    )
    read = (
        "A dot is a schedule that was built, checked and measured, the line the fastest so far; on the left in the "
        "order of the trials, on the right against time. Hover for the decisions."
        + (f" Crosses at the top: {plural(failed, 'trial')} that failed." if failed else "")
    )
    return chart(both, says=says, read=read, title="Best so far")


def draw_model(history: TuningHistory, found: Sequence[Correlation]) -> Markup | None:
    """Draw what the cost model predicted against what was measured, and its rank correlations; None without any."""
    import altair as alt

    scores = measured_scores(history)
    values = [
        {
            "trial": trial.index,
            "round": trial.round,
            "predicted": _short(trial.predicted),
            "measured": _short(scores[trial.index]),
            "time_ms": _short(trial.time_ms),
            "failed": trial.reason if trial.time_ms is None else None,
            "decisions": words_of(trial),
        }
        for trial in history.trials
        if trial.predicted is not None and trial.index in scores
    ]
    if not values:
        return None
    known = [(trial.predicted, scores[trial.index]) for trial in history.trials if trial.index in scores]
    numbers = [number for predicted, score in known if predicted is not None for number in (predicted, score)]
    ends = (min(numbers), max(numbers))
    dots = (
        alt.Chart(alt.InlineData(values=values), width=480, height=280)
        .mark_circle(size=60, opacity=0.85)
        .encode(
            x=alt.X("predicted:Q", title="predicted score", scale=alt.Scale(zero=False)),
            y=alt.Y(
                "measured:Q", title="measured: best time before the round over its own", scale=alt.Scale(zero=False)
            ),
            color=alt.Color("round:O", scale=alt.Scale(scheme=_RAMP), title="round"),
            tooltip=["trial:Q", "round:O", "predicted:Q", "measured:Q", "time_ms:Q", "failed:N", "decisions:N"],
        )
    )
    diagonal = (
        alt.Chart(alt.InlineData(values=[{"end": end} for end in ends]))
        .mark_line(strokeDash=[4, 4], color=COLORS["faint"], strokeWidth=1)
        .encode(x="end:Q", y="end:Q")
    )
    views = [alt.layer(diagonal, dots)]
    if found:
        rounds = [
            {
                "round": row.round,
                "rank_correlation": _short(row.value),
                "trials": row.trials,
                "by_chance": _short(row.chance),
            }
            for row in found
        ]
        x = alt.X("round:O", title="round", axis=alt.Axis(labelAngle=0))
        base = alt.Chart(alt.InlineData(values=rounds), width=480, height=280)
        tooltip = ["round:O", "rank_correlation:Q", "trials:Q", "by_chance:Q"]
        span = alt.Scale(domain=[-1, 1])
        band = base.transform_calculate(lowest="-datum.by_chance").mark_bar(color=COLORS["grid"], width={"band": 0.9})
        chance = band.encode(
            x=x, y=alt.Y("lowest:Q", scale=span, title="rank correlation"), y2="by_chance:Q", tooltip=tooltip
        )
        points = base.mark_circle(size=110, color=COLORS["ours"], opacity=1).encode(
            x=x, y=alt.Y("rank_correlation:Q", scale=span), tooltip=tooltip
        )
        views.append(alt.layer(chance, points))
    return chart(alt.hconcat(*views), says=_model_says(found), read=_MODEL_READ, title="What the cost model knew")


def _model_says(found: Sequence[Correlation]) -> str:
    if not found:
        return "No round had enough trials for a rank correlation."
    beyond = sum(row.value > row.chance for row in found)
    return (
        "The cost model's order agrees with the measured one to a rank correlation of "
        f"{statistics.median(row.value for row in found):.2f} in the median of {plural(len(found), 'round')}; in "
        f"{beyond} it is beyond chance."
    )


_MODEL_READ = (
    "Left: each trial's score, given before it was measured, and what it should have been; on the dashed line the "
    "model was right. Right: Spearman's rank correlation within each round, 1 for the same order; within the grey "
    "bar it may be chance (two in forty rounds of unrelated numbers leave it). Rounds hold what the model thought "
    "best, which is hard to order. Trials that failed count as 0 on the left and not at all on the right."
)


def draw_importance(history: TuningHistory, found: Sequence[Importance]) -> Markup | None:
    """Draw how much each decision explains, and the times by its values; None if no decision varied."""
    import altair as alt

    if not found:
        return None
    shown = [row.decision for row in found[:_DECISIONS_SHOWN]]
    shares = [
        {
            "decision": row.decision,
            "share": _short(row.share, 3),
            "trials": row.trials,
            "values": row.values,
            "best_value": row.best,
        }
        for row in found
    ]
    bars = (
        alt.Chart(alt.InlineData(values=shares), width=640, height=20 * len(shares))
        .mark_bar(color=COLORS["ours"])
        .encode(
            x=alt.X("share:Q", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%"), title="variance explained"),
            y=alt.Y("decision:N", sort=None, title=None),
            tooltip=["decision:N", alt.Tooltip("share:Q", format=".0%"), "trials:Q", "values:Q", "best_value:N"],
        )
    )
    # One row per trial; the page unfolds the decisions.
    rows: list[dict[str, Any]] = []
    for trial in history.trials:
        if trial.time_ms is not None:
            made = decided(trial)
            places = [place for place, name in enumerate(shown) if name in made]
            rows.append(
                {
                    "trial": trial.index,
                    "time_ms": _short(trial.time_ms),
                    "place": places,
                    "value": [made[shown[place]] for place in places],
                    "decisions": words_of(trial),
                }
            )
    named = [{"place": place, "decision": name} for place, name in enumerate(shown)]
    order = {name: index for index, row in enumerate(levels(history.trials).values()) for name in row}
    by_size = sorted(order, key=_number)
    x = alt.X("value:N", sort=by_size, title=None, axis=alt.Axis(labelAngle=0))
    y = alt.Y("time_ms:Q", scale=alt.Scale(type="log", nice=False, padding=8), title="ms per call")
    base = alt.Chart(width=230, height=150)
    dots = base.mark_circle(size=28, opacity=0.5, color=COLORS["faint"]).encode(
        x=x, y=y, tooltip=["value:N", "time_ms:Q", "trial:Q", "decisions:N"]
    )
    ticks = base.mark_tick(thickness=3, color=COLORS["ours"], size=18).encode(x=x, y=alt.Y("median(time_ms):Q"))
    facets = (
        alt.layer(dots, ticks, data=alt.InlineData(values=rows))
        .transform_flatten(["place", "value"])
        .transform_lookup("place", alt.LookupData(alt.InlineData(values=named), "place", ["decision"]))
        .facet(facet=alt.Facet("decision:N", sort=shown, title=None), columns=4)
        .resolve_scale(x="independent")
    )
    first = found[0]
    says = (
        f"{first.decision} matters most: it alone explains {first.share:.0%} of the variance of the logarithm of the "
        f"time; the best value in the median is {first.best}."
        if first.share > 0
        else "No decision alone explains the differences in time."
    )
    return chart(alt.vconcat(bars, facets), says=says, read=_IMPORTANCE_READ, title="Which decisions matter")


_IMPORTANCE_READ = (
    "Bars: how much of the variance the means of a decision's values explain, among the trials that had it to take, "
    "less what as many values would explain by chance. Each is taken alone: what two decisions do only together "
    "shows in neither, and decisions that the search always took together share their credit. Below: every trial by "
    "the value it chose, the green tick at their median. Hover for all decisions of a trial."
)


def _number(value: str) -> tuple[int, float, str]:
    try:
        return 0, float(value), ""
    except ValueError:
        return 1, 0.0, value


def draw_population(history: TuningHistory) -> Markup | None:
    """Draw every measured trial as a line through its decisions; None if fewer than two decisions varied."""
    import altair as alt

    measured = [trial for trial in history.trials if trial.time_ms is not None]
    axes = levels(measured)
    best = history.best
    if len(axes) < 2 or best is None:
        return None
    heights = {
        name: {value: index / (len(values) - 1) for index, value in enumerate(values)} for name, values in axes.items()
    }
    names = list(axes)
    # Fast lines are drawn last, over the others.
    rows: list[dict[str, Any]] = []
    for trial in sorted(measured, key=lambda trial: -(trial.time_ms or 0)):
        made = decided(trial)
        rows.append(
            {
                "trial": trial.index,
                "time_ms": _short(trial.time_ms),
                "best": trial is best,
                "height": [_short(heights[name][made.get(name, ABSENT)], 3) for name in names],
                "decisions": words_of(trial),
            }
        )
    labels = [
        {"place": place, "height": _short(at, 3), "value": value}
        for place, places in enumerate(heights.values())
        for value, at in places.items()
    ]
    heads = [{"place": place, "height": 1.1, "decision": name} for place, name in enumerate(names)]
    hover = alt.selection_point(fields=["trial"], on="pointerover", empty=False, name="population")
    x = alt.X("place:O", axis=None)
    y = alt.Y("height:Q", axis=None, scale=alt.Scale(domain=[-0.05, 1.15]))
    times = [trial.time_ms or 0.0 for trial in measured]
    lines = (
        alt.Chart(alt.InlineData(values=rows), width="container", height=300)
        .transform_calculate(place=str(list(range(len(names)))))
        .transform_flatten(["place", "height"])
        .mark_line(interpolate="monotone")
        .encode(
            x=x,
            y=y,
            detail="trial:N",
            color=alt.Color(
                "time_ms:Q",
                scale=alt.Scale(type="log" if max(times) > 3 * min(times) else "linear", scheme=_RAMP, reverse=True),
                title="ms per call",
            ),
            strokeWidth=alt.when(hover)
            .then(alt.value(5))
            .when("datum.best")
            .then(alt.value(4))
            .otherwise(alt.value(1.5)),
            opacity=alt.when(hover | "datum.best").then(alt.value(1)).otherwise(alt.value(0.45)),
            tooltip=["trial:Q", "time_ms:Q", "decisions:N"],
        )
        .add_params(hover)
    )
    rules = alt.Chart(alt.InlineData(values=heads)).mark_rule(color=COLORS["grid"]).encode(x=x)
    texts = (
        alt.Chart(alt.InlineData(values=labels))
        .mark_text(dx=5, align="left", stroke=COLORS["card"], strokeWidth=3, strokeOpacity=0.9)
        .encode(x=x, y=y, text="value:N")
    )
    plain = (
        alt.Chart(alt.InlineData(values=labels))
        .mark_text(dx=5, align="left", color=COLORS["ink"])
        .encode(x=x, y=y, text="value:N")
    )
    titles = alt.Chart(alt.InlineData(values=heads)).mark_text(fontWeight="bold").encode(x=x, y=y, text="decision:N")
    says = f"The best schedule: {words_of(best)}."
    read = (
        "A line per measured trial; where it crosses an axis is what it decided, its colour is its time, and the "
        f"thick line is the best. Fast lines that part at an axis say that the decision matters little. {ABSENT}: "
        "the variant has no such decision. Hover for one trial."
    )
    return chart(alt.layer(rules, lines, texts, plain, titles), says=says, read=read, title="The population")
