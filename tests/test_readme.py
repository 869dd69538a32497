"What the README says is true: its commands run, its table is the run's, its links lead somewhere."
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT/'README.md').read_text()
COMMANDS = [line.split('#')[0].strip() for block in re.findall(r'```sh\n(.*?)```', README, re.S)
            for line in block.splitlines() if line.strip()]


def test_leaderboard_is_that_of_the_run():
    from foldbook.report import markdown_table
    board = json.loads((ROOT/'data'/'leaderboard_villin_go.json').read_text())
    written = README.split('<!-- leaderboard:start -->')[1].split('<!-- leaderboard:end -->')[0]
    assert markdown_table(board['rows']) in written and board['headline'] in written
    assert len(board['rows']) >= 8


def test_the_fresh_trajectories_say_what_is_said_of_them():
    rows = {r['coordinate']: r for r in json.loads((ROOT/'data'/'fresh_villin_go.json').read_text())['rows']}
    said = re.search(r'judged once: T_max (.*?) \((\d+) events', README)
    for name, value in (part.rsplit(' ', 1) for part in said[1].split('; ')):
        assert f'{rows[name]["t_max"]:.1f}' == value and rows[name]['events'] == int(said[2])
        assert rows[name]['passed'] == (float(value) <= 3)


@pytest.mark.slow
def test_seed_0_of_the_leaderboard_comes_out_again(tmp_path):
    "The whole main job: every number of its table is the stored one of the first of five seeds."
    from foldbook.config import Config
    from foldbook.runs import run
    table = run(Config(), tmp_path/'run').set_index('coordinate')
    stored = {r['coordinate']: r for r in json.loads((ROOT/'data'/'leaderboard_villin_go.json').read_text())['rows']}
    assert set(table.index) == set(stored)
    for name, row in stored.items():
        first = {k: row[f'{k}_seeds'][0] for k in ('t_max', 'log_loss', 'auc', 'rmse')}
        np.testing.assert_allclose([table.loc[name, k] for k in first], list(first.values()), rtol=1e-3, err_msg=name)


def test_a_fresh_clone_can_run():
    "A run refuses a directory that is not empty, so none may be committed."
    assert not subprocess.run(['git', 'ls-files', 'runs'], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_first_screen():
    first = README.split('\n## ')[0]
    assert COMMANDS[:2] == ['make run', 'make test']
    assert first.count('![') == 1 and '<!-- leaderboard:start -->' in first


def test_links_and_figure_exist():
    missing = [link for link in re.findall(r'\]\((?!https?:)([^)]+)\)', README) if not (ROOT/link).exists()]
    assert not missing


@pytest.mark.parametrize('command', [c for c in COMMANDS if c.startswith('make')]
                         + ['make docs', 'make lab', 'make readme', 'make help'])
def test_make_targets_exist(command):
    subprocess.run([*command.split(), '--dry-run'], cwd=ROOT, check=True, capture_output=True)


@pytest.fixture
def own_files(tmp_path):
    "The files that the README's commands name: three trajectories, a native structure, a coordinate with its flags."
    from foldbook.data import fetch
    from foldbook.systems import dw1d
    villin, system = fetch('villin_go', progress=False), dw1d()
    for name, path in zip('abc', villin.trajectories): shutil.copy(path, tmp_path/f'{name}.xtc')
    shutil.copy(villin.topology, tmp_path/'native.pdb')
    shutil.copy(villin.topology.with_name('model.json'), tmp_path)  # the contacts, which C-alphas do not tell
    _, (flags,), (q,) = system.observe(system.sample(50_000, seed=1))
    np.save(tmp_path/'rc.npy', q)
    np.save(tmp_path/'flags.npy', flags)
    return tmp_path


@pytest.mark.parametrize('command', [c for c in COMMANDS if c.startswith('foldbook')])
def test_commands_on_own_trajectories(command, own_files):
    program, *arguments = shlex.split(command)
    quick = []
    if arguments[0] == 'run': quick = '--quick --students mlp:martingale --baselines none --workers 1'.split()
    done = subprocess.run([Path(sys.executable).parent/program, *arguments, *quick], cwd=own_files, capture_output=True,
                          text=True, timeout=600)
    assert done.returncode == ('FAILS Z_q' in done.stdout), done.stdout + done.stderr
    if quick: assert (own_files/'runs'/'mine'/'report.html').exists()
    else: assert 'PASS' in done.stdout
