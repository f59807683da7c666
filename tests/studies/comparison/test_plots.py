"""Labels keep off each other; the same records give the same files; what is drawn is what the rows say."""

import itertools
import math
import random
import warnings
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest

from peft_jax.studies.comparison import plot_style, rows, run_of
from peft_jax.studies.comparison.ablation_plots import ablations
from peft_jax.studies.comparison.label_placement import label
from peft_jax.studies.comparison.plots import comparison_plots, loss_curve, pareto
from peft_jax.studies.comparison.report import drawings
from tests.studies.comparison import examples


@pytest.mark.parametrize("points, front", [
    ([], []),
    ([(1.0, 0.5)], [0]),
    ([(1.0, math.nan), (math.nan, 0.9)], []),
    ([(1.0, 0.5), (1.0, 0.6)], [1]),  # the same price: the better one
    ([(1.0, 0.5), (2.0, 0.5)], [0]),  # the same worth: the cheaper one
    ([(2.0, 0.5), (2.0, 0.5), (3.0, 0.1)], [0, 1]),  # equal points do not beat each other
    ([(3.0, 0.9), (2.0, 0.7), (1.0, 0.1), (2.5, 0.6)], [2, 1, 0]),
    ([(1.0, 0.5), (0.5, math.nan), (2.0, 0.8)], [0, 2]),
    ([(math.inf, 0.9), (1.0, 0.5)], [1, 0]),
])  # fmt: skip
def test_the_pareto_front(points, front):
    assert pareto(points) == front


def test_no_point_beats_one_on_the_front_and_each_other_is_beaten():
    rng = random.Random(0)
    for _ in range(50):
        points = [(rng.randrange(6), rng.randrange(6)) for _ in range(12)]
        front = pareto(points)
        for at, (price, worth) in enumerate(points):
            beaten = any(p <= price and w >= worth and (p, w) != (price, worth) for p, w in points)
            assert beaten == (at not in front)
        assert [points[at][0] for at in front] == sorted(points[at][0] for at in front)


@pytest.mark.slow
@pytest.mark.parametrize("seed, many, spread", [(0, 9, 1.0), (1, 27, 1.0), (2, 27, 0.3), (3, 14, 0.05)])
def test_labels_cover_neither_each_other_nor_points_and_stay_inside(seed, many, spread):
    rng = random.Random(seed)
    names = [f"method_{at}" for at in range(many)]
    points = [(rng.gauss(0, spread), rng.gauss(0, spread), name) for name in names]
    with matplotlib.rc_context(plot_style.STYLE):
        figure, (axes,) = plot_style.new_figure("title")
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o", markersize=7)
        axes.set(xlim=(-3, 3), ylim=(-3, 3))
        notes = label(axes, points)
        figure.canvas.draw()
        boxes = [note.get_window_extent() for note in notes]
        inside = axes.get_window_extent()
    assert {note.get_text() for note in notes} == set(names)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    centres = axes.transData.transform([point[:2] for point in points])
    assert not any(box.contains(*centre) for box in boxes for centre in centres)
    assert all(inside.contains(*corner) for box in boxes for corner in box.corners())


def test_styles_are_distinct_and_the_same_for_the_same_names():
    names = [f"m{at}" for at in range(56)]
    assert len(set(plot_style.styles(names).values())) == 56
    assert plot_style.styles(["a", "b", "a"]) == plot_style.styles(["a", "b"])


def lines_of(text):
    """The text of each <text> of an SVG, which must be XML."""
    tree = ElementTree.fromstring(text)
    return ["".join(element.itertext()) for element in tree.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.slow
def test_every_plot_of_a_comparison():
    found = {plot.name: plot for plot in drawings([run_of(record) for record in examples.comparison(seeds=2)])}
    assert set(found) == {"metric-parameters", "metric-memory", "forgetting-newspaper", "forgetting-amazon", "loss",
                          "latency", "ablation-optim.learning_rate"}  # fmt: skip
    for plot in found.values():
        words = lines_of(plot.svg)
        assert set(examples.METHODS) <= set(words), plot.name
        assert plot.png.startswith(b"\x89PNG") and "SmolLM2-135M-Instruct" in " ".join(words)
    assert "base model" in lines_of(found["metric-memory"].svg) and "0.003" in lines_of(
        found["ablation-optim.learning_rate"].svg)  # fmt: skip
    assert any("accuracy among the choices" in word for word in lines_of(found["metric-parameters"].svg))
    assert "14.0" in lines_of(found["latency"].svg) or "14.1" in lines_of(found["latency"].svg)


@pytest.mark.slow
def test_the_same_records_give_the_same_bytes():
    first, second = (ablations(swept({"method.r": (4, 8)}), plot_style.styles(["lora"])) for _ in range(2))
    assert first == second


@pytest.mark.slow
def test_hostile_names_damaged_numbers_and_missing_keys_are_drawn_without_a_warning():
    nothing = examples.record("ia3", peft_jax=None)
    nothing["peft_jax"] = {"metric": "among_choices"}
    broken = examples.record("full", loss=[[1, math.nan], [2, math.inf]], memory={},
                             general={"a": {"before": math.nan}})  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = drawings([run_of(record) for record in [*examples.hostile(), nothing, broken, examples.peft_record()]])
    names = [plot.name for plot in found]
    assert len(set(names)) == len(names) and all(set(name) <= set(plot_style.slug(name)) for name in names)
    for plot in found:
        assert "<script" not in plot.svg and lines_of(plot.svg)  # it is XML, and the tag is text
    assert any("<script>alert(1)" in word and "$" in word for plot in found for word in lines_of(plot.svg))


@pytest.mark.slow
@pytest.mark.parametrize("labels", [["full"], ["lora", "qlora"], ["full", "lora"]])
def test_one_point_or_points_of_one_price_are_drawn_as_well(labels):
    found = rows(map(run_of, [examples.record(label, seed, general={}, latency={}, loss=[])  # the front's plots alone
                              for label in labels for seed in (0, 1)]))  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (first, *_) = comparison_plots(found, plot_style.styles(labels))
    assert set(labels) <= set(lines_of(first.svg))


def test_no_runs_no_plots():
    assert drawings([]) == [] and drawings([run_of(examples.failed())]) == []


def test_losses_are_averaged_over_seeds_step_by_step():
    curve = loss_curve([[(1, 1.0), (2, 3.0), (3, None)], [(1, 2.0), (2, math.nan)]])
    np.testing.assert_array_equal(curve.index, [1, 2, 3])
    np.testing.assert_allclose(curve["mean"], [1.5, 3.0, math.nan])
    np.testing.assert_allclose(curve["std"], [math.sqrt(0.5), math.nan, math.nan])


def test_losses_are_smoothed_over_a_twentieth_of_their_values():
    """Of 60 values three, at the start as many as there are; a gap is not filled, and does not count."""
    losses = [None if step == 30 else float(step) for step in range(60)]
    (mean, std) = loss_curve([list(enumerate(losses))])[["mean", "std"]].to_numpy().T
    assert mean[[0, 1, 2, 59]].tolist() == [0.0, 0.5, 1.0, 58.0] and np.isnan(mean[30])
    assert mean[[31, 32]].tolist() == [30.0, 31.5] and np.isnan(std).all()


@pytest.mark.slow
def test_rows_measured_on_validation_are_not_drawn_among_those_measured_on_test():
    found = rows(map(run_of, [examples.record("lora"), examples.record("ia3", chosen=False)]))
    for plot in comparison_plots(found, plot_style.styles(row.name for row in found)):
        assert "lora" in lines_of(plot.svg) and "ia3" not in lines_of(plot.svg)


def swept(axes, seeds=2):
    """Ablations of lora over {setting: values}."""
    return [run_of(examples.record(settings=dict(zip(axes, values)) | {"seed": seed}, axes=list(axes), chosen=None))
            for values in itertools.product(*axes.values()) for seed in range(seeds)]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("axes, words", [
    ({"method.r": (1, 4, 16)}, {"1", "4", "16", "rank"}),
    ({"method.r": (4, 5, 6)}, {"4", "5", "6"}),
    ({"method.init": ("default", "pissa", True)}, {"default", "pissa", "True"}),
    ({"method.r": (4, 8), "method.init": ("default", "pissa")}, {"4", "8", "default", "pissa"}),
    ({"a": (1, 2), "b": (1, 2), "c": (1, 2)}, {"a=1 b=2 c=1"}),
])  # fmt: skip
def test_an_ablation_is_drawn_by_what_it_varies(axes, words):
    (plot,) = ablations(swept(axes), plot_style.styles(["lora"]))
    assert words <= set(lines_of(plot.svg))


@pytest.mark.slow
def test_a_map_has_every_value_written_in():
    runs = swept({"method.r": (4, 8), "method.init": ("default", "pissa")}, seeds=1)[:3]
    (plot,) = ablations(runs, plot_style.styles(["lora"]))
    lines = lines_of(plot.svg)
    assert {"higher is better", "lower is better", "rank", "init"} <= set(lines)  # what the colours say, what varies
    assert not any("method." in line for line in lines)
    shown = [word for word in lines if word.startswith(("0.", "1."))]
    assert sorted(shown) == sorted([f"{run.values['test']:.3f}" for run in runs] + ["1.100"] * 3)  # the losses below


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"method.r": (1, 4)}, {"method.init": ("default", "pissa")},
                                  {"method.r": (4, 8), "method.init": ("default", "pissa")},
                                  {"a": (1, 2), "b": (1, 2), "c": (1, 2)}])  # fmt: skip
def test_an_ablation_shows_every_loss_that_all_its_runs_have(axes):
    parts = {"validation": {"among_choices": 0.5, "loss": 0.75, "probe_loss": 5.0},
             "before": {"among_choices": 0.25, "loss": 8.0, "probe_loss": 4.0}}  # fmt: skip
    runs = [run_of(examples.record(settings=dict(zip(axes, values)), axes=list(axes), chosen=False, **parts))
            for values in itertools.product(*axes.values())]  # fmt: skip
    (plot,) = ablations(runs, plot_style.styles(["lora"]))
    words = " ".join(lines_of(plot.svg))
    assert words.count("before training") == 2 and words.count("general") == 2 and words.count("answers") == 2
    (partly,) = ablations([*runs[:-1], runs[-1]._replace(values={"validation": 0.5})], plot_style.styles(["lora"]))
    assert "answers" not in " ".join(lines_of(partly.svg))


@pytest.mark.slow
@pytest.mark.parametrize("columns", [2, 16])  # side by side, and stacked
def test_every_panel_of_a_map_has_its_rows_in_the_order_of_the_sweep(columns):
    runs = swept({"init": ("default", "pissa"), "r": tuple(range(columns))}, seeds=1)
    (plot,) = ablations(runs, plot_style.styles(["lora"]))
    tree, places = ElementTree.fromstring(plot.svg), {"default": [], "pissa": []}
    for element in tree.iter("{http://www.w3.org/2000/svg}text"):
        if (word := "".join(element.itertext())) in places:
            places[word].append(float(element.get("y")))
    assert len(places["default"]) == (1 if columns == 2 else 2)
    assert all(above < below for above, below in zip(*places.values(), strict=True))


def test_an_ablation_uses_validation_where_not_all_have_a_test():
    runs = [run_of(examples.record(rate=rate, chosen=rate == 1e-3)) for rate in (1e-3, 1e-2)]
    (plot,) = ablations(runs, plot_style.styles(["lora"]))
    assert any("on validation" in word for word in lines_of(plot.svg))
