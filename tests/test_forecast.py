"Forecasts against exact optima, against statsmodels and scikit-learn, and against malformed input."
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.linalg import toeplitz

from foldbook import data
from foldbook.forecast import (FORECASTERS, NETWORKS, bootstrap_errors, compare, forecaster, load_forecaster,
                               protocol_ratio, save_forecaster)
from foldbook.lines import Arima, Autoregression, Drift, Linear, Shrink, Static, VectorAutoregression
from foldbook.neural import Network
from foldbook.windows import PROCESSES, Windows, forecasting_problem, one_frame_optimum, read_positions, rmsd

LEADS = (1, 5, 30)
BRIEF = dict(max_epochs=1, steps_per_epoch=2) # a training that is a training


@pytest.fixture(scope='module')
def rest():
    d = data.fetch('cln025_implicit', progress=False)
    return read_positions(d.trajectories, d.topology)[0]


@pytest.fixture(scope='module')
def pulled():
    d = data.fetch('ala_smd', progress=False)
    return read_positions(d.trajectories, d.topology)[0]


def weights_of(process, lead, history): # exact, on the past oldest first; for driven processes on the steps
    g = process.autocovariance(lead + history + 1)
    if process.drift is None: return np.linalg.lstsq(toeplitz(g[:history]), g[lead:lead + history], rcond=None)[0][::-1]
    c = np.array([g[k + 1:k + 1 + lead].sum() for k in range(history - 1)])
    return np.linalg.lstsq(toeplitz(g[:history - 1]), c, rcond=None)[0][::-1]


def exact_forecast(process, w):
    "What someone would say who knows the process."
    past, a = w.past.astype(float), weights_of(process, w.lead, w.history)
    if process.drift is None: return np.einsum('nhij,h->nij', past, a)[:, None]
    steps = np.diff(past, axis=1) - process.drift
    return (past[:, -1] + w.lead*process.drift + np.einsum('nhij,h->nij', steps, a))[:, None]


def score(model, p):
    return np.sqrt(np.square(rmsd(model.fit(p.train, p.validation).predict(p.test), p.test, 'coordinate')).mean())


@pytest.mark.parametrize('name', PROCESSES)
@pytest.mark.parametrize('lead', LEADS)
def test_linear_forecasters_reach_the_optimum(name, lead):
    process = PROCESSES[name]
    p = forecasting_problem(process.sample(20_000, n_atoms=4, n_trajectories=3, seed=lead), lead, align=False)
    exact = np.square(rmsd(exact_forecast(process, p.test), p.test, 'coordinate'))
    able = [Autoregression(), VectorAutoregression()] + [Shrink()]*(name in ('fast', 'slow'))
    for model in able:
        e = np.square(rmsd(model.fit(p.train, p.validation).predict(p.test), p.test, 'coordinate'))
        ratio = np.sqrt(e.mean()/exact.mean())
        blocks = (e - exact)[:len(e)//20*20].reshape(20, -1).mean(1)/exact.mean()/2
        assert ratio < 1.03
        assert ratio > 1 - 4*blocks.std(ddof=1)/np.sqrt(20) # never better but by chance


@pytest.mark.parametrize('name,order', [('fast', (2, 0, 1)), ('underdamped', (2, 0, 1)), ('driven', (2, 1, 1))])
def test_arima_reaches_the_optimum(name, order):
    process = PROCESSES[name]
    p = forecasting_problem(process.sample(8000, n_atoms=1, n_trajectories=3, seed=2), 5, align=False)
    exact = score_of(exact_forecast(process, p.test), p)
    assert 0.97 < score(Arima(order), p)/exact < 1.03


def score_of(forecast, p): return np.sqrt(np.square(rmsd(forecast, p.test, 'coordinate')).mean())


@pytest.mark.parametrize('name, process', [('ffn', 'driven'), ('lstm', 'underdamped'), ('lstm_structure', 'fast'),
                                           *(pytest.param(n, p, marks=pytest.mark.slow) for n in NETWORKS
                                             for p in ('fast', 'underdamped', 'driven'))])
def test_networks_reach_the_optimum(name, process):
    q = PROCESSES[process]
    p = forecasting_problem(q.sample(12_000, n_atoms=3, n_trajectories=3, seed=4), 5, align=False)
    ratio = score(forecaster(name, max_epochs=8, patience=3), p)/score_of(exact_forecast(q, p.test), p)
    assert 0.985 < ratio < 1.03 # 12,000 frames with 9 coordinates: 2e4 independent pairs or more, so 1 - 3*0.005


@pytest.mark.slow # the chapter trains two of them
@pytest.mark.parametrize('kind', ['ffn', 'gru', 'lstm', 'transformer'])
def test_networks_learn_what_their_start_does_not_know(kind):
    "From the shrinking forecast, which has no velocity, to the underdamped optimum."
    q = PROCESSES['underdamped']
    p = forecasting_problem(q.sample(12_000, n_atoms=3, n_trajectories=3, seed=6), 5, align=False)
    learned = score(Network(kind, skip='shrink', max_epochs=12, patience=5), p)
    assert score(Shrink(), p) > 2*learned
    assert learned < 1.05*score_of(exact_forecast(q, p.test), p)


def test_nothing_of_the_future_is_read(rest):
    "Frames after the last known one may be anything."
    p = forecasting_problem(rest, 15)
    x = p.test.series[0]
    spoiled = x.copy()
    spoiled[200:] = np.random.default_rng(0).normal(size=spoiled[200:].shape)
    known = 200 - 5 + 1 # windows that end before frame 200
    for name in ('shrink', 'ar', 'var', 'arima', 'lstm', 'transformer', 'lstm_structure'):
        few = [w if name != 'arima' else Windows([s[:, :2] for s in w.series], w.lead)
               for w in (p.train, p.validation, p.test)]
        model = forecaster(name, **(BRIEF if name in NETWORKS else {})).fit(*few[:2])
        other = Windows([spoiled[:, :few[2].series[0].shape[1]]], 15)
        np.testing.assert_allclose(model.predict(few[2])[:known], model.predict(other)[:known], atol=1e-5, err_msg=name)


def test_true_lead():
    "A series that jumps once is known to have jumped only when the jump is in the past."
    x = np.zeros((60, 1, 3), np.float32)
    x[30:] = 1
    w = Windows([x], lead=7, history=3)
    error = rmsd(Static().fit(w, w).predict(w), w)
    assert np.flatnonzero(error > 0).tolist() == list(range(30 - 7 - 2, 30 - 2)) # last known frame 23 ... 29


def test_windows_of_several_frames(rest):
    p = forecasting_problem(rest, 3, window=4)
    single = [forecasting_problem(rest, 3 + j, gap=3 + 5 + 4) for j in range(4)]
    for make in (Shrink, Drift, Linear, Autoregression):
        f = make().fit(p.train, p.validation).predict(p.test)
        assert f.shape == (len(p.test), 4, 10, 3)
    for name in ('lstm', 'lstm_structure', 'lstm_coordinate'):
        f = forecaster(name, skip='shrink', max_epochs=1, steps_per_epoch=2).fit(p.train, p.validation)
        assert f.predict(p.test).shape == (len(p.test), 4, 10, 3)
    many, one = (Linear().fit(q.train, q.validation).predict(q.test) for q in (p, single[3]))
    n = min(len(many), len(one))
    np.testing.assert_allclose(many[:n, 3], one[:n, 0], atol=1e-4)


def test_autoregression_is_least_squares(rest):
    "Against scikit-learn, coordinate by coordinate, without a ridge."
    from sklearn.linear_model import LinearRegression
    p = forecasting_problem(rest, 5)
    model = Autoregression(ridges=(1e-12,)).fit(p.train, p.validation)
    ours = model.predict(p.test)
    past, future, test = (x.astype(float).reshape(len(x), -1, 30) for x in (p.train.past, p.train.future, p.test.past))
    theirs = np.stack([LinearRegression().fit(past[:, :, d], future[:, 0, d]).predict(test[:, :, d])
                       for d in range(30)], 1)
    assert model.learned['weights'][:, 0].any() # levels, not steps
    assert np.abs(ours.reshape(-1, 30) - theirs).max() < 1e-4


def test_arima_forecasts_as_statsmodels_does():
    from statsmodels.tsa.arima.model import ARIMA
    x = PROCESSES['underdamped'].sample(900, n_atoms=1, seed=3)
    p = forecasting_problem(x, 6, align=False)
    model = Arima().fit(p.train, p.validation)
    test = p.test.series[0][:, 0, 0].astype(float) - model.learned['mean'][0]
    s = model.learned['scale'][0]
    filtered = ARIMA(test[:101]/s, order=(2, 0, 1), trend='n').filter(model.learned['parameters'][0])
    theirs = filtered.forecast(6)[-1]*s + model.learned['mean'][0]
    assert abs(model.predict(p.test)[100 - 4, 0, 0, 0] - theirs) < 1e-4


@pytest.mark.slow # the stored comparison of the chapter asserts the same
def test_real_protein(rest):
    "Every network beats static and stays within two percent of the best straight line."
    c = compare(rest, (1, 15), ('shrink', 'ar', 'var', 'ffn', 'lstm', 'lstm_structure'),
                options={m: dict(max_epochs=6) for m in ('ffn', 'lstm', 'lstm_structure')}, n_workers=1, progress=False)
    t = c.table(100)
    best = t[t.model.isin(['shrink', 'ar', 'var'])].groupby('lead').rmsd_nm.min()
    nets = t[t.model.isin(NETWORKS)]
    assert (nets.over_static < 1).all() and (nets.rmsd_nm.to_numpy() < 1.02*best[nets.lead].to_numpy()).all()
    np.testing.assert_allclose(t.rmsd_nm, np.sqrt(3)*t.rmsd_study_nm)


def test_flawed_protocol_loses(rest):
    d = data.fetch('cln025_implicit_10fs', progress=False)
    fast = [x[:4000] for x in read_positions(d.trajectories, d.topology)[0]]
    flaws = ('no superposition', 'no scaling', 'no skip connection', 'lead off by one', 'few steps')
    assert protocol_ratio(fast, 15, flaws) > 1 > protocol_ratio(fast, 15, max_epochs=2)
    with pytest.raises(ValueError, match='not a known flaw'): protocol_ratio(fast, 15, ('no luck',))


def test_pulled_helix(pulled):
    c = compare(pulled, (15, 60), ('drift', 'linear', 'ar', 'var'), n_workers=1, progress=False)
    t = c.table(100).set_index(['lead', 'model']).over_static
    for lead in (15, 60):
        assert t[lead, 'var'] < t[lead, 'drift'] < 1 < t[lead, 'linear'] and t[lead, 'ar'] < t[lead, 'drift']


def test_same_numbers_twice(rest):
    p = forecasting_problem([rest[0][:1500]], 5)
    one, two, other = (Network(seed=s, skip='static', max_epochs=2).fit(p.train, p.validation) for s in (3, 3, 4))
    np.testing.assert_array_equal(one.predict(p.test), two.predict(p.test))
    assert one.history == two.history != other.history


def test_workers_give_what_one_process_gives(rest):
    given = dict(leads=(5,), models=('ar', 'lstm'), options=dict(lstm=BRIEF), progress=False)
    one, two = compare(rest, n_workers=1, **given), compare(rest, n_workers=2, **given)
    for key in one.errors: np.testing.assert_array_equal(one.errors[key], two.errors[key])


@pytest.mark.parametrize('name', [n for n in FORECASTERS if n != 'arima'])
def test_saved_and_loaded(name, rest, tmp_path):
    p = forecasting_problem([rest[0][:1200]], 2)
    model = forecaster(name, **(BRIEF if name in NETWORKS else {})).fit(p.train, p.validation)
    save_forecaster(model, tmp_path)
    np.testing.assert_array_equal(load_forecaster(tmp_path).predict(p.test), model.predict(p.test))
    assert not [f for f in tmp_path.iterdir() if f.name.startswith('.')]


def test_a_killed_comparison_resumes(tmp_path):
    "A process is killed while its network trains; the same call again ends with the numbers of one undisturbed."
    series = PROCESSES['fast'].sample(1500, n_atoms=2, seed=1)
    given = dict(leads=(2,), models=('ar', 'lstm'), options=dict(lstm=dict(max_epochs=60, patience=60)), align=False,
                 n_workers=1, progress=False)
    expected = compare(series, **given)
    program = f"""from foldbook.forecast import compare
from foldbook.windows import PROCESSES
compare(PROCESSES['fast'].sample(1500, n_atoms=2, seed=1), directory={str(tmp_path)!r}, **{given!r})"""
    child = subprocess.Popen([sys.executable, '-c', program])
    checkpoint = tmp_path/'lead-0002'/'lstm'/'training.ckpt'
    while not checkpoint.exists() and child.poll() is None: time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL # it was still at work
    again = compare(series, directory=tmp_path, **given)
    for key, e in expected.errors.items(): np.testing.assert_array_equal(e, again.errors[key])
    assert not checkpoint.exists() and (tmp_path/'lead-0002'/'ar'/'errors.npz').exists()


def test_other_options_are_not_mixed_up(rest, tmp_path):
    given = dict(leads=(1,), models=('lstm',), n_workers=1, progress=False, directory=tmp_path)
    compare(rest, options=dict(lstm=BRIEF), **given)
    with pytest.raises(ValueError, match='was made with options'):
        compare(rest, options=dict(lstm=dict(max_epochs=2)), **given)


def test_static_error_has_the_bound(rest):
    "No shrinking forecast is better than the one-frame optimum on the same frames."
    for lead in (1, 15, 120):
        p = forecasting_problem(rest, lead, gap=130)
        assert score(Shrink(), p)/score_of(np.repeat(p.test.last[:, None], 1, 1), p) > one_frame_optimum(p) - 1e-3


def test_bootstrap_finds_the_error_of_a_correlated_mean():
    "AR(1) errors: the variance of their mean is known."
    phi, n = 0.9, 20_000
    z = np.random.default_rng(5).normal(size=n)*np.sqrt(1 - phi**2)
    for t in range(1, n): z[t] += phi*z[t-1]
    known = np.sqrt((1 + phi)/(1 - phi)/n)
    draws = bootstrap_errors(dict(a=np.sqrt(z - z.min())), block=1, n_resamples=400)
    assert 0.8 < np.square(draws.a).std()/known < 1.2


shapes = st.tuples(st.integers(0, 40), st.integers(0, 3), st.integers(2, 4))


@settings(deadline=None, max_examples=60)
@given(shapes, st.integers(-1, 12), st.integers(0, 6), st.integers(0, 3), st.booleans())
def test_any_input_gives_an_answer_or_a_sentence(shape, lead, history, window, align):
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    try: p = forecasting_problem([x], lead, history, window, align)
    except ValueError as e:
        assert len(str(e)) > 20
        return
    for make in (Static, Shrink, Drift, Autoregression, VectorAutoregression):
        assert np.isfinite(make().fit(p.train, p.validation).predict(p.test)).all()


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 299), st.integers(0, 2), st.integers(0, 2), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_a_bad_number_is_named(frame, atom, axis, value):
    x = np.random.default_rng(1).normal(size=(300, 3, 3))
    x[frame, atom, axis] = value
    with pytest.raises(ValueError, match=f'trajectory 1, frame {frame}, atom {atom}:'):
        forecasting_problem([np.random.default_rng(2).normal(size=(300, 3, 3)), x], 2)


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 2), st.integers(0, 5))
def test_few_atoms(n_atoms, seed):
    "One atom cannot be superposed; as it is, it can be forecast."
    x = PROCESSES['fast'].sample(600, n_atoms=n_atoms, seed=seed)
    with pytest.raises(ValueError, match='align=False'): forecasting_problem(x, 2)
    p = forecasting_problem(x, 2, align=False)
    for name in ('shrink', 'ar', 'var'):
        assert forecaster(name).fit(p.train, p.validation).predict(p.test).shape == (len(p.test), 1, n_atoms, 3)


def test_an_atom_that_never_moves(rest):
    x = [a.copy() for a in rest]
    x[0][:, 3] = 0.5
    p = forecasting_problem(x, 5, align=False)
    for name in ('shrink', 'ar', 'var', 'lstm', 'lstm_structure'):
        f = forecaster(name, **(BRIEF if name in NETWORKS else {})).fit(p.train, p.validation).predict(p.test)
        assert np.isfinite(f).all()
        if name in ('shrink', 'ar'): np.testing.assert_allclose(f[:, :, 3], 0.5, atol=1e-4)


@pytest.mark.parametrize('x,message', [
    (np.zeros((1, 5, 3)), 'span'), (np.zeros((400, 5, 3)), 'nothing moves'), (np.zeros((0, 5, 3)), 'span'),
    (np.zeros((400, 5)), r'positions are \(frames, atoms, 3\)'), (np.zeros((400, 0, 3)), 'positions are')])
def test_what_cannot_be_forecast(x, message):
    with pytest.raises(ValueError, match=message): forecasting_problem([x], 5, align=False)
    with pytest.raises(ValueError, match='at least one'): forecasting_problem([], 5)


def test_trajectories_must_have_the_same_atoms(rest):
    with pytest.raises(ValueError, match='trajectory 1 has shape'): forecasting_problem([rest[0], rest[0][:, :5]], 5)


def test_damaged_file_is_named(tmp_path, rest):
    d = data.fetch('cln025_implicit', progress=False)
    bad = tmp_path/'bad.xtc'
    bad.write_bytes(b'not a trajectory')
    with pytest.raises(ValueError, match='bad.xtc'): read_positions([bad], d.topology)
    with pytest.raises(ValueError, match='stride=0'): read_positions(d.trajectories, d.topology, stride=0)


def test_directions_that_do_not_move_are_not_read(rest):
    """Superposition takes six directions; what rounding leaves of them must not be scaled up. On these parts it made
    a few forecasts ten times worse."""
    p = forecasting_problem(rest, 1, gap=20)
    e = rmsd(VectorAutoregression().fit(p.train, p.validation).predict(p.test), p.test)
    assert e.max() < 4*np.sqrt((e**2).mean())
