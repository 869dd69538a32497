"Atoms of a trajectory against its structure: order, unit, box, chains, names; through the commands that read them."
import subprocess
import warnings

import mdtraj as md
import numpy as np
import pytest

from foldbook.bonds import ALIASES, Molecule, standard_topology
from foldbook.frames import load_topology, read_ensemble, read_trajectory
from foldbook.structures import load_native


def built(sequence, folder, offset=0.):
    "Heavy atoms of a helix."
    import PeptideBuilder
    from Bio.PDB import PDBIO
    io = PDBIO()
    io.set_structure(PeptideBuilder.make_structure(sequence, [-57]*len(sequence), [-47]*(len(sequence) - 1)))
    io.save(str(folder/'built.pdb'))
    t = md.load(str(folder/'built.pdb'))
    t.xyz += np.float32([0, 0, offset])
    return t


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp('bonds')
    t = built('ACDEFGHIKLMNPQRSTVWY', home)
    noise = np.random.default_rng(0).normal(0, .003, (30, t.n_atoms, 3))
    moving = md.Trajectory((t.xyz + noise).astype(np.float32), t.topology, time=2.*np.arange(30))
    moving.save_xtc(str(home/'a.xtc'))
    t.save_pdb(str(home/'a.pdb'))
    return home


@pytest.fixture
def inside(monkeypatch, home):
    from typer.testing import CliRunner
    from foldbook.cli import app
    monkeypatch.chdir(home)
    def call(line):
        done = CliRunner().invoke(app, line.split())
        return subprocess.CompletedProcess(line, done.exit_code, done.stdout, done.stderr)
    return call


def reordered(t, key): # the same atoms, each residue's in another order
    order = [a.index for r in t.topology.residues for a in sorted(r.atoms, key=key)]
    top = md.Topology()
    chain = top.add_chain()
    for r in t.topology.residues:
        residue = top.add_residue(r.name, chain, r.resSeq)
        for a in sorted(r.atoms, key=key): top.add_atom(a.name, a.element, residue)
    top.create_standard_bonds()
    return md.Trajectory(t.xyz[:, order], top)


@pytest.mark.parametrize('key', [lambda a: a.name in ('C', 'O'), lambda a: a.name, lambda a: -a.index],
                         ids=['C and O last', 'by name', 'backwards'])
def test_another_order_of_atoms_is_named(home, key):
    reordered(md.load(str(home/'a.pdb')), key).save_pdb(str(home/'other.pdb'))
    with pytest.raises(ValueError, match='a.xtc: frame 0, atom .*in another order'):
        read_trajectory(home/'a.xtc', home/'other.pdb')


def test_another_order_in_every_command(home, inside):
    reordered(md.load(str(home/'a.pdb')), lambda a: a.name).save_pdb(str(home/'other.pdb'))
    for line in ('features --traj a.xtc --top other.pdb --out f',
                 'propagate train --traj a.xtc --top other.pdb --out m',
                 'forecast --traj a.xtc a.xtc a.xtc --top other.pdb --atoms heavy --model ar --out o'):
        done = inside(line)
        assert done.returncode == 2 and 'in another order' in done.stderr, (line, done.stdout, done.stderr)


@pytest.mark.parametrize('factor, words', [(10, 'look like ångströms'), (.1, 'divided by 10')])
def test_a_wrong_unit_is_named(home, factor, words):
    t = md.load(str(home/'a.xtc'), top=str(home/'a.pdb'))
    t.xyz *= factor
    t.save_dcd(str(home/'unit.dcd'))
    with pytest.raises(ValueError, match=f'unit.dcd: frame 0.*{words}'): read_trajectory(home/'unit.dcd', home/'a.pdb')


@pytest.mark.parametrize('angles', [(90, 90, 90), (70, 80, 95)], ids=['right angles', 'oblique'])
def test_a_molecule_cut_by_the_box_is_named_and_mended(home, angles):
    t = md.load(str(home/'a.xtc'), top=str(home/'a.pdb'))
    t.unitcell_lengths, t.unitcell_angles = np.full((30, 3), 6.), np.tile(angles, (30, 1))
    cut = t[:]
    side = cut.topology.select('sidechain')[-8:]
    cut.xyz[7, side] += cut.unitcell_vectors[7, 1] # one side chain, one frame
    cut.save_xtc(str(home/'cut.xtc'))
    with pytest.raises(ValueError, match='cut.xtc: frame 7, .*split across the box; read it with --periodic'):
        read_ensemble(home/'cut.xtc', home/'a.pdb')
    mended = read_ensemble(home/'cut.xtc', home/'a.pdb', periodic=True).values[0]
    pairs = np.array([(0, side[-1]), (10, side[0])])
    far = lambda x: np.linalg.norm(x[:, pairs[:, 0]] - x[:, pairs[:, 1]], axis=2)
    np.testing.assert_allclose(far(mended), far(t.xyz), atol=2e-3)


def test_chains_in_different_images_are_named_and_mended(home):
    both = built('AAAAAAAAAA', home).stack(built('GGGGGGGGGG', home, .8))
    t = md.Trajectory(np.repeat(both.xyz, 4, 0), both.topology, unitcell_lengths=np.full((4, 3), 5.),
                      unitcell_angles=np.full((4, 3), 90.))
    chain = [a.index for a in t.topology.chain(1).atoms]
    t.xyz[2, chain] += np.float32([5, 0, 0])
    t[0].save_pdb(str(home/'two.pdb'))
    t.save_xtc(str(home/'two.xtc'))
    with pytest.raises(ValueError, match='two.xtc: frame 2, .*chain 2 touches the others through the periodic box'):
        read_trajectory(home/'two.xtc', home/'two.pdb')
    mended = read_trajectory(home/'two.xtc', home/'two.pdb', periodic=True)
    np.testing.assert_allclose(mended.xyz[2] - mended.xyz[0], 0, atol=2e-3)


def test_chains_that_went_apart_are_no_fault(home):
    both = built('AAAAAAAAAA', home).stack(built('GGGGGGGGGG', home, 3.))
    t = md.Trajectory(both.xyz, both.topology, unitcell_lengths=[[12.]*3], unitcell_angles=[[90.]*3])
    assert not list(Molecule(t.topology).faults(t))


def test_a_gap_in_the_chain_is_no_fault(home):
    t = md.load(str(home/'a.pdb'))
    t = t.atom_slice(t.topology.select('resSeq 1 to 6 or resSeq 14 to 20'))
    assert not list(Molecule(t.topology).faults(t))


def test_chains_of_a_gro_file_are_kept_apart(home):
    both = built('AAAAAAAAAA', home).stack(built('GGGGGGGGGG', home, .8))
    both.save_gro(str(home/'two.gro'))
    both.save_pdb(str(home/'two.pdb'))
    chains = lambda top: [c.n_residues for c in top.chains]
    assert chains(load_topology(home/'two.gro')) == chains(load_topology(home/'two.pdb')) == [10, 10]
    assert load_topology(home/'two.gro').n_bonds == load_topology(home/'two.pdb').n_bonds
    assert load_native(home/'two.gro').topology.n_chains == 2


@pytest.mark.parametrize('name', ['HISE', 'HISD', 'HISH', 'HID', 'HSP', 'NHIS', 'CHIE'])
def test_names_of_histidine_are_one(home, name):
    t = md.load(str(home/'a.pdb'))
    bonds = t.topology.n_bonds
    next(r for r in t.topology.residues if r.name == 'HIS').name = name
    known = standard_topology(t.topology)
    assert ALIASES[name] == 'HIS' and known.n_bonds == bonds and [r.name for r in known.residues][6] == 'HIS'


def test_residues_in_pieces_are_named(home):
    t = md.load(str(home/'a.pdb'))
    main = [a.index for a in t.topology.atoms if a.name in ('N', 'CA', 'C', 'O')]
    rest = [a.index for a in t.topology.atoms if a.index not in set(main)]
    lines = [l for l in (home/'a.pdb').read_text().splitlines() if l.startswith('ATOM')]
    (home/'pieces.pdb').write_text('\n'.join(lines[i] for i in main + rest) + '\nEND\n')
    for read in (load_topology, load_native):
        with pytest.raises(ValueError, match='pieces.pdb: residue .* is in two places of the file'):
            read(home/'pieces.pdb')


def test_a_native_structure_across_the_box_is_refused(home):
    t = md.load(str(home/'a.pdb'))
    t.unitcell_lengths, t.unitcell_angles = [[4.]*3], [[90.]*3]
    t.xyz -= 4*np.float32(t.xyz > np.median(t.xyz, axis=1, keepdims=True))
    t.save_pdb(str(home/'cut.pdb'))
    with pytest.raises(ValueError, match='cut.pdb: .*split across the box'): load_native(home/'cut.pdb')


@pytest.mark.parametrize('line, words', [
    ('features --traj back.xtc --top a.pdb --out f', 'time goes back at frame 20, from 38 to 20 ps'),
    ('propagate train --traj back.xtc --top a.pdb --steps 1 --out m', 'time goes back at frame 20'),
    ('forecast --traj back.xtc back.xtc back.xtc --top a.pdb --model ar --lead 1 --out o', 'goes back at frame 20'),
    ('run --traj a.xtc back.xtc a.xtc --top a.pdb --out r', 'time goes back at frame 20'),
    ('features --traj a.xtc slow.xtc --top a.pdb --out f', 'slow.xtc: 4 ps between frames, a.xtc has 2'),
    ('forecast --traj a.dcd a.dcd a.dcd --top a.pdb --model ar --lead 1 --out o', 'a.dcd: holds no times'),
    ('propagate train --traj a.dcd --top a.pdb --steps 1 --out m', 'a.dcd: holds no times'),
    ('run --traj a.dcd a.dcd a.dcd --top a.pdb --out r2', 'a.dcd: holds no times')])
def test_time_is_looked_at_by_every_command(home, inside, line, words):
    t = md.load(str(home/'a.xtc'), top=str(home/'a.pdb'))
    t.save_dcd(str(home/'a.dcd'))
    t[::2].save_xtc(str(home/'slow.xtc'))
    md.join([t[:20], t[10:]]).save_xtc(str(home/'back.xtc'))
    done = inside(line)
    assert done.returncode == 2 and words in done.stderr, (done.stdout, done.stderr)


def test_a_restart_is_cut(home):
    t = md.load(str(home/'a.xtc'), top=str(home/'a.pdb'))
    md.join([t[:20], t[10:]]).save_xtc(str(home/'back.xtc'))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        cut = read_ensemble(home/'back.xtc', home/'a.pdb', restart='cut', stride=2)
    np.testing.assert_allclose(cut.values[0], t.xyz[::2], atol=1e-3)
    assert cut.spacing_ps == 4.
