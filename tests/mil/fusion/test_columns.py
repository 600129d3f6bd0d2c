"""What a training part teaches of a table, applied to others: the values by hand, and what it must never see."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mhim.mil.fusion.columns import CLIP_SD, Columns, ColumnsError, Options, fit
from mhim.mil.fusion.rows import Rows

NAN = float("nan")


def table(**columns: list[float] | list[str | None]) -> Rows:
    """Rows of patients p0, p1, ...: lists of numbers are number columns, of words factors."""
    n = len(next(iter(columns.values())))
    words = {k: tuple(v) for k, v in columns.items() if any(isinstance(x, str) for x in v)}
    numbers = {k: v for k, v in columns.items() if k not in words}
    values = np.array(list(numbers.values()), dtype=float).T if numbers else np.empty((n, 0))
    return Rows(tuple(f"p{i}" for i in range(n)), tuple(numbers), values, words)


def some_rows(n: int, seed: int = 0, prefix: str = "p") -> Rows:
    draw = np.random.default_rng(seed)
    values = draw.normal(size=(n, 6)) * [1, 10, 100, 0.1, 1, 1]
    values[draw.random(values.shape) < 0.15] = NAN
    words = tuple(draw.choice(["a", "b", "c", None], n))
    groups = {"odd": ("x1", "x3", "x5"), "even": ("x0", "x2", "x4")}
    return Rows(
        tuple(f"{prefix}{i:03d}" for i in range(n)), tuple(f"x{i}" for i in range(6)), values, {"f": words}, groups
    )


def bytes_of(columns: Columns) -> bytes:
    return json.dumps(columns.plain()).encode() + b"".join(v.tobytes() for v in columns.arrays().values())


def test_numbers_are_imputed_and_scaled_by_hand() -> None:
    found = fit(table(age=[1.0, 2.0, 6.0, NAN], flat=[5.0, 5.0, 5.0, 5.0], gone=[NAN] * 4))
    assert found.names == ("age",)
    assert (found.mean[0], found.fill[0]) == (3.0, 2.0)
    assert found.sd[0] == pytest.approx(np.sqrt(14 / 3))
    assert found.left == {"flat": "one value in the training part", "gone": "no training patient has a value"}
    z = found.matrix(table(age=[3.0, NAN, 3.0 + np.sqrt(14 / 3), 1e30, -1e30]))
    # without any known cell a patient has 0; the median comes in only beside a known cell
    assert z[:, 0] == pytest.approx([0.0, 0.0, 1.0, CLIP_SD, -CLIP_SD])
    both = fit(table(age=[1.0, 2.0, 6.0], psa=[0.0, 1.0, 2.0])).matrix(table(age=[NAN], psa=[1.0]))
    assert both[0] == pytest.approx([(2.0 - 3.0) / np.sqrt(14 / 3), 0.0])
    mean = fit(table(age=[1.0, 2.0, 6.0], psa=[0.0, 1.0, 2.0]), Options(impute="mean"))
    assert mean.matrix(table(age=[NAN], psa=[1.0]))[0] == pytest.approx([0.0, 0.0])


def test_indicators_tell_where_cells_are_missing() -> None:
    rows = table(age=[1.0, 2.0, 6.0, NAN], psa=[1.0, 2.0, 3.0, 4.0])
    found = fit(rows, Options(indicators=True))
    assert found.names == ("age", "age missing", "psa")
    assert found.matrix(rows)[:, 1] == pytest.approx(np.array([-0.25, -0.25, -0.25, 0.75]) / np.sqrt(3 / 16))


def test_factors_have_a_feature_per_word_and_one_for_unknown() -> None:
    found = fit(table(grade=["low", "high", "mid", None], n=[1.0, 2.0, 3.0, 4.0]))
    assert found.names == ("n", "grade = high", "grade = low", "grade = mid", "grade unknown")
    z = found.matrix(table(grade=["odd", "high", None], n=[1.0, 2.0, 3.0]))
    sd = np.sqrt(3 / 16)
    assert z[0, 1:] == pytest.approx(np.array([-0.25, -0.25, -0.25, 0.75]) / sd)  # a new word is an unknown one
    assert z[1, 1:] == pytest.approx(np.array([0.75, -0.25, -0.25, -0.25]) / sd)
    assert list(z[2, 1:]) == list(z[0, 1:])


def test_a_new_word_counts_as_the_mean_where_no_patient_without_word_taught_anything() -> None:
    found = fit(table(sex=["F", "M", "M", "F"], stage=["1", "2", "3", "3"]))
    assert found.names == ("sex = M", "stage = 1", "stage = 2", "stage = 3")
    z = found.matrix(table(sex=["X", "F"], stage=["4", "1"]))
    assert list(z[0]) == [0.0] * 4
    assert z[1, 0] == -1.0
    assert found.told(table(sex=["X", "F"], stage=["4", "1"])) == [
        "column sex: 'X' was not in training and counts as unknown",
        "column stage: '4' was not in training and counts as unknown",
    ]


def test_absent_columns_count_as_training_means_and_are_told() -> None:
    found = fit(table(a=[1.0, 2.0, 4.0], b=[1.0, 2.0, 3.0], f=["x", "y", "z"]))
    new = table(b=[2.0, 99.0])
    assert found.matrix(new)[0] == pytest.approx([0.0] * 5)
    assert found.told(new) == [
        "2 columns not in the table, taken at the training mean: a, f",
        "1 cell of b 10 standard deviations or more from the training mean, taken as just so far: another unit?",
    ]


def test_groups_are_means_of_kept_columns_scaled_by_the_training_part() -> None:
    rows = some_rows(40)
    found = fit(rows)
    z, of_groups = found.matrix(rows), found.group_matrix(rows)
    assert list(found.groups) == ["even", "odd"]
    by_hand = z[:, [found.names.index(n) for n in ("x1", "x3", "x5")]].mean(axis=1)
    assert of_groups[:, 1] == pytest.approx((by_hand - by_hand.mean()) / by_hand.std())
    assert list(fit(rows, Options(smallest_group=4)).groups) == []


def test_patients_without_a_known_cell_teach_nothing_and_are_zero() -> None:
    rows = some_rows(30)
    more = rows.of([*rows.patients, "nobody", "nor this"])
    assert bytes_of(fit(more)) == bytes_of(fit(rows))
    assert list(more.present[-2:]) == [False, False]
    assert not fit(rows).matrix(more)[-2:].any()
    assert not fit(rows).group_matrix(more)[-2:].any()


def test_selection_keeps_what_tells_most_of_the_outcome() -> None:
    draw = np.random.default_rng(1)
    x = draw.normal(size=(200, 50))
    rows = Rows(tuple(f"{i:03d}" for i in range(200)), tuple(f"g{i:02d}" for i in range(50)), x)
    classes = [int(v > 0) for v in x[:, 7] + x[:, 31] + 0.3 * draw.normal(size=200)]
    pairs = [(float(np.exp(-v)), 1.0) for v in x[:, 7] + x[:, 31] + 0.3 * draw.normal(size=200)]
    numbers = [float(v) for v in x[:, 7] + x[:, 31] + 0.3 * draw.normal(size=200)]
    for targets in (classes, pairs, numbers):
        found = fit(rows, Options(select=2), targets)
        assert found.names == ("g07", "g31")
        assert found.left["g00"] == "not among the chosen"
    with pytest.raises(ValueError, match="select needs the targets"):
        fit(rows, Options(select=2))


def test_nothing_to_learn_is_refused() -> None:
    with pytest.raises(ColumnsError, match="no column differs between the 3 training patients: a, f"):
        fit(table(a=[1.0, 1.0, 1.0], f=["x", "x", "x"]))
    with pytest.raises(ColumnsError, match="1 training patient in the table"):
        fit(table(a=[1.0, NAN, NAN]))


def test_files_give_back_the_same_columns() -> None:
    found = fit(some_rows(30), Options(indicators=True))
    again = Columns.of(json.loads(json.dumps(found.plain())), found.arrays())
    assert bytes_of(again) == bytes_of(found)
    assert again.group_matrix(some_rows(9, 5)).tobytes() == found.group_matrix(some_rows(9, 5)).tobytes()
    with pytest.raises(ValueError, match="columns of format 2"):
        Columns.of(found.plain() | {"format": 2}, found.arrays())
    with pytest.raises(ValueError, match="mean has shape"):
        Columns.of(found.plain(), found.arrays() | {"mean": np.zeros(1)})


# ---------------------------------------------------------------------------------------------- leaks


@pytest.mark.parametrize("poison", [100.0, NAN, float("inf"), 1e30])
def test_held_out_rows_change_nothing_that_is_fitted(poison: float) -> None:
    """The split of a fold: fitted from the training patients' rows of the whole table, whatever the others hold."""
    rows = some_rows(60)
    train, test = rows.patients[:40], rows.patients[40:]
    values = rows.values.copy()
    values[40:] *= poison
    factors = {"f": rows.factors["f"][:40] + ("poison",) * 20}
    spoilt = Rows(rows.patients, rows.columns, values, factors, rows.groups)
    targets = [float(i % 7) for i in range(60)]
    shuffled = targets[:40] + targets[40:][::-1]
    for options in (Options(), Options(impute="mean", indicators=True), Options(select=3)):
        found = fit(rows.of(train), options, targets[:40])
        again = fit(spoilt.of(train), options, shuffled[:40])
        assert bytes_of(found) == bytes_of(again)
        assert found.matrix(rows.of(train)).tobytes() == again.matrix(spoilt.of(train)).tobytes()
        assert np.isfinite(again.matrix(spoilt.of(test))).all()
        assert np.isfinite(again.group_matrix(spoilt.of(test))).all()
    # the test can fail: a fit on all patients is another one
    assert bytes_of(fit(rows)) != bytes_of(fit(spoilt))


CELLS = arrays(np.float64, (12, 4), elements=st.one_of(st.just(NAN), st.floats(-1e6, 1e6, allow_nan=False, width=32)))


def of_cells(cells: np.ndarray, words: list[str | None]) -> Rows | None:
    rows = Rows(
        tuple(f"p{i:02d}" for i in range(12)), ("a", "b", "c", "d"), cells, {"f": tuple(words)}, {"g": ("a", "c")}
    )
    try:
        fit(rows, Options(smallest_group=1))
    except ColumnsError:
        return None
    return rows


WORDS = st.lists(st.sampled_from(["x", "y", "z", None]), min_size=12, max_size=12)


@settings(max_examples=60)
@given(CELLS, WORDS, st.permutations(range(12)), st.permutations(range(4)), st.integers(1, 11))
def test_order_and_company_change_no_bit(
    cells: np.ndarray, words: list[str | None], rows_order: list[int], columns_order: list[int], few: int
) -> None:
    rows = of_cells(cells, words)
    if rows is None:
        return
    other = Rows(
        rows.patients, tuple(rows.columns[j] for j in columns_order), cells[:, columns_order], rows.factors, rows.groups
    ).of([rows.patients[i] for i in rows_order])
    options = Options(indicators=True, smallest_group=1)
    found, again = fit(rows, options), fit(other, options)
    assert bytes_of(found) == bytes_of(again)
    whole, groups = found.matrix(rows), found.group_matrix(rows)
    part = rows.of(rows.patients[:few])
    assert found.matrix(part).tobytes() == whole[:few].tobytes()
    assert found.group_matrix(part).tobytes() == groups[:few].tobytes()
    assert again.matrix(other)[np.argsort(rows_order)].tobytes() == whole.tobytes()


@settings(max_examples=40)
@given(CELLS, st.sampled_from([1024.0, 2.0**-7]))
def test_another_unit_gives_the_same_features(cells: np.ndarray, unit: float) -> None:
    rows = of_cells(cells, ["x"] * 12)
    if rows is None:
        return
    other = Rows(rows.patients, rows.columns, cells * unit, rows.factors, rows.groups)
    assert fit(other).matrix(other) == pytest.approx(fit(rows).matrix(rows), abs=1e-9)
