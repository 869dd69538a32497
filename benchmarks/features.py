"Frames a second: features streamed in chunks and checked, against mdtraj with the whole file in memory."
import tempfile
import time
from pathlib import Path

import mdtraj as md
import numpy as np

from foldbook.data import fetch
from foldbook.structures import ca_atoms, load_native, native_contacts
from foldbook.features import default, heavy_distances, model_contacts, stream


def plain_default(path, native, pairs):
    "The default columns, written out with mdtraj."
    t = md.load(str(path), top=native.topology)
    d0, d = (md.compute_distances(x, pairs, periodic=False) for x in (native, t))
    soft = np.exp(-0.5*(np.maximum(d - d0, 0)/0.1)**2)
    ends = md.compute_distances(t, [[0, native.n_atoms - 1]], periodic=False)
    return np.c_[(d < 1.2*d0).mean(1), md.rmsd(t, native, parallel=False), md.compute_rg(t), ends, soft, d]


def plain_heavy(path, native, pairs):
    "Closest heavy atoms of all native contacts by mdtraj, the whole file at once."
    return md.compute_contacts(md.load(str(path), top=native.topology), pairs, scheme='closest-heavy',
                               periodic=False)[0]


def peptide(folder, n_frames=5000, n_residues=40):
    "An all-atom helix that shakes."
    import Bio.PDB
    import PeptideBuilder
    s = PeptideBuilder.make_structure('AELKIFQWRD'*(n_residues//10), [-57]*n_residues, [-47]*(n_residues - 1))
    out = Bio.PDB.PDBIO()
    out.set_structure(s)
    out.save(str(folder/'native.pdb'))
    native = load_native(folder/'native.pdb')
    noise = np.random.default_rng(0).normal(0, 0.03, (n_frames, native.n_atoms, 3)).astype(np.float32)
    md.Trajectory(native.xyz + noise, native.topology).save_xtc(str(folder/'peptide.xtc'))
    return native


def compare(what, ours, theirs, repeats=7):
    "Best time of each, taken in turns, so that a busy machine hits both."
    times = {ours: [], theirs: []}
    for _ in range(repeats):
        for task in times:
            start = time.perf_counter()
            result = task()
            times[task].append(time.perf_counter() - start)
    a, b = (min(t) for t in times.values())
    np.testing.assert_allclose(ours(), theirs(), atol=1e-4)
    n, columns = result.shape
    print(f'{what}: {columns} columns, streamed {n/a:,.0f} frames/s, mdtraj at once {n/b:,.0f} frames/s, ratio of '
          f'times {a/b:.2f}')


if __name__ == '__main__':
    villin = fetch('villin_go')
    native, pairs, path = load_native(villin.topology), model_contacts(villin.topology), villin.trajectories[0]
    assert len(ca_atoms(native.topology)) == native.n_atoms
    f = default(native, pairs)
    compare('default, 35 beads', lambda: stream(path, native, f, progress=False)[0][0],
            lambda: plain_default(path, native, pairs))
    with tempfile.TemporaryDirectory() as folder:
        native = peptide(Path(folder))
        path, pairs, g = Path(folder)/'peptide.xtc', native_contacts(native), heavy_distances(native)
        compare(f'heavy distances, {native.n_atoms} atoms', lambda: stream(path, native, g, progress=False)[0][0],
                lambda: plain_heavy(path, native, pairs), repeats=3)
