"Residue tokens against mdtraj; students of residues: any length and order, causality, seeds, files, bad input."
import mdtraj as md
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from foldbook.committor import clamp
from foldbook.networks import predict
from foldbook.go import shipped_model
from foldbook.systems import MarkovSystem, metropolis
from foldbook.transfer import (MOLECULE, RESIDUE, ResidueNetwork, ResidueOptions, ResidueStudent, ResidueTokens,
                               TokenWindows, make_student, neighbours, student_options)


FAST = dict(batches=30, hidden=8, learning_rate=.01)


def shaken(model, n=6, seed=0, size=.15):
    "Frames around the native structure of a model."
    native = model.native
    return md.Trajectory(native.xyz + size
        * np.random.default_rng(seed).normal(size=(n, native.n_atoms, 3)).astype(np.float32), native.topology)


@pytest.fixture(scope='module', params=['villin_go', 'bba_go'])
def model(request): return shipped_model(request.param)


def column(tokens, name, residue=slice(None)): return tokens[:, 1:, list(RESIDUE).index(name)][:, residue]


# tokens

def test_contacts_against_mdtraj(model):
    t = shaken(model)
    rule = ResidueTokens(model)
    x = rule(rule.featurizer(t))
    assert x.dtype == np.float32 and x.shape == (6, 1 + len(model.residues), len(RESIDUE))
    d, d0 = (md.compute_distances(a, model.contacts, periodic=False) for a in (t, model.native))
    made = np.exp(-.5 * (np.maximum(d - d0, 0) / .1)**2)
    for i in range(len(model.residues)):
        of = (model.contacts == i).any(1)
        assert np.allclose(column(x, 'native contacts', i), of.sum())
        assert np.allclose(column(x, 'contacts made', i), made[:, of].mean(1) if of.any() else 0, atol=1e-4)
        assert np.allclose(column(x, 'contact length', i), np.log(d / d0)[:, of].mean(1) if of.any() else 0, atol=1e-4)
    span = model.contacts[:, 1] - model.contacts[:, 0]
    expected = dict(Q=(d < 1.2 * d0).mean(1), RMSD=md.rmsd(t, model.native) / md.compute_rg(model.native),
                    size=np.log(md.compute_rg(t) / md.compute_rg(model.native)))
    expected |= {'contacts made': made.mean(1), 'contact length': np.log(d / d0).mean(1),
                 'far contacts': (made * span).sum(1) / span.sum()}
    for k, name in enumerate(MOLECULE): assert np.allclose(x[:, 0, k], expected[name], atol=2e-3), name
    assert (x[:, 0, len(MOLECULE):] == 0).all()


def test_geometry_against_mdtraj(model):
    t, n = shaken(model), len(model.residues)
    rule = ResidueTokens(model)
    x = rule(rule.featurizer(t))
    angles = [md.compute_angles(a, [(i, i + 1, i + 2) for i in range(n - 2)], periodic=False)
              for a in (t, model.native)]
    assert np.allclose(column(x, 'angle')[:, 1:-1], angles[0] - angles[1], atol=1e-4)
    phi = [md.compute_dihedrals(a, [(i, i + 1, i + 2, i + 3) for i in range(n - 3)], periodic=False)
           for a in (t, model.native)]
    assert np.allclose(column(x, 'cos dihedral')[:, 1:-2], np.cos(phi[0] - phi[1]), atol=1e-4)
    assert np.allclose(column(x, 'sin dihedral')[:, 1:-2], np.sin(phi[0] - phi[1]), atol=1e-4)
    for ends, value in (('angle', 0), ('sin dihedral', 0), ('cos dihedral', 1)):
        assert (column(x, ends, [0, n - 1]) == value).all()
    moved = np.linalg.norm(md.Trajectory(t.xyz.copy(), t.topology).superpose(model.native).xyz - model.native.xyz,
                           axis=-1)
    # mdtraj centres the reference in place
    assert np.abs(column(x, 'displacement') - moved / md.compute_rg(model.native)).max() < .02
    assert np.allclose(column(x, 'place')[0], np.linspace(-1, 1, n))


def test_tokens_do_not_see_the_frame_of_reference(model):
    t, rule = shaken(model), ResidueTokens(model)
    q = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    q *= np.sign(np.linalg.det(q))
    turned = md.Trajectory((t.xyz @ q + 3).astype(np.float32), t.topology)
    mirrored = md.Trajectory(t.xyz * np.float32([1, 1, -1]), t.topology)
    x, y, z = (rule(rule.featurizer(a)) for a in (t, turned, mirrored))
    assert np.allclose(x, y, atol=5e-3)
    assert not np.allclose(column(x, 'sin dihedral'), column(z, 'sin dihedral'), atol=.1) # handedness is seen


def test_structure_file_and_model_give_the_same_tokens(model, tmp_path):
    model.native.save_pdb(str(tmp_path / 'native.pdb'))
    model.save(tmp_path / 'model.json')
    t = shaken(model)
    a, b = (ResidueTokens(n) for n in (model, tmp_path / 'native.pdb'))
    assert (a.pairs == b.pairs).all()
    assert np.allclose(a(a.featurizer(t)), b(b.featurizer(t)), atol=.02) # a PDB file has three decimals


def test_wrong_columns_are_refused(model):
    rule = ResidueTokens(model)
    with pytest.raises(ValueError, match='are needed, as ResidueTokens.featurizer makes them'): rule(np.zeros((3, 5)))


def test_neighbours_by_hand():
    x = np.random.default_rng(0).uniform(0, 1.5, (5, 12, 3)).astype(np.float32)
    expected = np.zeros((5, 12))
    for t, i, j in np.ndindex(5, 12, 12):
        if abs(i - j) > 2: expected[t, i] += 1 / (1 + np.exp((np.linalg.norm(x[t, i] - x[t, j]) - .8) / .05))
    assert np.allclose(neighbours(x, chunk=2), expected, atol=1e-4)


# windows

shapes = st.lists(st.tuples(st.integers(1, 8), st.integers(0, 4), st.integers(1, 3)), min_size=1, max_size=4)

@settings(deadline=None, max_examples=40)
@given(shapes, st.integers(1, 4))
def test_windows_by_hand(shapes, window):
    rng = np.random.default_rng(0)
    X = [rng.normal(size=(n, 1 + m, 2)).astype(np.float32) for n, m, _ in shapes]
    mean, scale, pace = rng.normal(size=(2, 2)).astype(np.float32), *rng.uniform(.5, 2, (2, 2, 2)).astype(np.float32)
    w = TokenWindows([[x] for x in X], mean, scale, pace, window, [e for _, _, e in shapes])
    x, there = w(torch.arange(len(w.frames)))
    assert x.shape == (sum(n for n, _, _ in shapes), 1 + max(m for _, m, _ in shapes), 2 * window)
    row = 0
    for frames, (n, m, every) in zip(X, shapes):
        part = np.array([0] + m * [1])
        z = (frames - mean[part]) / scale[part]
        for t in range(n):
            expected = np.concatenate([z[t]] + [(z[t] - z[max(0, t - every * j)]) / pace[part]
                                                for j in range(1, window)], -1)
            assert np.allclose(x[row, :1 + m], expected, atol=1e-4) and there[row].sum() == 1 + m and there[row,
                :1 + m].all()
            row += 1
    assert [len(v) for v in w.split(np.arange(row))] == [n for n, _, _ in shapes]


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 9), st.integers(0, 6), st.integers(0, 2), st.randoms(use_true_random=False))
def test_network_ignores_order_and_padding(n, empty, layers, random):
    torch.manual_seed(n)
    network = ResidueNetwork(6, 8, layers, 2, 0.).eval()
    x, there = torch.randn(3, 1 + n, 6), torch.ones(3, 1 + n, dtype=torch.bool)
    order = list(range(1, 1 + n))
    random.shuffle(order)
    padded = torch.cat([x, 100 * torch.randn(3, empty, 6)],
                       1), torch.cat([there, torch.zeros(3, empty, dtype=torch.bool)], 1)
    with torch.no_grad(): a, b, c = (network(v) for v in ((x, there), (x[:, [0] + order], there), padded))
    assert torch.allclose(a, b, atol=1e-5) and torch.allclose(a, c, atol=1e-5)


# students

def chain(n, n_frames, n_trajectories, seed):
    """A chain of n units, each folded or not, whose committor depends on the number of folded ones: tokens, states,
    exact committor."""
    y = np.arange(n + 1) / n
    moves = np.stack([np.arange(n + 1) - 1, np.append(np.arange(1, n + 1), -1)], 1)
    K = np.linalg.matrix_power(metropolis(40 * y**2 * (1 - y)**2, moves), 2)
    system = MarkovSystem('chain', y[:, None], K, np.where(y < .1, 0, np.where(y > .9, 1, -1)).astype(np.int8))
    Y, S, q = system.observe(system.sample(n_frames, n_trajectories, seed=seed))
    rng = np.random.default_rng(seed)
    folded = [rng.random((len(x), n)).argsort(1) < np.rint(n * x) for x in Y]
    return [np.concatenate([np.zeros((len(f), 1, 1)), f[..., None]], 1).astype(np.float32) for f in folded], S, q


@pytest.fixture(scope='module')
def short(): return chain(6, 3000, 3, seed=1)


@pytest.fixture(scope='module')
def long(): return chain(9, 3000, 2, seed=2)


@pytest.fixture(scope='module')
def student(short): return ResidueStudent(**FAST).fit(short[0][:2], short[1][:2], progress=False)


def error(student, X, S, q):
    return np.sqrt(np.mean([np.mean((r - e)[s < 0]**2) for r, e, s in zip(student.transform(X, S), q, S)]))


def test_learns_to_count_and_counts_longer_chains(short, long):
    s = ResidueStudent(batches=150, hidden=16, learning_rate=.01).fit(short[0][:2], short[1][:2], progress=False)
    constant = np.std(np.concatenate([q[f < 0] for q, f in zip(short[2], short[1])]))
    assert error(s, *(v[2:] for v in short)) < .4 * constant
    assert error(s, *long) < .6 * constant


def test_same_seed_same_numbers_and_global_state_untouched(short):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = (ResidueStudent(**FAST, dropout=.1, seed=s).fit(short[0][:1], short[1][:1], progress=False)
               for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    ra, rb, rc = (s.transform(short[0][2:])[0] for s in (a, b, c))
    assert (ra == rb).all() and not np.allclose(ra, rc)
    assert [h['epoch'] for h in a.history] == list(range(len(a.history))) and a.seconds > 0


def test_save_and_load(student, short, tmp_path):
    student.save(tmp_path / 'kept')
    again = ResidueStudent.load(tmp_path / 'kept')
    assert (again.transform(short[0])[1] == student.transform(short[0])[1]).all()
    assert again.n_parameters == student.n_parameters and again.get_params() == student.get_params()
    assert again.seconds == student.seconds
    with pytest.raises(FileNotFoundError, match='ResidueStudent.save wrote'): ResidueStudent.load(tmp_path)
    with pytest.raises(ValueError, match='not been trained'): ResidueStudent().save(tmp_path)


@pytest.mark.parametrize('every', [1, 3])
def test_causal(student, short, every):
    X = short[0][2][:200]
    changed = X.copy()
    changed[100:] = np.random.default_rng(0).normal(size=changed[100:].shape)
    a, b = (student.transform([x], every=every)[0] for x in (X, changed))
    assert np.allclose(a[:100], b[:100], atol=1e-6) and not np.allclose(a[100:], b[100:], atol=.01)
    cut = student.transform([X[50:]], every=every)[0][3 * every:] # no memory beyond the window
    assert np.allclose(a[50 + 3 * every:], cut, atol=1e-6)


def test_states_are_exact_and_change_nothing_else(student, short):
    X, S, _ = short
    for free, r, s in zip(student.transform(X), student.transform(X, S), S):
        assert (r[s >= 0] == s[s >= 0]).all() and np.allclose(r, clamp([free], [s])[0], atol=1e-6)


def tokens_of(s, ensembles): return TokenWindows(ensembles, s.mean, s.scale, s.pace, s.window, [1] * len(ensembles))


def test_batches_do_not_matter(student, short):
    windows = tokens_of(student, [short[0][:1]])
    a, b = (predict(student.network, windows, batch=k)[0] for k in (7, 1024))
    assert np.allclose(a, b, atol=1e-6)


def test_two_proteins_at_once(short, long):
    both = ResidueStudent(**FAST).fit_proteins([short[0][:1], long[0][:1]], [short[1][:1], long[1][:1]], every=[1, 2],
                                               progress=False)
    for X, _, _ in (short, long): assert all(np.isfinite(r).all() for r in both.transform(X))
    alone = both.transform(short[0][:1])[0]
    mixed = predict(both.network, tokens_of(both, [short[0][:1], long[0][:1]]))[0]
    assert np.allclose(alone, mixed, atol=1e-5)


def test_going_on(student, short, long):
    before = {k: v.clone() for k, v in student.network.state_dict().items()}
    head, whole = (ResidueStudent(**FAST).fit(long[0][:1], long[1][:1], start=student, head=h, progress=False)
                   for h in (True, False))
    for k, v in student.network.state_dict().items():
        assert torch.equal(v, before[k]) # the source is left alone
        assert k.startswith('head') != torch.equal(head.network.state_dict()[k], v)
    assert any(not torch.equal(v, before[k]) for k, v in whole.network.state_dict().items() if k.startswith('body'))
    assert (head.mean == student.mean).all() and (whole.pace == student.pace).all()
    assert head.history == [] and whole.history
    assert not np.allclose(head.transform(long[0])[1], student.transform(long[0])[1])


def test_validation_stops(short):
    s = ResidueStudent(**FAST | dict(batches=400, patience=1)).fit(short[0][:1], short[1][:1],
        validation=(short[0][1:2], short[1][1:2]), progress=False)
    scores = [h['score'] for h in s.history]
    assert np.isfinite(scores).all() and (len(scores) == s.training(int((short[1][0] < 0).sum())).max_epochs
                                          or int(np.argmin(scores)) == len(scores) - 2)


@pytest.mark.parametrize('n', [10, 500, 5000, 50_000])
def test_length_of_training_follows_the_data(n):
    options = ResidueStudent().training(n)
    batches = options.max_epochs * -(-n // options.batch_size)
    assert options.max_epochs >= 2 and (options.max_epochs == 2 or .5 < batches / (240 * np.sqrt(n / 5000)) < 2)


@pytest.mark.parametrize('options, message', [
    (dict(window=0), 'window=0; it must be at least 1'), (dict(hidden=9), 'give a multiple'),
    (dict(loss='variational'), 'choose one of teacher_mse, '), (dict(patience=0), 'patience=0')])
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message): ResidueOptions(**options)


def test_bad_input(student, short):
    X, S, _ = short
    fit = lambda *a, **k: ResidueStudent(**FAST).fit_proteins(*a, progress=False, **k)
    with pytest.raises(ValueError, match='one list of trajectories for each protein'): fit([X, X], [S])
    with pytest.raises(ValueError, match=r'must be \(T, 1 \+ N, C\)'): fit([[x[:, :, 0] for x in X]], [S])
    with pytest.raises(ValueError, match='different numbers of channels'):
        fit([X, [np.repeat(x, 2, 2) for x in X]], [S, S])
    with pytest.raises(ValueError, match='NaN or infinite'):
        fit([[np.where(np.arange(len(x))[:, None, None] == 7, np.nan, x) for x in X]], [S])
    with pytest.raises(ValueError, match='states'): fit([X], [[s[:-1] for s in S]])
    with pytest.raises(ValueError, match='no frame is in'): fit([X], [[np.full_like(s, -1) for s in S]])
    with pytest.raises(ValueError, match='steps of at least one frame'): fit([X], [S], every=0)
    with pytest.raises(ValueError, match='give it as start'): fit([X], [S], head=True)
    with pytest.raises(ValueError, match='start= has not been trained'): fit([X], [S], start=ResidueStudent())
    with pytest.raises(ValueError, match='make the new student with the same'):
        ResidueStudent(window=2).fit(X, S, start=student, progress=False)
    with pytest.raises(ValueError, match='not been trained; call fit or load'): ResidueStudent().transform(X)
    with pytest.raises(ValueError, match='tokens; found'): student.transform([np.repeat(x, 2, 2) for x in X])
    with pytest.raises(ValueError, match='states'): student.transform(X, S[:1])


class Killed(Exception): pass


def test_interrupted_run_gives_the_same_numbers(short, tmp_path, monkeypatch):
    from foldbook.distill import Distillation
    X, S, q = short
    fit = lambda d, **k: ResidueStudent(**FAST, dropout=.1, **k).fit(X[:1], S[:1], validation=(X[1:2], S[1:2]),
                                                                     directory=d, progress=False)
    whole, judge = fit(None), Distillation.judge
    def dying(self, network):
        if self.loop.current_epoch == 1: raise Killed
        return judge(self, network)
    monkeypatch.setattr(Distillation, 'judge', dying)
    with pytest.raises(Killed): fit(tmp_path)
    monkeypatch.setattr(Distillation, 'judge', judge)
    again = fit(tmp_path)
    assert again.history == whole.history and (again.transform(X)[2] == whole.transform(X)[2]).all()
    with pytest.raises(ValueError, match='another training or other data'): fit(tmp_path, seed=1)


def test_a_teacher_is_heard(short):
    X, S, q = short
    s = ResidueStudent(**FAST, loss='teacher_cross_entropy')
    with pytest.raises(ValueError, match='needs teacher='): s.fit(X[:1], S[:1], progress=False)
    with pytest.raises(ValueError, match='frames'): s.fit(X[:1], S[:1], [q[0][1:]], progress=False)
    up, down = (s.fit(X[:1], S[:1], [t], progress=False).transform(X[:1])[0].mean() for t in (q[0], 0 * q[0]))
    assert up > down + .1


def test_one_way_to_make_a_student():
    from sklearn.base import clone
    for name in ('mlp', 'lstm', 'transformer', 'residue'):
        student = make_student(name, 'outcome', seed=3, devices=1)
        assert (student.loss, student.seed) == ('outcome', 3) and clone(student).get_params() == student.get_params()
        assert set(student_options(name)) == set(student.get_params()) - {'architecture', 'loss'}
    for wrong, cure in ((dict(architecture='gru'), 'choose one of mlp, lstm, transformer, residue'),
                        (dict(architecture='lstm', loss='mse'), 'choose one of teacher_mse'),
                        (dict(architecture='residue', loss='variational'), 'choose one of teacher_mse'),
                        (dict(architecture='residue', reach=3), 'reach is not an option of a student of architecture'),
                        (dict(architecture='lstm', hiden=3), 'hiden is not an option')):
        with pytest.raises(ValueError, match=cure): make_student(**wrong)
