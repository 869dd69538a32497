"Atoms and topologies: right or refused, for siblings of every kind of fault."
import mdtraj as md
import numpy as np
import pytest

from foldbook.bonds import ALIASES, Molecule, ca_atoms, standard_topology
from foldbook.features import named, stream
from foldbook.frames import load_topology, read_trajectory, stream_frames
from foldbook.molecules import build_chain
from foldbook.structures import load_native, read_structure

def peptide(sequence='ANLYSWKDRV'): return build_chain(sequence, 'helix')


def frames(t, n=6, box=8., seed=0):
    "Frames that shake a little, in a box; `box` is a length or three vectors (3, 3)."
    x = np.repeat(t.xyz[:1], n, 0) + np.random.default_rng(seed).normal(0, .003, (n, t.n_atoms, 3))
    new = md.Trajectory(x.astype(np.float32), t.topology, np.arange(n, dtype=float))
    if box is not None:
        v = box*np.eye(3) if np.isscalar(box) else np.asarray(box)
        new.unitcell_vectors = np.repeat(v[None].astype(np.float32), n, 0)
    return new


def dimer(sequence='ANLYSWKDRV', other=None, **how):
    "Two helices side by side."
    a, b = peptide(sequence), peptide(other or sequence)
    b.xyz = b.xyz + np.float32(a.xyz[0].mean(0) - b.xyz[0].mean(0) + [0, 0, .95])
    return frames(a.stack(b), **how)


def moved(t, atoms, shift, when=slice(None)):
    "The same trajectory with some atoms elsewhere in some frames."
    x = t.xyz.copy()
    x[when, np.asarray(atoms)[:, None] if not isinstance(when, slice) else atoms] += np.float32(shift)
    return md.Trajectory(x, t.topology, t.time, t.unitcell_lengths, t.unitcell_angles)


def write(folder, t, structure=None, name='a.xtc'):
    (t if structure is None else structure)[0].save_pdb(str(folder/'top.pdb'))
    t.save(str(folder/name))
    return folder/name, folder/'top.pdb'


def read(path, top, **how): return md.join([piece for _, piece in stream_frames(path, top, **how)])


def reordered(t, key):
    "The same molecule, its residues written in the order of `key`."
    top, order = md.Topology(), []
    for c in t.topology.chains:
        chain = top.add_chain(c.chain_id)
        for r in c.residues:
            residue = top.add_residue(r.name, chain, r.resSeq)
            for a in sorted(r.atoms, key=key):
                top.add_atom(a.name, a.element, residue)
                order.append(a.index)
    return md.Trajectory(t.xyz[:, order], top, t.time, t.unitcell_lengths, t.unitcell_angles)


def place(atom): return [a.index for a in atom.residue.atoms].index(atom.index)


@pytest.mark.parametrize('key', [
    lambda a: (a.name in ('C', 'O'), place(a)),                                # as some programs write it
    lambda a: a.name,
    lambda a: -place(a),
    lambda a: (a.name == 'O', place(a)),
    lambda a: dict(C=3, O=2).get(a.name, 9*(place(a) > 1) + place(a)) if a.name in 'CO' else place(a),
    lambda a: dict(CB=3.5, O=4.5).get(a.name, place(a)) if a.residue.index == 5 else place(a)]) # one pair alone
@pytest.mark.parametrize('box', [None, 8.])
def test_another_order_is_refused(tmp_path, key, box):
    t = frames(peptide(), box=box)
    other = reordered(t, key)
    assert [str(a) for a in other.topology.atoms] != [str(a) for a in t.topology.atoms]
    path, top = write(tmp_path, t, other)
    with pytest.raises(ValueError, match=r'a.xtc: frame 0, atom \w+-\w+: its neighbour is [0-9.]+ nm away.*another '
                                         r'order'): read(path, top)
    path, top = write(tmp_path, other, other)
    assert len(read(path, top)) == 6


def test_chains_in_another_order_are_refused(tmp_path):
    t = dimer('ANLYSWKDRV', 'GWEKRITLLN')
    n = t.topology.chain(0).n_atoms
    swapped = np.r_[n:t.n_atoms, :n]
    path, top = write(tmp_path, md.Trajectory(t.xyz[:, swapped], t.topology), t)
    with pytest.raises(ValueError, match='another order'): read(path, top)


@pytest.mark.parametrize('factor, why', [(10, 'look like ångströms; divide them by 10'),
                                         (.1, 'divided by 10 once too')])
@pytest.mark.parametrize('part', ['all', 'name CA', 'backbone'])
def test_wrong_unit_is_named(tmp_path, factor, why, part):
    t = frames(peptide(), box=None)
    t = t.atom_slice(t.topology.select(part))
    path, top = write(tmp_path, md.Trajectory(factor*t.xyz, t.topology), t, 'a.dcd')
    with pytest.raises(ValueError, match=f'a.dcd: frame 0.*{why}'): read(path, top)


BOXES = [8., [[6., 0, 0], [0, 6., 0], [3., 3., 4.2426]]] # a cube, a rhombic dodecahedron


@pytest.mark.parametrize('box', BOXES)
@pytest.mark.parametrize('vector', [0, 2])
@pytest.mark.parametrize('part, late', [('resid 15 and sidechain', True), ('chainid 0 and resid < 4', True),
                                        ('chainid 1 and resid > 14', False)])
def test_a_molecule_that_is_cut(tmp_path, box, vector, part, late):
    t = dimer(box=box)
    cut = moved(t, t.topology.select(part), t.unitcell_vectors[0, vector], slice(3 if late else 0, 6))
    path, top = write(tmp_path, cut, t)
    with pytest.raises(ValueError, match=rf'a.xtc: frame {3*late}, atom.*split across the box.*--periodic'):
        read(path, top, chunk=2)
    np.testing.assert_allclose(inner(read(path, top, periodic=True)), inner(t), atol=5e-3)


def inner(t): # distances of C-alphas do not depend on where the molecule is
    ca = ca_atoms(t.topology)
    return md.compute_distances(t, [(i, j) for i in ca[::3] for j in ca[1::3]], periodic=False)


@pytest.mark.parametrize('box', BOXES)
@pytest.mark.parametrize('chain', [0, 1])
@pytest.mark.parametrize('only', ['all', 'name CA'])
def test_chains_in_two_images(tmp_path, box, chain, only):
    t = dimer(box=box)
    t = t.atom_slice(t.topology.select(only))
    jump = t.unitcell_vectors[0, 1] + t.unitcell_vectors[0, 2]
    jumped = moved(t, t.topology.select(f'chainid {chain}'), jump, slice(1, None, 2))
    path, top = write(tmp_path, jumped, t)
    with pytest.raises(ValueError, match='a.xtc: frame 1, atom.*chain 2 touches.*different images.*--periodic'):
        read(path, top)
    f = named('RMSD + Rg', load_native(top)) if only == 'all' else None
    whole = read(path, top, periodic=True)
    np.testing.assert_allclose(inner(whole), inner(t), atol=5e-3)
    if f is None: return
    got, = stream(path, top, f, periodic=True, progress=False)[0]
    t.save_xtc(str(tmp_path/'whole.xtc'))
    right, = stream(tmp_path/'whole.xtc', top, f, progress=False)[0]
    np.testing.assert_allclose(got, right, atol=5e-3)


def test_chains_that_part_are_no_fault(tmp_path):
    "Neither a complex that falls apart, nor three chains of which only neighbours touch."
    t = dimer()
    second = t.topology.select('chainid 1')
    path, top = write(tmp_path, moved(t, second, [0, 0, 1.7], slice(2, 6)), t)
    assert len(read(path, top)) == 6
    third = moved(t, second, [0, 0, 0]).atom_slice(second)
    three = t.stack(moved(third, np.arange(third.n_atoms), [0, 0, .95]))
    path, top = write(tmp_path, three)
    assert len(read(path, top)) == 6


def test_what_is_sound_is_read(tmp_path):
    "Heat, a gap in the chain, renumbered or not, C-alphas, backbones, a ring, water that the box cuts."
    t = frames(peptide())
    for k in range(3):
        noise = np.random.default_rng(k).normal(0, .012, t.xyz.shape)
        hot = md.Trajectory(np.float32(t.xyz + noise), t.topology)
        assert len(read(*write(tmp_path, hot, t))) == 6
    gap = t.atom_slice([a.index for a in t.topology.atoms if not 3 < a.residue.index < 6])
    assert len(read(*write(tmp_path, gap))) == 6 and load_native(tmp_path/'top.pdb').n_residues == 8
    for k, r in enumerate(gap.topology.residues, 1): r.resSeq = k
    assert len(read(*write(tmp_path, gap))) == 6
    for part in ('name CA', 'backbone', 'name CA or name CB'):
        assert len(read(*write(tmp_path, t.atom_slice(t.topology.select(part))))) == 6
    ring = t.topology.copy()
    ring.add_bond(next(ring.residue(0).atoms_by_name('N')), next(ring.residue(9).atoms_by_name('C')))
    assert not list(Molecule(ring).faults(t))
    wet = t.topology.copy()
    water = wet.add_residue('HOH', wet.add_chain(), 11)
    for name in ('O', 'H1', 'H2'): wet.add_atom(name, md.element.get_by_symbol(name[0]), water)
    x = np.concatenate([t.xyz, np.repeat(np.float32([[[.02, 4, 4], [7.95, 4, 4], [.02, 4.1, 4]]]), 6, 0)], 1)
    wet = md.Trajectory(x, wet, t.time, t.unitcell_lengths, t.unitcell_angles)
    assert len(read(*write(tmp_path, wet))) == 6


@pytest.mark.parametrize('suffix', ['pdb', 'gro'])
def test_a_broken_native_structure_is_refused(tmp_path, suffix):
    t = dimer()
    path = tmp_path/f'native.{suffix}'
    for bad, why in ((moved(t, t.topology.select('resid 4 and sidechain'), [8., 0, 0]), 'split across the box'),
                     (moved(t, t.topology.select('chainid 1'), [0, 8., 0]), 'different images')):
        bad[0].save(str(path))
        with pytest.raises(ValueError, match=f'native.{suffix}: atom.*{why}'): load_native(path)
    t[0].save(str(path))
    assert load_native(path).topology.n_chains == 2


def test_copies_in_a_crystal_are_no_fault(tmp_path):
    t = dimer()
    moved(t, t.topology.select('chainid 1'), [0, 8., 0])[0].save_pdb(str(tmp_path/'a.pdb'))
    text = (tmp_path/'a.pdb').read_text()
    assert 'P 1 ' in text.splitlines()[1]
    (tmp_path/'a.pdb').write_text(text.replace('P 1 ', 'P 21'))
    assert load_native(tmp_path/'a.pdb').topology.n_chains == 2


def without(t, names): return t.atom_slice([a.index for a in t.topology.atoms if a.name not in names])


def numbered_on(t):
    top = t.topology.copy()
    for k, r in enumerate(top.residues, 1): r.resSeq = k
    return md.Trajectory(t.xyz, top, t.time, t.unitcell_lengths, t.unitcell_angles)


@pytest.mark.parametrize('number', [lambda t: t, numbered_on])
@pytest.mark.parametrize('atoms', [lambda t: t, lambda t: without(t, ('OXT', 'O2')),
                                   lambda t: t.atom_slice(ca_atoms(t.topology))])
def test_a_gro_file_is_a_structure_with_two_chains(tmp_path, number, atoms):
    t = number(atoms(dimer()))
    t[0].save_gro(str(tmp_path/'top.gro'))
    path, top = write(tmp_path, t)
    for part in ('top.gro', 'top.pdb'): assert [c.n_residues for c in load_topology(tmp_path/part).chains] == [10, 10]
    if t.n_atoms > 20:
        got, right = (stream(path, x, named('default + phi', load_native(x)), progress=False)
                      for x in (tmp_path/'top.gro', top))
        assert sum(n.startswith('end') for n in got[1].names) == 2 and len(got[1].names) == len(right[1].names)
        np.testing.assert_allclose(got[0][0], right[0][0], atol=5e-3) # a gro file has three digits
        assert [r.name for r in read_structure(tmp_path/'top.gro').residues] == [r.name for r in t.topology.residues]


@pytest.mark.parametrize('chain, ter', [(' ', True), (' ', False), ('A', True), ('A', False)])
def test_a_pdb_file_without_names_of_chains(tmp_path, chain, ter):
    without(dimer(), ('OXT', 'O2'))[0].save_pdb(str(tmp_path/'a.pdb'))
    lines = [x for x in (tmp_path/'a.pdb').read_text().splitlines(keepends=True) if ter or not x.startswith('TER')]
    (tmp_path/'a.pdb').write_text(''.join(x[:21] + chain + x[22:] if x.startswith(('ATOM', 'TER')) else x
                                          for x in lines))
    assert [c.n_residues for c in load_topology(tmp_path/'a.pdb').chains] == [10, 10]


@pytest.mark.parametrize('name, known', [
    (n, k) for k, names in dict(
        HIS='HISE HISD HISH HISA HISB HISP HID HIE HIP HSD HSE HSP NHIE CHID', LYS='LYSH LYN LYP NLYS CLYS',
        CYS='CYSH CYX CYM CYS2 NCYX', ASP='ASPH ASH NASP', GLU='GLUH GLH CGLU', ARG='ARGN NARG').items()
    for n in names.split()])
def test_names_of_force_fields_have_bonds(name, known):
    "A residue under another name has the bonds of the known one, in the middle of a chain."
    letter = dict(HIS='H', LYS='K', CYS='C', ASP='D', GLU='E', ARG='R')[known]
    t = peptide(f'A{letter}A')
    top = t.topology.copy()
    top.residue(1).name = name
    new = standard_topology(md.Topology.from_dataframe(top.to_dataframe()[0]))
    assert ALIASES[name] == new.residue(1).name == known
    bonds = lambda topology: {tuple(sorted((a.index, b.index))) for a, b in topology.bonds}
    right = md.Topology.from_dataframe(t.topology.to_dataframe()[0])
    right.create_standard_bonds()
    assert bonds(new) == bonds(right)


@pytest.mark.parametrize('ter', [False, True])
def test_a_residue_in_two_places_is_refused(tmp_path, ter):
    t = peptide()
    main = [a.index for a in t.topology.atoms if a.name in ('N', 'CA', 'C', 'O', 'OXT')]
    side = [i for i in range(t.n_atoms) if i not in set(main)]
    t.save_pdb(str(tmp_path/'a.pdb'))
    atoms = [x for x in (tmp_path/'a.pdb').read_text().splitlines(keepends=True) if x.startswith('ATOM')]
    parts = [atoms[i] for i in main] + ['TER\n']*ter + [atoms[i] for i in side]
    (tmp_path/'a.pdb').write_text(''.join(parts) + 'END\n')
    with pytest.raises(ValueError, match='a.pdb: residue ALA1 is in two places of the file'):
        load_topology(tmp_path/'a.pdb')


def test_read_trajectory_checks_too(tmp_path):
    t = dimer()
    path, top = write(tmp_path, moved(t, t.topology.select('chainid 1'), [8., 0, 0], slice(1, 2)), t)
    with pytest.raises(ValueError, match='frame 1'): read_trajectory(path, top)
