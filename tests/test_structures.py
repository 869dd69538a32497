"The reader of structure files: one model, one conformer, chains, names; the same from PDB, mmCIF and packed files."
import gzip

import mdtraj as md
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from foldbook import structures
from foldbook.features import fraction_native
from foldbook.go import GoModel
from foldbook.molecules import prepare
from foldbook.structures import (AtomRecord, ca_contacts, load_native, native_contacts, one_conformer, protein_chain,
    read_structure)


def test_only_one_whole_chain_is_kept(hth, tmp_path):
    "Alternate places, hydrogens, waters, ions called CA, a modified residue, a second model and a second chain."
    atoms = [l for l in hth.read_text().splitlines() if l.startswith('ATOM')]
    atoms = [l.replace('ATOM  ', 'HETATM').replace('ALA', 'NLE') if int(l[22:26]) == 5 else l for l in atoms]
    alt = atoms[1][:16] + 'B' + atoms[1][17:30] + '  99.000' + atoms[1][38:]
    atoms[1] = atoms[1][:16] + 'A' + atoms[1][17:]
    extra = ['ATOM    997  H   ALA A   1       0.000   0.000   0.000  1.00  0.00           H',
             'TER', 'HETATM  998 CA    CA A 101      10.000  10.000  10.000  1.00  0.00          CA',
             'HETATM  999  O   HOH A 102      20.000  10.000  10.000  1.00  0.00           O']
    second = [l[:16] + ' ' + l[17:21] + 'B' + l[22:] for l in atoms[:60]]
    text = ['MODEL        1', *atoms[:2], alt, *atoms[2:], *extra, *second, 'ENDMDL', 'MODEL        2', *atoms,
            'ENDMDL', 'END']
    (tmp_path/'mess.pdb').write_text('\n'.join(text) + '\n')
    clean, mess = GoModel.from_pdb(hth), GoModel.from_pdb(tmp_path/'mess.pdb')
    assert np.allclose(clean.xyz, mess.xyz) and (clean.contacts == mess.contacts).all()
    assert mess.residues[4] == 'NLE' and mess.residues[:4] == ['ALA']*4
    assert len(GoModel.from_pdb(tmp_path/'mess.pdb', chain='B').residues) == 12
    with pytest.raises(ValueError, match='no protein chain .Z.; it has A, B'):
        protein_chain(tmp_path/'mess.pdb', 'Z')


@pytest.mark.parametrize('suffix', ['.cif', '.mmcif', '.CIF'])
def test_mmcif_is_the_same_chain(hth, model, tmp_path, suffix):
    "Two models, a water, a second chain: the model is that of the PDB file."
    from openmm.app import PDBFile, PDBxFile
    atoms = [l for l in hth.read_text().splitlines() if l.startswith('ATOM')]
    water = 'HETATM  999  O   HOH A 102      20.000  10.000  10.000  1.00  0.00           O'
    second = [l[:21] + 'B' + l[22:] for l in atoms[:60]]
    (tmp_path/'two.pdb').write_text('\n'.join([*atoms, 'TER', *second, 'TER', water, 'END']) + '\n')
    pdb = PDBFile(str(tmp_path/'two.pdb'))
    with open(tmp_path/f'two{suffix}', 'w') as f:
        PDBxFile.writeHeader(pdb.topology, f, keepIds=True)
        PDBxFile.writeModel(pdb.topology, pdb.positions, f, modelIndex=1, keepIds=True)
        PDBxFile.writeModel(pdb.topology, pdb.getPositions(asNumpy=True)*2, f, modelIndex=2, keepIds=True)
    for chain in (None, 'B'):
        a, b = (GoModel.from_pdb(tmp_path/f'two{x}', chain=chain) for x in ('.pdb', suffix))
        assert a.settings() | dict(source='') == b.settings() | dict(source='') and b.source == f'two{suffix}'
    assert (GoModel.from_pdb(tmp_path/f'two{suffix}').contacts == model.contacts).all()


@pytest.mark.parametrize('text', ['', 'data_x\n', 'ATOM      1  N   ALA A   1',
                                  'data_x\nloop_\n_atom_site.id\n_atom_site.Cartn_x\n1 2.0 3.0\n'])
def test_an_unreadable_mmcif_says_so(tmp_path, text):
    (tmp_path/'bad.cif').write_text(text)
    with pytest.raises(ValueError, match='bad.cif: not a PDB or mmCIF file that can be read'):
        protein_chain(tmp_path/'bad.cif')


def test_an_id_is_looked_up_in_the_protein_data_bank(hth, monkeypatch, model):
    asked = []

    def fetch(name, progress):
        asked.append(name)
        return type('Found', (), dict(topology=hth))
    monkeypatch.setattr(structures, 'fetch', fetch)
    assert (GoModel.from_pdb('9XYZ').contacts == model.contacts).all() and asked == ['pdb:9XYZ']


def two_places(hth, tmp_path, occupancy=(0.4, 0.6)):
    "The C-beta of residue 7 in two places, letters A and B; residue 9 is called 8A."
    lines = []
    for l in hth.read_text().splitlines():
        if not l.startswith('ATOM'): continue
        if l[22:27] == '   9 ': l = l[:22] + '   8A' + l[27:]
        if l[12:16].strip() == 'CB' and l[22:26] == '   7':
            for letter, shift, o in zip('AB', (0.0, 0.3), occupancy):
                lines.append(f'{l[:16]}{letter}{l[17:30]}{float(l[30:38]) + shift:8.3f}{l[38:54]}{o:6.2f}{l[60:]}')
        else: lines.append(l)
    (tmp_path/'two.pdb').write_text('\n'.join([*lines, 'END', '']))
    return tmp_path/'two.pdb'


@pytest.mark.parametrize('occupancy, letter', [((0.4, 0.6), 'B'), ((0.6, 0.4), 'A'), ((0.5, 0.5), 'A')])
def test_every_reader_takes_the_same_conformer(hth, tmp_path, occupancy, letter):
    "The reader, the native structure, the model of one chain and the molecule to simulate; PDB, packed, and mmCIF."
    from openmm.app import PDBxFile, PDBFile
    path = two_places(hth, tmp_path, occupancy)
    residue = next(r for r in read_structure(path).residues if r.others)
    assert (residue.label, residue.alternate, len(residue.atoms)) == ('ALA7 of chain A', letter, 5)
    want = read_structure(path).xyz[next(i for i, a in residue.atoms if a.atom == 'CB')]
    pdb = PDBFile(str(hth))
    with open(tmp_path/'one.cif', 'w') as f: PDBxFile.writeFile(pdb.topology, pdb.positions, f, keepIds=True)
    rows = []
    for l in (tmp_path/'one.cif').read_text().splitlines():
        w = l.split()
        if w[:1] == ['ATOM'] and (w[3], w[8]) == ('CB', '7'):
            rows += [' '.join([*w[:4], x, *w[5:10], f'{float(w[10]) + s:.4f}', *w[11:13], str(o), *w[14:]])
                     for x, s, o in zip('AB', (0.0, 0.3), occupancy)]
        else: rows.append(l)
    (tmp_path/'two.cif').write_text('\n'.join(rows) + '\n')
    with gzip.open(tmp_path/'two.pdb.gz', 'wt') as f: f.write(path.read_text())
    for file in (path, tmp_path/'two.pdb.gz', tmp_path/'two.cif'):
        for t in (load_native(file), protein_chain(file), prepare(file).trajectory):
            atom = [a for a in t.topology.atoms if a.name == 'CB' and a.residue.index == 6]
            assert len(atom) == 1
            np.testing.assert_allclose(t.xyz[0, atom[0].index], want, atol=1e-5)


def test_insertion_codes_are_residues_of_their_own(hth, tmp_path):
    path = two_places(hth, tmp_path)
    assert [r.number for r in read_structure(path).residues][7:10] == ['8', '8A', '10']
    assert load_native(path).n_residues == 21


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(['N', 'CA', 'C', 'CB', 'OG']), st.sampled_from(['', 'A', 'B', 'C']),
                          st.sampled_from([0.2, 0.5, 1.0])), min_size=1, max_size=12))
def test_one_conformer_is_never_mixed(rows):
    "No atom is kept twice, all letters kept are one letter, and an atom without a letter stays unless doubled."
    rows = [AtomRecord(0, 'A', '1', 'SER', a, letter, o, a[0], (0.0, 0.0, 0.0))
            for (a, letter), o in {(a, letter): o for a, letter, o in rows}.items()]
    kept, letter, others = one_conformer(rows)
    assert len({r.atom for r in kept}) == len(kept) and {r.alternate for r in kept} <= {'', letter}
    assert letter not in others and {r.alternate for r in rows} - {''} <= {letter, *others}
    doubled = {r.atom for r in rows if r.alternate} & {r.atom for r in rows if not r.alternate}
    assert {r.atom for r in rows if not r.alternate} - doubled <= {r.atom for r in kept}


def test_beads_have_no_native_contacts(hth):
    "The C-alpha list has another name, and no fraction of it is Q."
    native = load_native(hth)
    beads = native.atom_slice(structures.ca_atoms(native.topology))
    with pytest.raises(ValueError, match='C-alphas only'): native_contacts(beads)
    with pytest.raises(ValueError, match='C-alphas only'): fraction_native(beads)
    assert set(map(tuple, ca_contacts(beads))) != set(map(tuple, native_contacts(native)))
    d = md.compute_contacts(native, scheme='closest-heavy', periodic=False)
    pairs = {tuple(p) for p, x in zip(d[1], d[0][0]) if x < 0.45}
    assert {tuple(p) for p in native_contacts(native)} == pairs
