"Molecules: what comes out is determined, whole and accepted by OpenMM; what cannot be mended is refused."
import os
import random
import subprocess
import sys
from collections import Counter

import mdtraj as md
import numpy as np
import openmm as mm
import pytest
from hypothesis import given, settings, strategies as st
from openmm import app, unit

import foldbook.structures as structures
from foldbook.molecules import Molecule, build_chain, charge, load_molecule, peptide, plot_molecule, prepare, report

THREE = dict(zip('ACDEFGHIKLMNPQRSTVWY', 'ALA CYS ASP GLU PHE GLY HIS ILE LYS LEU MET ASN PRO GLN ARG SER THR VAL TRP '
                                         'TYR'.split()))
# heavy atoms and hydrogens of a residue inside a chain at pH 7, HIS neutral
ATOMS = dict(A=(5, 5), C=(6, 5), D=(8, 4), E=(9, 6), F=(11, 9), G=(4, 3), H=(10, 7), I=(8, 11), K=(9, 13), L=(8, 11),
             M=(8, 9), N=(8, 6), P=(7, 7), Q=(9, 8), R=(11, 13), S=(6, 5), T=(7, 7), V=(7, 9), W=(14, 10), Y=(12, 9))
SEQUENCE = 'ADKWMGGSHSFA'
sequences = st.text('ACDEFGHIKLMNPQRSTVWY', min_size=1, max_size=12)


def lines_of(tmp_path, sequence=SEQUENCE, shape='extended', chain='A'):
    build_chain(sequence, shape).save_pdb(str(tmp_path/'ideal.pdb'))
    return [l[:21] + chain + l[22:] for l in (tmp_path/'ideal.pdb').read_text().splitlines() if l.startswith('ATOM')]


def seqres(sequence, chain='A'):
    return [f'SEQRES   1 {chain} {len(sequence):4d}  ' + ' '.join(THREE[s] for s in sequence)]
def write(path, lines):
    path.write_text('\n'.join([*lines, 'END', '']))
    return path
def number(l): return int(l[22:26])
def name(l): return l[12:16].strip()
def moved(l, x=0.0, y=0.0): return l[:30] + f'{float(l[30:38]) + x:8.3f}{float(l[38:46]) + y:8.3f}' + l[46:]
def count(m): return Counter('H' if a.element.symbol == 'H' else 'heavy' for a in m.topology.atoms())
def system(m): return app.ForceField('amber14/protein.ff14SB.xml').createSystem(m.topology)
def said(m, text): return any(text in c for c in m.changes)


def mirrored(m):
    found = []
    for r in m.topology.residues():
        p = {a.name: m.positions[a.index] for a in r.atoms()}
        if 'CB' in p and np.dot(np.cross(p['N'] - p['CA'], p['C'] - p['CA']), p['CB'] - p['CA']) < 0:
            found.append(str(r))
    return found


@settings(deadline=None, max_examples=10)
@given(sequences, st.sampled_from(['helix', 'extended']), st.booleans())
def test_atoms_follow_from_composition(sequence, shape, caps):
    m = peptide(sequence, shape, caps)
    heavy, hydrogens = np.sum([ATOMS[s] for s in sequence], axis=0)
    ends = (5, 7) if caps else (1, 2)
    if caps: assert m.topology.getNumResidues() == len(sequence) + 2
    assert count(m) == {'heavy': heavy + ends[0], 'H': hydrogens + ends[1]}
    assert np.isfinite(m.positions).all() and m.positions.dtype == np.float64
    assert not mirrored(m)
    if len(sequence) == 1 and not caps: return # no force field here knows an amino acid that is both ends at once
    assert system(m).getNumParticles() == len(m.positions)
    assert charge(m) == sum(dict(K=1, R=1, D=-1, E=-1).get(s, 0) for s in sequence)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.tuples(st.sampled_from('ACDEFGHIKLMNPQRSTVWY'), st.floats(-3.1, 3.1), st.floats(-3.1, 3.1)),
                min_size=1, max_size=10), st.booleans())
def test_dihedrals_come_back(residues, caps):
    sequence, phi, psi = ''.join(r[0] for r in residues), *np.array([r[1:] for r in residues]).T
    t = build_chain(sequence, np.stack([phi, psi], 1), caps)
    same = lambda a, b: np.abs(np.exp(1j*np.asarray(a)) - np.exp(1j*np.asarray(b))).max(initial=0) < 2e-4
    inner = (slice(None), slice(None)) if caps else (slice(1, None), slice(None, -1))
    assert same(md.compute_phi(t)[1][0], phi[inner[0]]) and same(md.compute_psi(t)[1][0], psi[inner[1]])
    assert same(md.compute_omega(t)[1][0], np.pi)


def test_same_in_two_processes(tmp_path):
    lines = [l for l in lines_of(tmp_path) if number(l) not in (6, 7) and not (number(l) == 3
                                                                               and name(l) in ('CE', 'NZ'))]
    path = write(tmp_path/'gap.pdb', seqres(SEQUENCE) + lines)
    code = ('import random, sys; random.seed(1); from foldbook.molecules import prepare; '
            f'sys.stdout.write(prepare({str(path)!r}, caps=True, seed=3).positions.tobytes().hex())')
    there = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True,
                           env=dict(os.environ, PYTHONHASHSEED='1')).stdout
    here = prepare(path, caps=True, seed=3).positions.ravel()
    np.testing.assert_allclose(np.frombuffer(bytes.fromhex(there)), here, atol=1e-6, rtol=0)


def test_global_generator_is_put_back():
    random.seed(5)
    expected = random.random()
    random.seed(5)
    peptide('A')
    assert random.random() == expected


def test_minimises_to_a_sane_energy(tmp_path):
    m = peptide('ADKWTLREHSFA', 'helix')
    c = mm.Context(system(m), mm.VerletIntegrator(0.001), mm.Platform.getPlatformByName('Reference'))
    c.setPositions(m.positions)
    mm.LocalEnergyMinimizer.minimize(c, 10, 50)
    assert -5000 < c.getState(getEnergy=True).getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole) < 0


@pytest.mark.parametrize('gap', [(6,), (6, 7), (5, 6, 7)])
def test_gap_is_modelled_from_the_sequence(tmp_path, gap):
    lines = lines_of(tmp_path)
    m = prepare(write(tmp_path/'gap.pdb', seqres(SEQUENCE) + [l for l in lines if number(l) not in gap]))
    assert [r.name for r in m.topology.residues()] == [THREE[s] for s in SEQUENCE]
    assert said(m, 'modelled') and not mirrored(m)
    assert max(np.linalg.norm(m.positions[a.index] - m.positions[b.index])
               for a, b in m.topology.bonds() if 'H' not in (a.element.symbol, b.element.symbol)) < 0.2
    system(m)


def test_missing_ends_are_said_and_not_added(tmp_path):
    lines = lines_of(tmp_path)
    m = prepare(write(tmp_path/'ends.pdb', seqres(SEQUENCE) + [l for l in lines if 2 < number(l) < 12]))
    assert m.topology.getNumResidues() == 9
    assert said(m, '2 residues of the sequence before LYS3 of chain A without coordinates: not added') and said(m,
        '1 residue of the sequence after PHE11')
    assert said(m, 'PHE11 of chain A: added OXT')


def test_side_chain_is_completed(tmp_path):
    m = prepare(write(tmp_path/'short.pdb', [l for l in lines_of(tmp_path)
                                             if number(l) != 4 or name(l) in ('N', 'CA', 'C', 'O')]))
    assert said(m, 'TRP4 of chain A: added CB CG CD1') and not mirrored(m)
    assert len(m.positions) == peptide(SEQUENCE, caps=False).topology.getNumAtoms()


def test_alternate_locations(tmp_path):
    lines = lines_of(tmp_path)
    two = [x for l in lines for x in ([l[:16] + 'A' + l[17:], moved(l[:16] + 'B' + l[17:], 0.4)] if number(l) == 8
                                      else [l])]
    m, plain = prepare(write(tmp_path/'alt.pdb', two)), prepare(write(tmp_path/'plain.pdb', lines))
    np.testing.assert_array_equal(m.positions, plain.positions)
    assert said(m, '1 residue had alternate locations')
    other = [x for l in lines for x in ([l[:16] + 'A' + l[17:], moved(l[:16] + 'BTHR' + l[20:], 0.4)] if number(l) == 8
                                        else [l])]
    assert [r.name for r in prepare(write(tmp_path/'two.pdb', other)).topology.residues()] == [THREE[s]
                                                                                               for s in SEQUENCE]


def cif(path, pdb):
    f = app.PDBFile(str(pdb))
    with open(path, 'w') as h: app.PDBxFile.writeFile(f.topology, f.positions, h, keepIds=True)
    return path


def test_mmcif_is_pdb(tmp_path):
    pdb = write(tmp_path/'plain.pdb', lines_of(tmp_path))
    a, b = prepare(pdb), prepare(cif(tmp_path/'plain.cif', pdb))
    np.testing.assert_allclose(a.positions, b.positions, atol=1e-6)
    assert a.changes == b.changes and [str(x) for x in a.topology.atoms()] == [str(x) for x in b.topology.atoms()]


def test_mmcif_alternate_locations(tmp_path):
    path = cif(tmp_path/'plain.cif', write(tmp_path/'plain.pdb', lines_of(tmp_path)))
    plain, out = prepare(path), []
    for l in path.read_text().splitlines():
        w = l.split()
        if w[:1] == ['ATOM'] and w[3] == 'OG':
            out += [' '.join([*w[:4], 'A', *w[5:]]),
                    ' '.join([*w[:4], 'B', *w[5:10], str(float(w[10]) + 0.4), *w[11:]])]
        else: out.append(l)
    (tmp_path/'alt.cif').write_text('\n'.join(out) + '\n')
    m = prepare(tmp_path/'alt.cif')
    np.testing.assert_allclose(m.positions, plain.positions, atol=1e-6)
    assert said(m, '2 residues had alternate locations')


def test_models_waters_ligands_hydrogens_and_second_chain(tmp_path):
    m = peptide('AKE', caps=False)
    body = [l for l in m.save(tmp_path/'ake.pdb').read_text().splitlines() if l.startswith(('ATOM', 'TER'))]
    second = [l[:21] + 'B' + moved(l, 30)[22:] if l.startswith('ATOM') else l for l in body]
    water = ['HETATM  900  O   HOH A 100      50.000  50.000  50.000  1.00  0.00           O', 'HETATM  901 CA    CA '
             'A 101      60.000  50.000  50.000  1.00  0.00          CA']
    path = write(tmp_path/'all.pdb', ['MODEL        1', *body, *second, *water, 'ENDMDL', 'MODEL        2', *body,
                                      *second, *water, 'ENDMDL'])
    one, both = prepare(path), prepare(path, chain='A,B')
    assert count(one) == count(m) and count(both) == {k: 2*v for k, v in count(m).items()}
    for text in ('Model 1 of 2 taken', 'Chain B (3 residues) left out', '1 CA, 1 HOH',
                 'hydrogens of the input removed'):
        assert said(one, text), one.changes
    assert not said(both, 'left out') and charge(both) == 2*charge(m)


def test_caps(tmp_path):
    m = prepare(write(tmp_path/'plain.pdb', lines_of(tmp_path)), caps=True)
    assert [r.name for r in m.topology.residues()] == ['ACE', *(THREE[s] for s in SEQUENCE), 'NME']
    assert not any(a.name == 'OXT' for a in m.topology.atoms()) and said(m, 'Caps ACE and NME added')
    assert count(m) == count(peptide(SEQUENCE)) and np.abs(np.cos(md.compute_omega(m.trajectory)[1]) + 1).max() < 0.3
    system(m)
    again = prepare(m.trajectory, caps=True)
    assert count(again) == count(m) and not said(again, 'Caps')


def norleucine(lines):
    return [('HETATM' + l[6:]).replace('MET', 'NLE').replace(' SD ', ' CD ').replace('           S', '           C')
            if 'MET' in l else l for l in lines]


def test_nonstandard_residues(tmp_path):
    lines = lines_of(tmp_path)
    path = write(tmp_path/'nle.pdb', norleucine(lines))
    m, plain = prepare(path), prepare(write(tmp_path/'plain.pdb', lines))
    assert said(m, 'NLE5 of chain A became MET')
    np.testing.assert_array_equal(m.positions, plain.positions)
    assert [r.name for r in prepare(path, replace={'nle': 'LYS'}).topology.residues()][4] == 'LYS'
    assert prepare(write(tmp_path/'hie.pdb',
                         [l.replace('HIS', 'HSE') for l in lines])).topology.getNumAtoms() == len(plain.positions)
    assert said(prepare(write(tmp_path/'sep.pdb', [l.replace('SER', 'SEP') for l in lines])), 'SEP8 of chain A became '
                'SER')


def test_d_residue_is_turned(tmp_path):
    lines = lines_of(tmp_path, 'GAG')
    n, ca, c, cb = (np.array([float(l[k:k+8]) for k in (30, 38, 46)]) for want in ('N', 'CA', 'C', 'CB')
                    for l in lines if number(l) == 2 and name(l) == want)
    normal = np.cross(n - ca, c - ca)/np.linalg.norm(np.cross(n - ca, c - ca))
    x = cb - 2*normal*((cb - ca) @ normal)
    m = prepare(write(tmp_path/'dal.pdb',
                      [(l[:30] + ''.join(f'{v:8.3f}' for v in x) + l[54:] if name(l) == 'CB' else l).replace('ALA',
                          'DAL') for l in lines]))
    assert said(m, 'DAL2 of chain A became ALA') and not mirrored(m)


def test_disulfide_and_ph(tmp_path):
    one = lines_of(tmp_path, 'GCG')
    sg = next(np.array([float(l[k:k+8]) for k in (30, 38, 46)]) for l in one if name(l) == 'SG')
    far = np.array([float(l[k:k+8]) for l in one for k in (30, 38, 46)]).reshape(-1, 3)
    away = (sg - far.mean(0))/np.linalg.norm(sg - far.mean(0))
    turned = 2*(sg + 1.02*away) - far # the chain through a point beyond its sulfur
    two = [l[:21] + 'B' + l[22:30] + ''.join(f'{v:8.3f}' for v in x) + l[54:] for l, x in zip(one, turned)]
    m = prepare(write(tmp_path/'ss.pdb', [*one, 'TER', *two]), chain='A,B', replace=None)
    assert said(m, 'CYS2 of chain A as CYX, CYS2 of chain B as CYX')
    assert any(a.name == b.name == 'SG' for a, b in m.topology.bonds())
    system(m)
    acid = peptide('HDEK', ph=2.0)
    assert charge(acid) == 2 and said(acid, 'HIP') and said(acid, 'ASH') and said(acid, 'GLH')
    assert charge(peptide('HDEK', ph=13.0)) == -2


def test_save_and_load(tmp_path):
    m = peptide('AKE')
    for suffix in ('pdb', 'cif'):
        again = load_molecule(m.save(tmp_path/f'm.{suffix}'))
        np.testing.assert_allclose(again.positions, m.positions, atol=1e-4)
        assert again.topology.getNumBonds() == m.topology.getNumBonds() and again.name == 'm' and again.changes == ()
        system(again)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['m.cif', 'm.pdb']
    with pytest.raises(ValueError, match='must end in'): m.save(tmp_path/'m.xyz')
    with pytest.raises(FileNotFoundError, match='no such structure file'): load_molecule(tmp_path/'none.pdb')
    with pytest.raises(ValueError, match='no hydrogens'): load_molecule(write(tmp_path/'heavy.pdb', lines_of(tmp_path)))
    assert m.trajectory.n_atoms == len(m.positions)


def edited(change): return lambda lines: [x for l in lines if (x := change(l)) is not None]


@pytest.mark.parametrize('edit, options, match', [
    (edited(lambda l: l.replace('TRP', 'XYZ')), {}, r"bad.pdb: residue XYZ4 of chain A is unknown; .*replace=\{'XYZ'"),
    (edited(lambda l: None if (number(l), name(l)) == (4, 'CA') else l), {}, 'residue TRP4 of chain A has no backbone '
     'atom CA'),
    (edited(lambda l: l if name(l) == 'CA' else None), {}, 'residue ALA1 of chain A has no backbone atom C, N'),
    (edited(lambda l: None if number(l) == 6 else l), {}, 'missing between MET5 of chain A and GLY7 of chain A'),
    (edited(lambda l: l[:30] + '     nan' + l[38:] if (number(l), name(l)) == (4, 'CB') else l), {}, 'CB of TRP4 of '
     'chain A has a coordinate that is not a number'),
    (edited(lambda l: l[:30] + '********' + l[38:] if number(l) == 4 else l), {}, 'bad.pdb: not a PDB or mmCIF file '
     'that can be read'),
    (edited(lambda l: None), {}, 'bad.pdb: has no atoms'),
    (list, dict(chain='Q'), "no protein chain 'Q'; it has A"),
    (list, dict(replace={'NLE': 'MET'}), 'no residue NLE'),
    (list, dict(replace={'MET': 'NLE'}), 'not one of the twenty'),
])
def test_refused(tmp_path, edit, options, match):
    path = write(tmp_path/'bad.pdb', edit(lines_of(tmp_path)))
    with pytest.raises(ValueError, match=match): prepare(path, **options)


def test_clash_is_named(tmp_path):
    lines = lines_of(tmp_path)
    spot = next(l for l in lines if (number(l), name(l)) == (2, 'CB'))[30:54]
    path = write(tmp_path/'clash.pdb', [l[:30] + spot + l[54:] if (number(l), name(l)) == (9, 'CG') else l
                                        for l in lines])
    with pytest.raises(ValueError, match='atoms CB of ASP2 of chain A and CG of HIS9 of chain A are 0.000 nm apart'):
        prepare(path)


def test_only_water(tmp_path):
    path = write(tmp_path/'water.pdb',
                 ['HETATM  900  O   HOH A 100      50.000  50.000  50.000  1.00  0.00           O'])
    with pytest.raises(ValueError, match='no protein chain'): prepare(path)
    with pytest.raises(FileNotFoundError, match='no such structure file'): prepare(tmp_path/'nothing.pdb')


def test_pdb_id_goes_through_the_register(tmp_path, monkeypatch):
    path = write(tmp_path/'1ABC.pdb', lines_of(tmp_path))
    asked = []
    def fetch(key, **_):
        asked.append(key)
        return type('DataSet', (), dict(topology=path))()
    monkeypatch.setattr(structures, 'fetch', fetch)
    assert prepare('1ABC').name == '1ABC' and asked == ['pdb:1ABC']


@pytest.mark.parametrize('sequence, shape, match', [('AXA', 'helix', "'X' at position 2"),
    ('', 'helix', 'at least one'), ('AA', 'coil', 'no shape'), ('AA', [(0, 0)]*3, '2 pairs'),
    ('AA', (np.nan, 0), 'finite')])
def test_chain_refused(sequence, shape, match):
    with pytest.raises(ValueError, match=match): build_chain(sequence, shape)


def test_report_and_figure():
    import matplotlib
    matplotlib.use('Agg')
    text = report(peptide('AK'))
    assert text.startswith('AK: 4 residues, ') and 'charge +1' in text and 'hydrogens placed for pH 7' in text
    unknown = Molecule('x', build_chain('A').topology.to_openmm(), build_chain('A').xyz[0])
    assert charge(unknown) is None and 'charge unknown' in report(unknown)
    assert len(plot_molecule(peptide('AK')).lines) == 1
