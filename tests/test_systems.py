"Markov systems: the exact answers satisfy their equations, and sampling agrees with them."
import subprocess
import sys
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given as hypothesis_given, settings, strategies as st

from foldbook.systems import (SYSTEMS, MarkovSystem, dw1d, given, history_committor, lshape2d, martingale_defect,
                              metropolis, persist1d, plot_system, sample_chain, shoot, solve_boundary, stationary)

quick = settings(deadline=None, max_examples=20)
every = pytest.mark.parametrize('name', SYSTEMS)


@every
def test_exact_answers(name):
    s = SYSTEMS[name]()
    P, pi, q = s.transition, s.stationary, s.committor
    assert np.allclose(P.sum(1), 1, atol=1e-12) and (P >= 0).all()
    assert np.allclose(pi @ P, pi, atol=1e-12) and np.isclose(pi.sum(), 1) and (pi > 0).all()
    assert martingale_defect(s, q) < 1e-12 < martingale_defect(s, q**2)
    assert (q[s.states == 0] == 0).all() and (q[s.states == 1] == 1).all()
    assert np.isclose(1 / s.rates.flux, s.rates.mfpt_ab + s.rates.mfpt_ba)
    for tau, flag in ((s.mfpt_to_a, 0), (s.mfpt_to_b, 1)):
        outside = s.states != flag
        assert np.allclose((P @ tau + 1)[outside], tau[outside], rtol=1e-9) and (tau[~outside] == 0).all()


@pytest.mark.parametrize('name, n, mtpt', [('dw1d', 73, 34.37), ('lshape2d', 625, 150.65), ('persist1d', 82, 31.67)])
def test_published_numbers(name, n, mtpt):
    s = SYSTEMS[name]()
    assert len(s.states) == n and s.rates.mtpt == pytest.approx(mtpt, abs=0.005)


def test_flux_is_the_same_in_both_directions():
    for make in SYSTEMS.values():
        s = make()
        back = s.stationary @ ((s.states == 1) * (1 - s.transition @ s.committor))
        assert back == pytest.approx(s.rates.flux, rel=1e-9)


def test_time_reversal():
    for s in (dw1d(), lshape2d()):
        flow = s.stationary[:, None] * s.transition
        assert np.allclose(flow, flow.T, atol=1e-15) and np.allclose(s.backward_committor, 1 - s.committor, atol=1e-6)
    s = persist1d()
    q, back = s.committor.reshape(-1, 2), s.backward_committor.reshape(-1, 2)
    assert np.allclose(back, 1 - q[:, ::-1], atol=1e-9) and np.abs(back - (1 - q)).max() > 0.3
    naive = s.stationary @ (s.committor * (1 - s.committor)) / s.rates.flux
    assert naive == pytest.approx(25.47, abs=0.005)


@quick
@hypothesis_given(st.lists(st.floats(-3, 3), min_size=4, max_size=12), st.integers(0, 10**6))
def test_any_metropolis_chain_keeps_boltzmann(energy, seed):
    U, n = np.array(energy), len(energy)
    K = metropolis(U, np.array([[i - 1, i + 1 if i + 1 < n else -1] for i in range(n)]))
    pi = stationary(K)
    assert np.allclose(pi, np.exp(-U) / np.exp(-U).sum(), rtol=1e-6)
    assert np.allclose(pi[:, None] * K, (pi[:, None] * K).T, atol=1e-12)
    q = solve_boundary(K, np.r_[0, np.full(n - 2, np.nan), 1])
    assert (np.diff(q) > -1e-12).all()
    path, = sample_chain(K, [1], [50], seed)
    assert len(path) == 50 and (np.abs(np.diff(path)) <= 1).all()


@every
def test_sampled_rates(name):
    "Transitions, passage times and occupation of 2e5 frames within 3 standard errors over 8 trajectories."
    s = SYSTEMS[name]()
    paths = s.sample(200_000, 8, seed=11)
    flags = [s.states[p] for p in paths]
    n_ab = np.array([(np.diff(f[f >= 0]) == 1).sum() for f in flags])
    assert abs(n_ab.mean() - 2e5 * s.rates.flux) < 3 * n_ab.std(ddof=1) / 8**.5
    waits, transits = [], []
    for f in flags:
        t = np.flatnonzero(f >= 0)
        c = np.flatnonzero(np.diff(f[t]))
        leave, arrive = t[c], t[c + 1]
        waits += list(np.diff(arrive)[f[arrive[:-1]] == 0])
        transits += list((arrive - leave)[f[leave] == 0])
    for x, exact in ((waits, s.rates.mfpt_ab), (transits, s.rates.mtpt + 1)):
        assert abs(np.mean(x) - exact) < 3 * np.std(x) / len(x)**.5
    share = np.array([(f == 0).mean() for f in flags])
    assert abs(share.mean() - s.stationary[s.states == 0].sum()) < 3.5 * share.std(ddof=1) / 8**.5


@every
def test_one_step_frequencies(name):
    "The sampler draws from the rows of the matrix: chi-squared over the most visited state."
    s = SYSTEMS[name]()
    i = int(np.argmax(s.stationary))
    after = np.array([p[1] for p in s.sample(2, 20_000, seed=5, start=i)])
    expected = 20_000 * s.transition[i]
    counts = np.bincount(after, minlength=len(expected))
    assert (counts[expected == 0] == 0).all()
    k = expected > 5
    chi2 = ((counts - expected)[k]**2 / expected[k]).sum()
    assert chi2 < k.sum() + 4 * (2 * k.sum())**.5


def test_shooting():
    s = lshape2d()
    for i in (312, 160):
        q = s.committor[i]
        assert abs(shoot(s, i, 3000, seed=2) - q) < 4 * (q * (1 - q) / 3000)**.5 + 1e-3


def test_ensembles():
    s = dw1d()
    assert {len(p) for p in s.sample(17, 5)} == {17}
    absorbed = s.sample(10**6, 300, seed=1, ensemble='absorbed')
    assert all((s.states[p[:-1]] < 0).all() and s.states[p[-1]] >= 0 for p in absorbed)
    lengths = np.array([len(p) for p in s.sample(40, 4000, seed=2, length='poisson')])
    assert abs(lengths.mean() - 40) < 4 * 40 / 4000**.5 and abs(lengths.std() / 40 - 1) < 0.1
    weights = (s.states == 1).astype(float)
    assert all(s.states[p[0]] == 1 for p in s.sample(3, 50, start=weights))
    assert [len(p) for p in s.sample(1, 3)] == [1, 1, 1]


def test_seeds():
    s = persist1d()
    a, b, c = (s.sample(100, 3, seed=k) for k in (4, 4, 5))
    assert all((x == y).all() for x, y in zip(a, b)) and not all((x == y).all() for x, y in zip(a, c))
    assert not (a[0] == a[1]).all()


@pytest.mark.parametrize('options, words', [
    (dict(ensemble='closed'), 'ensemble'), (dict(length='long'), 'length'), (dict(start=[-1]), 'microstates'),
    (dict(start=[82.5]), 'microstates'),
    (dict(start=np.zeros(82)), 'weights'), (dict(start=-np.ones(82)), 'weights'), (dict(n_frames=0), 'at least 1')])
def test_faults(options, words):
    with pytest.raises(ValueError, match=words): persist1d().sample(**{'n_frames': 5, **options})


def test_container():
    s = dw1d()
    assert dw1d() is s and isinstance(s, MarkovSystem)
    with pytest.raises(FrozenInstanceError): s.name = 'other'
    x, flags, q = s.observe(s.sample(20, 2))
    assert x[0].shape == (20, 1) and x[0].dtype == np.float32 and flags[1].dtype == np.int8 and ((0
        <= q[0]) & (q[0] <= 1)).all()
    assert np.allclose(s.reversed.sum(1), 1)


def test_hidden_direction():
    s = persist1d()
    seen = given(s)
    assert (s.stationary @ (seen - s.committor)) == pytest.approx(0, abs=1e-12)
    assert np.abs(seen - s.committor).max() > 0.1 and np.allclose(given(s, (0, 1)), s.committor)


def test_the_filter_by_enumeration():
    "A chain of six microstates of which an observer sees three classes: sum over all hidden paths of four frames."
    rng = np.random.default_rng(0)
    P = rng.dirichlet(np.ones(6), 6)
    small = MarkovSystem('small', np.array([[0, 0], [1, 0], [1, 1], [1, 2], [2, 0], [2, 1]], float), P,
                         np.array([0, -1, -1, -1, 1, -1], np.int8))
    seen = lambda i: (small.coordinates[i, 0], small.states[i])
    for path in small.sample(4, 12, seed=3):
        for t in range(4):
            weight = np.zeros(6)
            for hidden in np.ndindex(*(6,) * (t + 1)):
                if all(seen(i) == seen(j) for i, j in zip(hidden, path)):
                    weight[hidden[-1]] += small.stationary[hidden[0]] * np.prod([P[i, j]
                                                                                 for i, j in zip(hidden, hidden[1:])])
            assert history_committor(small, [path])[0][t] == pytest.approx(weight @ small.committor / weight.sum(),
                                                                           abs=1e-12)


@pytest.mark.parametrize('make', [lshape2d, persist1d])
def test_the_filter_is_the_best_forecast_of_the_record(make):
    """It passes Z_q, its log-loss lies between those of the exact committor and of the average over one frame, and
    it does not read the future."""
    from foldbook.committor import clamp
    from foldbook.zq import cut_profiles
    from foldbook.scores import scores
    s = make()
    paths = s.sample(100_000, 5, seed=32)
    S, q, r, frame = ([x[p] for p in paths] if x is not None else history_committor(s, paths)
                      for x in (s.states, s.committor, None, given(s)))
    loss = [scores(clamp(x, S), S).log_loss for x in (q, r, frame)]
    assert loss[0] < loss[1] + 1e-5 and loss[1] < loss[2] - .02
    result = cut_profiles(clamp(r, S), S)
    assert result.t_max < 3.1 and .15 < result.t_sd < 1.3
    assert np.allclose(history_committor(s, [paths[0][:500]])[0],
                       r[0][:500]) and np.allclose(history_committor(s, paths[:1], (0, 1))[0], q[0])
    assert all((x[f == 0] == 0).all() and np.allclose(x[f == 1], 1) for x, f in zip(r, S))


def test_pictures():
    import matplotlib
    matplotlib.use('Agg')
    assert len(plot_system(lshape2d()).axes) == 4 and len(plot_system(persist1d()).axes) == 2


def test_import_is_light():
    heavy = 'torch lightning mdtraj matplotlib pandas'
    code = f'import sys, foldbook.systems, foldbook.committor; print(sorted(set({heavy.split()}) & set(sys.modules)))'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                          check=True).stdout.strip() == '[]'


@every
def test_rates_close_a_cycle(name):
    from foldbook.systems import Rates
    rates = SYSTEMS[name]().rates
    assert isinstance(rates, Rates)
    assert np.isclose(rates.mfpt_ab + rates.mfpt_ba, 1/rates.flux)  # one cycle a transition
