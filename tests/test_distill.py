"Students: causality, seeds, restarts, files, and each loss against the exact committor."
import json, os, signal, subprocess, sys, time
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from foldbook.committor import clamp, outcomes
from foldbook.distill import LOSSES, Student, Windows, lambda_return, stopped, targets
from foldbook.systems import dw1d, persist1d

ARCHITECTURES = ('mlp', 'lstm', 'transformer')
FAST = dict(hidden=8, max_epochs=3, window=4, batch_size=256)


def data(system, n_frames, n_trajectories, seed, columns=slice(None)):
    "Features, states and exact committor of a sample."
    index = system.sample(n_frames, n_trajectories, seed=seed)
    return ([system.coordinates[i][:, columns].astype(np.float32) for i in index], [system.states[i] for i in index], [system.committor[i] for i in index])


@pytest.fixture(scope='module')
def walk(): return data(dw1d(), 4000, 3, seed=1)


flags_and_values = st.lists(st.sampled_from([-1, -1, -1, 0, 1]), min_size=2, max_size=30).flatmap(
    lambda s: st.tuples(st.just(np.array(s, np.int8)), st.lists(st.floats(0, 1), min_size=len(s), max_size=len(s)).map(np.array)))


@settings(deadline=None, max_examples=40)
@given(flags_and_values, st.integers(1, 8))
def test_stopped_by_hand(case, lag):
    flags, r = case
    value, got = np.where(flags >= 0, flags, r), stopped(r, flags, lag)
    for t in range(len(r)):
        if t + lag >= len(r): assert np.isnan(got[t]); continue
        end = next((j for j in range(t + 1, t + lag + 1) if flags[j] >= 0), t + lag)
        assert got[t] == value[end]


@settings(deadline=None, max_examples=40)
@given(flags_and_values, st.floats(0.05, 0.9))
def test_lambda_return_is_the_mean_over_lags(case, lam):
    flags, r = case
    clamped, n = np.where(flags >= 0, flags, r), len(r)
    got = lambda_return(clamped, flags, lam)
    assert np.isnan(got[-1])
    for t in range(n - 1):
        values = [stopped(r, flags, k)[t] for k in range(1, n - t)]
        weights = (1 - lam) * lam**np.arange(n - t - 1)
        weights[-1] = lam**(n - t - 2) # the rest of the geometric law, all on the last frame
        assert got[t] == pytest.approx(np.dot(weights, values), abs=1e-12)


def test_lambda_return_ends(walk):
    "lambda 0 is the next frame, lambda 1 the outcome, and the exact committor is a fixed point on average."
    _, S, q = walk
    one, zero = lambda_return(q[0], S[0], 1.), lambda_return(q[0], S[0], 0.)
    known = np.flatnonzero(S[0] >= 0)[-1] # frames before it have a next boundary
    inside = (S[0] < 0) & (np.arange(len(q[0])) < known)
    assert np.allclose(one[inside], outcomes(S)[0][inside]) and np.allclose(zero[:-1], q[0][1:])
    for lam in (0., .5, .9):
        change = np.concatenate([(lambda_return(r, s, lam) - r)[:-1][s[:-1] < 0] for r, s in zip(q, S)])
        assert abs(change.mean()) < 4 * change.std() / np.sqrt(len(change) / 20)


def test_targets_leave_out_boundaries(walk):
    X, S, q = walk
    for loss in LOSSES:
        for y, s in zip(targets(loss, S, r=q, teacher=q), S):
            assert np.isnan(y[s >= 0]).all() and np.isfinite(y[s < 0]).any()
            assert np.nanmin(y) >= 0 and np.nanmax(y) <= 1


def test_windows_stop_at_the_first_frame():
    X = [np.arange(5, dtype=np.float32)[:, None], 10 + np.arange(4, dtype=np.float32)[:, None]]
    w = Windows(X, np.zeros(1), np.ones(1), 3)
    assert w(torch.tensor([0, 1, 4, 5, 7])).squeeze(-1).tolist() == [[0, 0, 0], [0, 0, 1], [2, 3, 4], [10, 10, 10], [10, 11, 12]]


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_causal_clamped_bounded(walk, architecture):
    X, S, _ = walk
    student = Student(architecture, **FAST).fit(X, S, progress=False)
    r = student.transform(X, S)
    for x, s in zip(r, S): assert (x[s == 0] == 0).all() and (x[s == 1] == 1).all() and ((x[s < 0] > 0) & (x[s < 0] < 1)).all()
    for t in (0, 5, 1000):
        changed = X[0].copy()
        changed[t + 1:] = 7.
        a, b = student.transform([changed])[0], student.transform([X[0]])[0]
        assert np.allclose(a[:t + 1], b[:t + 1], atol=1e-7) and not np.allclose(a[t + 1:t + 4], b[t + 1:t + 4], atol=1e-4)
        assert np.allclose(student.transform([X[0][:t + 1]])[0], b[:t + 1], atol=1e-6)
    depends = np.abs(student.transform([np.vstack([X[0][:50] + 1, X[0][50:]])])[0] - student.transform([X[0]])[0])
    assert np.allclose(depends[50 + student.window - 1:], 0, atol=1e-7) # nothing older than the window is read


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_order_of_trajectories_is_free(walk, architecture):
    X, S, _ = walk
    student = Student(architecture, **FAST).fit(X, S, progress=False)
    for a, b in zip(student.transform(X)[::-1], student.transform(X[::-1])): assert np.allclose(a, b, atol=1e-7)


def test_seeds(walk):
    X, S, _ = walk
    run = lambda **k: np.concatenate(Student('lstm', dropout=0.1, **FAST, **k).fit(X[:2], S[:2], validation=(X[2:], S[2:]), progress=False).transform(X))
    same, before = run(seed=3), torch.random.get_rng_state()
    assert (run(seed=3) == same).all() and (torch.random.get_rng_state() == before).all()
    assert (run(seed=4) != same).any() and (run(seed=3, data_seed=5) != same).any()


def test_save_load(walk, tmp_path):
    X, S, _ = walk
    student = Student('transformer', members=2, **FAST).fit(X[:2], S[:2], validation=(X[2:], S[2:]), progress=False)
    student.save(tmp_path / 's')
    assert sorted(p.name for p in (tmp_path / 's').iterdir()) == ['student.json', 'student.safetensors']
    again = Student.load(tmp_path / 's')
    assert all((a == b).all() for a, b in zip(student.transform(X, S), again.transform(X, S)))
    assert again.n_parameters == student.n_parameters > 0 and again.history == student.history and again == student
    (tmp_path / 's/student.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='student.safetensors'): Student.load(tmp_path / 's')


class Killed(Exception): pass


@pytest.mark.parametrize('kill_at', [1, 3, 4])
def test_interrupted_run_gives_the_same_numbers(walk, tmp_path, monkeypatch, kill_at):
    "Stopped in the middle of an epoch, of either member, and started again: bit for bit the unbroken run."
    from foldbook import distill
    X, S, _ = walk
    make = lambda: Student('lstm', dropout=0.1, martingale_weight=.5, loss='outcome', members=2, **FAST)
    fit = lambda d: make().fit(X[:2], S[:2], validation=(X[2:], S[2:]), directory=d, progress=False)
    whole, step, epochs = fit(None), distill.Distillation.training_step, []
    def dying(self, batch, i):
        if i == 1: epochs.append(0)
        if len(epochs) > kill_at: raise Killed
        return step(self, batch, i)
    monkeypatch.setattr(distill.Distillation, 'training_step', dying)
    with pytest.raises(Killed): fit(tmp_path)
    monkeypatch.setattr(distill.Distillation, 'training_step', step)
    again = fit(tmp_path)
    assert again.history == whole.history
    assert all((a == b).all() for a, b in zip(again.transform(X), whole.transform(X)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ['member_0.ckpt', 'member_1.ckpt']
    monkeypatch.setattr(distill.Distillation, 'training_step', dying) # a finished run trains no more
    assert fit(tmp_path).history == whole.history


def test_foreign_checkpoint_is_refused(walk, tmp_path):
    X, S, _ = walk
    Student('mlp', **FAST).fit(X, S, directory=tmp_path, progress=False)
    with pytest.raises(ValueError, match='another student or other data'): Student('mlp', **FAST, seed=1).fit(X, S, directory=tmp_path, progress=False)
    with pytest.raises(ValueError, match='another student or other data'): Student('mlp', **FAST).fit([x + 1 for x in X], S, directory=tmp_path, progress=False)


def test_mistakes(walk):
    X, S, q = walk
    for bad, words in ((dict(architecture='gru'), 'lstm'), (dict(loss='mse'), 'teacher_mse'), (dict(functional_weight=1.), 'memoryless'), (dict(window=0), 'window')):
        with pytest.raises(ValueError, match=words): Student(**bad)
    with pytest.raises(ValueError, match='needs teacher'): Student(loss='teacher_mse').fit(X, S)
    with pytest.raises(ValueError, match='frames'): Student().fit(X, [s[1:] for s in S])
    with pytest.raises(ValueError, match='frames'): Student(loss='teacher_mse').fit(X, S, teacher=[t[1:] for t in q])
    with pytest.raises(ValueError, match='same F'): Student().fit(X, S, validation=([np.zeros((len(S[0]), 2))], S[:1]))
    with pytest.raises(ValueError, match='NaN'): Student().fit([np.where(x > 1, np.nan, x) for x in X], S)
    with pytest.raises(ValueError, match='trained'): Student().transform(X)
    with pytest.raises(ValueError, match='reads 1 features'): Student('mlp', **FAST).fit(X, S, progress=False).transform([np.zeros((5, 2))])


def rmse(student, X, S, q): return np.sqrt(np.mean(np.concatenate([(a - b)[s < 0]**2 for a, b, s in zip(student.transform(X, S), q, S)])))


@pytest.mark.parametrize('loss, functional, bound', [('teacher_mse', 0., .02), ('teacher_cross_entropy', 0., .02), ('outcome', 0., .05), ('martingale', 0., .05), ('martingale', 1., .05)])
def test_memoryless_student_finds_the_committor(loss, functional, bound):
    X, S, q = data(dw1d(), 20_000, 3, seed=5)
    student = Student('mlp', loss, functional_weight=functional, hidden=16, max_epochs=30).fit(X[:2], S[:2], q[:2], validation=(X[2:], S[2:]), progress=False)
    assert rmse(student, X[2:], S[2:], q[2:]) < bound


@pytest.mark.parametrize('architecture', ['lstm', 'transformer'])
def test_a_window_finds_the_hidden_direction(architecture):
    "persist1d seen through x only: the present frame is not enough, three frames are."
    X, S, q = data(persist1d(), 20_000, 3, seed=6, columns=[0])
    fit = lambda a: Student(a, hidden=12, window=4, max_epochs=20).fit(X[:2], S[:2], validation=(X[2:], S[2:]), progress=False)
    assert rmse(fit(architecture), X[2:], S[2:], q[2:]) < 0.6 * rmse(fit('mlp'), X[2:], S[2:], q[2:])
