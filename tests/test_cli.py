"The foldbook command: exit codes, errors in one line, another protein, restarts after a kill, the report."
import base64
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser

import numpy as np
import pytest

from foldbook.systems import lshape2d

TIMINGS = {'seconds', 'microseconds_per_frame'}
START = [sys.executable, '-c', 'from foldbook.cli import app; app()']
ENV = dict(os.environ, OMP_NUM_THREADS='1', COLUMNS='120', NO_COLOR='1', TERM='dumb')


def foldbook(*args, cwd=None, timeout=300):
    return subprocess.run([*START, *map(str, args)], cwd=cwd, env=ENV, capture_output=True, text=True, timeout=timeout)


@pytest.fixture
def inside(monkeypatch):
    "The same in this process: quicker where no kill or start-up is tested."
    from typer.testing import CliRunner
    from foldbook.cli import app
    def call(*args, cwd=None):
        if cwd: monkeypatch.chdir(cwd)
        done = CliRunner().invoke(app, list(map(str, args)))
        return subprocess.CompletedProcess(args, done.exit_code, done.stdout, done.stderr)
    return call


def one_line_error(done, *words):
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count('\n') == 1 and done.stderr.startswith('error: '), done.stderr
    for w in words: assert w in done.stderr
    return done.stderr


def judged(done):
    "A run that came to its end: its exit code is that of its headline."
    assert done.returncode == ('FAILS Z_q' in done.stdout), done.stdout + done.stderr


# --- help, version, start ----------------------------------------------------------------------------------------
COMMANDS = [[], ['run'], ['zq'], ['simulate'],
            *(['simulate', c] for c in ('go', 'scan', 'equilibrium', 'peptide', 'smd', 'benchmark')), ['shoot'],
            ['features'], ['propagate'], *(['propagate', c] for c in ('train', 'run', 'evaluate')), ['cg'],
            *(['cg', c] for c in ('prior', 'train', 'simulate', 'compare')), ['data'], ['data', 'list'],
            ['data', 'info'], ['data', 'fetch'], ['forecast'],
            *([c] for c in ('apply', 'rates', 'compare', 'report', 'reproduce', 'export'))]


@pytest.mark.parametrize('command', COMMANDS, ids=' '.join)
def test_every_command_has_help_with_an_example(command, inside):
    done = inside(*command, '--help')
    assert done.returncode == 0
    assert 'xample' in done.stdout or not command
    assert 'foldbook ' in done.stdout


def test_help_names_every_command_without_heavy_imports():
    code = ('import sys; from foldbook.cli import app\ntry: app(["--help"])\nexcept SystemExit: pass\n'
            'heavy = {"torch", "numpy", "mdtraj", "openmm", "pandas", "distributed"}\n'
            'print(sorted(heavy & set(sys.modules)), file=sys.stderr)')
    done = subprocess.run([sys.executable, '-c', code], env=ENV, capture_output=True, text=True)
    assert done.stderr.strip() == '[]'
    for command in {c[0] for c in COMMANDS if c} | {'forecast'}: assert f' {command} ' in done.stdout


def test_zq_does_not_load_torch(series):
    code = ('import sys; from foldbook.cli import app\ntry: app(sys.argv[1:])\n'
            'except SystemExit as e: print(e.code, "torch" in sys.modules)')
    done = subprocess.run([sys.executable, '-c', code, 'zq', 'q0.npy', '--labels', 'f0.npy'], cwd=series, env=ENV,
                          capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == '0 False', done.stderr


def test_version():
    import foldbook as package
    assert foldbook('--version').stdout.split() == ['foldbook', package.__version__]


# --- zq ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def series(tmp_path_factory):
    home, system = tmp_path_factory.mktemp('series'), lshape2d()
    for i, p in enumerate(system.sample(60_000, 2, seed=2)):
        s = system.states[p]
        np.save(home/f'q{i}.npy', system.committor[p])
        np.savetxt(home/f'q{i}.txt', system.committor[p])
        np.save(home/f'x{i}.npy', np.where(s >= 0, s, np.clip((system.coordinates[p, 0] + 1)/2, 0, 1)))
        np.save(home/f'f{i}.npy', s)
        np.savetxt(home/f'f{i}.txt', s)
    np.save(home/'short.npy', np.load(home/'q0.npy')[:-1])
    np.save(home/'nan.npy', np.where(np.arange(60_000) == 77, np.nan, np.load(home/'q0.npy')))
    np.save(home/'two.npy', np.zeros((60_000, 2)))
    np.save(home/'interior.npy', np.full(60_000, -1))
    np.save(home/'three.npy', np.full(60_000, 3))
    (home/'words.txt').write_text('not a number\n')
    (home/'bad.txt').write_text('# q\n0.1\n0.2\noops\n0.3\n')
    (home/'ragged.txt').write_text('0 0.1\n1 0.2\n2 0.3 7\n')
    np.savetxt(home/'table.txt', np.zeros((60_000, 2)), fmt='%d')
    (home/'empty.txt').write_text('')
    p = system.sample(60_000, 1, seed=5)[0]
    s = system.states[p]
    (home/'colvar').write_text('#! FIELDS time q\n' + ''.join(f'{0.2*t:.1f} {v:.6f}\n'
                                                              for t, v in enumerate(system.committor[p])))
    np.savetxt(home/'colvar_flags.txt', s)
    p = system.sample(240_000, 1, seed=5)[0]
    np.save(home/'raw.npy', 10 - 3*system.coordinates[p, 0])  # in a unit of its own, and falling from A to B
    return home


@pytest.mark.parametrize('line, code, words', [
    ('q0.npy q1.npy --labels f0.npy f1.npy', 0, 'PASS'),
    ('--labels f0.npy f1.npy q0.npy q1.npy', 0, 'PASS'),
    ('q0.npy q1.npy --labels f0.npy --labels f1.npy --max-lag 16', 0, 'PASS'),
    ('q0.txt q1.txt --labels f0.txt f1.npy', 0, 'PASS'),
    ('q*.npy --labels f*.npy', 0, 'PASS'),
    ('x0.npy x1.npy --labels f0.npy f1.npy', 1, 'FAIL')])
def test_zq_verdict_and_exit_code(line, code, words, series, inside):
    done = inside('zq', *line.split(), cwd=series)
    assert done.returncode == code, done.stdout + done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith(words) and 'T_max' in last
    assert re.search(r'\d+ frames +\d+ transitions A to B +T_max \d+\.\d\d \+- \d+\.\d\d +T_sd \d+\.\d\d .* verdict: '
                     r'\w+', done.stdout)


@pytest.mark.parametrize('line, words', [
    ('q0.npy', ['--labels']),
    ('missing.npy --labels f0.npy', ['missing.npy', 'no such file']),
    ('q0.npy --labels missing.npy', ['missing.npy']),
    ('none*.npy --labels f0.npy', ['none*.npy', 'no file matches']),
    ('q0.npy q1.npy --labels f0.npy', ['2 coordinate files', '1 file']),
    ('short.npy --labels f0.npy', ['short.npy', '59999', '60000']),
    ('nan.npy --labels f0.npy', ['77']),
    ('two.npy --labels f0.npy', ['two.npy', '(60000, 2)']),
    ('words.txt --labels f0.npy', ['words.txt', 'line 1', 'not a number']),
    ('bad.txt --labels f0.npy', ['bad.txt', 'line 4', 'oops']),
    ('ragged.txt --labels f0.npy', ['ragged.txt', 'line 3', '3 columns']),
    ('empty.txt --labels f0.npy', ['empty.txt', 'empty']),
    ('table.txt --labels f0.npy', ['table.txt', 'table.txt:2']),
    ('colvar:3 --labels colvar_flags.txt', ['colvar', 'no column 3']),
    ('raw.npy --folded "r>1"', ['--unfolded', '--labels']),
    ('q0.npy --labels f0.npy --lengths 100', ['60000', '100']),
    ('q0.npy --labels three.npy', ['3']),
    ('q0.npy --labels f0.npy --max-lag 70000', ['65536', '60000'])])
def test_zq_bad_input(line, words, series, inside):
    done = inside('zq', *line.split(), cwd=series)
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    for w in words: assert w in done.stderr


def test_zq_without_any_transition_does_not_pass(series, inside):
    assert inside('zq', 'q0.npy', '--labels', 'interior.npy', cwd=series).returncode != 0


def test_zq_writes_json_and_figure(series, inside):
    assert inside('zq', 'q0.npy', '--labels', 'f0.npy', '--json', 'z.json', '--figure', 'z.png',
                  cwd=series).returncode == 0
    assert 't_max' in json.dumps(json.loads((series/'z.json').read_text()))
    assert (series/'z.png').read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'


def test_zq_reads_a_column_of_a_table(series, inside):
    done = inside('zq', 'colvar:2', '--labels', 'colvar_flags.txt', '--bootstrap', '0', cwd=series)
    assert done.returncode == 0 and 'verdict: pass' in done.stdout
    from foldbook.series import read_series
    with pytest.raises(FileNotFoundError, match='nothing.npy'): read_series('nothing.npy')
    np.testing.assert_allclose(read_series(series/'colvar:1')[:3], [0, 0.2, 0.4])


def test_zq_makes_flags_from_conditions_in_any_unit(series, inside):
    done = inside('zq', 'raw.npy', '--unfolded', 'r > 12.5', '--folded', 'r < 7.5', '--json', 'raw.json', cwd=series)
    assert done.returncode == 1 and 'monotone fit' in done.stderr
    found = json.loads((series/'raw.json').read_text())
    assert found['verdict']['label'] == 'missing slow variable' and found['n_ab'] > 10
    assert found['explanation'].count('. ') == 1 and found['explanation'].endswith('.')


def test_zq_report_is_one_page_that_explains(series, inside):
    assert inside('zq', 'x0.npy', '--labels', 'f0.npy', '--report', 'z.html', '--bootstrap', '0',
                  cwd=series).returncode == 1
    page = (series/'z.html').read_text()
    HTMLParser().feed(page)
    for words in ('How to read this', 'fair game', 'data:image/png;base64,', 'x0.npy', 'missing slow variable',
                  '<table>'):
        assert words in page
    assert 'http' not in page


def test_zq_of_short_stopped_trajectories(tmp_path, inside):
    system = lshape2d()
    start = (system.states < 0)/(system.states < 0).sum()
    for i, p in enumerate(system.sample(33, 300, 3, 'absorbed', start=start)):
        np.save(tmp_path/f'q{i:03d}.npy', system.committor[p])
        np.save(tmp_path/f'f{i:03d}.npy', system.states[p])
    done = inside('zq', 'q*.npy', '--labels', 'f*.npy', '--lengths', '33', cwd=tmp_path)
    assert done.returncode == 0 and 'T_ne' in done.stdout and 'warning' not in done.stderr, done.stdout + done.stderr
    assert 'warning: trajectories end whenever they arrive' in inside('zq', 'q*.npy', '--labels', 'f*.npy',
                                                                      cwd=tmp_path).stderr


def test_debug_shows_the_traceback(series):
    for line in (['zq', 'missing.npy', '--labels', 'f0.npy', '--debug'],
                 ['--debug', 'zq', 'missing.npy', '--labels', 'f0.npy']):
        assert 'Traceback' in foldbook(*line, cwd=series).stderr


# --- data --------------------------------------------------------------------------------------------------------
def test_data(inside):
    assert 'villin_go' in inside('data', 'list', '--kind', 'shipped').stdout
    assert 'Apache-2.0' in inside('data', 'info', 'villin_go').stdout
    one_line_error(inside('data', 'info', 'nothing_like_it'), 'nothing_like_it', 'villin_go')
    one_line_error(inside('data', 'list', '--kind', 'odd'), '--kind odd')


# --- another protein, from its structure to its report -----------------------------------------------------------
def hairpin(path, sequence='GEWTYDDATKTFTVTE'):
    "Two strands and a type I' turn."
    from Bio.PDB import PDBIO
    from PeptideBuilder import Geometry, add_residue, initialize_res
    n, structure = len(sequence), None
    phi, psi = [-120]*n, [130]*n
    phi[n//2 - 1], psi[n//2 - 1], phi[n//2], psi[n//2] = 55, 38, 78, 20
    for i, a in enumerate(sequence):
        g = Geometry.geometry(a)
        g.phi, g.psi_im1 = phi[i], psi[i - 1]
        structure = initialize_res(g) if structure is None else add_residue(structure, g)
    io = PDBIO()
    io.set_structure(structure)
    io.save(str(path))


SMALL = ['--students', 'lstm:martingale,mlp:teacher_mse', '--baselines', 'msm', '--seeds', '2',
         '--student-option', 'max_epochs=6']


@pytest.fixture(scope='module')
def protein(tmp_path_factory):
    "Trajectories of a protein that the package knows nothing of."
    home = tmp_path_factory.mktemp('protein')
    hairpin(home/'hairpin.pdb')
    done = foldbook('simulate', 'go', '--pdb', 'hairpin.pdb', '--out', 'hp', '--trajectories', 4, '--frames', 600,
                    '--steps-per-frame', 60, '--burn-in', 20, '--workers', 1, cwd=home)
    assert done.returncode == 0, done.stderr
    done = foldbook('shoot', 'hp', '--frames', 12, '--shots', 6, '--steps-per-frame', 60, '--workers', 1, cwd=home)
    assert done.returncode == 0, done.stderr
    return home


@pytest.fixture(scope='module')
def unbroken(protein):
    done = foldbook('run', '--data', 'hp', '--quick', *SMALL, '--out', 'runs/whole', cwd=protein)
    judged(done)
    return done


def board(run):
    d = json.loads((run/'leaderboard.json').read_text())
    for r in d['rows']:
        for k in TIMINGS: r.pop(k)
    return d


def test_another_protein(unbroken, protein):
    whole = protein/'runs'/'whole'
    for f in ('config.json', 'split.json', 'features.json', 'inputs.json', 'leaderboard.csv', 'leaderboard.json',
              'report.html', 'figures/zq.png', 'models/lstm_martingale/student.safetensors'):
        assert (whole/f).stat().st_size > 0, f
    rows = {r['coordinate']: r for r in board(whole)['rows']}
    assert {'RMSD, diffusive', 'RMSD, isotonic', 'Q, diffusive', 'Q, isotonic', 'Rg, diffusive', 'TICA, isotonic',
            'teacher', 'LSTM, martingale', 'MLP, teacher mse', 'Markov model'} <= set(rows)
    assert [k for k, r in rows.items() if r['in_sample']] == ['teacher']
    assert all(r['rmse'] is not None and r['rmse_se'] > 0 for k, r in rows.items() if k != 'teacher'), 'shots are used'
    assert 'LSTM, martingale' in unbroken.stdout and 'Traceback' not in unbroken.stderr
    for k in ('LSTM, martingale', 'Markov model', 'teacher, replayed'):
        assert rows[k]['seeds'] == 2 and len(set(rows[k]['log_loss_seeds'])) == 2, f'two seeds of {k} differ'
    assert rows['Q, isotonic']['seeds'] == 1
    assert rows[board(whole)['chosen']]['seeds'] == 1 or 'of 2 seeds' in board(whole)['headline']
    split, r = json.loads((whole/'split.json').read_text()), np.load(whole/'r'/'lstm_martingale'/'003.npy')
    assert split['test'] == [3] and r.shape == (600,) and 0 <= r.min() <= r.max() <= 1


def test_own_trajectories_and_states_from_the_rmsd(protein, inside):
    line = ('run --traj hp/hairpin-0.xtc hp/hairpin-1.xtc --traj hp/hairpin-[23].xtc --top hp/native.pdb --quick '
            '--students mlp:outcome,residue:martingale --student-option max_epochs=4 --student-option batches=30 '
            '--baselines none --workers 1 --out runs/own').split()
    done = inside(*line, '--folded', 'RMSD < 0.3', '--unfolded', 'RMSD > 0.45', cwd=protein)
    judged(done)
    rows = [r['coordinate'] for r in board(protein/'runs'/'own')['rows']]
    assert len(rows) == 12 and 'residue Transformer, martingale' in rows


def test_bad_input_of_run(protein, unbroken, inside):
    run = lambda *a: inside('run', '--quick', '--workers', 1, '--out', 'runs/bad', *a, cwd=protein)
    one_line_error(run('--traj', 'no.xtc', '--top', 'hp/native.pdb'), 'no.xtc', 'no such file')
    one_line_error(run('--traj', 'hp/hairpin-0.xtc', '--top', 'no.pdb'), 'no.pdb')
    one_line_error(run('--traj', 'hp/hairpin-0.xtc'), '--top')
    one_line_error(inside('run', '--data', 'hp', '--quick', *SMALL, '--seed', 1, '--out', 'runs/whole', cwd=protein),
                   'seed: 0 before, 1 now', '--overwrite')
    for states in (['--folded', 'RMSD < 0.001'], ['--folded', 'Q > 2'], ['--folded', 'Nonsense > 2'],
                   ['--folded', 'Q >'], ['--folded', 'Q > 0.1']):
        one_line_error(run('--data', 'hp', *states), states[1])
    one_line_error(run('--data', 'hp', '--students', 'oracle:martingale'), 'oracle')
    one_line_error(run('--data', 'hp', '--student-option', 'hiden=3'), 'hiden', 'hidden')
    one_line_error(run('--data', 'hp', '--student-option', 'hidden'), '--student-option hidden', 'name=value')
    one_line_error(run('--data', 'hp', '--teacher-option', 'degre=3'), 'degre', 'degree')
    one_line_error(run('--data', 'hp', '--students', 'oracle'), 'oracle', 'architecture:loss')
    one_line_error(run('--data', 'hp', '--baselines', 'oracle'), 'oracle', 'vampnet')
    (protein/'papers').mkdir()
    (protein/'papers'/'thesis.txt').write_text('mine')
    one_line_error(inside('run', '--data', 'hp', '--out', 'papers', '--overwrite', cwd=protein), 'not a foldbook run')


def test_features(protein, inside):
    done = inside('features', '--traj', 'hp/hairpin-0.xtc', '--top', 'hp/native.pdb', '--out', 'feat', cwd=protein)
    assert done.returncode == 0, done.stderr
    names = json.loads((protein/'feat'/'features.json').read_text())['names']
    assert {'Q', 'RMSD', 'Rg'} <= set(names) and np.load(protein/'feat'/'000.npy').shape == (600, len(names))
    listed = inside('features', '--traj', 'hp/hairpin-0.xtc', '--top', 'hp/native.pdb', '--set', 'Q + pseudo_dihedrals',
                    cwd=protein).stdout
    assert 'cos theta' in listed
    one_line_error(inside('features', '--traj', 'hp/hairpin-0.xtc', '--top', 'hp/native.pdb', '--set', 'Q + phase',
                          cwd=protein), 'phase', 'pseudo_dihedrals')


def kill_after(line, cwd, mark, delay):
    """Start the command, wait for a line that begins with `mark`, wait `delay` seconds more, kill it without
    warning; True if it was still running."""
    p = subprocess.Popen([*START, *line], cwd=cwd, env=dict(ENV, PYTHONUNBUFFERED='1'), stdout=subprocess.PIPE,
                         stderr=subprocess.DEVNULL, text=True)
    for said in p.stdout:
        if said.startswith(mark): break
    threading.Thread(target=p.stdout.read, daemon=True).start()
    try: p.wait(delay)
    except subprocess.TimeoutExpired:
        p.send_signal(signal.SIGKILL)
        p.wait()
        return True
    return False


def same_numbers(a, b):
    "Two run directories agree in the table, and in every committor of every frame."
    assert board(a) == board(b)
    for f in sorted((a/'r').rglob('*.npy')): assert np.array_equal(np.load(f), np.load(b/f.relative_to(a))), f
    assert not list(b.rglob('.[0-9]*')), 'no half-written file is left under any name'


@pytest.mark.slow
def test_killed_four_times_it_ends_with_the_same_numbers(unbroken, protein):
    rng, line, out = random.Random(4), ['run', '--data', 'hp', '--quick', *SMALL, '--out',
                                        'runs/broken'], protein/'runs'/'broken'
    killed = [kill_after(line, protein, mark, rng.uniform(0, longest))
              for mark, longest in (('features', 1), ('training', 2), ('student', 4), ('student', 4))]
    assert sum(killed) >= 3, 'the run is too short to be killed'
    assert not (out/'report.html').exists() or not killed[-1]
    done = foldbook(*line, cwd=protein)
    judged(done)
    assert 'done before' in done.stdout
    same_numbers(protein/'runs'/'whole', out)


@pytest.fixture
def cluster(tmp_path):
    "A Dask scheduler and two workers, each a process of its own: address, processes of the workers."
    dask, file = [sys.executable, '-m', 'distributed.cli.dask_scheduler'], tmp_path/'scheduler.json'
    quiet = dict(env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    scheduler = subprocess.Popen([*dask, '--host', '127.0.0.1', '--port', '0', '--no-dashboard', '--scheduler-file',
                                  str(file)], **quiet)
    worker = [sys.executable, '-m', 'distributed.cli.dask_worker', '--scheduler-file', str(file), '--nthreads', '1',
              '--no-nanny', '--no-dashboard']
    workers = [subprocess.Popen(worker, **quiet) for _ in range(2)]
    while not file.exists():
        assert scheduler.poll() is None, 'the scheduler did not start'
        time.sleep(.1)
    yield json.loads(file.read_text())['address'], workers
    for p in (*workers, scheduler):
        p.kill()
        p.wait()


@pytest.mark.slow
def test_a_cluster_that_loses_a_worker_ends_with_the_same_numbers(unbroken, protein, cluster):
    address, workers = cluster
    line = ['run', '--data', 'hp', '--quick', *SMALL, '--scheduler', address, '--out', 'runs/far']
    p = subprocess.Popen([*START, *line], cwd=protein, env=dict(ENV, PYTHONUNBUFFERED='1'), stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True)
    said = []
    for words in p.stdout:
        said.append(words)
        if words.startswith('student-') and workers[0].poll() is None: workers[0].send_signal(signal.SIGKILL)
    assert p.wait() == ('FAILS Z_q' in ''.join(said)), ''.join(said)
    assert workers[0].wait() == -signal.SIGKILL and workers[1].poll() is None
    same_numbers(protein/'runs'/'whole', protein/'runs'/'far')


# --- the report --------------------------------------------------------------------------------------------------
class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.images, self.outside, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for k, v in attributes:
            if tag == 'img' and k == 'src': self.images.append(v)
            elif k in ('src', 'href'): self.outside.append(v)

    def handle_data(self, data): self.words.append(data)


def test_report_is_self_contained(unbroken, protein):
    page = Page((protein/'runs'/'whole'/'report.html').read_text())
    assert len(page.images) >= 7 and not page.outside
    for src in page.images:
        kind, data = src.split(',', 1)
        assert kind == 'data:image/png;base64' and base64.b64decode(data, validate=True)[:8] == b'\x89PNG\r\n\x1a\n'
    text = ' '.join(page.words)
    for w in ('PASS' if 'PASSES' in board(protein/'runs'/'whole')['headline'] else 'FAIL', 'LSTM, martingale', 'sha256',
              'T_max', 'validation'):
        assert w in text
    assert 'nan' not in re.findall(r'\bnan\b', text)


@pytest.mark.skipif(not shutil.which('chromium'), reason='no chromium on PATH')
def test_report_opens_in_a_browser_without_a_missing_picture(unbroken, protein, tmp_path):
    text = (protein/'runs'/'whole'/'report.html').read_text()
    script = ('<script>window.onload=()=>{document.title="pictures "+[...document.images].map('
              'i=>i.complete&&i.naturalWidth>300?1:0).join("")'
              '+" wide "+(document.documentElement.scrollWidth>innerWidth)}</script></body>')
    (tmp_path/'page.html').write_text(text.replace('</body>', script))
    done = subprocess.run(['chromium', '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic',
        '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync',
                           f'--user-data-dir={tmp_path/"profile"}', '--window-size=1200,900',
                           '--virtual-time-budget=10000', '--dump-dom', f'file://{tmp_path/"page.html"}'],
                           capture_output=True, text=True, timeout=120)
    title = re.search(r'<title>(.*?)</title>', done.stdout)[1]
    assert title == f'pictures {"1"*len(Page(text).images)} wide false'
