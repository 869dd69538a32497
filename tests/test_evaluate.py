"The leaderboard and the main job: fairness, restart, report."
import base64
import json
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from foldbook import evaluate
from foldbook.evaluate import (Candidate, Config, DiffusiveCommittor, IsotonicCommittor, Run, Split, TicaCoordinate, choose, free_energy, judge,
                               leaderboard, markdown_table, read_leaderboard, replacing, shooting_error, split, write_readme)
from foldbook.systems import dw1d, lshape2d

TIMINGS = ('seconds', 'microseconds_per_frame')


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
    if len(lengths) >= 3: assert all(u.min() == 1 for u in used) and sorted(i for i, _, _ in s.blocks) == list(range(len(lengths)))
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


# --- maps --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def well():
    system = dw1d()
    path = system.sample(60_000, 2, seed=3)
    return system, [system.coordinates[p, 0] for p in path], [system.states[p] for p in path]


@pytest.mark.parametrize('make', [DiffusiveCommittor, IsotonicCommittor])
@pytest.mark.parametrize('sign', [1, -1])
def test_maps_find_the_committor_whichever_way_x_runs(make, sign, well):
    system, x, states = well
    r = make().fit([sign*v for v in x], states).transform([sign*system.coordinates[:, 0]])[0]
    inside = system.states < 0
    assert abs(r - system.committor)[inside].max() < .08
    assert r.min() > 0 and r.max() < 1, 'an interior frame is never certain'


@settings(deadline=None, max_examples=10)
@given(st.floats(-5, 5), st.floats(.1, 20))
def test_diffusive_map_does_not_depend_on_units(shift, scale):
    system = dw1d()
    path = system.sample(20_000, seed=5)
    x, states = [system.coordinates[p, 0] for p in path], [system.states[p] for p in path]
    a = DiffusiveCommittor().fit(x, states).transform(x)[0]
    y = [shift + scale*v for v in x]
    b = DiffusiveCommittor().fit(y, states).transform(y)[0]
    assert abs(a - b).max() < .03


@pytest.mark.parametrize('make', [DiffusiveCommittor, IsotonicCommittor])
def test_maps_are_saved_and_loaded(make, well, tmp_path):
    _, x, states = well
    fitted = make().fit(x, states).save(tmp_path)
    assert all(np.array_equal(a, b) for a, b in zip(make.load(tmp_path).transform(x), fitted.transform(x)))


def test_map_without_a_state_says_so(well):
    _, x, states = well
    with pytest.raises(ValueError, match=r'A \(0\)|state A'): DiffusiveCommittor().fit(x, [np.where(f == 0, -1, f) for f in states])


def test_tica_agrees_with_the_closed_form():
    rng = np.random.default_rng(0)
    slow = np.zeros(20_000)
    for t in range(1, len(slow)): slow[t] = .99*slow[t-1] + rng.normal()
    x = np.stack([slow + rng.normal(size=len(slow)), rng.normal(size=len(slow)), 3*rng.normal(size=len(slow)) - slow, np.full(len(slow), 2.)], 1)
    states = [np.where(slow > 8, 1, np.where(slow < -8, 0, -1)).astype(np.int8)]
    got = TicaCoordinate(5).fit([x], states).transform([x])[0]
    a, b = x[:-5, :3], x[5:, :3]
    mean = (a.mean(0) + b.mean(0))/2
    a, b = a - mean, b - mean
    c0, c1 = a.T @ a + b.T @ b, a.T @ b + b.T @ a
    values, vectors = np.linalg.eig(np.linalg.solve(c0, c1))
    want = x[:, :3] @ vectors[:, values.real.argmax()].real
    assert abs(np.corrcoef(got, want)[0, 1]) > 1 - 1e-6
    assert got[states[0] == 1].mean() > got[states[0] == 0].mean()
    with pytest.raises(ValueError, match='too short'): TicaCoordinate(50).fit([x[:40]], [states[0][:40]])


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
    system = lshape2d()
    path = system.sample(60_000, 2, seed=7)
    states = [system.states[p] for p in path]
    q = [system.committor[p] for p in path]
    x = [system.coordinates[p, 0] for p in path]
    mapped = IsotonicCommittor().fit(x, states).transform(x, states)
    shots = (np.concatenate(q)[::50], np.random.default_rng(0).binomial(10, np.concatenate(q)[::50]), np.full(2400, 10))
    made = [Candidate('x', 'one-dimensional', mapped, states), Candidate('q', 'student', q, states, parameters=7, seconds=1., microseconds=2., shots=shots),
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


def test_a_wrong_shift_of_flags_is_seen():
    system = lshape2d()
    path = system.sample(100_000, 1, seed=9)
    states, q = [system.states[p] for p in path], [system.committor[p] for p in path]
    good = judge(Candidate('q', 'k', q, states), n_bootstrap=0)[0]
    late = judge(Candidate('q', 'k', [v[1:] for v in q], [f[:-1] for f in states]), n_bootstrap=0)[0]
    assert good['passed'] and not late['passed'] and late['verdict'] == 'misaligned flags'


def test_free_energy_of_a_flat_diffusion():
    rng = np.random.default_rng(0)
    x = np.cumsum(rng.normal(0, .02, 400_000))
    r = abs((x + 1) % 2 - 1)  # reflected at both ends
    centres, f, natural, g = free_energy([r])
    inner = slice(5, -5)
    assert np.ptp(f[inner]) < .5
    assert abs(np.ptp(natural)/np.ptp(centres)*.02/np.sqrt(2) - 1) < .05  # D = step**2/2


# --- files -------------------------------------------------------------------------------------------------------
def test_a_failed_write_leaves_the_old_file(tmp_path):
    f = tmp_path/'a.txt'
    f.write_text('old')
    def fail(p):
        p.write_text('half')
        raise OSError('disk full')
    with pytest.raises(OSError, match='disk full'): replacing(f, fail)
    assert f.read_text() == 'old' and list(tmp_path.iterdir()) == [f]


def test_a_run_directory_refuses_another_configuration(tmp_path):
    job = Run(Config(seed=1), tmp_path/'r', say=lambda line: None)
    job.stage('states', dict)
    job.close()
    with pytest.raises(ValueError, match='lag: 10 before, 20 now.*--overwrite'): Run(Config(seed=1, lag=20), tmp_path/'r')
    Run(Config(seed=1, lag=20), tmp_path/'r', overwrite=True).close()
    Run(Config(seed=1, lag=20), tmp_path/'r').close()


def test_settings_may_change_before_a_stage_that_depends_on_them(tmp_path):
    quiet = dict(say=lambda line: None)
    Run(Config(data='a'), tmp_path/'r').close()
    job = Run(Config(), tmp_path/'r', **quiet)  # nothing was done: corrected freely
    job.stage('features', dict)
    job.close()
    Run(Config(folded='Q > 0.7'), tmp_path/'r').close()
    assert evaluate.load_config(tmp_path/'r'/'config.json').folded == 'Q > 0.7'
    with pytest.raises(ValueError, match='max_frames'): Run(Config(max_frames=5), tmp_path/'r')


def test_overwrite_spares_what_is_not_a_run(tmp_path):
    (tmp_path/'thesis.txt').write_text('years of work')
    with pytest.raises(ValueError, match='not a foldbook run'): Run(Config(), tmp_path, overwrite=True)
    assert (tmp_path/'thesis.txt').exists()


def test_readme(tmp_path, rows):
    table = leaderboard(rows)
    (tmp_path/'figures').mkdir()
    (tmp_path/'figures'/'zq.png').write_bytes(b'png')
    evaluate.write_json(tmp_path/'leaderboard.json', dict(headline='It passes.', rows=table.to_dict('records')))
    readme = tmp_path/'README.md'
    readme.write_text('# a\n<!-- leaderboard:start -->\nold\n<!-- leaderboard:end -->\nb\n')
    write_readme(tmp_path, readme, tmp_path/'fig.png')
    once = readme.read_text()
    stored = json.loads((tmp_path/'leaderboard.json').read_text())['rows']
    assert once == f'# a\n<!-- leaderboard:start -->\nIt passes.\n\n{markdown_table(stored)}\n<!-- leaderboard:end -->\nb\n'
    assert '**q**' in once and (tmp_path/'fig.png').read_bytes() == b'png'
    write_readme(tmp_path, readme)
    assert readme.read_text() == once
    readme.write_text('no marks')
    with pytest.raises(ValueError, match='README.md: needs one line'): write_readme(tmp_path, readme)
    assert read_leaderboard(tmp_path).coordinate[0] == 'q'


# --- figures and words -------------------------------------------------------------------------------------------
def test_figures_show_what_they_are_given(rows):
    import matplotlib.pyplot as plt
    from foldbook.evaluate import (figure_calibration, figure_free_energy, figure_ladder, figure_learning, figure_profiles, figure_series, figure_shooting)
    system = lshape2d()
    path = system.sample(40_000, 2, seed=1)
    states, q = [system.states[p] for p in path], [system.committor[p] for p in path]
    c = Candidate('q', 'student', q, states, shots=(np.linspace(0, 1, 20), np.arange(20), np.full(20, 20)))
    z = judge(c, n_bootstrap=0)[1]
    drawn = lambda f: [a for a in f.axes if a.has_data()]
    assert [a.get_title().split('\n')[0] for a in drawn(figure_profiles(dict(a=z, b=z, c=z, d=z)))] == list('abcd')
    assert len(drawn(figure_ladder(rows))[0].lines) == len(rows) + 1  # and the limit
    assert len(drawn(figure_calibration([c, c]))) == 1
    assert len(drawn(figure_free_energy(q, 'q'))) == 2
    assert [a.get_title() for a in drawn(figure_series(q, states, names=['one', 'two']))] == ['one', 'two']
    assert [a.get_title() for a in drawn(figure_learning(dict(a=dict(epoch=[0, 1], log_loss=[1, .5], t_max=[3, 2]))))] == ['log loss', 't max']
    assert 'RMSE' in drawn(figure_shooting([c]))[0].get_title()
    plt.close('all')


def test_headline_says_pass_or_fail_and_why(rows):
    from foldbook.evaluate import headline
    table = leaderboard(rows)
    assert 'q, chosen on the validation part, PASSES' in headline(table, 'q') and 'The best order parameter by log-loss, x,' in headline(table, 'q')
    assert 'FAILS' in headline(table, 'x') and 'Reason: T_max is' in headline(table, 'x')


def test_rows_for_people_have_a_cell_for_each_column(rows):
    from foldbook.evaluate import COLUMNS, LEGEND, SHORT, cells
    assert all(len(cells(r)) == len(COLUMNS) for r in rows) and set(SHORT) < set(COLUMNS)
    assert cells(rows[2])[0] == 'seen (in-sample)' and cells(rows[0])[COLUMNS.index('RMSE to shooting')] == '–'
    assert 'validation' in LEGEND


def test_inputs_are_looked_for_before_anything_is_done(tmp_path):
    from foldbook.evaluate import Inputs, find_inputs
    found = find_inputs(Config())
    assert isinstance(found, Inputs) and len(found.files) == 8 and found.shooting.name == 'shooting.npz' and found.unfolded == 'Q < 0.25'
    assert find_inputs(Config(folded='Q > 0.7')).shooting is None  # shots to other states are no truth
    with pytest.raises(ValueError, match='--top'): find_inputs(Config(trajectories=('a.xtc',)))
    with pytest.raises(FileNotFoundError, match='a.xtc'): find_inputs(Config(trajectories=('a.xtc',), topology='b.pdb'))
    with pytest.raises(FileNotFoundError, match='foldbook simulate'): find_inputs(Config(data=str(tmp_path)))
    with pytest.raises(KeyError, match='villin_go'): find_inputs(Config(data='nothing'))


def test_a_failing_student_leaves_its_last_words(tmp_path):
    from foldbook.evaluate import student_process, train_student, load_config, save_array
    job = Run(Config(students=('lstm:telepathy',)), tmp_path/'r')
    evaluate.write_json(job.path/'split.json', asdict(split([50]*3)))
    for folder, a in (('features', np.zeros((50, 2), 'f4')), ('states', np.zeros(50, 'i1'))):
        for i in range(3): save_array(job.path/folder/f'{i:03d}.npy', a)
    with pytest.raises(ValueError, match='telepathy'): train_student(job.path, 'lstm:telepathy')
    with pytest.raises(SystemExit): student_process(str(job.path), 'lstm:telepathy', 'auto', 'False')
    assert 'telepathy' in (job.path/'models'/'lstm_telepathy'/'error.txt').read_text().splitlines()[-1]
    assert load_config(job.path/'config.json') == job.config


def test_quick_is_smaller():
    from foldbook.evaluate import quick
    assert quick().max_frames < 10_000 and quick(seed=3).seed == 3 and len(quick().students) < len(Config().students)
