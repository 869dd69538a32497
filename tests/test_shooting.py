"Shots: repeatable, resumable, in any order; as many as an error asks for."
import numpy as np
import pytest

import foldbook.shooting as fs
from foldbook.base import derived_seed
from foldbook.engine import run_segment


def test_shooting_resumes_and_repeats(model, tmp_path, monkeypatch):
    job = dict(n_shots=3, seed=1, n_workers=1, steps_per_frame=50, max_frames=40, unfolded=0.6, folded=0.9,
               progress=False)
    xyz = run_segment(model, dict(x=model.xyz, v=np.zeros_like(model.xyz)), 5, 40, 137.0, 2)[0]['xyz']
    want = fs.shoot(model, xyz, **job)
    real, calls = fs.shoot_frame, []

    def fail(*a, **k):
        calls.append(1)
        if len(calls) == 4: raise KeyboardInterrupt
        return real(*a, **k)
    monkeypatch.setattr(fs, 'shoot_frame', fail)
    with pytest.raises(KeyboardInterrupt): fs.shoot(model, xyz, out=tmp_path/'s.npz', **job)
    monkeypatch.undo()
    assert np.load(tmp_path/'s.npz')['batches'].sum() == 3
    assert (fs.shoot(model, xyz, out=tmp_path/'s.npz', **job) == want).all()
    assert want.dtype == np.int8 and set(want.ravel()) <= {-1, 0, 1}
    with pytest.raises(ValueError, match='shots of another'): fs.shoot(model, xyz[:4], out=tmp_path/'s.npz', **job)


def test_a_fixed_number_of_shots_is_what_it_was(model, monkeypatch):
    "The shipped shots stay reproducible: frame k is shot with derived_seed(seed, k), once."
    calls = []

    def note(m, x, seed, n, **settings):
        calls.append((seed, n))
        return np.zeros(n, np.int8)
    monkeypatch.setattr(fs, 'shoot_frame', note)
    assert fs.shoot(model, np.zeros((3, 1, 3)), 7, seed=5, n_workers=1, progress=False).shape == (3, 7)
    assert calls == [(derived_seed(5, k), 7) for k in range(3)]


def coin(model, x, seed, n, undecided=0.0, **settings): # a frame is its committor
    rng = np.random.default_rng(seed)
    return np.where(rng.uniform(size=n) < undecided, -1, rng.uniform(size=n) < x[0, 0]).astype(np.int8)


TRUTH = np.linspace(0.02, 0.98, 65)


COINS = dict(n_shots=20, seed=3, target_error=0.05, n_workers=1, progress=False)


def test_shots_go_where_the_error_is_large(model, monkeypatch):
    monkeypatch.setattr(fs, 'shoot_frame', coin)
    got = fs.shoot(model, TRUTH[:, None, None], **COINS)
    p, se = fs.committor_estimate(got)
    count = (got > -2).sum(axis=1)
    assert got.shape == (65, 400) and se.max() <= 0.05 + 1e-12 and count.min() >= 20
    assert (count[abs(TRUTH - .5) < .1] > 80).all() and (count[abs(TRUTH - .5) > .45] < 60).all()
    z = (p - TRUTH)/np.sqrt(TRUTH*(1 - TRUTH)/count)
    assert abs(z.mean()) < 4/65**0.5 and abs(z).max() < 4.5
    for row, n in zip(got, count):
        assert (row[:n] > -2).all() and (row[n:] == -2).all()
        sizes = fs.batch_sizes(row, 20, 0.05)
        assert sizes[0] == 20 and sum(sizes) == n and all(1 <= b <= sum(sizes[:k]) for k, b in enumerate(sizes) if k)
        k = int(np.flatnonzero((got == row).all(1))[0])
        shots = [coin(None, TRUTH[k].reshape(1, 1), fs.shot_seed(3, k, b), size) for b, size in enumerate(sizes)]
        assert (np.concatenate(shots) == row[:n]).all()
    few = fs.shoot(model, TRUTH[:, None, None], **COINS | dict(max_shots=30))
    assert few.shape == (65, 30) and (few[30:35] > -2).all()


def test_adaptive_shots_resume_and_know_no_order(model, tmp_path, monkeypatch):
    "Killed after any number of batches, or with frames finished in another order, the result is the same."
    monkeypatch.setattr(fs, 'shoot_frame', coin)
    xyz = TRUTH[:, None, None]
    want = fs.shoot(model, xyz, **COINS)
    for stop in (1, 30, 66, 70, 120):
        calls = []

        def fail(*a, **k):
            calls.append(1)
            if len(calls) == stop: raise KeyboardInterrupt
            return coin(*a, **k)
        monkeypatch.setattr(fs, 'shoot_frame', fail)
        out = tmp_path/f'{stop}.npz'
        with pytest.raises(KeyboardInterrupt): fs.shoot(model, xyz, out=out, **COINS)
        monkeypatch.setattr(fs, 'shoot_frame', coin)
        assert (fs.shoot(model, xyz, out=out, **COINS) == want).all()
        assert np.load(out)['batches'].tolist() == [len(fs.batch_sizes(o, 20, 0.05)) for o in want]
        with pytest.raises(ValueError, match='shots of another'):
            fs.shoot(model, xyz, out=out, **COINS | dict(target_error=0.04))

    def shuffled(job, left, need, *_):
        rng, left = np.random.default_rng(0), list(left)
        while left:
            k = left[rng.integers(len(left))]
            yield k, coin(*job(k))
            left = [k for k in left if need(k)]
    monkeypatch.setattr(fs, '_shots', shuffled)
    assert (fs.shoot(model, xyz, **COINS) == want).all()


def test_adaptive_shots_over_workers_are_the_serial_ones(model):
    job = dict(n_shots=4, seed=1, target_error=0.15, max_shots=20, steps_per_frame=50, max_frames=40, unfolded=0.6,
               folded=0.9, progress=False)
    xyz = run_segment(model, dict(x=model.xyz, v=np.zeros_like(model.xyz)), 4, 40, 137.0, 2)[0]['xyz']
    one = fs.shoot(model, xyz, n_workers=1, **job)
    assert (fs.shoot(model, xyz, n_workers=2, **job) == one).all() and (one == -2).any()


def test_undecided_shots_get_no_endless_company(model, monkeypatch, caplog):
    "A frame of undecided shots only gets no more; with some undecided the decided ones reach the error."
    monkeypatch.setattr(fs, 'shoot_frame', coin)
    xyz = TRUTH[:, None, None]
    got = fs.shoot(model, xyz, undecided=1.1, **COINS)
    assert ((got == -1).sum(1) == 20).all() and (got[:, 20:] == -2).all() and '1300 of 1300 shots' in caplog.text
    some = fs.shoot(model, xyz, undecided=0.3, **COINS)
    assert fs.committor_estimate(some)[1].max() <= 0.05 + 1e-12
    assert f'{(some == -1).sum()} of {(some > -2).sum()} shots' in caplog.text
    with pytest.raises(ValueError, match='another first batch'): fs.batch_sizes(np.int8([0]*20 + [1]*380), 20, 0.05)


@pytest.mark.parametrize('settings, words', [(dict(n_shots=0), 'at least one'), (dict(temperature=0), 'above zero'),
    (dict(temperature=-1.0), 'above zero'), (dict(target_error=0), 'between 0 and 0.5'),
                                             (dict(target_error=0.1, n_shots=500), 'at most 400')])
def test_impossible_shots_are_refused(model, settings, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        fs.shoot(model, model.xyz[None], out=tmp_path/'s.npz', n_workers=1, **settings)
    if not {'target_error'} & set(settings):
        with pytest.raises(ValueError, match=words): fs.shoot_frame(model, model.xyz, 1, **settings)
    assert not list(tmp_path.iterdir())


def test_committor_estimate_leaves_undecided_out(caplog, model):
    q, se = fs.committor_estimate(np.array([[1, 1, 0, -1, -2], [-1, -1, -1, -1, -1], [0, 0, 0, 0, -2]], np.int8))
    assert np.allclose(q[[0, 2]], [2/3, 0]) and np.isnan(q[1]) and np.allclose(se[0], np.sqrt(2/27))
    assert se[2] > 0
    fs.shoot(model, model.xyz[None], 2, n_workers=1, max_frames=1, steps_per_frame=1, folded=2, unfolded=-1,
             progress=False)
    assert '2 of 2 shots' in caplog.text


def test_chosen_frames_lie_between_the_states():
    q = [np.random.default_rng(k).uniform(size=500) for k in range(3)]
    c = fs.choose_frames(q, [0, 2], 40, seed=3)
    v = np.array([q[k][t] for k, t in c])
    assert set(c[:, 0]) == {0, 2} and v.min() >= 0.25 and v.max() <= 0.8 and len({tuple(x) for x in c}) == 40
    with pytest.raises(ValueError, match='only'): fs.choose_frames([np.full(5, .5)], [0], 6)


def test_shoot_ensemble_chooses_shoots_and_writes(model, tmp_path):
    rng = np.random.default_rng(1)
    xyz = [model.xyz + rng.normal(scale=s, size=(40, *model.xyz.shape)) for s in (0.1, 0.15)]
    got = fs.shoot_ensemble(model, xyz, [1], tmp_path/'shots.npz', n=3, n_shots=2, seed=5, n_workers=1,
                            steps_per_frame=20, max_frames=3, progress=False)
    with np.load(tmp_path/'shots.npz') as z: assert all((z[k] == v).all() for k, v in got.items())
    assert set(got['trajectory']) == {1} and got['outcomes'].shape == (3, 2)
    assert got['steps_per_frame'] == 20 and 'batches' not in got
    assert [p.name for p in tmp_path.iterdir()] == ['shots.npz']
    more = fs.shoot_ensemble(model, xyz, [1], tmp_path/'more.npz', n=3, n_shots=2, seed=5, target_error=0.2,
                             max_shots=9, n_workers=1, steps_per_frame=20, max_frames=3, progress=False)
    assert (more['batches'].sum(1) == (more['outcomes'] > -2).sum(1)).all()
    assert more['outcomes'].shape == (3, 9) and more['target_error'] == 0.2
    assert (more['outcomes'][:, :2] == got['outcomes']).all()


@pytest.mark.parametrize('name', ['villin_go', 'bba_go'])
def test_shipped_shots_are_of_the_test_trajectories(name):
    shots = fs.shipped_shots(name)
    assert shots['outcomes'].dtype == np.int8 and set(shots['trajectory']) <= {6, 7}
    assert len(shots['outcomes']) == len(shots['frame']) == len(shots['trajectory'])


def test_the_figure_is_drawn():
    import matplotlib
    matplotlib.use('Agg')
    ax = fs.plot_shooting(np.array([.3, .6]), np.array([[0, 0], [1, 1]]))
    assert ax.get_ylabel() == 'committor by shooting'
