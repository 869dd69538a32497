"Split, judge, leaderboard: fair, in order, and the same for several seeds."
import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from foldbook.maps import IsotonicCommittor
from foldbook.evaluate import (COLUMNS, SHORT, Candidate, Split, cells, choose, headline, judge, leaderboard,
                               over_seeds, shooting_error, split)
from foldbook.systems import lshape2d


# --- split -------------------------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(2000, 9000), min_size=1, max_size=30), st.one_of(st.none(), st.integers(0, 99)))
def test_split_covers_each_trajectory_once_and_keeps_parts_apart(lengths, seed):
    s = split(lengths, seed)
    parts = [set(s.train), set(s.validation), set(s.test)]
    assert all(parts) and set.union(*parts) == set(range(len(s.blocks))) and sum(map(len, parts)) == len(s.blocks)
    used = [np.zeros(n, int) for n in lengths]
    for i, a, b in s.blocks: used[i][a:b] += 1
    assert all(u.max() == 1 for u in used)
    if len(lengths) >= 3:
        assert all(u.min() == 1 for u in used) and sorted(i for i, _, _ in s.blocks) == list(range(len(lengths)))
    else: assert all(np.flatnonzero(u == 0).size == 200 for u in used)
    assert Split.from_dict(json.loads(json.dumps(asdict(s)))) == s


def test_split_is_deterministic_and_the_seed_shuffles():
    assert split([5000]*8).test == (6, 7)
    assert split([5000]*8, 3) == split([5000]*8, 3)
    assert len({split([5000]*8, seed).test for seed in range(6)}) > 1


def test_split_takes_blocks():
    s = split([1000, 1000])
    x = [np.arange(1000), np.arange(1000) + 1000]
    assert [v[0] for v in s.take(x, 'train')] == [0, 1000]
    assert sum(map(len, s.take(x, 'all'))) == 2000 - 400


# --- shooting ----------------------------------------------------------------------------------------------------
def test_shooting_error_is_unbiased():
    rng = np.random.default_rng(1)
    z = []
    for _ in range(200):
        p = rng.random(300)
        shots = rng.integers(2, 12, 300)
        e = shooting_error(p + .1*rng.normal(size=300), rng.binomial(shots, p), shots)
        z.append((e['mse'] - .01)/e['mse_se'])
    assert abs(np.mean(z)) < .3 and .85 < np.std(z) < 1.15  # 4 standard errors of the mean, 3 of the sd


def test_shooting_error_needs_two_shots():
    with pytest.raises(ValueError, match='two finished shots'): shooting_error([.5], [1], [1])
    assert shooting_error([.5, .5, .5], [1, 1, 2], [1, 4, 4])['frames'] == 2


# --- judging -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def rows():
    "Three judged coordinates of the L-shaped path."
    system = lshape2d()
    path = system.sample(60_000, 2, seed=7)
    states = [system.states[p] for p in path]
    q = [system.committor[p] for p in path]
    x = [system.coordinates[p, 0] for p in path]
    mapped = IsotonicCommittor().fit(x, states).transform(x, states)
    shots = (np.concatenate(q)[::50], np.random.default_rng(0).binomial(10, np.concatenate(q)[::50]), np.full(2400, 10))
    made = [Candidate('x', 'one-dimensional', mapped, states),
            Candidate('q', 'student', q, states, parameters=7, seconds=1., microseconds=2., shots=shots),
            Candidate('seen', 'teacher', q, states, in_sample=True)]
    return [judge(c, n_bootstrap=20)[0] | dict(chosen=c.name == 'q') for c in made]


def test_leaderboard_order(rows):
    table = leaderboard(rows)
    assert list(table.coordinate) == ['q', 'x', 'seen']
    assert bool(table.passed[0]) and not bool(table.passed[1])
    assert table.rmse[0] < 3*table.rmse_se[0] and np.isnan(table.rmse[1]) and table.t_max_se[0] > 0
    assert choose(rows) == 'q'


def test_nothing_in_sample_is_chosen(rows):
    assert choose([r for r in rows if r['coordinate'] != 'q']) == 'x'


def test_what_fails_on_its_own_training_frames_is_not_chosen(rows):
    also = [dict(r, coordinate='small', log_loss=r['log_loss'] - 1) for r in rows if r['coordinate'] == 'q']
    assert choose(rows + also) == 'small'
    assert choose(rows + also, {'small': 6.5, 'q': 0.3}) == 'q' # far too flat is no failure on training frames


def test_a_wrong_shift_of_flags_is_seen():
    system = lshape2d()
    path = system.sample(100_000, 1, seed=9)
    states, q = [system.states[p] for p in path], [system.committor[p] for p in path]
    good = judge(Candidate('q', 'k', q, states), n_bootstrap=0)[0]
    late = judge(Candidate('q', 'k', [v[1:] for v in q], [f[:-1] for f in states]), n_bootstrap=0)[0]
    assert good['passed'] and not late['passed'] and late['verdict'] == 'misaligned flags'


# --- several seeds -----------------------------------------------------------------------------------------------
def test_rows_of_several_seeds_become_one(rows):
    x, q, seen = rows
    by_seed = [q | dict(t_max=t, log_loss=l, passed=t < 3, verdict='pass' if t < 3 else 'too steep',
                        reason='' if t < 3 else 'T_max is large', t_max_per_lag=[t, t/2])
               for t, l in ((1.5, .31), (3.5, .30), (2., .32))]
    one, = over_seeds(by_seed)
    assert (one['t_max'], one['log_loss'], one['passed'], one['verdict'], one['seeds'], one['seeds_passed']) == (2.,
        .31, True, 'pass', 3, 2)
    assert one['t_max_seeds'] == [1.5, 3.5, 2.] and one['t_max_per_lag'] == [2.,
        1.] and one['t_max_per_lag_range'] == [[1.5, .75], [3.5, 1.75]]
    lost, = over_seeds([by_seed[1], by_seed[1], by_seed[0]])
    assert not lost['passed'] and (lost['verdict'], lost['reason'], lost['seeds_passed']) == ('too steep', 'T_max is '
        'large', 1)
    assert np.isnan(over_seeds([q, q | dict(rmse=np.nan)])[0]['rmse']), 'a missing number is not hidden'
    merged = over_seeds([*by_seed, x, seen])
    assert [r['coordinate'] for r in merged] == ['q', 'x', 'seen'] and merged[1]['seeds'] == 1 and choose(merged) == 'q'
    shown = dict(zip(COLUMNS, cells(one)))
    assert shown['Z_q'] == 'pass 2/3' and shown['T_max'].endswith('(1.5–3.5)')
    assert shown['log-loss'] == '0.310 (0.300–0.320)'
    assert '(' not in ''.join(cells(merged[1])[2:]), 'one seed has no range'
    table = leaderboard([r | dict(chosen=r['coordinate'] == 'q') for r in merged])
    assert 'PASSES Z_q in 2 of 3 seeds' in headline(table, 'q') and 'median T_max 2.0' in headline(table, 'q')
    assert 'FAILS Z_q in 2 of 3 seeds' in headline(leaderboard(over_seeds([by_seed[1], by_seed[1], by_seed[0]])), 'q')


def test_headline_says_pass_or_fail_and_why(rows):
    table = leaderboard(rows)
    assert 'q, chosen on the validation part, PASSES' in headline(table,
        'q') and 'The best order parameter, slow mode or regression by log-loss, x,' in headline(table, 'q')
    assert 'FAILS' in headline(table, 'x') and 'Reason: T_max is' in headline(table, 'x')


def test_rows_for_people_have_a_cell_for_each_column(rows):
    assert all(len(cells(r)) == len(COLUMNS) for r in rows) and set(SHORT) < set(COLUMNS)
    assert cells(rows[2])[0] == 'seen (in-sample)' and cells(rows[0])[COLUMNS.index('RMSE to shooting')] == '–'
