"""Every protocol of `foldbook simulate` from the command line: killed and resumed, wrong input, a full disk; what
ships is what the commands make."""
import json
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import mdtraj as md
import numpy as np
import pytest
from typer.testing import CliRunner

from foldbook import allatom, base, data, engine, go, shooting, steered
from foldbook.cli import app
from foldbook.molecules import build_chain, load_molecule, peptide

FOLDBOOK = Path(sys.executable).parent/'foldbook'
SHORT = {'go': '--pdb helix.pdb --trajectories 1 --frames 900 --steps-per-frame 60 --burn-in 0',
         'scan': '--pdb helix.pdb --temperatures 3 --from 20 --to 400 --frames 450 --steps-per-frame 30',
         'equilibrium': '--sequence AA --force-field ff14SB --solvent vacuum --platform Reference --steps 12000 '
                        '--every 10 --burn-in 0 --format xtc --forces',
         'peptide': 'A --frames 900 --steps-per-frame 15 --trajectories 1 --burn-in 0 --format xtc',
         'smd': '--residues 4 --target 1.5 --speed 0.05 --replicas 1 --still 5 --every 10 --format xtc'}


@pytest.fixture(scope='session')
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp('protocols')
    turn = [(-1.0, -0.82)]*9 + [(1.05, 0.7)]*3 + [(-1.0, -0.82)]*9
    build_chain('A'*21, turn).save_pdb(str(home/'helix.pdb'))
    return home


def run(line, cwd, **options):
    return subprocess.run([FOLDBOOK, 'simulate', *line.split()], cwd=cwd, capture_output=True, text=True, **options)


def content(folder):
    "Every number of a run, by file."
    out = {}
    for p in sorted(p for p in folder.rglob('*') if p.is_file()):
        name = str(p.relative_to(folder))
        if p.suffix == '.npz':
            with np.load(p) as z: out |= {f'{name}:{k}': z[k].tobytes() for k in z.files}
        else: out[name] = p.read_bytes()
    return out


@pytest.mark.parametrize('protocol', [pytest.param(p, marks=() if p == 'go' else pytest.mark.slow) for p in SHORT])
def test_killed_and_started_again_it_ends_the_same(protocol, home):
    line = f'{protocol} {SHORT[protocol]} --workers 1 --out'
    whole = run(f'{line} whole-{protocol}', home)
    assert whole.returncode == 0, whole.stderr
    folder = home/f'killed-{protocol}'
    p = subprocess.Popen([FOLDBOOK, 'simulate', *line.split(), folder.name], cwd=home, stdout=subprocess.DEVNULL,
                         stderr=subprocess.DEVNULL)
    while p.poll() is None and not list(folder.rglob('*.segments/0*.npz')): time.sleep(0.002)
    assert p.poll() is None, 'the run is too short to be killed'
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert list(folder.rglob('*.segments/0*.npz'))
    again = run(f'{line} {folder.name}', home)
    assert again.returncode == 0, again.stderr
    assert again.stdout.replace('killed', 'whole') == whole.stdout
    assert content(folder) == content(home/f'whole-{protocol}')


def test_shots_until_the_error_is_reached(home):
    "By foldbook shoot, on what foldbook simulate go wrote; each shot can be made again from the file."
    line = f'go {SHORT["go"]} --workers 1 --out shot'.replace('--frames 900', '--frames 100')
    assert run(line, home).returncode == 0
    line = [FOLDBOOK, 'shoot', 'shot', *'--trajectory 0 --frames 3 --shots 4 --target-error .2 --max-shots 16 '
                                        '--steps-per-frame 60 --unfolded .3 --folded .9 --workers 1'.split()]
    done = subprocess.run(line, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(home/'shot'/'shooting.npz') as z:
        outcomes, frame, shots, error = z['outcomes'], z['frame'], int(z['shots']), float(z['target_error'])
    assert outcomes.shape == (3, 16) and (outcomes[:, :4] > -2).all()
    p, se = shooting.committor_estimate(outcomes)
    assert ((se <= .2) | (outcomes > -2).all(axis=1)).all()
    model = go.GoModel.load(home/'shot'/'model.json')
    x = md.load_frame(str(home/'shot'/'helix-0.xtc'), int(frame[1]), top=model.native).xyz[0]
    sizes = shooting.batch_sizes(outcomes[1], shots, error)
    again = [shooting.shoot_frame(model, x, shooting.shot_seed(0, 1, b), n, steps_per_frame=60, unfolded=.3,
                                    folded=.9) for b, n in enumerate(sizes)]
    assert (np.concatenate(again) == outcomes[1][outcomes[1] > -2]).all()


def atoms(home, keep=lambda l: True, change=lambda l: l):
    return '\n'.join(change(l) for l in (home/'helix.pdb').read_text().splitlines() if keep(l)) + '\n'


WRONG = {'unknown residue': (lambda h: atoms(h, change=lambda l: l.replace('ALA A   5', 'QQQ A   5')), '', 'QQQ'),
         'clash': (lambda h: atoms(h, change=lambda l: l[:30]
                                   + next(m for m in (h/'helix.pdb').read_text().splitlines()
                                       if m[12:26].split()[:1] == ['CB'] and m[22:26].strip() == '12')[30:54] + l[54:]
                                   if l[12:16].strip() == 'CB' and l[22:26].strip() == '3' else l), '', 'nm'),
         'missing backbone': (lambda h: atoms(h, keep=lambda l: not (l[12:16].strip() == 'C'
                                                                     and l[22:26].strip() == '7')), '', '7'),
         'no file': (None, '', 'wrong.pdb'),
         'temperature': (lambda h: atoms(h), '--temperature 0', 'above zero'),
         'negative temperature': (lambda h: atoms(h), '--temperature -5', 'above zero'),
         'force field': (lambda h: atoms(h), '--force-field ff20', "force_field='ff20' is not known"),
         'solvent': (lambda h: atoms(h), '--solvent oil', "solvent='oil' is not known"),
         'format': (lambda h: atoms(h), '--format trr --solvent vacuum', 'write .xtc, .dcd or .h5')}


@pytest.mark.parametrize('case', WRONG)
def test_wrong_input_is_one_sentence_and_leaves_nothing(case, home, tmp_path, monkeypatch):
    text, options, word = WRONG[case]
    if text: (tmp_path/'wrong.pdb').write_text(text(home))
    monkeypatch.chdir(tmp_path)
    line = f'simulate equilibrium --pdb wrong.pdb --steps 100 --workers 1 --out out {options}'
    done = CliRunner().invoke(app, line.split())
    assert done.exit_code == 2 and done.stderr.startswith('error: ') and done.stderr.count('\n') == 1, done.stderr
    assert word in done.stderr
    assert not [p for p in (tmp_path/'out').rglob('*') if p.suffix not in ('.pdb', '.json')]


@pytest.mark.slow
def test_a_full_disk_is_one_sentence(tmp_path):
    "A limit on the size of files stands for the disk; the same command goes on when there is room."
    line = 'peptide A --frames 600 --steps-per-frame 2 --trajectories 1 --burn-in 0 --format xtc --workers 1 --out out'
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    done = run(line, tmp_path, preexec_fn=limit)
    assert done.returncode == 2 and done.stderr.count('\n') == 1, done.stderr
    assert 'no space left to write 000000250.npz' in done.stderr
    assert not [p.name for p in (tmp_path/'out').rglob('*') if p.name.startswith('.') or p.suffix == '.xtc']
    assert run(line, tmp_path).returncode == 0


# --- what ships --------------------------------------------------------------------------------------------------
def again(name, n_frames, tmp_path):
    "The first frames of the first trajectory of a shipped set, made again, and those that ship."
    d = data.fetch(name, progress=False)
    first = d.trajectories[0]
    made = json.loads((data.shipped_directory()/name/f'{first.name}.json').read_text())
    kind = steered.PulledModel if 'speed' in made else allatom.AtomicModel
    settings = {k: made[k] for k in ('force_field', 'solvent', 'temperature', 'friction', 'time_step', 'cutoff',
                                     'spring_constant', 'speed', 'still_steps', 'update') if k in made}
    model = kind(replace(load_molecule(d.directory/'native.pdb'), name=made['molecule']), platform=made['platform'],
                 **settings)
    out = engine.simulate(model, tmp_path/first.name, n_frames, made['steps_per_frame'], made['seed'],
        made['trajectory'], burn_in=made['burn_in'], atoms=made['atoms'], keep=tuple(made['keep']), progress=False)
    arrays = lambda p: dict(np.load(p.with_suffix('.npz')))
    return md.load(str(out)), md.load(str(first))[:n_frames], arrays(out), arrays(first)


ATOMIC = {'ala2_implicit': 50, 'cln025_implicit': 25, 'cln025_implicit_10fs': 40, 'ala_smd': 100}


@pytest.mark.parametrize('name', [pytest.param(n, marks=() if n == 'ala2_implicit' else pytest.mark.slow)
                                  for n in ATOMIC])
def test_a_prefix_made_again_is_what_ships(name, tmp_path):
    """The same numbers on the kind of processor that made the set, to the rounding of the package; on another,
    another sample of the same law."""
    n = ATOMIC[name]
    new, old, a, b = again(name, n, tmp_path)
    assert new.n_atoms == old.n_atoms and np.allclose(new.time, old.time, atol=1e-3)
    if abs(new.xyz - old.xyz).max() < 1.1e-3: return np.testing.assert_allclose(a['energy'], b['energy'][:n], atol=0.2)
    energy = b['energy'][:max(n, 200)]
    assert abs(a['energy'].mean() - energy.mean()) < 4*energy.std()
    heavy = new.topology.select('not element H')
    spread = lambda t: md.compute_rg(t.atom_slice(heavy))
    assert abs(spread(new).mean() - spread(old).mean()) < 0.1
    if 'force' in b: assert abs(a['force'].mean() - b['force'][:n].mean()) < 4*b['force'][:n].std()/n**0.5*10**0.5


@pytest.mark.parametrize('name', [pytest.param('villin_go', marks=pytest.mark.slow), 'bba_go'])
def test_a_prefix_of_the_structure_based_sets(name, tmp_path):
    "Burn-in and three frames; where the arithmetic differs, energies and bonds of the same law."
    d, model = data.fetch(name, progress=False), go.shipped_model(name)
    steps = round(d.frame_spacing_ps/model.time_step)
    new = md.load(str(engine.simulate(model, tmp_path/'a.xtc', 3, steps, seed=1, burn_in=200, progress=False)),
                  top=model.native).xyz
    old = md.load(str(d.trajectories[0]), top=model.native).xyz
    if (new == old[:3]).all(): return
    e, law = (go.energies(model, x).sum(axis=1) for x in (new, old[::100]))
    assert law.min() - 4*law.std() < e.min() and e.max() < law.max() + 4*law.std()
    bonds = np.linalg.norm(np.diff(new, axis=1), axis=2) - go.internal_coordinates(model.xyz)[0]
    assert abs(bonds.var()*model.bond_constant/(base.BOLTZMANN*model.temperature) - 1) < 6*(2/bonds.size)**0.5


def test_molecules_that_ship_are_what_the_commands_build(tmp_path):
    "From the sequence to the start of the run, minimisation included."
    for name, molecule, model in (('ala2_implicit', replace(peptide('A'), name='ala2'), allatom.AtomicModel),
        ('ala_smd', replace(peptide('A'*12, 'helix', caps=False), name='ala12'), steered.PulledModel)):
        made = json.loads(next((data.shipped_directory()/name).glob('*.h5.json')).read_text())
        built = allatom.prepared(model(molecule, made['force_field'], made['solvent'], made['temperature'],
                                       time_step=made['time_step'], platform=made['platform']), tmp_path/name)
        shipped = load_molecule(data.fetch(name, progress=False).directory/'native.pdb')
        assert [a.name for a in built.molecule.topology.atoms()] == [a.name for a in shipped.topology.atoms()]
        a, b = (md.Trajectory(m.positions[None], md.Topology.from_openmm(m.topology))
                for m in (built.molecule, shipped))
        assert md.rmsd(a, b)[0] < 0.02
