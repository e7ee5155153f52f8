"""Metrics of forecasts against double loops, and what must hold of them."""

import numpy as np
import pytest

from foveal.core.errors import DataError
from foveal.evaluate.forecast import convergence, dispersion, errors, leads, measure_forecasts, straight_on

RNG = np.random.default_rng(0)
DT, T = 0.5, 4
AGENT = np.repeat([0, 1, 2], [12, 7, 9])
XY = RNG.normal(size=(len(AGENT), 2)).cumsum(0)
ROWS = np.array([row for row in range(1, len(AGENT) - T) if AGENT[row - 1] == AGENT[row + T]])
FOUND = RNG.normal(size=(len(ROWS), T, 2))


def test_ade_and_fde_by_hand():
    future = XY[ROWS[:, None] + np.arange(1, T + 1)]
    ade, fde = errors(FOUND, future)
    for n in range(len(ROWS)):
        away = [np.hypot(*(FOUND[n, t] - future[n, t])) for t in range(T)]
        assert ade[n] == pytest.approx(sum(away) / T)
        assert fde[n] == pytest.approx(away[-1])
    with pytest.raises(DataError, match="expected equal ones"):
        errors(FOUND[:, :2], future)


def test_dispersion_and_convergence_by_double_loops():
    points, instant = leads(AGENT, ROWS, FOUND)
    expected = []
    for s in range(len(AGENT)):
        made = []
        for k in range(1, T + 1):
            start = [n for n, row in enumerate(ROWS) if row == s - k and AGENT[row] == AGENT[s]]
            made += [FOUND[start[0], k - 1]] if start else []
        if len(made) == T:
            expected.append((s, made))
    assert instant.tolist() == [s for s, _ in expected]
    assert len(expected) > 3
    assert np.array_equal(points, np.array([made for _, made in expected]))
    for within in (0.5, 1.5, 3.0):
        found = convergence(points, XY[instant], within, DT)
        for n, (s, made) in enumerate(expected):
            steps = 0
            for point in made:
                if np.hypot(*(point - XY[s])) > within:
                    break
                steps += 1
            assert found[n] == pytest.approx(steps * DT)
    spread = dispersion(points)
    for n, (_, made) in enumerate(expected):
        centre = sum(made) / T
        assert spread[n] == pytest.approx(np.sqrt(sum(((point - centre) ** 2).sum() for point in made) / T))


def test_what_must_hold():
    points, instant = leads(AGENT, ROWS, FOUND)
    truth = XY[instant]
    assert np.allclose(dispersion(np.repeat(truth[:, None], T, 1)), 0)
    assert (convergence(np.repeat(truth[:, None], T, 1), truth, 0.2, DT) == T * DT).all()
    curve = np.array([convergence(points, truth, within, DT) for within in np.linspace(0, 8, 30)])
    assert (np.diff(curve, axis=0) >= 0).all()
    assert curve[-1].max() > curve[0].min()
    turn = np.array([[np.cos(1), -np.sin(1)], [np.sin(1), np.cos(1)]])
    moved, there = points @ turn.T + 3, truth @ turn.T + 3
    assert np.allclose(dispersion(moved), dispersion(points))
    assert np.array_equal(convergence(moved, there, 1.5, DT), convergence(points, truth, 1.5, DT))
    for dt in (0.0, float("nan")):
        with pytest.raises(DataError, match="convergence is in seconds"):
            convergence(points, truth, 1.0, dt)


def test_everything_measured():
    modes = np.stack([FOUND, XY[ROWS[:, None] + np.arange(1, T + 1)]], 1)
    found = measure_forecasts(modes, XY, AGENT, ROWS, DT, resamples=50)
    assert found["best_fde"]["value"] == pytest.approx(0)
    assert found["ade"]["value"] == pytest.approx(errors(FOUND, modes[:, 1])[0].mean())
    assert found["ade"]["low"] <= found["ade"]["value"] <= found["ade"]["high"]
    points, instant = leads(AGENT, ROWS, FOUND)
    assert found["instants"] == len(instant)
    assert found["dispersion"]["value"] == pytest.approx(dispersion(points).mean())
    assert found["convergence"]["5"]["value"] == pytest.approx(convergence(points, XY[instant], 5, DT).mean())
    alone = measure_forecasts(modes[:1], XY, AGENT, ROWS[:1], DT, resamples=0)
    assert alone["dispersion"]["value"] is None
    with pytest.raises(DataError, match="no forecast to measure on"):
        measure_forecasts(modes[:0], XY, AGENT, ROWS[:0], DT)


def test_going_straight_on():
    line = np.stack([np.arange(10.0), 2 * np.arange(10.0)], -1)
    assert np.allclose(straight_on(line, np.array([3, 4]), 3), [line[4:7], line[5:8]])
