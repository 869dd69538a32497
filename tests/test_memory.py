"Weights of frames, the committor with memory, and outer folds: against exact chains and against repetition."
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from foldbook.baselines import LogisticCommittor
from foldbook.committor import clamp, count_transitions
from foldbook.config import Config, check, frame_weights
from foldbook.distill import Student
from foldbook.evaluate import outer_folds
from foldbook.maps import DiffusiveCommittor, IsotonicCommittor
from foldbook.memory import FirstCommittor, MemoryCommittor, cross_fitted
from foldbook.npne import NonparametricCommittor
from foldbook.scores import base_log_loss, scores
from foldbook.systems import MarkovSystem, dw1d, lshape2d, metropolis
from foldbook.zq import cut_profiles


def chain(system, n, k=1, seed=0):
    paths = system.sample(n, k, seed=seed)
    return [system.coordinates[p].astype(float) for p in paths], [system.states[p] for p in paths], paths


@pytest.mark.parametrize('make, columns', [
    (IsotonicCommittor, 'line'), (DiffusiveCommittor, 'line'), (FirstCommittor, 'cells'), (LogisticCommittor, 'plane'),
    (partial(FirstCommittor, discrete=False), 'plane')], ids=str)
def test_a_weight_of_two_is_a_trajectory_given_twice(make, columns):
    x, states, paths = chain(lshape2d(), 8000, 4)
    x = dict(line=[v[:, 0] + v[:, 1] for v in x], cells=[p[:, None] for p in paths], plane=x)[columns]
    twice = make().fit([*x, x[0]], [*states, states[0]])
    heavy = make().fit(x, states, weights=[np.full(len(s), 2. if i == 0 else 1.) for i, s in enumerate(states)])
    a, b = (np.concatenate(m.transform(x, states)) for m in (twice, heavy))
    assert np.abs(a - b).max() < .02  # the least probability that is claimed depends on the number of events


def test_equal_weights_change_nothing():
    x, states, _ = chain(lshape2d(), 8000, 3)
    one, three = (MemoryCommittor().fit(x, states, weights=w).transform(x, states)
                  for w in (None, [np.full(len(s), 3.) for s in states]))
    assert np.abs(np.concatenate(one) - np.concatenate(three)).max() < 1e-3  # regularisation of the regression


def thinned(seed=0):
    "Excursions of a double well cut apart; of those that arrive in B four in five are lost, and the others weigh five."
    system, rng = dw1d(), np.random.default_rng(seed)
    (x,), (s,), (path,) = chain(system, 200_000, seed=seed)
    at = np.flatnonzero(s >= 0)
    parts = [(a, b) for a, b in zip(at, at[1:]) if b - a > 1]
    kept = [(a, b) for a, b in parts if s[b] == 0 or rng.random() < .2]
    cut = lambda v: [v[a:b + 1] for a, b in kept]
    weights = [np.full(b + 1 - a, 1. + 4*(s[b] == 1)) for a, b in kept]
    return cut(x), cut(s), cut(path), weights, cut(system.committor[path])


@pytest.fixture(scope='module')
def lost(): return thinned()


def off(r, exact, states): # root mean square error between the states
    inside = np.concatenate(states) < 0
    return float(np.sqrt(np.mean((np.concatenate(r) - np.concatenate(exact))[inside]**2)))


def test_weights_of_paths_bring_back_the_committor(lost):
    x, states, paths, weights, exact = lost
    line = [v[:, 0] for v in x]
    for fit, cells in ((IsotonicCommittor().fit, line), (FirstCommittor().fit, [p[:, None] for p in paths]),
                       (LogisticCommittor().fit, x)):
        biased = off(fit(cells, states).transform(cells, states), exact, states)
        mended = off(fit(cells, states, weights=weights).transform(cells, states), exact, states)
        assert mended < .6*biased and mended < .06, (fit, mended, biased)
    assert abs(base_log_loss(states, weights) - scores([np.full(len(s), .5) for s in states], states).log_loss) < .01
    assert scores(exact, states, weights).log_loss < scores([v**2 for v in exact], states, weights).log_loss


def test_a_student_and_the_teacher_count_frames_by_their_weight(lost):
    x, states, _, weights, exact = (v[:4000] for v in lost)
    how = dict(architecture='mlp', loss='outcome', max_epochs=8, components=None, keep=1, seed=1, lstd=True,
               calibrate=True)
    biased, mended = (off(Student(**how).fit(x, states, progress=False, weights=w).transform(x, states), exact, states)
                      for w in (None, weights))
    assert mended < .6*biased and mended < .06, (mended, biased)
    fitted = NonparametricCommittor(n_iterations=150, degree=3, history=(0,)).fit(x, states, progress=False,
                                                                                 weights=weights)
    assert off(fitted.r, exact, states) < .08


def tilted():
    "The double well, one step a frame, and the same with a tilt of 1.5 x kT."
    x, steps = np.linspace(-1.8, 1.8, 73), np.array([-2, -1, 1, 2])
    to = np.arange(73)[:, None] + steps
    to = np.where((to >= 0) & (to < 73), to, -1)
    U, flags = 3*(x**2 - 1)**2, dw1d().states
    make = lambda V: MarkovSystem('tilted', x[:, None], metropolis(V, to), flags, 1.)
    return make(U), make(U + 1.5*x)


def test_weights_of_a_known_bias_bring_back_the_unbiased_committor():
    free, biased = tilted()
    assert np.abs(free.committor - biased.committor).max() > .15
    (x,), (s,), (path,) = chain(biased, 400_000, seed=2)
    weights = [np.exp(1.5*x[:, 0])]
    points, inside = free.coordinates[:, 0], free.states < 0
    plain, weighted = (DiffusiveCommittor(60).fit([x[:, 0]], [s], w).transform([points])[0] for w in (None, weights))
    assert np.abs(plain - biased.committor)[inside].max() < .06
    assert np.abs(weighted - free.committor)[inside].max() < .06 < .12 < np.abs(plain - free.committor)[inside].max()


def test_a_bias_becomes_weights(tmp_path):
    lines = '\n'.join(f'{t} {x} {b}' for t, (x, b) in enumerate([(0, 0), (.5, 1), (1, 2)]))
    for name in 'ab': (tmp_path/name).write_text('#! FIELDS time x metad.bias\n' + lines + '\n')
    files = tuple(str(tmp_path/n) for n in 'ab')
    kinds = dict(series=files, unfolded='x < 0.1', folded='x > 0.9')
    config = Config(**kinds, bias=('metad.bias',), temperature=300.)
    from foldbook.config import described_series
    e, *_ = described_series(config)
    assert e.names == ('x',) and not set(config.baselines) & {'msm', 'vampnet', 'srv'}
    w = frame_weights(config, [3, 3], e.weights)
    assert np.allclose(w[0]/w[0][0], np.exp(np.arange(3)/(.008314462618*300)))
    assert np.isclose(np.concatenate(w).mean(), 1)
    with pytest.raises(ValueError, match='--temperature'): check(Config(**kinds, bias=('metad.bias',)))
    with pytest.raises(ValueError, match='choose one'):
        check(Config(**kinds, bias=('b',), weights=('b',), temperature=1.))
    with pytest.raises(ValueError, match="'msm' cannot count"):
        check(Config(**kinds, weights=('metad.bias',), baselines=('msm',)))
    with pytest.raises(ValueError, match='1 files of weights for 2'): check(Config(**kinds, weights=(files[0],)))


@given(st.integers(1, 6), st.integers(2, 6), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_folds_judge_every_frame_once_and_learn_from_none_of_it(k, folds, seed):
    _, states, _ = chain(dw1d(), 4000, k, seed)
    events = sum(count_transitions(states)) if all(any((s == f).any() for s in states) for f in (0, 1)) else 0
    if events < 2*folds:
        with pytest.raises(ValueError): outer_folds(states, folds)
        return
    seen = [np.zeros(len(s), int) for s in states]
    for s in outer_folds(states, folds):
        for b in s.test: seen[s.blocks[b][0]][slice(*s.blocks[b][1:])] += 1
        parts = [{(i, t) for i, a, b in (s.blocks[j] for j in part) for t in range(a, b)}
                 for part in (s.train, s.validation, s.test)]
        assert len(set.union(*parts)) == sum(map(len, parts))
        if s.validation: assert sum(count_transitions(s.take(states, 'validation'))) >= 10
    assert all((v == 1).sum() >= len(v) - 2*folds for v in seen)  # a stretch of one frame is left out


def test_cross_fitted_values_do_not_know_their_outcome():
    rng = np.random.default_rng(0)
    _, states, _ = chain(dw1d(), 20_000, 1, 3)
    noise = [rng.integers(0, 3000, (len(s), 1)) for s in states]  # states that say nothing
    known = FirstCommittor().fit(noise, states).transform(noise, states)
    honest, _ = cross_fitted(FirstCommittor, noise, states)
    base = base_log_loss(states)
    assert scores(known, states).log_loss < .95*base < base < scores(clamp(honest, states), states).log_loss


@pytest.mark.parametrize('system', [dw1d])
def test_memory_passes_on_a_chain_without_hidden_variables(system):
    x, states, paths = chain(system(), 40_000, 4, 5)
    cells = [p[:, None] for p in paths]
    m = MemoryCommittor(discrete=(0,)).fit(cells[:2], states[:2])
    r, exact = m.transform(cells[2:], states[2:]), [system().committor[p] for p in paths[2:]]
    assert off(r, exact, states[2:]) < .05
    assert m.inputs(cells[2:], states[2:])[0].shape == (40_000, m.inputs_of_fit[0].shape[1])
    with pytest.raises(ValueError, match='not fitted'): MemoryCommittor().transform(cells, states)


@pytest.fixture(scope='module')
def villin():
    "The shipped protein in sixty states, twice: by its contacts, and by distances along the chain."
    from deeptime.clustering import KMeans
    from foldbook.committor import states_from
    from foldbook.data import fetch
    from foldbook.features import model_contacts, named, stream
    from foldbook.structures import load_native
    home = fetch('villin_go', progress=False)
    rule = named('default', load_native(home.topology), model_contacts(home.topology))
    x, names = stream(home.trajectories, home.topology, rule, progress=False)
    made = []
    for kind in ('contact ', 'd '):
        columns = [i for i, n in enumerate(names.names) if n.startswith(kind)]
        series = [np.stack([v[:, h].mean(1) for h in np.array_split(columns, 3)], 1) for v in x]
        cells = KMeans(60, fixed_seed=0, max_iter=30, n_jobs=1).fit_fetch(np.concatenate(series)[::5])
        made.append([cells.transform(v) for v in series])
    return [np.stack(v, 1) for v in zip(*made)], states_from(x, names, **home.states)


@pytest.mark.filterwarnings('ignore:Algorithm did not reach')
def test_folds_of_two_coarse_descriptions_pass_with_memory_only(villin):
    "With thirty events, each judged by what was learned from the other folds."
    x, states = [villin[0][2][:4500]], [villin[1][2][:4500]]
    r, flags = {0: [], 1: [], 'memory': []}, []
    for s in outer_folds(states, 8):
        learn = [*s.train, *s.validation]
        a, f = ([v[i][p:q] for i, p, q in (s.blocks[b] for b in learn)] for v in (x, states))
        b, g = s.take(x, 'test'), s.take(states, 'test')
        for k in (0, 1): r[k] += FirstCommittor().fit([v[:, k] for v in a], f).transform([v[:, k] for v in b], g)
        r['memory'] += MemoryCommittor(discrete=(0, 1)).fit(a, f).transform(b, g)
        flags += g
    t = {k: cut_profiles(v, flags) for k, v in r.items()}
    assert t['memory'].n_ab >= 30
    assert t['memory'].t_max <= 3 < min(t[0].t_max, t[1].t_max)
