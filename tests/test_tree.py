"Tree coordinates: what is read is placed or reported, what is placed comes back, every trap of the paper is closed."
import hashlib
import io
import json
from pathlib import Path

import mdtraj as md
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from openmm import app, unit
from scipy.spatial.transform import Rotation

from foldbook.data import shipped_directory
from foldbook.histograms import wrap
from foldbook.molecules import build_chain
from foldbook.rebuilding import closures, fit_torsions, leverage, reconstruction_error, validity
from foldbook.templates import template
from foldbook.tokens import (KINDS, add_positions, decode, encode, euler_angles, euler_axes, from_paper_tokens, layout,
                             normalised, origin_spread, paper_mask, paper_tokens, position_angles)
from foldbook.tree import (ANGLES, compose, fresh_flags, local_transform, read_tree, scan, to_cartesian,
                           to_internal)

ROOT = Path(__file__).parents[1]
LETTERS = 'ACDEFGHIKLMNPQRSTVWY'
sequences = st.text(LETTERS, min_size=2, max_size=9)
seeds = st.integers(0, 2**32 - 1)


def bent(sequence, seed=0):
    return build_chain(sequence, np.random.default_rng(seed).uniform(-2.8, -0.5, (len(sequence), 2)))


def jittered(tree, n=1, sigma=0.01, seed=0):
    return torch.tensor(tree.positions + np.random.default_rng(seed).normal(0, sigma, (n, *tree.positions.shape)))


def record(i, atom, residue, number, xyz, chain='A', letter=' ', occupancy=1.0, code=' ', kind='ATOM  ', element=None):
    name = atom if len(atom) == 4 else ' ' + atom
    place = ''.join(f'{10*v:8.3f}' for v in xyz)
    head = f'{kind}{i % 100000:5d} {name:<4}{letter}{residue:>3} {chain}{number:4d}{code}'
    return f'{head}   {place}{occupancy:6.2f}  0.00          {element or atom[0]:>2}'


def records(t, number=lambda i: i + 1, shift=0.0, **more):
    "One record an atom; `number` of a residue from its place."
    return [record(a.index + 1, a.name, a.residue.name, number(a.residue.index), x + shift, **more)
            for a, x in zip(t.topology.atoms, t.xyz[0])]


def written(tmp_path, lines, name='x.pdb'):
    (tmp_path/name).write_text('\n'.join([*lines, 'END', '']))
    return tmp_path/name


def comes_back(tree, tolerance=1e-10):
    xyz = jittered(tree, 2)
    for t, level in ((tree, 'all'), (tree.measured(), 'default')):
        x = xyz if level == 'all' else torch.tensor(tree.positions)[None]
        assert (to_cartesian(t, to_internal(t, x, level)) - x).abs().max() < tolerance


# reading

@settings(deadline=None, max_examples=25)
@given(sequences, seeds, st.floats(0, 0.4))
def test_exactly_the_atoms_whose_ancestors_exist_are_placed(sequence, seed, share):
    "Atoms are struck out at random; an oracle that walks up the bonds says which of the rest have all their ancestors."
    rng, t = np.random.default_rng(seed), bent(sequence, seed % 1000)
    kept = [a for a in t.topology.atoms if rng.random() > share]
    if len(kept) < 2: return
    part, have = t.atom_slice([a.index for a in kept]), {(a.residue.index, a.name) for a in kept}
    reached, alive = set(), False # alive: the atom before on the backbone was reached
    for i in range(len(sequence)):
        whole = {(i, n) for n in ('N', 'CA', 'C')} <= have
        if not alive and not whole: continue
        for n in ('N', 'CA', 'C'):
            if (i, n) not in have: break
            reached.add((i, n))
        alive = (i, 'C') in reached
        for atom, (parent, *_) in template(t.topology.residue(i).name).items():
            if (i, atom) in have and (i, parent) in reached: reached.add((i, atom))
        if not alive and not any((i, n) in reached for n in ('N', 'CA', 'C')): continue
    labels = {r.index: f'{r.name}{r.resSeq}' for r in t.topology.residues}
    wanted = sorted((labels[i], n) for i, n in reached)
    if not reached:
        with pytest.raises(ValueError, match='N, CA and C'): read_tree(part)
        return
    tree = read_tree(part)
    label = lambda r: f'{r.name}{r.number}'
    assert sorted((label(tree.residues[r]), n) for r, n in zip(tree.residue, tree.names)) == wanted
    unplaced = [(r.split(' ')[0], a) for r, atoms in tree.summary.unplaced for a in atoms]
    assert sorted(unplaced + wanted) == sorted((labels[a.residue.index], a.name) for a in kept)
    assert np.array_equal(tree.positions, part.xyz[0, tree.atoms].astype(float))
    comes_back(tree)


def test_one_conformer_a_residue_the_fuller_one_is_never_mixed_in(tmp_path):
    t = bent('GSLG')
    lines = [l for l in records(t) if l[17:20] != 'LEU']
    leu = {l[12:16].strip(): l for l in records(t) if l[17:20] == 'LEU'}
    with_letter = lambda l, letter, occupancy: l[:16] + letter + l[17:54] + f'{occupancy:6.2f}' + l[60:]
    for name, l in leu.items():
        if name in ('N', 'CA', 'C', 'O'): lines.append(l)
        else: lines.append(with_letter(l, 'A', 0.45))
        if name not in ('N', 'CA', 'C', 'O', 'CD2'): lines.append(with_letter(l, 'B', 0.55))
    tree = read_tree(written(tmp_path, lines))
    assert tree.summary.alternates == (('LEU3 of chain A', 'B', ('A',)),)
    assert 'CD2' not in tree.names and tree.summary.missing == (('LEU3 of chain A', ('CD2',)),)


def test_the_conformer_with_a_backbone_is_taken_before_the_occupied_one(tmp_path):
    t = bent('GAG')
    lines = []
    for l in records(t):
        lines.append(l if l[22:26] != '   2' else l[:16] + 'A' + l[17:54] + '  0.20' + l[60:])
        if l[22:26] == '   2' and l[12:16].strip() == 'CB': lines.append(l[:16] + 'B' + l[17:54] + '  0.80' + l[60:])
    tree = read_tree(written(tmp_path, lines))
    assert len(tree.segments) == 1 and tree.summary.alternates == (('ALA2 of chain A', 'A', ('B',)),)


def test_no_letter_beside_a_letter_is_a_conformer_of_its_own(tmp_path):
    t = bent('GSG')
    lines = records(t)
    at = next(i for i, l in enumerate(lines) if l[12:16].strip() == 'OG')
    lines.insert(at + 1, lines[at][:16] + 'B' + lines[at][17:54] + '  0.30' + lines[at][60:])
    tree = read_tree(written(tmp_path, lines))
    assert tree.summary.alternates == (('SER2 of chain A', '-', ('B',)),) and tree.names.count('OG') == 1


def test_two_amino_acids_in_one_place(tmp_path):
    serine, threonine = bent('GSG'), bent('GTG')
    lines = [l for l in records(serine) if l[22:26] == '   1']
    lines += [l[:16] + 'A' + l[17:54] + '  0.40' + l[60:] for l in records(serine) if l[22:26] == '   2']
    lines += [l[:16] + 'B' + l[17:54] + '  0.60' + l[60:] for l in records(threonine) if l[22:26] == '   2']
    lines += [l for l in records(serine) if l[22:26] == '   3']
    tree = read_tree(written(tmp_path, lines))
    assert [r.kind for r in tree.residues] == ['GLY', 'THR', 'GLY'] and len(tree) == 4 + 7 + 5
    comes_back(tree)


def test_insertion_codes_and_negative_numbers(tmp_path):
    t = bent('GASLK')
    names = [(-3, ' '), (52, ' '), (52, 'A'), (52, 'B'), (53, ' ')]
    lines = [record(a.index + 1, a.name, a.residue.name, names[a.residue.index][0], x, code=names[a.residue.index][1])
             for a, x in zip(t.topology.atoms, t.xyz[0])]
    tree = read_tree(written(tmp_path, lines))
    assert [r.number for r in tree.residues] == ['-3', '52', '52A', '52B', '53']
    assert len(tree.segments) == 1 and len(tree) == t.n_atoms
    comes_back(tree)


@pytest.mark.parametrize('ter', [True, False])
def test_chains_without_names(tmp_path, ter):
    a, b = bent('GAV', 1), bent('GAV', 2)
    lines = records(a, chain=' ') + ['TER']*ter + records(b, chain=' ', shift=2.0)
    tree = read_tree(written(tmp_path, lines))
    assert len(tree.segments) == 2 and len(tree) == a.n_atoms + b.n_atoms
    assert 'without a name' in str(tree.summary)
    comes_back(tree)


def test_two_nameless_chains_that_begin_with_the_same_residue(tmp_path):
    "A lone glycine 1 before another glycine 1: a second N begins a second residue."
    a, b = bent('G'), bent('GAV', 2)
    tree = read_tree(written(tmp_path, records(a, chain=' ') + records(b, chain=' ', shift=2.0)))
    assert [r.number for r in tree.residues] == ['1', '1', '2', '3'] and len(tree.segments) == 2


def test_breaks_are_seen_by_distance_and_not_by_number(tmp_path):
    t = bent('GASLKVAG')
    gap = [l for l in records(t, number=lambda i: i + 1 - (i > 3)) if not (l[17:20] == 'LEU')]
    tree = read_tree(written(tmp_path, gap))
    assert [r.number for r in tree.residues] == list('1234567') and len(tree.segments) == 2
    (before, after, distance), = tree.summary.breaks
    assert (before, after) == ('SER3 of chain A', 'LYS4 of chain A') and distance > 0.2
    jumps = read_tree(written(tmp_path, records(t, number=lambda i: 10*i)))
    assert len(jumps.segments) == 1 and not jumps.summary.breaks
    assert not tree.mask[3, ANGLES.index('omega')] and jumps.mask[3, ANGLES.index('omega')]


def test_mdtraj_measures_across_the_gap_where_the_tree_does_not(tmp_path):
    t = bent('GASLKVAG')
    lines = [l for l in records(t, number=lambda i: i + 1 - (i > 3)) if l[17:20] != 'LEU']
    path = written(tmp_path, lines)
    tree = read_tree(path)
    assert len(md.compute_phi(md.load(str(path)), periodic=False)[0]) == 6
    assert tree.mask[:, ANGLES.index('phi')].sum() == 5


def test_modified_residues_follow_their_parents(tmp_path):
    t = bent('EMCSG')
    names = {'GLU': 'PCA', 'MET': 'MSE', 'CYS': 'CSO', 'SER': 'XYZ'}
    lines = []
    for l in records(t, kind='HETATM'):
        if l[17:20] == 'GLU' and l[12:16].strip() == 'OE2': continue
        atom = {('GLU', 'OE1'): 'OE', ('MET', 'SD'): 'SE'}.get((l[17:20], l[12:16].strip()), l[12:16].strip())
        lines.append(l[:12] + f' {atom:<3}' + l[16] + names.get(l[17:20], l[17:20]) + l[20:])
    lines.append(record(99, 'OD', 'CSO', 3, t.xyz[0, 20] + 0.1, kind='HETATM'))
    lines.insert(0, lines.pop(0))
    tree = read_tree(written(tmp_path, sorted(lines, key=lambda l: int(l[22:26]))))
    assert [r.kind for r in tree.residues] == ['GLU', 'MSE', 'CYS', 'UNK', 'GLY'] and len(tree.segments) == 1
    assert tree.summary.unknown == ('XYZ4 of chain A',)
    assert dict(tree.summary.dropped) == {'CSO3 of chain A': ('OD',), 'XYZ4 of chain A': ('OG',)}
    assert tree.names[tree.names.index('CG', 9) + 1] == 'SE' and 'Se' in tree.elements
    assert [KINDS[k] for k in layout(tree).types] == ['GLU', 'MET', 'CYS', 'UNK', 'GLY']
    other = read_tree(tmp_path/'x.pdb', parents={'xyz': 'ser'})
    assert [r.kind for r in other.residues][3] == 'SER' and not other.summary.unknown
    comes_back(tree)


def test_duplicates_are_counted_and_the_first_is_kept(tmp_path):
    t = bent('GAG')
    lines = records(t)
    at = next(i for i, l in enumerate(lines) if l[12:16].strip() == 'CB')
    moved = lines[at][:30] + f'{99.0:8.3f}' + lines[at][38:]
    tree = read_tree(written(tmp_path, lines[:at + 1] + [moved] + lines[at + 1:]))
    assert tree.summary.dropped == (('ALA2 of chain A', ('CB',)),) and tree.positions.max() < 5


def test_water_ions_and_ligands_are_left_out_and_said(tmp_path):
    lines = records(bent('GAG'))
    lines += [record(90 + i, 'O', 'HOH', 100 + i, (3, 3, i), kind='HETATM') for i in range(3)]
    lines.append(record(95, 'ZN', 'ZN', 200, (4, 4, 4), kind='HETATM', element='ZN'))
    assert read_tree(written(tmp_path, lines)).summary.others == (('HOH', 3), ('ZN', 1))


def test_a_calcium_ion_is_no_residue(tmp_path):
    ion = record(95, 'CA', 'CA', 200, (4, 4, 4), kind='HETATM', element='CA')
    tree = read_tree(written(tmp_path, [*records(bent('GAG')), ion]))
    assert tree.summary.others == (('CA', 1),) and len(tree.residues) == 3


@pytest.mark.parametrize('ends', [('OT1', 'OT2'), ('OC1', 'OC2'), ('O', 'OXT')])
def test_terminal_oxygens_by_any_name(tmp_path, ends):
    t = bent('GA')
    lines = [l for l in records(t) if not (l[22:26] == '   2' and l[12:16].strip() in ('O', 'OXT'))]
    o = {a.name: t.xyz[0, a.index] for a in t.topology.residue(1).atoms}
    lines += [record(50 + k, e, 'ALA', 2, o[n], element='O') for k, (e, n) in enumerate(zip(ends, ('O', 'OXT')))]
    tree = read_tree(written(tmp_path, lines))
    assert len(tree) == t.n_atoms and tree.names[-2:] == ends and not tree.summary.dropped
    assert reconstruction_error(tree, tree.positions[None],
                                to_cartesian(tree, to_internal(tree, tree.positions[None])))['heavy'] < 0.01


def test_the_order_of_atoms_in_the_file_changes_nothing(tmp_path):
    "CHARMM writes CB before C; the torsion of C must define phi all the same."
    t = bent('GLWSK')
    lines = records(t)
    shuffled = sorted(lines, key=lambda l: (int(l[22:26]), hashlib.md5(l.encode()).hexdigest()))
    one, other = read_tree(written(tmp_path, lines, 'a.pdb')), read_tree(written(tmp_path, shuffled, 'b.pdb'))
    table = lambda tree: to_internal(tree, tree.positions[None]).values
    assert torch.allclose(table(one), table(other), atol=1e-9)


def test_cis_peptide_bonds_and_disulfides_are_reported():
    tree = read_tree(shipped_directory()/'1bom.pdb.xz')
    assert [d[:2] for d in tree.summary.disulfides] == [('CYS6 of chain A', 'CYS11 of chain A'),
        ('CYS7 of chain A', 'CYS7 of chain B'), ('CYS20 of chain A', 'CYS19 of chain B')]
    assert not tree.summary.cis
    t = bent('GAPG')
    x = to_internal(read_tree(t), read_tree(t).positions[None])
    x.values[0, 2, ANGLES.index('omega')] = 0.1
    turned = read_tree(read_tree(t).trajectory(to_cartesian(read_tree(t), x)))
    (label, omega), = turned.summary.cis
    assert label.startswith('PRO3') and abs(omega - 0.1) < 1e-4
    assert 'Cis peptide bonds before: PRO3' in str(turned.summary)


def test_mirrored_residues_keep_their_hand():
    t = bent('GKG')
    mirror = md.Trajectory(t.xyz*np.float32([1, 1, -1]), t.topology)
    tree = read_tree(mirror)
    assert len(tree.summary.mirrored) == 1
    error = reconstruction_error(tree, tree.positions[None],
                                 to_cartesian(tree, to_internal(tree, tree.positions[None])))
    assert error['heavy'] < 0.01 and not read_tree(t).summary.mirrored


def test_caps_are_part_of_the_chain():
    t = build_chain('AP', (-1.2, 2.4), caps=True)
    tree = read_tree(t)
    assert len(tree) == t.n_atoms and len(tree.segments) == 1
    assert [r.kind for r in tree.residues] == ['ACE', 'ALA', 'PRO', 'NME']
    comes_back(tree)
    assert np.allclose(to_internal(tree, tree.positions[None]).values[0, 1:3, ANGLES.index('phi')],
                       md.compute_phi(t, periodic=False)[1], atol=1e-5)


@pytest.mark.parametrize('form', ['pdb', 'cif', 'trajectory', 'pdb.gz', 'cif.xz'])
def test_every_kind_of_source_gives_the_same_tree(tmp_path, form):
    import gzip, lzma
    t = bent('GASWPK')
    expected = read_tree(t)
    if form == 'trajectory': source = t
    else:
        text, writer = io.StringIO(), app.PDBFile if form.startswith('pdb') else app.PDBxFile
        writer.writeFile(t.topology.to_openmm(), t.xyz[0]*unit.nanometer, text)
        source = tmp_path/f'x.{form}'
        opened = gzip.open if form.endswith('gz') else lzma.open if form.endswith('xz') else open
        with opened(source, 'wt') as f: f.write(text.getvalue())
    tree = read_tree(source)
    assert tree.names == expected.names and np.array_equal(tree.parent, expected.parent)
    assert np.array_equal(tree.torsion, expected.torsion)
    assert np.abs(tree.positions - expected.positions).max() < 1e-4


def test_mmcif_alternates_insertion_codes_models_and_author_names(tmp_path):
    columns = ('group_PDB id type_symbol label_atom_id label_alt_id label_comp_id label_asym_id label_seq_id '
               'pdbx_PDB_ins_code Cartn_x Cartn_y Cartn_z occupancy auth_seq_id auth_asym_id '
               'pdbx_PDB_model_num').split()
    t, lines = bent('GSA'), []
    for model in (1, 2):
        for a, x in zip(t.topology.atoms, t.xyz[0]*10):
            for alt, occupancy in (('A', 0.3), ('B', 0.7)) if a.name == 'OG' else (('.', 1),):
                code = 'A' if a.residue.index == 1 else '?'
                lines.append(f'ATOM {len(lines) + 1} {a.element.symbol} {a.name} {alt} {a.residue.name} Q '
                             f'{a.residue.index + 1} {code} {x[0]:.3f} {x[1]:.3f} {x[2]:.3f} {occupancy} '
                             f'{-4 + a.residue.index - (a.residue.index > 1)} L {model}')
    (tmp_path/'x.cif').write_text('data_x\nloop_\n' + '\n'.join(f'_atom_site.{c}' for c in columns) + '\n'
                                  + '\n'.join(lines) + '\n')
    tree = read_tree(tmp_path/'x.cif')
    labels = [r.label for r in tree.residues]
    assert len(tree) == t.n_atoms and labels == ['GLY-4 of chain L', 'SER-3A of chain L', 'ALA-3 of chain L']
    assert tree.summary.alternates == (('SER-3A of chain L', 'B', ('A',)),)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_damaged_files_are_read_or_refused_in_a_sentence(tmp_path_factory, data):
    lines = records(bent('GASLW'))
    for _ in range(data.draw(st.integers(1, 6))):
        i = data.draw(st.integers(0, len(lines) - 1))
        how = data.draw(st.sampled_from(['cut', 'drop', 'swap', 'character', 'double']))
        if how == 'cut': lines[i] = lines[i][:data.draw(st.integers(0, 79))]
        if how == 'drop': lines[i] = ''
        if how == 'swap':
            j = data.draw(st.integers(0, len(lines) - 1))
            lines[i], lines[j] = lines[j], lines[i]
        if how == 'character' and lines[i]:
            k = data.draw(st.integers(0, len(lines[i]) - 1))
            lines[i] = lines[i][:k] + data.draw(st.sampled_from(' X9-.*\u00e5')) + lines[i][k+1:]
        if how == 'double': lines.insert(i, lines[i])
    path = written(tmp_path_factory.mktemp('odd'), lines)
    try: tree = read_tree(path)
    except ValueError as e: assert path.name in str(e)
    else:
        assert str(tree.summary) and np.isfinite(tree.positions).all()
        x = torch.tensor(tree.positions)[None]
        y = to_cartesian(tree, to_internal(tree, x, 'all'))
        if min(np.linalg.norm(x[0, a] - x[0, p]) for a, p in enumerate(tree.parent) if p >= 0) > 0.05:
            assert (y - x).abs().max() < 1e-6


@pytest.mark.parametrize('lines, message', [([], 'atoms'), (['REMARK nothing here'], 'atoms'),
                                            (['ATOM  nonsense'], 'cannot be read|can be read'),
                                            ([record(1, 'O', 'HOH', 1, (0, 0, 0))], 'no amino acid'),
                                            ([record(1, 'CA', 'GLY', 1, (0, 0, 0)),
                                              record(2, 'CA', 'ALA', 2, (0.38, 0, 0))], 'C-alpha model')])
def test_what_is_no_protein_is_refused(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message): read_tree(written(tmp_path, lines))


def test_errors_name_what_is_wrong(tmp_path):
    t = bent('GAG')
    with pytest.raises(FileNotFoundError, match='nowhere.pdb'): read_tree(tmp_path/'nowhere.pdb')
    bad = md.Trajectory(t.xyz.copy(), t.topology)
    bad.xyz[0, 5] = np.nan
    with pytest.raises(ValueError, match='atom CA of ALA2'): read_tree(bad)
    tree = read_tree(t)
    with pytest.raises(ValueError, match='choose from all, default, torsions'):
        to_internal(tree, tree.positions[None], 'some')
    with pytest.raises(ValueError, match=r'\(frames, 14, 3\)'): to_internal(tree, tree.positions)
    with pytest.raises(ValueError, match='make the tree from a frame'): tree.coordinates(t.atom_slice(range(5)))
    x = to_internal(tree, tree.positions[None])
    with pytest.raises(ValueError, match="level 'all'"): to_cartesian(tree, x._replace(level='all'))
    with pytest.raises(ValueError, match='exact without'): fit_torsions(tree, tree.positions[None], 'all')
    for tokens in (paper_tokens, encode):
        with pytest.raises(ValueError, match='default level'):
            tokens(tree, to_internal(tree, tree.positions[None], 'all'))
    with pytest.raises(ValueError, match='larger reach'): paper_tokens(tree, x._replace(origins=x.origins + 11))
    with pytest.raises(ValueError, match='longest=4'): position_angles(tree, longest=3)


def test_a_chain_cut_by_the_box_is_refused():
    t = bent('GASLK')
    cut = md.Trajectory(t.xyz.copy(), t.topology, unitcell_lengths=[[3, 3, 3]], unitcell_angles=[[90, 90, 90]])
    cut.xyz[0, [a.index for a in t.topology.atoms if a.residue.index > 2]] += 3
    with pytest.raises(ValueError, match='SER3.* and LEU4.*image_molecules'): read_tree(cut)
    cut.unitcell_vectors = None
    assert len(read_tree(cut).segments) == 2


# there and back

@settings(deadline=None, max_examples=15)
@given(st.lists(sequences, min_size=1, max_size=3), seeds)
def test_round_trip_of_complexes(chains, seed):
    top, xyz, rng = md.Topology(), [], np.random.default_rng(seed)
    for k, s in enumerate(chains):
        t = bent(s, seed % 997 + k)
        top = top.join(t.topology)
        xyz.append(t.xyz[0] @ Rotation.random(random_state=seed % 2**31 + k).as_matrix() + rng.normal(0, 3, 3))
    tree = read_tree(md.Trajectory(np.concatenate(xyz)[None], top))
    assert len(tree.segments) == len(chains)
    comes_back(tree)
    x = jittered(tree, 3, seed=seed % 1000)
    one = torch.cat([to_cartesian(tree, to_internal(tree, f[None])) for f in x])
    assert torch.allclose(to_cartesian(tree, to_internal(tree, x)), one, atol=1e-12)
    i = to_internal(tree, x)
    again = to_internal(tree, to_cartesian(tree, i))
    assert torch.cos(again.values - i.values).min() > 1 - 1e-12 # the default level is a projection
    assert (tree.mask.sum(1) <= 11).all() and (i.values[:, ~torch.tensor(tree.mask)] == 0).all()


@pytest.fixture(scope='module')
def long_chain():
    rng = np.random.default_rng(0)
    return read_tree(build_chain(''.join(rng.choice(list(LETTERS), 850)), rng.uniform(-2.5, -0.5, (850, 2))))


@pytest.mark.parametrize('dtype, precision, tolerance_nm', [(torch.float64, torch.float64, 1e-7),
                                                            (torch.float32, torch.float64, 1e-4),
                                                            (torch.float32, torch.float32, 1e-4)])
def test_850_residues(long_chain, dtype, precision, tolerance_nm):
    tree = long_chain
    x = torch.tensor(tree.positions, dtype=dtype)[None]
    y = to_cartesian(tree, to_internal(tree, x, 'all'), precision)
    assert y.dtype == dtype and (x - y).norm(dim=-1).max() < tolerance_nm


@pytest.mark.parametrize('name', ['1bom', '1crn', '1l2y'])
def test_default_level_of_shipped_structures(name):
    tree = read_tree(shipped_directory()/f'{name}.pdb.xz')
    error = reconstruction_error(tree, tree.positions[None],
                                 to_cartesian(tree, to_internal(tree, tree.positions[None])))
    assert error['backbone'] < 0.015 and error['heavy'] < 0.030


def test_every_structure_of_the_stored_table():
    rows = [r for r in json.loads((ROOT/'data'/'tree.json').read_text())['structures']]
    measured = [r for r in rows if not r['prepared']]
    assert len(measured) >= 11 and {'1bom', '19hc', '1hvr', '1osm', '4E43'} <= {r['name'] for r in rows}
    for part, bound in (('backbone', 0.015), ('heavy', 0.030)):
        assert np.median([r['default'][part] for r in measured]) < bound
    tree = read_tree(shipped_directory()/'1crn.pdb.xz')
    here = reconstruction_error(tree, tree.positions[None], to_cartesian(tree, to_internal(tree, tree.positions[None])))
    stored = next(r for r in rows if r['name'] == '1crn')['default']
    assert all(abs(here[k][0] - stored[k]) < 1e-6 for k in stored)


def test_the_files_of_other_packages():
    data = Path(pytest.importorskip('MDAnalysisTests').__file__).parent/'data'
    for name, segments in (('1hvr.pdb', 2), ('1osm.pdb.gz', 1), ('4E43.pdb', 3), ('4x8u.pdbx', 1)):
        tree = read_tree(data/name)
        assert len(tree.segments) == segments
        comes_back(tree, 1e-9)


def test_torsions_are_those_of_mdtraj():
    tree, t = read_tree(bent('ACDEFGHIKLMNPQRSTVWY', 3)), bent('ACDEFGHIKLMNPQRSTVWY', 3)
    t.xyz += np.random.default_rng(0).normal(0, 0.005, t.xyz.shape).astype(np.float32)
    table = to_internal(tree, tree.coordinates(t)).values[0].numpy()
    kinds = dict(phi=(md.compute_phi, 2), psi=(md.compute_psi, 1), omega=(md.compute_omega, 2),
                 chi1=(md.compute_chi1, 1), chi2=(md.compute_chi2, 1), chi3=(md.compute_chi3, 1),
                 chi4=(md.compute_chi4, 1), chi5=(md.compute_chi5, 1))
    for name, (compute, owner) in kinds.items():
        atoms, values = compute(t, periodic=False)
        rows = [t.topology.atom(int(a[owner])).residue.index for a in atoms]
        assert len(rows) and np.abs(wrap(table[rows, ANGLES.index(name)] - values[0])).max() < 1e-4, name
    angles = md.compute_angles(t, [[r.atom(0).index, r.atom(1).index, r.atom(2).index]
                                   for r in t.topology.residues][1:])
    assert np.abs(table[1:, ANGLES.index('N-CA-C')] - angles[0]).max() < 1e-4


@pytest.mark.parametrize('level', ['all', 'default', 'torsions'])
def test_gradients(level):
    a, b = bent('S', 1), bent('G', 2)
    tree = read_tree(md.Trajectory(np.concatenate([a.xyz, b.xyz + 1], 1), a.topology.join(b.topology)))
    x = jittered(tree)
    i = to_internal(tree, x, level)
    move = lambda o, v: to_cartesian(tree, i._replace(origins=o, values=v))
    assert torch.autograd.gradcheck(move, (i.origins.requires_grad_(), i.values.requires_grad_()))
    assert torch.autograd.gradcheck(lambda r: to_internal(tree, r, level).values, x.requires_grad_())


def test_gradients_are_finite_where_angles_are_not():
    "Straight bonds and coincident atoms: a zero or a number, never a NaN."
    tree = read_tree(bent('GAG'))
    x = torch.tensor(tree.positions)[None]
    x[0, 4] = x[0, 2]
    x[0, 5] = 2*x[0, 4] - x[0, 2]
    x.requires_grad_()
    to_internal(tree, x, 'all').values.square().sum().backward()
    assert torch.isfinite(x.grad).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 70), st.integers(1, 4), seeds)
def test_scan_is_the_product_in_order(n, pieces, seed):
    g = torch.Generator().manual_seed(seed)
    m = local_transform(*torch.rand(3, n, 2, dtype=torch.float64, generator=g).mul(3).unbind(0))
    starts = np.zeros(n, bool)
    starts[np.random.default_rng(seed).integers(0, n, pieces)] = starts[0] = True
    out, now = [], None
    for i in range(n):
        now = m[:, :, i] if starts[i] else compose(now, m[:, :, i])
        out.append(now)
    assert torch.allclose(scan(m, fresh_flags(starts)), torch.stack(out, 2), atol=1e-11)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_the_same_on_a_gpu():
    tree = read_tree(shipped_directory()/'1bom.pdb.xz')
    x = jittered(tree, 8)
    for level in ('all', 'default'):
        here, there = (to_cartesian(tree, to_internal(tree, v, level)) for v in (x, x.cuda()))
        assert there.device.type == 'cuda' and torch.allclose(here, there.cpu(), atol=1e-9)
    xg = x.cuda().requires_grad_()
    to_internal(tree, xg).values.sum().backward()
    assert torch.isfinite(xg.grad).all()


def test_refitting_brings_the_atoms_closer():
    tree = read_tree(shipped_directory()/'1l2y.pdb.xz')
    x = torch.tensor(tree.positions)[None]
    for level, factor in (('torsions', 3), ('default', 1.4)):
        read, fitted = (reconstruction_error(tree, x, to_cartesian(tree, f(tree, x, level)))
                        for f in (to_internal, lambda *a: fit_torsions(*a, steps=25)))
        assert fitted['heavy']*factor < read['heavy'] and fitted['backbone'] < read['backbone']
    assert fit_torsions(tree, x, 'default', steps=3).values[0, ~torch.tensor(tree.mask)].abs().max() == 0


def test_hydrogens_move_with_their_parents():
    tree = read_tree(shipped_directory()/'1l2y.pdb.xz', hydrogens=True)
    assert tree.elements.count('H') == 150 and not np.isnan(tree.constants).any()
    comes_back(tree)
    i = to_internal(tree, tree.positions[None])
    i.values[0, :, ANGLES.index('chi1')] += 0.7
    moved = to_cartesian(tree, i)[0].numpy()
    bonds = [(a, p) for a, p in enumerate(tree.parent) if tree.elements[a] == 'H']
    length = lambda x: np.array([np.linalg.norm(x[a] - x[p]) for a, p in bonds])
    assert np.abs(length(moved) - length(tree.positions)).max() < 1e-9 and np.abs(moved - tree.positions).max() > 0.1


def test_bonds_outside_of_the_tree():
    tree = read_tree(shipped_directory()/'1bom.pdb.xz')
    kinds = [k for k, *_ in closures(tree)]
    assert kinds.count('disulfide') == 3 and kinds.count('ring') > 5
    frames = np.stack([tree.positions, tree.positions])
    frames[1, closures(tree)[0][2]] += [1.0, 0, 0]
    table = validity(tree, frames)
    assert table['worst'][0] > 0.7 and np.allclose(table['worst'][3:], table['read'][3:]) and len(table) == len(kinds)


def test_leverage_grows_with_the_chain():
    short, long = (leverage(read_tree(build_chain('A'*n)), 0.01) for n in (15, 120))
    assert long > 5*short > 0


def test_trajectories_come_back_as_files(tmp_path):
    tree = read_tree(shipped_directory()/'1bom.pdb.xz')
    tree.trajectory(jittered(tree, 3)).save_pdb(str(tmp_path/'x.pdb'))
    again = read_tree(tmp_path/'x.pdb')
    numbers = lambda t: [int(r.number) % 10_000 for r in t.residues] # mdtraj writes -2 as 9998
    assert again.names == tree.names and len(again.segments) == 2 and numbers(again) == numbers(tree)


# the paper's encoding: each test fails on the version that the paper prints

@pytest.fixture(scope='module')
def dimer():
    a, b = bent('GASLWPK', 1), bent('MRTDE', 2)
    moved = b.xyz @ Rotation.from_rotvec([1, 2, -1]).as_matrix() + 1.5
    tree = read_tree(md.Trajectory(np.concatenate([a.xyz, moved], 1), a.topology.join(b.topology)))
    return tree, to_internal(tree, jittered(tree, 3))


def test_tokens_come_back(dimer):
    tree, i = dimer
    alpha = position_angles(tree)
    tokens = add_positions(paper_tokens(tree, i), alpha)
    assert tokens.shape == (3, 2 + 12, 40)
    for back in (from_paper_tokens(tree, add_positions(tokens, -alpha)), decode(tree, encode(tree, i, 0.3), 0.3)):
        assert (to_cartesian(tree, back) - to_cartesian(tree, i)).abs().max() < 1e-12


@settings(deadline=None, max_examples=50)
@given(st.tuples(*[st.floats(-3.1, 3.1)]*3), st.booleans())
def test_two_angles_do_not_fix_a_rotation(angles, locked):
    "Resolution 1: three angles return every rotation, at the locked position too; any two of them do not."
    angles = torch.tensor(angles, dtype=torch.float64)
    if locked: angles[1] = torch.pi/2
    axes = euler_axes(angles)
    assert torch.allclose(axes @ axes.T, torch.eye(3, dtype=torch.float64), atol=1e-12) and torch.linalg.det(axes) > 0
    assert torch.allclose(euler_axes(euler_angles(axes)), axes, atol=1e-6)
    with_two = euler_angles(axes)*torch.tensor([1.0, 1.0, 0.0])
    if abs(float(euler_angles(axes)[2])) > 0.1: assert not torch.allclose(euler_axes(with_two), axes, atol=1e-3)


def test_six_numbers_are_a_rotation_whatever_a_network_writes(dimer):
    tree, i = dimer
    e = encode(tree, i)
    noise = torch.randn(e.frames.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noisy = e._replace(frames=e.frames + 0.3*noise)
    axes = decode(tree, noisy).axes
    assert torch.allclose(axes.mT @ axes, torch.eye(3, dtype=torch.float64).expand_as(axes), atol=1e-12)


def test_a_negative_partner_is_brought_back(dimer):
    "Resolution 2: Eq. 5 has a positive partner; a step may write a negative one, and division by the norm keeps it."
    tree, i = dimer
    tokens, mask = paper_tokens(tree, i), paper_mask(tree)
    broken = tokens.clone()
    broken[:, 0, 20:] *= -1
    size = (broken[..., :20]**2 + broken[..., 20:]**2).sqrt()
    as_printed = broken/torch.cat([size, size], 2).clamp(min=1e-12)
    assert (as_printed[:, 0, 20:26] < 0).all()
    assert torch.allclose(normalised(broken, mask), tokens, atol=1e-9)


def test_more_chains_than_columns_raise(dimer):
    "Resolution 3: 3C <= L. Six chains fit into L = 20, seven do not."
    def complex_of(n):
        a = bent('GAV')
        top, xyz = a.topology, a.xyz
        for k in range(1, n): top, xyz = top.join(a.topology), np.concatenate([xyz, a.xyz + 3*k], 1)
        return read_tree(md.Trajectory(xyz, top))
    seven = complex_of(7)
    for call in (lambda: paper_tokens(seven, to_internal(seven, seven.positions[None]), reach=30),
                 lambda: paper_mask(seven)):
        with pytest.raises(ValueError, match='3 x 7 = 21'): call()
    assert paper_mask(complex_of(6)).shape == (2 + 18, 40)
    assert paper_tokens(seven, to_internal(seven, seven.positions[None]), width=21, reach=30).shape == (1, 23, 42)
    with pytest.raises(ValueError, match='up to 11 angles'): paper_mask(complex_of(1), 10)
    assert encode(seven, to_internal(seven, seven.positions[None])).frames.shape == (1, 7, 9) # no limit by default


def test_counting_from_one_keeps_the_type():
    "Resolution 4: with p = 0 and c = 0 every angle of Eq. 7 is zero, and all types look alike."
    tree, other = read_tree(bent('GAV')), read_tree(bent('WAV'))
    as_printed = lambda t: torch.zeros(20)/500.0**(torch.arange(20)*(layout(t).types[0]/100 + 1)/20)
    assert torch.equal(as_printed(tree), as_printed(other))
    first, second = position_angles(tree)[2], position_angles(other)[2]
    assert (first != 0).all() and not torch.allclose(first[1:], second[1:])
    assert torch.equal(first[0], second[0]) # the first pair has exponent 0: it never knows the type, as printed


def test_positions_are_absolute_in_the_paper_and_relative_by_default(dimer):
    """Resolution 4: the same residue at the same place of two chains has another angle in the paper, and the same
    position by default."""
    a = bent('GAVGK')
    tree = read_tree(md.Trajectory(np.concatenate([a.xyz, a.xyz + 2], 1), a.topology.join(a.topology)))
    alpha, place = position_angles(tree)[2:], layout(tree)
    assert not torch.allclose(torch.cos(alpha[:5]), torch.cos(alpha[5:]))
    for same in (place.positions, place.types): assert torch.equal(same[:5], same[5:])
    assert place.chains.tolist() == [0]*5 + [1]*5


def test_padding_is_masked_before_it_is_divided(dimer):
    "Resolution 5: padding pairs are 0/0 as printed."
    tree, i = dimer
    tokens, mask = paper_tokens(tree, i), paper_mask(tree)
    cos, sin = tokens.chunk(2, 2)
    assert torch.isnan(cos/(cos**2 + sin**2).sqrt()).any()
    x = (tokens*1.7).requires_grad_()
    out = normalised(x, mask)
    out.square().sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(x.grad).all() and torch.allclose(out, tokens, atol=1e-9)
    noise = normalised(tokens + 0.2, mask)
    assert (noise[:, ~mask] == 0).all()


def test_a_cis_proline_needs_omega(dimer):
    "Resolution 10: with omega at 180 degrees the chain behind a cis proline is elsewhere."
    tree = read_tree(bent('AAAPAAAA'))
    i = to_internal(tree, tree.positions[None])
    i.values[0, 3, 0] = 0.05
    cis = to_cartesian(tree, i)
    back = from_paper_tokens(tree, paper_tokens(tree, to_internal(tree, cis)))
    assert (to_cartesian(tree, back) - cis).abs().max() < 1e-9
    trans = back._replace(values=back.values.clone())
    trans.values[..., 0] = torch.where(torch.tensor(tree.mask[:, 0]), torch.pi, 0.0)
    assert reconstruction_error(tree, cis, to_cartesian(tree, trans))['backbone'] > 0.1


def test_tumbling_is_in_one_token(dimer):
    tree, i = dimer
    turn = torch.tensor(Rotation.from_rotvec([2, 1, 0]).as_matrix())
    moved = to_internal(tree, to_cartesian(tree, i) @ turn.T + 3)
    a, b = encode(tree, i), encode(tree, moved)
    assert torch.allclose(a.frames[:, 1:], b.frames[:, 1:], atol=1e-10)
    assert torch.allclose(a.residues, b.residues, atol=1e-10)
    assert not torch.allclose(a.frames[:, 0], b.frames[:, 0])
    one = read_tree(bent('GA'))
    assert 0 < origin_spread(i) < 0.2 and origin_spread(to_internal(one, one.positions[None])) == 1.0


def test_structures_of_data_are_listed():
    sources = (ROOT/'data'/'SOURCES.md').read_text()
    for p in (ROOT/'data').glob('*.pdb.xz'): assert hashlib.sha256(p.read_bytes()).hexdigest() in sources, p.name
