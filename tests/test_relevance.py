"Relevance: exact answers for linear functions, peers as oracles, noise over several seeds, malformed input."
import matplotlib
matplotlib.use('Agg')
import mdtraj as md
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.inspection import permutation_importance as sklearn_importance
from torch import nn

from foldbook import data, features
from foldbook.committor import outcomes
from foldbook.distill import Student
from foldbook.relevance import (Attributions, LogOdds, attention, block_error, contact_matrix, gradients, in_steps,
                                integrated_gradients, permutation_importance,
                                plot_chain, plot_contact_map, plot_importance, raw_windows, residue_groups,
                                residue_values, transition_frames, view_structure)
from foldbook.systems import lshape2d, persist1d
from foldbook.scores import scores

FAST = dict(hidden=8, max_epochs=2, window=4, batch_size=256, components=None)


@pytest.fixture(scope='module')
def plane():
    "Two short trajectories of the bent path with a column of noise and one that never changes."
    X, S, _ = lshape2d().observe(lshape2d().sample(4000, 2, seed=3))
    rng = np.random.default_rng(0)
    return [np.c_[x, rng.normal(size=len(x)), np.full(len(x), 7.)].astype(np.float32) for x in X], S


@pytest.fixture(scope='module', params=[dict(), dict(architecture='transformer'), dict(architecture='mlp'),
                                        dict(differences=True), dict(members=2, reach=13), dict(calibrate=True)],
                ids=lambda o: '-'.join(f'{k}-{v}' for k, v in o.items()) or 'lstm')
def student(request, plane): return Student(**FAST | request.param).fit(*plane, progress=False)


def linear(weights, mean, mix):
    "A student that is a weighted sum over its window; weights (W, C)."
    network = nn.Sequential(nn.Flatten(), nn.Linear(weights.size, 1), nn.Flatten(0)).requires_grad_(False)
    network[1].weight[:] = torch.tensor(weights.ravel())
    student = Student('lstm', window=len(weights))
    student.mean, student.mix, student.pace, student.bend, student.networks = mean, mix, None, None, [network]
    return student


def sigmoid(z): return 1 / (1 + np.exp(-z))


def test_function_is_the_student(student, plane):
    X, S = plane
    index = np.r_[0, 1, 5, 3999, 4000, 4002, np.arange(100, 7999, 211)] # ends and beginnings included
    r = sigmoid(LogOdds(student)(raw_windows(student, X)(torch.from_numpy(index)).double()).numpy())
    if student.bend is not None: r = np.interp(r, *student.bend)
    assert np.abs(r - np.concatenate(student.transform(X))[index]).max() < 2e-5


def test_gradient_is_the_slope(student, plane):
    x = raw_windows(student, plane[0])(torch.arange(100, 110)).double()
    f, g = LogOdds(student), gradients(LogOdds(student), x)
    for place in ((0, 0), (-1, 0), (-1, 1), (-1, 2)):
        step = torch.zeros_like(x)
        step[:, place[0], place[1]] = 1e-5
        assert torch.allclose((f(x + step) - f(x - step)) / 2e-5, g[:, place[0], place[1]], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize('baseline', ['A', 'B', 'last', np.zeros(4)])
def test_shares_add_up(student, plane, baseline):
    X, S = plane
    frames = transition_frames(student, X, S, (0, 1), 60)
    came = np.concatenate([np.maximum.accumulate(np.where(s >= 0, 1, 0)) for s in S])
    a = integrated_gradients(student, X, S, frames[came[frames] > 0], baseline)
    assert isinstance(a, Attributions) and a.gap <= 1e-3 and np.abs(a.values.sum((1, 2))
        - (a.output - a.start)).max() < 2e-3 * np.abs(a.output - a.start).mean()
    assert np.allclose(a.by_feature.sum(1), a.by_frame.sum(1))
    if isinstance(baseline, str): assert np.abs(a.by_feature[:, 3]).max() < 1e-6 # a constant has nothing to explain


def test_batches_do_not_matter(student, plane):
    frames = transition_frames(student, *plane, (0, 1), 30)
    whole, parts = (integrated_gradients(student, *plane, frames, batch=b).values for b in (1000, 7))
    assert np.allclose(whole, parts, atol=1e-9)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(0, 10**6))
def test_linear_function_is_weight_times_input(window, n_read, n_features, seed):
    rng = np.random.default_rng(seed)
    weights, mix = rng.normal(size=(window, n_read)).astype(np.float32), rng.normal(size=(n_features, n_read))
    X, S = [rng.normal(size=(20, n_features)).astype(np.float32)], [np.r_[0, np.full(18, -1), 1].astype(np.int8)]
    a = integrated_gradients(linear(weights, rng.normal(size=n_features), mix), X, S, np.arange(8, 15), X[0][0],
                             steps=1)
    back = np.arange(8, 15)[:, None] + np.arange(1 - window, 1)
    assert np.allclose(a.values, (X[0][back] - X[0][0]) * (weights @ mix.T), atol=1e-6)


def test_too_few_steps_are_refused():
    class Step(nn.Module):
        def forward(self, x): return 50 * torch.tanh(30 * (x[:, -1, 0] - .5))
    student = linear(np.ones((1, 1), np.float32), np.zeros(1), np.eye(1))
    student.networks = [Step()]
    X, S = [np.linspace(0, 1, 50, dtype=np.float32)[:, None]], [np.r_[0, np.full(48, -1), 1].astype(np.int8)]
    with pytest.raises(ValueError, match='take more than 4 steps'):
        integrated_gradients(student, X, S, np.arange(30, 49), steps=4)
    assert integrated_gradients(student, X, S, np.arange(30, 49), steps=200).gap < 1e-6


def test_malformed_input(student, plane):
    X, S = plane
    with pytest.raises(ValueError, match='not been trained'): LogOdds(Student())
    with pytest.raises(ValueError, match='reads 4 features'): raw_windows(student, [x[:, :2] for x in X])
    with pytest.raises(ValueError, match='choose A, B, last'): integrated_gradients(student, X, S, np.array([50]), 'C')
    with pytest.raises(ValueError, match='one frame of 4 features'):
        integrated_gradients(student, X, S, np.array([50]), np.zeros(3))
    with pytest.raises(ValueError, match='no frame outside A and B has a committor'):
        transition_frames(student, X, S, (.5, .5))
    start = [np.where(np.arange(len(s)) < 20, -1, s).astype(np.int8) for s in S]
    with pytest.raises(ValueError, match='they left no state'):
        integrated_gradients(student, X, start, np.array([3]), 'last')
    never = [np.full(len(s), -1, np.int8) for s in S]
    with pytest.raises(ValueError): permutation_importance(student, X, never, {'x': [0]})
    with pytest.raises(ValueError): integrated_gradients(student, X, never, np.array([3]), 'A')


def test_permutation_by_hand(student, plane):
    "The same permutation of whole windows, made with raw features and no shortcut."
    X, S = plane
    s, y = np.concatenate(S), np.concatenate(outcomes(S))
    index, columns = np.flatnonzero(s < 0), [0, 2]
    known = np.isfinite(y[index])
    order = np.random.default_rng(5).permutation(len(index))
    x = raw_windows(student, X)(torch.from_numpy(index)).double()
    mixed = x.clone()
    mixed[:, :, columns] = x[torch.from_numpy(order)][:, :, columns]
    def loss(x):
        r = sigmoid(LogOdds(student)(x).numpy())
        if student.bend is not None: r = np.interp(r, *student.bend)
        return -np.log(np.clip(np.where(y[index] > .5, r, 1 - r), 1e-6, 1))[known].mean()
    table = permutation_importance(student, X, S, {'pair': columns}, n_repeats=1, seed=5)
    assert table.log_loss['pair'] == pytest.approx(loss(mixed) - loss(x), abs=1e-5)


def test_what_is_not_read_is_worth_nothing(student, plane):
    "A constant, and a column whose weights are zero; and the same seed gives the same numbers."
    X, S = plane
    table = permutation_importance(student, X, S, {'constant': [3], 'x': [0]}, n_repeats=2)
    assert abs(table.log_loss['constant']) < 1e-6 and table.se['constant'] < 1e-6
    assert permutation_importance(student, X, S, {'constant': [3], 'x': [0]}, n_repeats=2).equals(table)


def test_scikit_learn_agrees_where_there_is_no_window(plane):
    X, S = plane
    student = Student('mlp', hidden=8, max_epochs=6, components=None, learning_rate=.01).fit(X, S, progress=False)
    s, y = np.concatenate(S), np.concatenate(outcomes(S))
    use = (s < 0) & np.isfinite(y)
    class Classifier:
        classes_ = np.array([0, 1])
        _estimator_type = 'classifier'
        def fit(self, *_): return self
    def score(_, x, y):
        r = np.clip(student.transform([x])[0], 1e-6, 1 - 1e-6)
        return np.mean(np.log(np.where(y > .5, r, 1 - r)))
    peer = sklearn_importance(Classifier(), np.concatenate(X)[use], y[use], scoring=score, n_repeats=10, random_state=0)
    ours = permutation_importance(student, X, S, {k: [k] for k in range(4)}, n_repeats=10)
    scatter = np.hypot(peer.importances_std, .002)
    assert (np.abs(ours.log_loss.to_numpy() - peer.importances_mean) < 3 * scatter).all()


@pytest.mark.parametrize('memory', [0, 30])
def test_error_bar_covers(memory):
    "Standard error of a mean of correlated numbers, over 300 samples."
    rng, keep, n = np.random.default_rng(1), np.exp(-1 / memory) if memory else 0., 6000
    from scipy.signal import lfilter
    d = lfilter([(1 - keep**2)**.5], [1, -keep], rng.normal(size=(300, n)), axis=1)
    told = np.array([block_error(x[None], np.arange(n) * 20 // n) for x in d])
    assert .85 < np.sqrt((told**2).mean()) / d.mean(1).std() < 1.15


def with_noise(seed, n_frames=30_000):
    "The bent path with x, y, two combinations, three white and three slow kinds of noise."
    X, S, _ = lshape2d().observe(lshape2d().sample(n_frames, 3, seed=seed))
    rng, keep = np.random.default_rng(seed), np.exp(-1 / 20)
    from scipy.signal import lfilter
    slow = lambda n: lfilter([(1 - keep**2)**.5], [1, -keep], rng.normal(size=(n, 3)), axis=0)
    return [np.hstack([x, x.sum(1, keepdims=True), x[:, :1] - x[:, 1:], rng.normal(size=(len(x), 3)),
                       slow(len(x))]).astype(np.float32) for x in X], S


@pytest.fixture(scope='module')
def seeds():
    "Permutation table and mean size of integrated gradients for two samples."
    found = []
    for seed in (11, 12):
        X, S = with_noise(seed)
        student = Student('mlp', components=None, learning_rate=.01, max_epochs=6, seed=seed).fit(X[:2], S[:2],
                                                                                                  progress=False)
        frames = transition_frames(student, X[2:], S[2:], n_frames=200)
        groups = {k: [k] for k in range(10)} | {'all': range(4), 'noise': range(4, 10)}
        found.append((permutation_importance(student, X[2:], S[2:], groups, t_max=seed == 11),
                      np.abs(integrated_gradients(student, X[2:], S[2:], frames).by_feature).mean(0)))
    return found


def test_noise_gets_nothing(seeds):
    z = np.array([(t.log_loss / np.hypot(t.se, 1e-5))[[*range(4, 10), 'noise']] for t, _ in seeds])
    # of 14; blocks give a t distribution with 19 degrees of freedom
    assert np.abs(z).max() < 4 and (np.abs(z) > 3).sum() <= 1 and (np.abs(z) > 2).mean() < .3
    assert max(t.log_loss['noise'] for t, _ in seeds) < .1 * min(t.log_loss[[0, 1, 2, 3]].min() for t, _ in seeds)


def test_the_plane_gets_its_share(seeds):
    for t, shares in seeds:
        assert (t.log_loss[[0, 1, 2, 3]] > 4 * t.se[[0, 1, 2, 3]]).all()
        assert t.log_loss['all'] > 1.5 * t.log_loss[[0, 1, 2, 3]].sum() # they hide each other
        assert shares[4:].max() < .1 * shares.max() and shares[0] > 3 * shares[1] # from A to the corner only x changes
    t = seeds[0][0]
    assert t.t_max[[0, 1, 2, 3]].min() > 5 and t.t_max[[4, 5, 6]].abs().max() < .5


@pytest.mark.slow # the chapter looks at one sample
@pytest.mark.parametrize('seed', [21, 22])
def test_walker_reads_the_last_step(seed):
    X, S, q = persist1d().observe(persist1d().sample(20_000, 3, seed=seed))
    X = [x[:, :1] for x in X]
    student = Student('lstm', differences=True, hidden=12, learning_rate=.01, max_epochs=12, seed=seed).fit(X[:2],
        S[:2], progress=False)
    assert scores(student.transform(X[2:]), S[2:]).log_loss < scores(q[2:], S[2:]).log_loss + .03
    x = raw_windows(student, X[2:])(torch.from_numpy(transition_frames(student, X[2:], S[2:], n_frames=500))).double()
    by_step = in_steps(gradients(LogOdds(student), x)).mean(0)[:, 0]
    assert by_step[1] > 0 > by_step[2] and by_step[1] > by_step[2:].abs().max() and by_step[1] > 2 * by_step[4].abs()


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 6), st.integers(1, 3), st.integers(0, 10**6))
def test_steps_are_the_chain_rule(window, n_features, seed):
    "A linear function has the same value in frames and in steps."
    rng = np.random.default_rng(seed)
    w, x = (torch.from_numpy(rng.normal(size=(1, window, n_features))) for _ in 'wx')
    steps = torch.cat([x[:, -1:], x.diff(dim=1).flip(1)], 1)
    assert torch.allclose((w * x).sum(), (in_steps(w) * steps).sum())


def test_attention_of_a_student(plane):
    "Shares add up to one, and the body rebuilt from shares, values and projections written out is the body itself."
    X, S = plane
    student = Student(**FAST | dict(architecture='transformer', members=2, max_epochs=1)).fit(X, S, progress=False)
    looks = attention(student, X, np.arange(40, 60))
    assert looks.shape == (20, 2, 1, 2, 4) and np.allclose(looks.sum(-1), 1, atol=1e-5)
    x, body = student.windows(X)(torch.arange(40, 60)), student.networks[0].body
    layer, share = body.encoder.layers[0], torch.from_numpy(looks[:, 0, 0])
    with torch.no_grad():
        h = body.embed(x) + body.place
        a, n = layer.self_attn, layer.norm1(h)
        value = (n @ a.in_proj_weight[16:].T + a.in_proj_bias[16:]).view(20, 4, 2, 4)
        token = h[:, -1] + a.out_proj(torch.einsum('bhj,bjhd->bhd', share, value).reshape(20, 8))
        token = token + layer._ff_block(layer.norm2(token))
        assert torch.allclose(torch.cat([token, body.present(x[:, -1])], -1), body(x), atol=1e-5)
    with pytest.raises(ValueError, match='has no attention'):
        attention(Student(**FAST).fit(X, S, progress=False), X, np.arange(3))


@pytest.fixture(scope='module')
def villin():
    d = data.fetch('villin_go', progress=False)
    return md.load(str(d.topology)), features.default(d.topology).features


def test_residues_and_contacts_find_their_place(villin):
    native, description = villin
    groups = residue_groups(description)
    assert list(groups) == [str(r) for r in native.topology.residues if str(r) in groups]
    # every contact and distance has two ends, and so has the end-to-end distance; Q, RMSD and Rg have none
    assert sum(map(len, groups.values())) == 2 * 151
    for residue, columns in groups.items():
        assert all(any(a.startswith(residue + '-') for a in description.atoms[k]) for k in columns)
    values = np.arange(len(description), dtype=float)
    matrix = contact_matrix(values, description, native)
    assert np.array_equal(matrix, matrix.T, equal_nan=True) and np.isfinite(matrix).sum() == 2 * 76
    i, j = (int(a[3:-3]) - 1 for a in description.atoms[4])
    assert matrix[i, j] == values[4] + values[4 + 75] # contact and distance of one pair
    table = residue_values(pd.Series({'PHE10': 3., 'LEU1': 1.}), native)
    assert table[9] == 3 and table[0] == 1 and table.sum() == 4
    with pytest.raises(KeyError, match='GLY99'): residue_values(pd.Series({'GLY99': 1.}), native)


def test_pictures(villin):
    native, description = villin
    values = np.linspace(-1, 1, 35)
    ax = plot_chain(native, values)
    assert len([t for t in ax.texts if t.get_text().strip()]) == 5
    image = plot_contact_map(contact_matrix(np.ones(len(description)), description, native))
    assert image.get_clim() == (-2, 2)
    table = pd.DataFrame(dict(log_loss=[.1, .2], se=[.01, .02]), index=['a', 'b'])
    assert len(plot_importance(table).patches) == 2
    matplotlib.pyplot.close('all')


def test_structure_in_the_browser(villin):
    pytest.importorskip('nglview')
    native, _ = villin
    values = np.zeros(35)
    values[9] = 2.
    values[3] = -1
    view = view_structure(native, values)
    text = view._ngl_component_ids and view._ngl_msg_archive[0]['args'][0]['data']
    factors = [float(line[60:66]) for line in text.splitlines() if line.startswith('ATOM')]
    assert len(factors) == 35 and factors[9] == 99 and max(factors[:9] + factors[10:]) == 0
