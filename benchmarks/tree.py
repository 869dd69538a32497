"""Atoms a second from internal coordinates to positions and back, against mp-nerf and MDAnalysis BAT; and how close
they come, against foldcomp.

Run with `python benchmarks/tree.py` (about a minute): 64 frames of a chain of 187 residues, every implementation in
this process on the same number of threads, best of several runs on the clock and, because machines are shared, on the
processor; the ratios compare processor times. `--device cuda` adds one line for a GPU. Peers take part if they are
installed (`pip install mp-nerf MDAnalysis foldcomp`); they are no dependencies of foldbook.

`python benchmarks/tree.py --accuracy data/tree.json` rebuilds every structure that the installed packages ship
(openmmforcefields, nglview, pdbfixer, MDAnalysisTests), those of `data/`, and with `--structures DIR` those in a folder
of PDB files, and writes the table that the chapter Rebuilt structures shows (some minutes).
"""
import argparse
import importlib.util
import json
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

warnings.simplefilter('ignore')
LETTERS = 'ACDEFGHIKLMNPQRSTVWY'
PACKAGES = {'openmmforcefields': 'data/perses_jacs_systems/*/*_protein.pdb', 'nglview': 'datafiles/md_1u19.pdb',
            'pdbfixer': 'tests/data/1BHL.pdb',
            'MDAnalysisTests': ['data/19hc.pdb.gz', 'data/1hvr.pdb', 'data/1osm.pdb.gz', 'data/4E43.pdb',
                                'data/1a28.pdb.gz', 'data/adk_open.pdb', 'data/adk_closed.pdb', 'data/6msm.pdb.bz2',
                                'data/nmr_neopetrosiamide.pdb', 'data/4x8u.pdbx']}


def installed(name): return importlib.util.find_spec(name) is not None


def best(call, runs=7):
    "Least seconds on the clock and on the processor."
    call()
    clock, processor = [], []
    for _ in range(runs):
        a, b = time.perf_counter(), time.process_time()
        call()
        clock.append(time.perf_counter() - a)
        processor.append(time.process_time() - b)
    return min(clock), min(processor)


def line(name, n_atoms, seconds):
    clock, processor = seconds
    print(f'{name:<58} {n_atoms/clock:11.3g} {n_atoms/processor:11.3g}')
    return n_atoms/processor


def chain(n_residues, seed=0):
    from foldbook.molecules import build_chain
    rng = np.random.default_rng(seed)
    return build_chain(''.join(rng.choice(list(LETTERS), n_residues)), rng.uniform(-2.5, -0.5, (n_residues, 2)))


def foldbook_speed(t, n_frames, device='cpu'):
    from foldbook.tree import read_tree, to_cartesian, to_internal
    tree, rates = read_tree(t), {}
    wait = torch.cuda.synchronize if device == 'cuda' else lambda: None
    noise = 0.002*torch.randn(n_frames, len(tree), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for dtype in (torch.float64, torch.float32):
        xyz = (tree.coordinates(t) + noise).to(device, dtype)
        for level in ('default', 'all'):
            internals = to_internal(tree, xyz, level)
            name = f'foldbook {str(dtype)[6:]} {level}, {n_frames} frames' + f' on {device}'*(device != 'cpu')
            for way, call in dict(forward=lambda: (to_internal(tree, xyz, level), wait()),
                                  inverse=lambda: (to_cartesian(tree, internals), wait())).items():
                rates[way, dtype, level] = line(f'{name}, {way}', n_frames*len(tree), best(call))
    return rates


def mp_nerf_speed(t):
    "One frame at a time, as it works: `protein_fold` on scaffolds of the same sequence, float32."
    from mp_nerf.proteins import build_scaffolds_from_scn_angles, protein_fold
    sequence = ''.join(r.code for r in t.topology.residues)
    angles = torch.from_numpy(np.random.default_rng(0).uniform(-2.5, -0.5, (len(sequence), 12)).astype(np.float32))
    angles[:, 3:6] = torch.tensor([1.94, 2.03, 2.12])
    scaffolds = build_scaffolds_from_scn_angles(sequence, angles, device='cpu')
    n = int(scaffolds['cloud_mask'].sum())
    return line('mp-nerf float32, 1 frame, inverse', n,
                best(lambda: protein_fold(**{k: v.clone() for k, v in scaffolds.items()})))


def bat_speed(n_residues=20, n_frames=4):
    "MDAnalysis, all bonds and angles: a small chain, because its setup grows fast."
    import MDAnalysis as mda
    from MDAnalysis.analysis.bat import BAT
    t = chain(n_residues)
    names = [a.name for a in t.topology.atoms]
    u = mda.Universe.empty(t.n_atoms, n_residues=t.n_residues,
                           atom_resindex=[a.residue.index for a in t.topology.atoms], trajectory=True)
    u.add_TopologyAttr('name', names)
    u.add_TopologyAttr('resname', [r.name for r in t.topology.residues])
    u.add_TopologyAttr('resid', list(range(1, t.n_residues + 1)))
    u.add_TopologyAttr('segid', ['A'])
    u.add_TopologyAttr('masses', [a.element.mass for a in t.topology.atoms])
    u.add_TopologyAttr('bonds', [(a.index, b.index) for a, b in t.topology.bonds])
    u.load_new(np.repeat(t.xyz*10, n_frames, 0).astype(np.float32))
    terminal = u.select_atoms('name OXT')[0]
    bat = BAT(u.atoms, initial_atom=terminal)
    forward = line(f'MDAnalysis BAT, {n_residues} residues, {n_frames} frames, forward', n_frames*t.n_atoms,
                   best(lambda: bat.run(), 3))
    frame = bat.results.bat[0]
    return forward, line(f'MDAnalysis BAT, {n_residues} residues, 1 frame, inverse', t.n_atoms,
                         best(lambda: bat.Cartesian(frame), 3))


def speed(args):
    torch.set_num_threads(args.threads)
    t = chain(args.residues)
    print(f'{args.residues} residues, {t.n_atoms} atoms, {args.threads} threads, torch {torch.__version__}')
    print(f'{"":<58} {"atoms/s":>11} {"atoms/cpu-s":>11}')
    ours = foldbook_speed(t, args.frames)
    if args.device != 'cpu': foldbook_speed(t, args.frames, args.device)
    inverse32 = ours['inverse', torch.float32, 'default']
    inverse64, forward64 = (ours[way, torch.float64, 'all'] for way in ('inverse', 'forward'))
    if installed('mp_nerf'): print(f'inverse: {inverse32/mp_nerf_speed(t):.0f} times mp-nerf (float32)')
    else: print('mp-nerf is not installed')
    if installed('MDAnalysis'):
        forward, inverse = bat_speed()
        print(f'inverse: {inverse64/inverse:.0f} times, forward: {forward64/forward:.0f} times MDAnalysis BAT '
              f'(float64, all internals)')
    else: print('MDAnalysis is not installed')


def structures(folder):
    "Paths of the structures at hand."
    found = sorted((Path(__file__).parents[1]/'data').glob('*.pdb.xz'))
    for package, patterns in PACKAGES.items():
        if spec := importlib.util.find_spec(package):
            for pattern in [patterns] if isinstance(patterns, str) else patterns:
                found += sorted(Path(spec.submodule_search_locations[0]).glob(pattern))
    return found + (sorted(Path(folder).glob('*.pdb')) if folder else [])


def longest_segment(tree):
    "The longest segment as a tree of its own, standard residues numbered from 1, no caps: what foldcomp can read."
    import mdtraj as md
    from foldbook.templates import CAP_ATOMS
    from foldbook.tree import read_tree
    segment = tree.segment
    chosen = int(np.argmax(np.bincount(segment)))
    top, xyz = md.Topology(), []
    chain = top.add_chain(chain_id='A')
    for i, r in enumerate(tree.residues):
        if segment[i] != chosen or r.kind in (*CAP_ATOMS, 'UNK', 'MSE', 'NLE'): continue
        new = top.add_residue(r.kind, chain, resSeq=top.n_residues + 1)
        for name in r.atoms:
            if len(at := np.flatnonzero(tree.atoms == r.atoms[name])):
                top.add_atom(name, md.element.get_by_symbol(tree.elements[at[0]]), new)
                xyz.append(tree.positions[at[0]])
    part = read_tree(md.Trajectory(np.array(xyz)[None], top))
    return part if len(part.segments) == 1 else longest_segment(part)


def foldcomp_error(tree):
    "Backbone and heavy-atom RMSD after foldcomp, nm, after superposition; raises what foldcomp raises."
    import foldcomp
    def record(i):
        residue, place = tree.residues[tree.residue[i]].name, ''.join(f'{10*v:8.3f}' for v in tree.positions[i])
        head = f'ATOM  {i + 1:5d}  {tree.names[i]:<3} {residue:>3} A{tree.residue[i] + 1:4d}'
        return f'{head}    {place}  1.00 50.00           {tree.elements[i]}'
    _, back = foldcomp.decompress(foldcomp.compress('x', '\n'.join(record(i) for i in range(len(tree))) + '\n'))
    place = {(int(l[22:26]), l[12:16].strip()): [float(l[c:c+8])/10 for c in (30, 38, 46)]
             for l in back.splitlines() if l.startswith('ATOM')}
    common = [i for i in range(len(tree)) if (tree.residue[i] + 1, tree.names[i]) in place]
    found = np.array([place[tree.residue[i] + 1, tree.names[i]] for i in common])
    backbone = np.isin([tree.names[i] for i in common], ('N', 'CA', 'C', 'O'))
    return dict(backbone=rmsd(tree.positions[common][backbone], found[backbone]),
                heavy=rmsd(tree.positions[common], found), atoms=len(common)/len(tree))


def rmsd(a, b):
    "After superposition."
    from scipy.spatial.transform import Rotation
    a, b = a - a.mean(0), b - b.mean(0)
    turn, _ = Rotation.align_vectors(a, b)
    return np.sqrt(((a - turn.apply(b))**2).sum(1).mean())


def one_structure(path, name, fit_steps):
    from foldbook.rebuilding import fit_torsions, reconstruction_error
    from foldbook.tree import read_tree, to_cartesian, to_internal
    tree = read_tree(path)
    xyz = torch.from_numpy(tree.positions)[None]
    def error(internals, tree=tree, xyz=xyz):
        found = reconstruction_error(tree, xyz, to_cartesian(tree, internals))
        return {k: float(v[0]) for k, v in found.items()}
    row = dict(name=name, prepared='perses' in str(path) or path.name.startswith('md_'), residues=len(tree.residues),
               segments=len(tree.segments), chains=len(tree.summary.chains), atoms=len(tree))
    for level in ('all', 'default', 'torsions'): row[level] = error(to_internal(tree, xyz, level))
    row['all float32 largest'] = float((to_cartesian(tree, to_internal(tree, xyz.float(), 'all'))
                                        - xyz.float()).norm(dim=-1).max())
    row['fitted default'] = error(fit_torsions(tree, xyz, 'default', fit_steps))
    row['fitted torsions'] = error(fit_torsions(tree, xyz, 'torsions', 2*fit_steps))
    part = longest_segment(tree)
    x = torch.from_numpy(part.positions)[None]
    row['longest segment'] = {'residues': len(part.residues), 'default': error(to_internal(part, x), part, x),
                              'fitted default': error(fit_torsions(part, x, 'default', fit_steps), part, x)}
    return row


def isolated(path):
    "Errors of foldcomp on the longest segment, in a process of its own: it can end with a segmentation fault."
    import subprocess
    code = ("import sys, json; sys.path.insert(0, sys.argv[2]); import tree as b; from foldbook.tree import read_tree\n"
            "t = b.longest_segment(read_tree(sys.argv[1]))\n"
            "try: print(json.dumps(b.foldcomp_error(t)))\nexcept Exception as e: "
            "print(json.dumps(str(e).splitlines()[0]))")
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, str(path), str(Path(__file__).parent)],
                          capture_output=True, text=True)
    if done.returncode == 0 and done.stdout: return json.loads(done.stdout.splitlines()[-1])
    return words(done)


def words(done):
    "Why a process ended."
    if done.returncode < 0: return f'killed by signal {-done.returncode}'
    return (done.stderr.strip().splitlines() or ['failed'])[-1][:100]


def raw_foldcomp(path):
    "The file as it is, given to foldcomp in a process of its own: 'works' or what it says."
    import subprocess
    code = ("import sys, gzip, bz2, lzma, foldcomp\n"
            "f = {'gz': gzip.open, 'bz2': bz2.open, 'xz': lzma.open}.get(sys.argv[1].rsplit('.', 1)[1], open)\n"
            "foldcomp.decompress(foldcomp.compress('x', f(sys.argv[1], 'rt').read()))")
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, str(path)], capture_output=True, text=True,
                          timeout=300)
    return 'works' if done.returncode == 0 else words(done)


def accuracy(args):
    torch.set_num_threads(args.threads)
    rows, seen = [], set()
    for path in structures(args.structures):
        name = path.name.split('.')[0].removesuffix('_protein')
        if name.lower() in seen: continue
        seen.add(name.lower())
        row = one_structure(path, name, args.fit_steps)
        if installed('foldcomp'):
            row['longest segment']['foldcomp'], row['foldcomp, file as it is'] = isolated(path), raw_foldcomp(path)
        show = lambda v: f'{10*v["backbone"]:.3f}/{10*v["heavy"]:.3f}'
        print(f'{row["name"]:<22} {row["residues"]:5d} residues {row["segments"]:2d} segments  '
              + '  '.join(f'{k} {show(row[k])}' for k in ('default', 'fitted default', 'torsions', 'fitted torsions')),
              row['longest segment'], row.get('foldcomp, file as it is'), flush=True)
        rows.append(row)
    from foldbook.base import provenance, write_json
    command = f'python benchmarks/tree.py --accuracy data/tree.json --fit-steps {args.fit_steps}'
    made = dict(command=command + ' --structures DIR'*bool(args.structures), units='nm') | provenance()
    write_json(args.accuracy, dict(made=made, structures=rows))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--frames', type=int, default=64)
    parser.add_argument('--residues', type=int, default=187)
    parser.add_argument('--threads', type=int, default=1, help='more than one only on an idle machine: threads that '
                        'wait for a busy core cost more than they bring')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--accuracy', help='json file to write')
    parser.add_argument('--structures', help='folder with more PDB files')
    parser.add_argument('--fit-steps', type=int, default=100)
    args = parser.parse_args()
    (accuracy if args.accuracy else speed)(args)
