"Every option of every command changes an output, or raises: the cheap commands are run with each, all are read."
import ast
import inspect
import textwrap

import numpy as np
import pytest
from typer.main import get_command
from typer.testing import CliRunner

import foldbook.cli  # noqa: F401 registers all commands
from foldbook.cli.core import app
from foldbook.systems import lshape2d


def leaves(command, path=()):
    "Every command with its name."
    if hasattr(command, 'commands'):
        for name, sub in command.commands.items(): yield from leaves(sub, (*path, name))
    else: yield ' '.join(path), command


COMMANDS = dict(leaves(get_command(app)))


@pytest.mark.parametrize('name', COMMANDS)
def test_every_option_is_read(name):
    function = inspect.unwrap(COMMANDS[name].callback)
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    body = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)).body
    read = {n.id for part in body for n in ast.walk(part) if isinstance(n, ast.Name)}
    if {'locals', 'vars', 'ctx'} & read: read |= set(inspect.signature(function).parameters)
    assert not set(inspect.signature(function).parameters) - read, f'foldbook {name} ignores an option'


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "A chain with two coordinates as columns, flags, values of its committor, weights."
    home, system = tmp_path_factory.mktemp('options'), lshape2d()
    rng = np.random.default_rng(0)
    for i, p in enumerate(system.sample(12_000, 3, seed=4)):
        t, w = 2.*np.arange(len(p)), rng.integers(1, 3, len(p))
        np.savetxt(home/f'x{i}.csv', np.column_stack([t, system.coordinates[p], w, t/3]), fmt='%.3f', delimiter=',',
                   header='time,x,y,w,u', comments='')
        np.save(home/f'q{i}.npy', system.committor[p])
        np.save(home/f's{i}.npy', system.states[p])
        np.save(home/f'w{i}.npy', w)
    return home


def said(home, line, monkeypatch):
    "Exit code, what was printed, and the bytes of what was written."
    monkeypatch.chdir(home)
    new = {p: p.stat().st_mtime_ns for p in home.rglob('*') if p.is_file()}
    done = CliRunner().invoke(app, line.split())
    written = {p.relative_to(home).as_posix(): p.read_bytes() for p in sorted(home.rglob('*'))
               if p.is_file() and new.get(p) != p.stat().st_mtime_ns}
    return done.exit_code, done.output + str(done.exception), written


@pytest.fixture(scope='module')
def finished(files):
    "A run of the chain, and the shipped villin in short files."
    import mdtraj as md
    from foldbook.data import fetch
    from foldbook.config import Config
    from foldbook.runs import run
    names = [tuple(str(files/f'{kind}{i}.{end}') for i in range(3)) for kind, end in (('x', 'csv'), ('s', 'npy'))]
    config = Config(series=names[0], labels=names[1], columns=('x', 'y'), students=('mlp:variational',),
                    student_options=dict(max_epochs=2), teacher_options=dict(n_iterations=50), n_bootstrap=5,
                    baselines=('logistic',))
    run(config, files/'done', workers=1, say=lambda line: None)
    villin = fetch('villin_go', progress=False)
    for name in ('native.pdb', 'model.json'): (files/name).write_bytes((villin.topology.parent/name).read_bytes())
    t = md.load(str(villin.trajectories[0]), top=str(villin.topology))[:40]
    t.unitcell_lengths, t.unitcell_angles = np.full((40, 3), 20.), np.full((40, 3), 90.)
    for name in ('a.xtc', 'b.xtc'): t.save_xtc(str(files/name))
    cut = t[:]
    cut.xyz = (cut.xyz - cut.xyz[0].mean(0)) % 20
    cut.save_xtc(str(files/'d.xtc'))
    t.time[20:] -= 60
    t.save_xtc(str(files/'c.xtc'))
    return files


FEATURES = 'features --traj a.xtc --top native.pdb --out f'
APPLY = 'apply done --series x2.csv --labels s2.npy -o r.npy'


@pytest.mark.parametrize('base, more', [
    (FEATURES, '--native a.xtc'), (FEATURES, '--set Q'), (FEATURES.replace('a.xtc', 'd.xtc'), '--periodic'),
    (FEATURES, '--stride 3'),
    (FEATURES, '--spacing 3'), (FEATURES, '--traj b.xtc'), (FEATURES, '--top c.pdb'), (FEATURES, '--out g'),
    (FEATURES.replace('a.xtc', 'c.xtc') + ' --restart cut', '--restart refuse'),
    (APPLY, '--name logistic'), (APPLY, '--traj a.xtc'), (APPLY, '--top native.pdb'), (APPLY, '--stride 2'),
    (APPLY, '--spacing 3'), (APPLY + ' --spacing 3', '--force'), (APPLY, '-o other.npy'),
    (APPLY, '--labels s1.npy'), (APPLY, '--series x1.csv'), (APPLY, '--restart no'), (APPLY, '--periodic'),
    ('rates done', '--name logistic'), ('rates done', '--bootstrap 3'), ('rates done', '--seed 3'),
    ('rates done', '--json a.json'), ('rates done', '--figure a.png'), ('compare done', '--json c.json'),
    ('compare done', 'done'), ('report done', 'nothing'),
    ('export done --name logistic --out e', '--to torchscript'), ('export done --name logistic --out e', '--out e2'),
    ('export done --name logistic --out e', '--name mlp_variational'),
    ('export done --name logistic --out e', '--seed 3'), ('data list', '--kind shipped'),
    ('data info villin_go', 'bba_go')], ids=lambda v: ' '.join(v.split()[-3:]))
def test_an_option_of_other_commands_changes_something(base, more, finished, monkeypatch):
    plain, changed = said(finished, base, monkeypatch), said(finished, f'{base} {more}', monkeypatch)
    assert changed != plain and 'Traceback' not in changed[1]


ZQ = 'zq q0.npy q1.npy --labels s0.npy s1.npy --bootstrap 10'
CONDITIONS = 'zq x0.csv:x x1.csv:x --unfolded x<-0.9 --folded x>0.9 --bootstrap 0'
RUN = 'run --series x0.csv x1.csv x2.csv --labels s0.npy s1.npy s2.npy --dry-run'


@pytest.mark.parametrize('base, more', [
    (ZQ, '--lengths 5'), (ZQ, '--ends stopping'), (ZQ, '--after r>2'), (ZQ, '--weights w0.npy w1.npy'),
    (ZQ, '--spacing 2'), (ZQ, '--stride 2'), (ZQ, '--max-lag 4'), (ZQ, '--bootstrap 20'), (ZQ, '--seed 1'),
    (ZQ, '--figure z.png'), (ZQ, '--report z.html'), (ZQ, '--json z.json'), (ZQ, '--unfolded r<0'),
    (CONDITIONS, '--weights w'), (CONDITIONS, '--time u'), (CONDITIONS, '--restart no'), (CONDITIONS, '--unfolded y<0'),
    (CONDITIONS, '--folded y>1'), (CONDITIONS, '--ends no'), (CONDITIONS, '--spacing 3'), (CONDITIONS, '--after y>0'),
    *((RUN, more) for more in (
        '--traj a.xtc', '--top a.pdb', '--native a.pdb', '--features Q', '--periodic', '--columns x', '--time u',
        '--spacing 3', '--restart cut', '--weights w', '--bias w --temperature 300', '--bias w', '--temperature 300',
        '--data bba_go', '--folded x>1', '--unfolded x<1', '--lag 5', '--max-lag 64', '--out other', '--seed 1',
        '--stride 2', '--seeds 2', '--split-seed 1', '--folds 3', '--students mlp:outcome', '--student-option hidden=8',
        '--teacher-option degree=4', '--components 2', '--baselines logistic', '--quick', '--shooting a.npz',
        '--series x0.csv', '--labels s0.npy'))], ids=lambda v: ' '.join(v.split()[-3:]))
def test_an_option_changes_what_is_said(base, more, files, monkeypatch):
    plain, changed = said(files, base, monkeypatch), said(files, f'{base} {more}', monkeypatch)
    assert plain[0] in (0, 1), plain[1]
    assert changed != plain and 'Traceback' not in changed[1]
    if changed[0] == 2: assert 'error' in changed[1].lower() or 'Usage' in changed[1], changed[1]
