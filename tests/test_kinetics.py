"Rates and landscapes: exact answers, identities, error bars."
import numpy as np
import pytest

from foldbook.committor import count_transitions
from foldbook.kinetics import (Cuts, Curve, Estimate, bootstrap, cuts, diffusion, diffusive_committor,
                               diffusive_transitions, free_energy, natural_coordinate,
                               natural_free_energy, plot_curve, rates, units)
from foldbook.systems import dw1d, lshape2d, persist1d
from foldbook.zq import cut_profile, cut_profiles

def slow(*values): return pytest.param(*values, marks=pytest.mark.slow)


def observed(s, n, seed, k=1, **options):
    paths = s.sample(n, k, seed=seed, **options)
    return paths, [s.states[p] for p in paths], [s.committor[p] for p in paths], [s.backward_committor[p]
                                                                                  for p in paths]


@pytest.mark.parametrize('system, flux', [
    (dw1d, 'counted'), (persist1d, 'committor'), slow(dw1d, 'committor'), slow(lshape2d, 'counted'),
    slow(lshape2d, 'committor'), slow(persist1d, 'counted')])
def test_rates_within_three_errors(system, flux):
    "Eight seeds, four numbers each: deviations in units of the error bar are what a normal law allows."
    z = []
    for seed in range(8):
        _, states, q, back = observed(system(), 100_000, seed)
        t = rates(q, states, backward=back, flux=flux, n_bootstrap=60)
        z.append((t.value - np.array(system().rates)) / t.se)
    z = np.array(z)
    assert (abs(z) < 3).mean() > .95 and abs(z).max() < 4.5
    assert abs(z.mean(0)).max() < 3 / 8**.5 + .5 and .5 < z.std() < 1.6


def test_rates_by_hand():
    r, s = [np.array([0, .5, .5, 1, .5, 0])], [np.array([0, -1, -1, 1, -1, 0])]
    t = rates(r, s, spacing=2., n_bootstrap=0)
    assert t.value.tolist() == pytest.approx([1 / 10, 2 * 2.5, 2 * 2.5, 2 * .75]) and t.se.isna().all()
    assert rates(r, s, flux='committor', n_bootstrap=0).value['j'] == pytest.approx((.5 + .25 - .25) / 5)
    assert rates(r * 2, s * 2, weights=[np.ones(6), np.zeros(6)],
                 n_bootstrap=0).value.tolist() == pytest.approx(rates(r, s, n_bootstrap=0).value.tolist())


def test_committor_flux_is_the_mean_level_of_zq():
    _, states, q, _ = observed(dw1d(), 50_000, 4)
    z = cut_profiles(q, states, lags=[1], n_bins=4000).zq[0].mean()
    assert rates(q, states, flux='committor', n_bootstrap=0).value['j'] * 49_999 == pytest.approx(z, rel=.01)


def test_units():
    s = [np.array([-1, 0, 1, 0, 1, -1, 0]), np.array([1]), np.array([-1, -1])]
    assert [u.tolist() for u in units(s)] == [[0, 0, 0, 1, 1, 1, 2], [3], [4, 4]]
    assert [u.tolist() for u in units(s, 'trajectories')] == [[0] * 7, [1], [2, 2]]
    with pytest.raises(ValueError, match='cycles'): units(s, 'frames')


def test_bootstrap_weighs_units():
    s = [np.array([0, 1, 0, 1, 0, 1])]
    totals = []
    e = bootstrap(lambda w: totals.append(w) or w.sum(), s, n_bootstrap=200)
    assert isinstance(e, Estimate) and e.value == 6 and len(totals) == 201 and all(np.isin(w, range(7)).all()
        and w[0] == w[1] and w[2] == w[3] for w in totals)
    assert np.isnan(bootstrap(lambda w: w.sum(), s, n_bootstrap=0).se) and np.isnan(bootstrap(lambda w: w.sum(),
        [np.array([0, -1])], n_bootstrap=9).se)
    assert bootstrap(lambda w: w[0], s, n_bootstrap=50, seed=1).se == bootstrap(lambda w: w[0], s, n_bootstrap=50,
        seed=1).se != bootstrap(lambda w: w[0], s, n_bootstrap=50, seed=2).se


@pytest.mark.parametrize('resample, k, n', [('cycles', 1, 40_000), slow('trajectories', 400, 100)])
def test_error_bars_are_those_of_repetition(resample, k, n):
    """Spread over thirty independent data sets against the mean error bar, for the flux and for the free energy at
    the barrier."""
    s, answers = dw1d(), []
    for seed in range(30):
        paths, states, q, _ = observed(s, n, seed, k)
        t = rates(q, states, flux='committor', resample=resample, n_bootstrap=30)
        F = free_energy(cuts([s.coordinates[p, 0] for p in paths], states,
                             n_bins=np.array([-1.2, -.975, .025, 1.025, 1.2]), resample=resample, n_bootstrap=15))
        answers.append([(t.value['j'], t.se['j']), (F.value[1], F.se[1])])
    a = np.array(answers)
    ratio = a[:, :, 1].mean(0) / a[:, :, 0].std(0)
    assert (ratio > .65).all() and (ratio < 1.5).all()


def spread(s, paths, seed=0):
    x = np.unique(s.coordinates[:, 0])
    width = x[1] - x[0]
    return [s.coordinates[p, 0] + np.random.default_rng(seed).uniform(-width / 2, width / 2, len(p))
            for p in paths], width


def test_profiles_are_what_the_chain_makes_them():
    "Z_C,alpha along the grid against its exact expectation, summed over all pairs of microstates."
    s = dw1d()
    x, (paths, states, _, _) = s.coordinates[:, 0], observed(s, 200_000, 6)
    levels = np.arange(-.975, 1, .1)
    c = cuts([x[p] for p in paths], states, n_bins=np.r_[-1.9, levels, 1.9], n_bootstrap=30)
    pairs, jump = s.stationary[:, None] * s.transition, abs(x[None] - x[:, None])
    for k, alpha in enumerate((-1, 0, 1)):
        power = np.where(jump > 0, np.maximum(jump, 1e-9)**alpha, 0)
        exact = np.array([(pairs * power)[(np.minimum.outer(x, x) < v) & (np.maximum.outer(x, x) > v)].sum() / 2
                          for v in levels]) * 199_999
        z = (c.z[0, k] - exact) / c.z[1:, k].std(0)
        assert abs(z).max() < 4 and np.sqrt((z**2).mean()) < 2


def test_landscape_of_the_double_well():
    s = dw1d()
    paths, states, _, _ = observed(s, 300_000, 7)
    x, width = spread(s, paths)
    grid, c = s.coordinates[:, 0], cuts(x, states, n_bins=np.linspace(-1.2, 1.2, 49))
    F, D, D0, step = free_energy(c), diffusion(c), diffusion(c, 0), grid[None] - grid[:, None]
    assert np.abs(F.value - np.interp(F.x, grid, -np.log(s.stationary / width))).max() < .25
    variance = (s.transition * step**2).sum(1) / 2 + width**2 / 12
    barrier = abs(D.x) < .6
    error = [(d.value / np.interp(d.x, grid, variance) - 1)[barrier] for d in (D, D0)]
    assert all(abs(e).max() < .25 and np.sqrt((e**2).mean()) < .08 for e in error)
    assert (F.se > 0).all() and (F.se < .2).all() and (D.se < .05 * D.value.mean() + D.value / 10).all()


def test_free_energy_does_not_depend_on_bins():
    paths, states, _, _ = observed(dw1d(), 30_000, 8)
    x = spread(dw1d(), paths)[0]
    a, b = (free_energy(cuts(x, states, n_bins=np.linspace(-1, 1, n), n_bootstrap=0)) for n in (11, 101))
    assert np.allclose(a.value, b.value[9::10]) and np.isnan(a.se).all()


def test_units_of_time():
    "Half the spacing: twice the diffusion, and a natural coordinate shorter by a root."
    paths, states, _, _ = observed(dw1d(), 30_000, 8)
    x = spread(dw1d(), paths)[0]
    a, b = (cuts(x, states, n_bins=np.linspace(-1, 1, 41), spacing=v, n_bootstrap=0) for v in (1., .5))
    assert np.allclose(diffusion(b).value, 2 * diffusion(a).value) and np.allclose(natural_coordinate(b).value,
                                                                                   natural_coordinate(a).value / 2**.5)
    assert np.allclose(free_energy(a).value, free_energy(b).value)


def test_natural_coordinate():
    "A stretched coordinate has the natural coordinate of the original, and diffusion 1 along it."
    paths, states, _, _ = observed(dw1d(), 200_000, 9)
    x = spread(dw1d(), paths)[0][0]
    edges = np.linspace(-1.2, 1.2, 97)
    a, b = cuts([x], states, n_bins=edges, n_bootstrap=5), cuts([np.exp(x)], states, n_bins=np.exp(edges),
                                                                n_bootstrap=5)
    assert np.abs(natural_coordinate(a).value
                  - natural_coordinate(b).value).max() < .04 * natural_coordinate(a).value[-1]
    assert np.abs(natural_free_energy(a).value - natural_free_energy(b).value).max() < .15
    n = natural_coordinate(a)
    again = cuts([np.interp(x, n.x, n.value)], states, n_bins=np.linspace(1, n.value[-1] - 1, 40), n_bootstrap=0)
    assert np.abs(diffusion(again).value - 1).max() < .2


@pytest.mark.parametrize('system', [dw1d, lshape2d])
def test_resistance_identity(system):
    """1/N_AB = int dx / Z_C1 along the committor, and for the double well along any function of x; not for x of the
    corner."""
    s = system()
    paths, states, q, _ = observed(s, 300_000, 11)
    counted = count_transitions(states)[0]
    c = cuts(q, states, n_bins=1000, n_bootstrap=20)
    n = diffusive_transitions(c, c.x[0], c.x[-1])
    assert abs(n.value / counted - 1) < .15 and 0 < n.se < .15 * counted
    x = spread(s, paths)[0]
    c, edge = cuts(x, states, n_bins=np.linspace(-1.2, 1.2, 241), n_bootstrap=0), .8 if system is lshape2d else 1.
    predicted = diffusive_transitions(c, -edge, edge).value
    assert predicted > 2 * counted if system is lshape2d else abs(predicted / counted - 1) < .25
    if system is dw1d:
        model = diffusive_committor(c, -1, 1)
        assert np.abs(model.value - np.interp(model.x, s.coordinates[:, 0],
                                              s.committor)).max() < .05 and (np.diff(model.value) >= 0).all()


def test_weights_give_back_equilibrium():
    "Exact weights on biased starts: rates and free energy of equilibrium, within errors; without them, not."
    s = dw1d()
    start = s.stationary * np.where(s.coordinates[:, 0] < .2, 5, 1)
    paths, states, q, _ = observed(s, 33, 3, 4000, start=start / start.sum())
    law = np.zeros(len(start))
    law += start / start.sum()
    for _ in range(31): law = np.vstack([np.atleast_2d(law), np.atleast_2d(law)[-1] @ s.transition])
    w = s.stationary / law.mean(0)
    weights = [w[p] for p in paths]
    options = dict(flux='committor', resample='trajectories', n_bootstrap=40)
    good, bad = (rates(q, states, weights=v, **options) for v in (weights, None))
    z = lambda t: (t.value - np.array(s.rates)) / t.se
    assert abs(z(good)).max() < 3 and abs(z(bad)).max() > 5
    x, width = spread(s, paths)
    wells = lambda v: np.diff(np.interp([-1, 1],
                                        *free_energy(cuts(x, states, n_bins=np.linspace(-1.3, 1.3, 53), weights=v,
                                                          resample='trajectories', n_bootstrap=0))[:2]))[0]
    assert abs(wells(weights)) < .15 < 1 < wells(None)


def test_windows_do_not_cross_seams():
    "Profiles of an ensemble are the sum of those of its trajectories, and length-1 trajectories add nothing."
    rng = np.random.default_rng(0)
    r = [rng.random(50), rng.random(1), rng.random(20)]
    s, edges = [np.full(len(x), -1) for x in r], np.linspace(0, 1, 11)
    for lag in (1, 7):
        c = cuts(r, s, lag=lag, n_bins=edges, n_bootstrap=0)
        for k, alpha in enumerate((-1, 0, 1)):
            parts = sum(cut_profile([x], lag, alpha, None, edges)[1][:-1] * 1. for x in (r[0], r[2]))
            assert np.allclose(c.z[0, k], parts, rtol=.05 if alpha < 0 else 1e-12)
        assert isinstance(c, Cuts) and c.window == lag and c.total[0] == (70 - 2 * lag) / lag


def test_bad_input():
    r, s = [np.array([0, .5, 1])], [np.array([0, -1, 1])]
    with pytest.raises(ValueError, match='flux'): rates(r, s, flux='guess')
    with pytest.raises(ValueError, match='no transition'): rates([np.array([.5, .5])], [np.array([-1, -1])])
    with pytest.raises(ValueError, match='same frame'): rates(r, [np.array([0, 1])])
    with pytest.raises(ValueError, match='weights'): rates(r, s, weights=[np.ones(2)])
    with pytest.raises(ValueError, match='lag=3'): cuts(r, s, lag=3)
    with pytest.raises(ValueError, match='exponent'): diffusion(cuts(r, s, n_bootstrap=0), 2)
    with pytest.raises(ValueError, match='levels'): diffusive_committor(cuts(r, s, n_bootstrap=0), -1, 1)


def test_pictures():
    import matplotlib
    matplotlib.use('Agg')
    ax = plot_curve(Curve(np.arange(3.), np.arange(3.), np.ones(3)), label='a')
    assert len(ax.lines) == 1 and len(ax.collections) == 1
