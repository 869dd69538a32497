"The configuration and the run directory: what is refused, what may change, what is found."
import numpy as np
import pytest

from foldbook import runs
from foldbook.base import write_json
from foldbook.config import Config, check, quick
from foldbook.evaluate import split
from foldbook.runs import Run, RunFiles, run


def test_a_run_directory_refuses_another_configuration(tmp_path):
    with Run(Config(seed=1), tmp_path/'r') as job: job.stage('states', dict)
    with pytest.raises(ValueError, match='lag: 10 before, 20 now.*--overwrite'):
        Run(Config(seed=1, lag=20), tmp_path/'r')
    Run(Config(seed=1, lag=20), tmp_path/'r', overwrite=True).close()
    Run(Config(seed=1, lag=20), tmp_path/'r').close()


def test_settings_may_change_before_a_stage_that_depends_on_them(tmp_path):
    Run(Config(data='a'), tmp_path/'r').close()
    with Run(Config(), tmp_path/'r') as job: job.stage('features', dict)  # nothing was done: corrected freely
    Run(Config(folded='Q > 0.7'), tmp_path/'r').close()
    assert Config.read(tmp_path/'r'/'config.json').folded == 'Q > 0.7'
    with pytest.raises(ValueError, match='max_frames'): Run(Config(max_frames=5), tmp_path/'r')


def test_overwrite_spares_what_is_not_a_run(tmp_path):
    (tmp_path/'thesis.txt').write_text('years of work')
    with pytest.raises(ValueError, match='not a foldbook run'): Run(Config(), tmp_path, overwrite=True)
    assert (tmp_path/'thesis.txt').exists()


def test_inputs_are_looked_for_before_anything_is_done(tmp_path):
    found = check(Config())
    assert len(found.files) == 8 and found.shooting.name == 'shooting.npz' and found.unfolded == 'Q < 0.25'
    assert check(Config(folded='Q > 0.7')).shooting is None  # shots to other states are no truth
    with pytest.raises(ValueError, match='--top'): check(Config(trajectories=('a.xtc',)))
    with pytest.raises(FileNotFoundError, match='a.xtc'): check(Config(trajectories=('a.xtc',), topology='b.pdb'))
    with pytest.raises(FileNotFoundError, match='foldbook simulate'): check(Config(data=str(tmp_path)))
    with pytest.raises(KeyError, match='villin_go'): check(Config(data='nothing'))


def test_trajectories_of_a_directory_are_taken_in_natural_order(tmp_path):
    for k in range(12): (tmp_path/f'hp-{k}.xtc').touch()
    native = check(Config()).native
    for name in ('native.pdb', 'model.json'): (tmp_path/name).write_bytes(native.with_name(name).read_bytes())
    found = check(Config(data=str(tmp_path)))
    assert [f.name for f in found.files] == [f'hp-{k}.xtc' for k in range(12)]


@pytest.mark.parametrize('settings, words', [
    (dict(students=('lstm',)), "'lstm'.*architecture:loss"),
    (dict(students=('lstm:telepathy',)), 'telepathy.*martingale'),
    (dict(students=('oracle:outcome',)), 'oracle.*lstm'), (dict(baselines=('oracle',)), 'oracle.*vampnet'),
    (dict(student_options=dict(hiden=8)), 'hiden.*hidden'), (dict(student_options={'lstm.hiden': 8}), 'hiden.*hidden'),
    (dict(student_options={'gru.hidden': 8}), 'gru.*lstm'), (dict(student_options=dict(hidden=0)), 'hidden'),
    (dict(teacher_options=dict(degre=4)), 'degre.*degree'), (dict(teacher_options=dict(method='magic')), 'magic'),
    (dict(folded='Q >'), 'Q >'), (dict(unfolded='P < 0.3'), 'P'), (dict(folded='Q + 1'), 'not a condition'),
    (dict(features='Q + RMSD + fi'), 'fi'), (dict(features='Q + Rg'), 'RMSD'),
    (dict(seeds=0), 'seeds=0'), (dict(stride=0), 'stride=0'), (dict(lag=0), 'lag=0'),
    (dict(max_frames=-1), 'max_frames')],
    ids=str)
def test_a_typing_error_is_refused_before_anything_is_done(settings, words, tmp_path):
    with pytest.raises(ValueError, match=words): run(Config(**settings), tmp_path/'r')
    assert not (tmp_path/'r').exists()


def test_a_shooting_file_is_looked_into(tmp_path):
    file = tmp_path/'shots.npz'
    with pytest.raises(FileNotFoundError, match='shots.npz'): check(Config(shooting=str(file)))
    file.write_text('nothing')
    with pytest.raises(ValueError, match='shots.npz'): check(Config(shooting=str(file)))
    np.savez(file, trajectory=[8], frame=[0])
    with pytest.raises(ValueError, match='no outcomes'): check(Config(shooting=str(file)))
    np.savez(file, trajectory=[8], frame=[0], outcomes=[[1, 1]])
    with pytest.raises(ValueError, match='trajectory 8.*8 trajectories'): check(Config(shooting=str(file)))


def test_options_reach_the_students_that_know_them():
    from foldbook.config import new_student
    c = Config(student_options={'hidden': 8, 'components': 2, 'residue.window': 6}, seed=3)
    lstm, residue = new_student(c, 'lstm:outcome', 1), new_student(c, 'residue:martingale')
    assert (lstm.hidden, lstm.components, lstm.window, lstm.seed) == (8, 2, 4, 4)
    assert (residue.hidden, residue.window, residue.seed) == (8, 6, 3)


def test_quick_is_smaller():
    assert quick().max_frames < 10_000 and quick(seed=3).seed == 3 and len(quick().students) < len(Config().students)
    assert quick(students=('residue:martingale',)).student_options == dict(batches=80)


def test_a_stride_takes_every_so_many_th_frame(tmp_path):
    found, said = check(Config()), []
    def features(name, **settings):
        config = Config(trajectories=tuple(map(str, found.files[:2])), topology=str(found.topology),
                        features='Q + RMSD', folded='Q > 2', students=(), **settings)
        with pytest.raises(ValueError, match='Q > 2'): run(config, tmp_path/name, workers=1, say=said.append)
        return RunFiles(tmp_path/name).load('features')
    every, few = features('all'), features('few', stride=7, max_frames=1000)
    assert [len(x) for x in every] == [10_000, 10_000] and '2 features of 20,000 frames' in said[0]
    assert all(len(b) == 1000 and np.array_equal(a[::7][:1000], b) for a, b in zip(every, few))


def test_shots_are_found_at_their_frames(tmp_path):
    from foldbook.config import Inputs
    inputs = Inputs('a', [], tmp_path, tmp_path, '', '', 1., 1., tmp_path/'shooting.npz', '')
    np.savez(inputs.shooting, trajectory=[2, 2, 0, 2], frame=[4, 6, 6, 9],
             outcomes=[[1, 0, -1], [1, 1, 1], [0, 0, 0], [0, 1, 1]])
    for stride, values, hits, shots in ((1, [4, 6, 9], [1, 3, 2], [2, 3, 3]), (2, [2, 3], [1, 3], [2, 3]),
                                        (5, [], [], [])):
        with Run(Config(stride=stride), tmp_path/f'r{stride}') as job:
            write_json(job.path/'split.json', split([20]*3))
            job.save('r/x', [np.arange(20.)]*3)
            found = runs._shots(job, inputs, 'x', 'test')
        if not values: assert found is None
        else: assert [list(v) for v in found] == [values, hits, shots]
