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
from foldbook.maps import IsotonicCommittor
from foldbook.evaluate import (Candidate, Config, Run, Split, choose, free_energy, judge, leaderboard, markdown_table,
                               over_seeds, read_leaderboard,
                               replacing, shooting_error, split, write_readme)
from foldbook.systems import lshape2d

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


def test_free_energy_of_a_flat_diffusion():
    rng = np.random.default_rng(0)
    x = np.cumsum(rng.normal(0, .02, 400_000))
    r = abs((x + 1) % 2 - 1)  # reflected at both ends
    centres, f, natural, g = free_energy([r])
    inner = slice(5, -5)
    assert np.ptp(f[inner]) < .5
    assert abs(np.ptp(natural)/np.ptp(centres)*.02/np.sqrt(2) - 1) < .05  # D = step**2/2


# --- several seeds -----------------------------------------------------------------------------------------------
def test_rows_of_several_seeds_become_one(rows):
    from foldbook.evaluate import COLUMNS, _merged, cells, headline
    x, q, seen = rows
    by_seed = [q | dict(t_max=t, log_loss=l, passed=t < 3, verdict='pass' if t < 3 else 'too steep',
                        reason='' if t < 3 else 'T_max is large', t_max_per_lag=[t, t/2])
               for t, l in ((1.5, .31), (3.5, .30), (2., .32))]
    one = over_seeds(by_seed)
    assert (one['t_max'], one['log_loss'], one['passed'], one['verdict'], one['seeds'], one['seeds_passed']) == (2.,
        .31, True, 'pass', 3, 2)
    assert one['t_max_seeds'] == [1.5, 3.5, 2.] and one['t_max_per_lag'] == [2.,
        1.] and one['t_max_per_lag_range'] == [[1.5, .75], [3.5, 1.75]]
    lost = over_seeds([by_seed[1], by_seed[1], by_seed[0]])
    assert not lost['passed'] and (lost['verdict'], lost['reason'], lost['seeds_passed']) == ('too steep', 'T_max is '
        'large', 1)
    assert np.isnan(over_seeds([q, q | dict(rmse=np.nan)])['rmse']), 'a missing number is not hidden'
    merged = _merged([*by_seed, x, seen])
    assert [r['coordinate'] for r in merged] == ['q', 'x', 'seen'] and merged[1]['seeds'] == 1 and choose(merged) == 'q'
    shown = dict(zip(COLUMNS, cells(one)))
    assert shown['Z_q'] == 'pass 2/3' and shown['T_max'].endswith('(1.5–3.5)') and shown['log-loss'] == '0.310 (0.300–0.320)'
    assert '(' not in ''.join(cells(merged[1])[2:]), 'one seed has no range'
    table = leaderboard([r | dict(chosen=r['coordinate'] == 'q') for r in merged])
    assert 'PASSES Z_q in 2 of 3 seeds' in headline(table, 'q') and 'median T_max 2.0' in headline(table, 'q')
    assert 'FAILS Z_q in 2 of 3 seeds' in headline(leaderboard(_merged([by_seed[1], by_seed[1], by_seed[0]])), 'q')


def test_jobs_of_a_run():
    from foldbook.evaluate import _jobs, _slug
    jobs = _jobs(Config(seeds=3, students=('lstm:martingale',), baselines=('logistic', 'msm')))
    assert jobs == ['lstm:martingale', 'logistic', 'msm', 'lstm:martingale seed 1', 'msm seed 1', 'lstm:martingale '
                    'seed 2', 'msm seed 2']
    assert _slug(jobs[-2]) == 'lstm_martingale_seed_2' and len(set(map(_slug, jobs))) == len(jobs)


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
    with pytest.raises(ValueError, match='lag: 10 before, 20 now.*--overwrite'):
        Run(Config(seed=1, lag=20), tmp_path/'r')
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
    from foldbook.evaluate import (figure_calibration, figure_free_energy, figure_ladder, figure_learning,
                                   figure_profiles, figure_series, figure_shooting)
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
    assert [a.get_title() for a in drawn(figure_learning(dict(a=dict(epoch=[0, 1], log_loss=[1, .5],
                                                                     t_max=[3, 2]))))] == ['log loss', 't max']
    assert 'RMSE' in drawn(figure_shooting([c]))[0].get_title()
    plt.close('all')


def test_headline_says_pass_or_fail_and_why(rows):
    from foldbook.evaluate import headline
    table = leaderboard(rows)
    assert 'q, chosen on the validation part, PASSES' in headline(table,
        'q') and 'The best order parameter, slow mode or regression by log-loss, x,' in headline(table, 'q')
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


def test_features_with_a_stride_alone_and_on_a_cluster(tmp_path):
    from distributed import Client, LocalCluster
    from foldbook.evaluate import _features, find_inputs
    inputs = replace(found := find_inputs(Config()), files=found.files[:2])
    job = lambda name, **o: Run(Config(features='Q + RMSD', **o), tmp_path/name, say=lambda line: None)
    assert _features(all_of_them := job('all'), inputs)['lengths'] == [10_000, 10_000]
    assert _features(few := job('few', stride=7, max_frames=300), inputs)['lengths'] == [300, 300]
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False,
                      dashboard_address=None) as cluster, Client(cluster) as client:
        _features(far := job('far', stride=7, max_frames=300), inputs, client)
    for a, b, c in zip(all_of_them.load('features'), few.load('features'), far.load('features')):
        assert np.array_equal(a[::7][:300], b) and np.array_equal(b, c)


def test_shots_are_found_at_their_frames(tmp_path):
    from foldbook.evaluate import Inputs, _shots
    inputs = Inputs('a', [], tmp_path, tmp_path, '', '', 1., 1., tmp_path/'shooting.npz', '')
    np.savez(inputs.shooting, trajectory=[2, 2, 0, 2], frame=[4, 6, 6, 9],
             outcomes=[[1, 0, -1], [1, 1, 1], [0, 0, 0], [0, 1, 1]])
    for stride, values, hits, shots in ((1, [4, 6, 9], [1, 3, 2], [2, 3, 3]), (2, [2, 3], [1, 3], [2, 3]),
                                        (5, [], [], [])):
        job = Run(Config(stride=stride), tmp_path/f'r{stride}', say=lambda line: None)
        evaluate.write_json(job.path/'split.json', asdict(split([20]*3)))
        job.save('r/x', [np.arange(20.)]*3)
        found = _shots(job, inputs, 'x', 'test')
        if not values: assert found is None
        else: assert [list(v) for v in found] == [values, hits, shots]


def test_unknown_rivals_are_named_before_anything_is_done(tmp_path):
    with pytest.raises(ValueError, match='oracle.*vampnet'): evaluate.run(Config(baselines=('oracle',)), tmp_path/'r')
    with pytest.raises(ValueError, match='seeds is 0'): evaluate.run(Config(seeds=0), tmp_path/'r')
    assert not (tmp_path/'r').exists()


def test_quick_is_smaller():
    from foldbook.evaluate import quick
    assert quick().max_frames < 10_000 and quick(seed=3).seed == 3 and len(quick().students) < len(Config().students)
